"""The body of a chunk loop: a graph for one chunk, built from a whole model's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.loops import LoopResult, LoopState
from graphopt.ir.match import value_of
from graphopt.ir.replace import call
from graphopt.ir.tokens.drop import scale_of

_ops = torch.ops.graphopt
_TOKENS = 2  # the axis of tokens in keys and values


@dataclass(frozen=True)
class Exit:
    """``node`` of the body is read outside, where ``mark`` stands for all tokens."""

    node: fx.Node
    mark: fx.Node
    axis: int


class ChunkBody:
    """Builds the graph; see `ChunkLoop` for what it is called with.

    ``parts`` are tensors of all tokens and what stands for a chunk of each, ``sites``
    what stands for attention, ``mask`` the mask of padding [B, T]; ``chunk`` is how
    many tokens a chunk has.
    """

    def __init__(
        self,
        whole: fx.GraphModule,
        parts: Mapping[fx.Node, fx.Node],
        sites: Mapping[fx.Node, AttentionSite],
        mask: fx.Node | None,
        chunk: int,
    ) -> None:
        self.module = fx.GraphModule({}, fx.Graph())
        self.module.meta = dict(whole.meta)
        self.graph = self.module.graph
        self.sites, self.mask = sites, mask
        self.states: tuple[LoopState, ...] = ()
        self.results: tuple[LoopResult, ...] = ()
        self._mode = _compat.fake_mode_of(whole)
        self._new: dict[fx.Node, fx.Node] = {}
        for whole_part, node in parts.items():
            name = f"chunk_{whole_part.name}"
            self._new[node] = self._input(name, value_of(node))
        self._past = self._input("past", _compat.new_count(self._mode, -chunk))
        self._seen = _compat.new_count(self._mode, 2)

    def build(self, nodes: Sequence[fx.Node], exits: Sequence[Exit]) -> list[fx.Node]:
        """Copy ``nodes``; return what of the whole graph is given to every chunk."""
        states = {node: self._add_states(node) for node in nodes if node in self.sites}
        given = self._given(nodes)
        for node in nodes:
            if node in self.sites:
                self._new[node] = self._attention(node, states[node])
            else:
                self._new[node] = self.graph.node_copy(node, lambda n: self._new[n])
        sources: list[Any] = [s for node in states for s in node.args[1:3]]
        self._finish(exits, {source: i for i, source in enumerate(sources)})
        return given

    def _input(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def _add_states(self, site: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Add inputs for the keys and values up to the chunk's, [B, Hkv, seen, D]."""
        number = len(self.states) // 2
        found = []
        for name, source in zip(("keys", "values"), site.args[1:3], strict=True):
            like = value_of(source)
            batch, heads, _, width = like.shape
            state = LoopState(int(heads), int(width), like.dtype, like.device)
            self.states += (state,)
            with self._mode:
                value = state.empty(batch, self._seen)
            found.append(self._input(f"{name}_{number}", value))
        return found[0], found[1]

    def _given(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Add inputs for what is not of the body, the mask of padding first."""
        inside = {*nodes, *self._new}
        read = [] if self.mask is None else [self.mask]
        read += [s for n in nodes for s in n.all_input_nodes if s not in inside]
        given = list(dict.fromkeys(read))
        for node in given:
            self._new[node] = self._input(node.name, value_of(node))
            self._new[node].meta = dict(node.meta)
            _compat.copy_source(node, self._new[node])
        if self.mask is not None:
            with self._mode:
                value = value_of(self.mask)
                value = value.new_empty((self._seen, value.shape[0])).t()
            self._new[self.mask].meta["example_value"] = value
        return given

    def _attention(self, mark: fx.Node, states: tuple[fx.Node, fx.Node]) -> fx.Node:
        """Write the chunk's keys and values, and attend to all up to its end."""
        graph, site = self.graph, self.sites[mark]
        query, key, value = (self._new[n] for n in mark.args[:3])  # type: ignore[index]
        for new, state in zip((key, value), states, strict=True):
            graph.call_function(_ops.append_rows.default, (new, state, self._past))
        mask = None if self.mask is None else self._new[self.mask]
        pattern = (site.pattern, [0], [site.window])
        rest = (self._past, scale_of(site), site.softcap, 0)
        args = (query, *states, mask, *pattern, *rest)
        node = call(graph, _ops.attention.default, args)
        node.meta = {**mark.meta, "example_value": value_of(node)}
        return node

    def _finish(self, exits: Sequence[Exit], held: Mapping[fx.Node, int]) -> None:
        outputs: list[fx.Node] = []
        for found in exits:
            if found.node in held and found.axis == _TOKENS:
                result = LoopResult(held[found.node], found.axis, state=True)
            else:
                result = LoopResult(len(outputs), found.axis)
                outputs.append(self._new[found.node])
            self.results += (result,)
        if not outputs:
            raise PassError("nothing but keys and values leaves the layers")
        output = self.graph.output(tuple(outputs))
        output.meta["example_value"] = tuple(value_of(n) for n in outputs)
        self.module.recompile()
