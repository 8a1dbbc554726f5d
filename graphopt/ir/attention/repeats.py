"""Key and value heads that a model repeats for grouped queries."""

from __future__ import annotations

from torch import fx

from graphopt.ir.match import argument, op_name, shape_of, size_expr


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
        source, repeats = node.args[0], argument(node, 1, "repeats")
        on_heads = argument(node, 2, "dim") in (1, -3) and isinstance(repeats, int)
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
