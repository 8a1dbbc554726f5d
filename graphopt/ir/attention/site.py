"""Attention sites: found in any spelling, rewritten to ``graphopt::attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from graphopt import ops as _ops  # noqa: F401  registers graphopt::attention
from graphopt.ir.masks.index_expr import Evaluator
from graphopt.ir.masks.read import MaskForm, UnknownMaskError, read_mask
from graphopt.ir.match import (
    at_least_zero,
    op_name,
    same_size,
    shape_of,
    size_expr,
    sizes_of,
    value_of,
)


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``node`` [B, Hq, Sq, Dv], ``key`` and ``value`` [B, Hkv, Skv, D].

    ``form`` is how the model spells it: sdpa, eager, or op (already rewritten).
    ``offset`` is the key position of query row 0; ``key_mask`` (bool [B|1, >= Skv]),
    ``key_start`` (its column of key 0) and ``hides_finitely`` are as in `MaskForm`;
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
    key_start: Any = sympy.S.Zero
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


Matcher = Callable[[fx.Node], "AttentionSite | None"]
# What integrations know: how other engines spell attention, by the operator's name.
_matchers: dict[str, Matcher] = {}


def register_matcher(name: str) -> Callable[[Matcher], Matcher]:
    """Let `find_attention` read operators of ``name`` by the function decorated."""

    def register(matcher: Matcher) -> Matcher:
        _matchers[name] = matcher
        return matcher

    return register


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """Return the attention sites of ``gm`` in graph order, numbered from 0."""
    from graphopt.ir.attention.eager import match_eager
    from graphopt.ir.attention.fused import match_op, match_sdpa, match_visit
    from graphopt.ir.attention.pages import match_pages, match_places

    evaluator = Evaluator(gm.graph)
    sites: list[AttentionSite] = []
    for node in gm.graph.nodes:
        site = None
        name = op_name(node)
        if name == "sdpa":
            site = match_sdpa(node, evaluator)
        elif name == "graphopt.attention":
            site = match_op(node)
        elif name == "graphopt.visit_attention":
            site = match_visit(node)
        elif name == "graphopt.page_attention":
            site = match_pages(node)
        elif name == "graphopt.place_attention":
            site = match_places(node)
        elif name == "softmax":
            site = match_eager(node, evaluator)
        elif name in _matchers:
            site = _matchers[name](node)
        if site is not None:
            sites.append(replace(site, index=len(sites)))
    return sites


def checked(site: AttentionSite) -> AttentionSite:
    """Return ``site``, refused where its tensors only fit together by broadcasting."""
    if site.unsupported:
        return site
    tensors = (site.query, site.key, site.value, site.node)
    query, key, value, result = (sizes_of(t) for t in tensors)
    # Both sides of: batch and heads of key and value; result; query, what the others
    # have of it. That key and value are equally long the product itself demands; in a
    # cache each has a symbol of its own.
    left = (*key[:2], *result, query[0], query[-1])
    right = (*value[:2], *query[:3], value[-1], key[0], key[-1])
    if not all(map(same_size, left, right)) or query[1] % key[1]:
        return replace(site, unsupported=f"tensors of sizes {query}, {key}, {value}")
    dtypes = {value_of(t).dtype for t in tensors}
    if len(dtypes) > 1:
        return replace(site, unsupported="query, key and value differ in dtype")
    return site


def unwritten(
    site: AttentionSite, evaluator: Evaluator, reads: Sequence[tuple[fx.Node, fx.Node]]
) -> AttentionSite:
    """Return ``site``, refused where a tensor is written after the model read it.

    ``reads`` are pairs (tensor, node that reads it); the op reads at ``site.node``.
    """
    for tensor, reader in reads:
        if evaluator.aliases.is_written(tensor, after=reader, before=site.node):
            return replace(site, unsupported=f"{tensor.name} is written in place")
    return site


def with_mask(
    site: AttentionSite, mask: fx.Node | None, evaluator: Evaluator
) -> AttentionSite:
    """Return ``site`` with what ``mask`` means, or with the reason why not."""
    if mask is None:
        return site
    site = replace(site, mask=mask)
    try:
        one_query = size_expr(site.query_len) == 1
        form = read_mask(mask, evaluator, one_query=one_query)
    except UnknownMaskError as error:
        return replace(site, unsupported=str(error))
    return _with_form(site, form)


def every_row_sees_a_key(site: AttentionSite) -> bool:
    """Tell whether the pattern by itself shows each query some key."""
    if site.pattern == "full":
        return True
    if not site.window:
        return at_least_zero(site.offset)
    beyond = size_expr(site.kv_len) - size_expr(site.query_len) - site.offset
    return at_least_zero(site.offset) and at_least_zero(beyond + site.window - 1)


def _with_form(site: AttentionSite, form: MaskForm) -> AttentionSite:
    site = replace(site, pattern=form.pattern, window=form.window, offset=form.offset)
    site = replace(site, hides_finitely=form.finite)
    if form.finite and not every_row_sees_a_key(site):
        return replace(site, unsupported="rows that see no key average all values")
    if form.key_mask is None:
        return site
    rows, batch = sizes_of(form.key_mask)[0], sizes_of(site.query)[0]
    if rows not in (batch, 1):
        return replace(site, unsupported=f"a key mask of {rows} rows for {batch}")
    return replace(site, key_mask=form.key_mask, key_start=form.key_start)
