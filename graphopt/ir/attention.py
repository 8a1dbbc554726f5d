"""Attention sites: found in any spelling, rewritten to ``graphopt::attention``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from graphopt import ops as _ops  # noqa: F401  registers graphopt::attention
from graphopt.ir.index_expr import Evaluator
from graphopt.ir.masks import MaskForm, UnknownMaskError, read_mask
from graphopt.ir.match import argument, float_of, op_name, shape_of, size_expr, value_of
from graphopt.ir.sizes import size_argument


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``node`` [B, Hq, Sq, Dv], ``key`` and ``value`` [B, Hkv, Skv, D].

    ``form`` is how the model spells it: sdpa, eager, or op (already rewritten).
    ``offset`` is the key position of query row 0; ``hides_finitely`` as in `MaskForm`;
    ``unsupported`` says why the graphopt op could not compute exactly this, or is None.
    """

    index: int
    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    form: str
    pattern: str = "full"
    window: int = 0
    offset: Any = sympy.S.Zero
    key_mask: fx.Node | None = None
    mask: fx.Node | None = None
    scale: Any = None
    softcap: float = 0.0
    hides_finitely: bool = False
    repeats_heads: bool = False
    unsupported: str | None = None

    @property
    def num_heads(self) -> int:
        """Return the number of query heads."""
        return int((shape_of(self.query) or ())[1])

    @property
    def num_kv_heads(self) -> int:
        """Return the number of key and value heads."""
        return int((shape_of(self.key) or ())[1])

    @property
    def head_dim(self) -> int:
        """Return the channels of a query head."""
        return int((shape_of(self.query) or ())[-1])

    @property
    def query_len(self) -> Any:
        """Return the number of query rows, int or SymInt."""
        return (shape_of(self.query) or ())[2]

    @property
    def kv_len(self) -> Any:
        """Return the number of keys, int or SymInt."""
        return (shape_of(self.key) or ())[2]

    @property
    def itemsize(self) -> int:
        """Return the bytes of one element of the query."""
        return int(value_of(self.query).dtype.itemsize)


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """Return the attention sites of ``gm`` in graph order, numbered from 0."""
    from graphopt.ir.eager import match_eager

    evaluator = Evaluator(gm.graph)
    sites: list[AttentionSite] = []
    for node in gm.graph.nodes:
        site = None
        name = op_name(node)
        if name == "sdpa":
            site = _match_sdpa(node, evaluator)
        elif name == "graphopt.attention":
            site = _match_op(node)
        elif name == "softmax":
            site = match_eager(node, evaluator)
        if site is not None:
            sites.append(replace(site, index=len(sites)))
    return sites


def _match_sdpa(node: fx.Node, evaluator: Evaluator) -> AttentionSite | None:
    query, key, value = (
        argument(node, i, n) for i, n in enumerate(("query", "key", "value"))
    )
    if any(len(shape_of(t) or ()) != 4 for t in (query, key, value)):
        return None
    if not all(isinstance((shape_of(t) or ())[1], int) for t in (query, key, value)):
        return None
    key, value, repeated = undo_repeats(query, key, value)
    mask = argument(node, 3, "attn_mask")
    site = AttentionSite(0, node, query, key, value, "sdpa", repeats_heads=repeated)
    site = replace(site, mask=mask, scale=node.kwargs.get("scale"))
    if float_of(argument(node, 4, "dropout_p", 0.0)) != 0.0:
        return replace(site, unsupported="dropout")
    if argument(node, 5, "is_causal", False):
        return replace(site, pattern="causal")
    return with_mask(site, mask, evaluator)


def with_mask(
    site: AttentionSite, mask: fx.Node | None, evaluator: Evaluator
) -> AttentionSite:
    """Return ``site`` with what ``mask`` means, or with the reason why not."""
    if mask is None:
        return site
    site = replace(site, mask=mask)
    try:
        form = read_mask(mask, evaluator)
    except UnknownMaskError as error:
        return replace(site, unsupported=str(error))
    return _with_form(site, form)


def _with_form(site: AttentionSite, form: MaskForm) -> AttentionSite:
    site = replace(site, pattern=form.pattern, window=form.window, offset=form.offset)
    site = replace(site, hides_finitely=form.finite)
    if form.key_mask is None:
        return site
    wanted = tuple(size_expr(s) for s in ((shape_of(site.query) or ())[0], site.kv_len))
    sizes = tuple(size_expr(s) for s in shape_of(form.key_mask) or ())
    if sizes[1] != wanted[1] or sizes[0] not in (wanted[0], 1):
        return replace(site, unsupported=f"a key mask of sizes {sizes}")
    return replace(site, key_mask=form.key_mask)


