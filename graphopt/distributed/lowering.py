"""Each operator on DTensors as what this rank does: local operators and collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor

from graphopt import _compat
from graphopt.distributed.rules import RULES
from graphopt.errors import PassError
from graphopt.ir.constants import is_parameter
from graphopt.ir.match import op_name, value_of
from graphopt.ir.sizes.fake_runs import apply


class Lowering:
    """Rewrites the DTensors of one graph; PassError where it cannot.

    The common operators have rules, which keep their spelling for matchers; any other
    is traced with the DTensors that it takes, down to what they do on this rank.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.held: dict[fx.Node, DTensor] = {
            node: value
            for node in gm.graph.nodes
            if isinstance(value := value_of(node), DTensor)
        }

    def run(self) -> None:
        """Lower every operator that takes or gives a DTensor, in graph order."""
        output = self.graph.find_nodes(op="output")[0]
        if any(node in self.held for node in output.all_input_nodes):
            raise PassError("the graph returns DTensors")
        todo = [n for n in self.graph.nodes if n.op != "output" and self._touches(n)]
        for node in todo:
            if node.op == "placeholder":
                node.meta["example_value"] = self._part(node)
                continue
            with self.graph.inserting_before(node):
                new = self._lowered(node)
            if node in self.held:
                self.held[new] = self.held[node]
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _part(self, node: fx.Node) -> torch.Tensor:
        """Return this rank's part of an input; of a parameter it is one."""
        whole = self.held[node]
        part = _compat.local_part(whole)
        if not is_parameter(node):
            return part
        return torch.nn.Parameter(part, requires_grad=whole.requires_grad)

    def _touches(self, node: fx.Node) -> bool:
        return node in self.held or any(n in self.held for n in node.all_input_nodes)

    def _lowered(self, node: fx.Node) -> fx.Node:
        rule = RULES.get(op_name(node))
        found = rule(self, node) if rule is not None else None
        return found if found is not None else self._traced(node)

    def placements(self, node: Any) -> tuple[Any, ...] | None:
        """Return how a value is spread over a mesh of one axis; None of others."""
        if node not in self.held:
            return None
        spec = self.held[node]._spec
        return tuple(spec.placements) if spec.mesh.ndim == 1 else None

    def _traced(self, node: fx.Node) -> fx.Node:
        """Insert the local operators that ``node`` comes down to."""
        from torch.fx.experimental.proxy_tensor import make_fx

        sources = node.all_input_nodes
        mode: Any = _compat.fake_mode_of(self.gm)

        def local(*parts: Any) -> Any:
            values = dict(zip(sources, map(self._whole, sources, parts), strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            return _compat.local_part(apply(node, args, kwargs))

        examples = [self._example(source) for source in sources]
        with mode, torch.no_grad():
            traced = make_fx(local)(*examples)
        return self._inline(traced, sources)

    def _whole(self, source: fx.Node, part: Any) -> Any:
        """Return what ``node`` takes: the DTensor of this rank's part."""
        if source in self.held:
            return DTensor(part, self.held[source]._spec, requires_grad=False)
        return getattr(value_of(source), "real_obj", part)  # such as a mesh

    def _example(self, source: fx.Node) -> Any:
        if source in self.held:
            return _compat.local_part(self.held[source])
        return getattr(value_of(source), "real_obj", value_of(source))

    def _inline(self, traced: fx.GraphModule, sources: list[fx.Node]) -> fx.Node:
        mapping: dict[fx.Node, fx.Node] = dict(
            zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True)
        )
        for node in traced.graph.nodes:
            if node.op == "output":
                result: Any = node.args[0]
                return mapping[result]
            if node.op == "get_attr":
                raise PassError(f"{node.name} is a constant tensor")
            if node.op != "placeholder":
                mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
                mapping[node].meta = {"example_value": node.meta.get("val")}
        raise AssertionError("a graph has an output")
