"""One captured graph of a staged model, in parts, and what its stages exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from graphopt._compat import local_part
from graphopt.errors import ModelError
from graphopt.integrations.pipelining.caches import give_up
from graphopt.integrations.pipelining.cut import Part
from graphopt.integrations.pipelining.sizes import Sizes, TensorLike

Compiled = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Probe:
    """What a call exchanges: ``received`` of each stage, and the last one's result."""

    received: tuple[tuple[TensorLike, ...], ...]
    result: TensorLike


@dataclass(frozen=True)
class Program:
    """``parts`` of a graph by stage, and ``run``, the code of this process's own."""

    parts: list[Part]
    run: dict[int, Compiled]
    sizes: Sizes
    result: fx.Node
    parameters: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, gm: fx.GraphModule, parts: list[Part], run: dict[int, Compiled]
    ) -> Program:
        """Put a graph's parts and their code together."""
        return cls(parts, run, Sizes(gm), _result(gm, parts))

    @property
    def reads(self) -> set[int]:
        """Return the places of the arguments that this process's stages read."""
        return {place for stage in self.run for place in self.parts[stage].inputs}

    def note(self, arguments: Sequence[Any]) -> None:
        """Remember the parameters among the arguments of a first call."""
        if not self.parameters:
            found = enumerate(arguments)
            self.parameters.update({i: x for i, x in found if _is_parameter(x)})

    def probe(self, arguments: Sequence[Any]) -> Probe:
        """Return the sizes of what stages exchange in a call."""
        like = self.sizes.of(arguments)
        received = (map(like, part.received) for part in self.parts)
        return Probe(tuple(map(tuple, received)), like(self.result))


def _result(gm: fx.GraphModule, parts: list[Part]) -> fx.Node:
    """Return what the last stage alone computes: the logits."""
    given: Any = gm.graph.output_node().args[0]
    flat = given if isinstance(given, (tuple, list)) else [given]
    apart = zip(flat, parts[0].results, parts[-1].results, strict=True)
    for node, first, last in apart:
        if last is not None and first is None and isinstance(node, fx.Node):
            return node
    raise ModelError(
        "pipelining: the model returns nothing that its last stage computes"
    )


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


def release(programs: Iterable[Program]) -> int:
    """Free the weights that no stage of this process reads; return the bytes."""
    known = [(p.reads, i, x) for p in programs for i, x in p.parameters.items()]
    read = [local_part(x) for reads, place, x in known if place in reads]
    kept = {x.untyped_storage().data_ptr() for x in read}
    found = [local_part(x) for _, _, x in known]
    return give_up([x for x in found if x.untyped_storage().data_ptr() not in kept])