def undo_repeats(
    query: fx.Node, key: fx.Node, value: fx.Node
) -> tuple[fx.Node, fx.Node, bool]:
    """Return key and value before their heads were repeated for grouped queries."""
    plain_key, plain_value = _before_repeat(key), _before_repeat(value)
    if plain_key is None or plain_value is None:
        return key, value, False
    if (shape_of(plain_key) or ())[1] != (shape_of(plain_value) or ())[1]:
        return key, value, False
    return plain_key, plain_value, True


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """Match reshape(expand(x[:, :, None], [B, H, G, S, D]), [B, H*G, S, D]) or
    repeat_interleave(x, G, dim=1); head h then reads KV head h // G."""
    if op_name(node) == "repeat_interleave":
        source = node.args[0]
        on_heads = argument(node, 2, "dim") in (1, -3)
        return source if on_heads and isinstance(source, fx.Node) else None
    if op_name(node) not in ("reshape", "flatten"):
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or op_name(expanded) != "expand":
        return None
    widened = expanded.args[0]
    if not isinstance(widened, fx.Node) or len(shape_of(expanded) or ()) != 5:
        return None
    source = widened.args[0]
    if op_name(widened) not in ("getitem", "unsqueeze") or not isinstance(
        source, fx.Node
    ):
        return None
    return source if _is_repeat(source, widened, expanded, node) else None


def _is_repeat(
    source: fx.Node, widened: fx.Node, expanded: fx.Node, result: fx.Node
) -> bool:
    s, w, e, r = (
        [size_expr(x) for x in shape_of(n) or ()]
        for n in (source, widened, expanded, result)
    )
    if len(s) != 4 or len(r) != 4:
        return False
    return (
        w == [s[0], s[1], 1, s[2], s[3]]
        and e == [s[0], s[1], e[2], s[2], s[3]]
        and r == [s[0], s[1] * e[2], s[2], s[3]]
    )


def _match_op(node: fx.Node) -> AttentionSite:
    names = ("query", "key", "value", "key_mask", "pattern", "sink", "window")
    query, key, value, key_mask, pattern, _, window = (
        argument(node, i, name) for i, name in enumerate(names)
    )
    offset = size_expr(argument(node, 7, "query_offset"))
    site = AttentionSite(0, node, query, key, value, "op", pattern, max(window), offset)
    return replace(
        site,
        key_mask=key_mask,
        scale=argument(node, 8, "scale"),
        softcap=float_of(argument(node, 9, "softcap", 0.0)) or 0.0,
    )


def replace_site(
    gm: fx.GraphModule,
    site: AttentionSite,
    *,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    min_tokens: int = 0,
) -> fx.Node:
    """Put ``graphopt::attention`` in the place of ``site`` and return its node.

    What only the old form needed (mask, repeated heads) is left without users.
    """
    graph = gm.graph
    with graph.inserting_before(site.node):
        offset = size_argument(graph, site.offset, [site.key, site.query])
        args: tuple[Any, ...] = (site.query, site.key, site.value)
        args += (_key_mask(graph, site), pattern)
        args += (
            list(sink),
            list(window),
            offset,
            _scale(site),
            site.softcap,
            min_tokens,
        )
        node = graph.call_function(torch.ops.graphopt.attention.default, args)
    node.meta = {k: v for k, v in site.node.meta.items() if k != "example_value"}
    values = fx.map_arg(args, lambda n: n.meta["example_value"])
    query = value_of(site.query)
    with query.fake_mode:
        result = torch.ops.graphopt.attention.default(*values)
    before = value_of(site.node)
    node.meta["example_value"] = result
    if result.dtype != before.dtype or result.shape != before.shape:
        raise ValueError(
            f"{site.node.name}: {before.shape} would become {result.shape}"
        )
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)
    return node


def _key_mask(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """A mask of one row holds for every batch row; the op wants [B, Skv]."""
    mask = site.key_mask
    if mask is None:
        return None
    batch = (shape_of(site.query) or ())[0]
    if size_expr((shape_of(mask) or ())[0]) == size_expr(batch):
        return mask
    rows = size_argument(graph, size_expr(batch), [site.query])
    node = graph.call_method("expand", (mask, rows, -1))
    node.meta["example_value"] = value_of(mask).expand(batch, -1)
    return node


def _scale(site: AttentionSite) -> Any:
    known = float_of(site.scale)
    return site.scale if known is None else known
