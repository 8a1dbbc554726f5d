"""Writes of keys and values into buffers, and what a graph hands back to its caller."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir.casts import skip_casts
from graphopt.ir.match import argument, op_name, shape_of

_TOKEN_AXIS = 2  # of [B, Hkv, S, D]
# Where each in-place operator has the tensor that it writes.
_SOURCES = {"index_copy_": 3, "setitem": 2, "copy_": 1}


class Writes:
    """The in-place writes along the tokens of 4-d tensors, and the outputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._sources: dict[fx.Node, fx.Node] = {}  # the last one, by what is written
        self._buffers: dict[fx.Node, fx.Node] = {}  # by what was written into them
        self._outputs: set[fx.Node] = set()
        for node in graph.nodes:
            place = _SOURCES.get(op_name(node))
            if node.op == "output":
                self._outputs.update(node.all_input_nodes)
            elif place is not None and len(node.args) > place and _along_tokens(node):
                self._record(node.args[0], node.args[place])

    def _record(self, target: Any, source: Any) -> None:
        if isinstance(target, fx.Node) and isinstance(source, fx.Node):
            buffer = whole(target)
            self._sources[buffer] = source
            self._buffers[whole(source)] = buffer

    def into(self, buffer: fx.Node) -> fx.Node | None:
        """Return the new tokens that were written into ``buffer``, or None.

        A full window is written as a whole: its rolled copy holds the new tokens.
        """
        source = self._sources.get(buffer)
        while source is not None:
            inner = self._sources.get(whole(source))
            parts = concatenated(whole(source))
            if inner is None and parts is None:
                break
            source = inner if parts is None else parts[1]
        return source

    def kept(self, node: fx.Node) -> fx.Node | None:
        """Return where a later call finds ``node`` or its last tokens, or None.

        An output of the graph, or a buffer that came in or goes out.
        """
        slices = [u for u in node.users if is_token_slice(u)]
        found = next((n for n in (node, *slices) if n in self._outputs), None)
        buffer = self._buffers.get(node)
        if found is None and buffer is not None and self.outlives(buffer):
            return buffer
        return found

    def outlives(self, buffer: fx.Node) -> bool:
        """Tell whether ``buffer`` is the caller's, before or after the call."""
        return buffer.op in ("placeholder", "get_attr") or buffer in self._outputs


def whole(node: fx.Node) -> fx.Node:
    """Return the tensor of whose tokens ``node`` is a slice or a changed dtype."""
    while True:
        node = skip_casts(node)
        source = node.args[0] if node.args else None
        viewed = is_token_slice(node) or op_name(node) in _SOURCES
        if not viewed or not isinstance(source, fx.Node):
            return node
        node = source


def concatenated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return (past, new) of a cat of two tensors along the tokens, or None."""
    items, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if op_name(node) != "cat" or axis not in (_TOKEN_AXIS, _TOKEN_AXIS - 4):
        return None
    if not isinstance(items, (list, tuple)) or len(items) != 2:
        return None
    return (items[0], items[1]) if len(shape_of(items[1]) or ()) == 4 else None


def is_token_slice(node: fx.Node) -> bool:
    """Tell whether ``node`` is x[:, :, a:b] of a 4-d tensor."""
    index = argument(node, 1, "index")
    sliced = op_name(node) == "getitem" and _is_token_index(index)
    return sliced and isinstance(index[_TOKEN_AXIS], slice)


def _is_token_index(index: Any) -> bool:
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        return False
    others = [i for axis, i in enumerate(index) if axis != _TOKEN_AXIS]
    return all(i == slice(None) for i in others) and index[_TOKEN_AXIS] is not None


def _along_tokens(write: fx.Node) -> bool:
    """Tell whether ``write`` replaces whole tokens of a 4-d tensor."""
    if len(shape_of(write.args[0]) or ()) != 4:
        return False
    name = op_name(write)
    if name == "index_copy_":
        return write.args[1] in (_TOKEN_AXIS, _TOKEN_AXIS - 4)
    return name == "copy_" or _is_token_index(write.args[1])
