"""What a pass is: a frozen dataclass whose fields are its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt.remarks import Remark

if TYPE_CHECKING:
    from graphopt.ir.model_graph import ModelGraph


# What a pass ranks, sums or measures to choose; a rank has a part of it only.
Selects = Literal["nothing", "heads", "neurons", "weights", "durations"]


def option(default: Any, help: str, unit: str = "") -> Any:
    """Declare an option: its default, what it means, and its unit if it has one."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the graph.

    ``device`` is the type on which the graph will run (``cpu``, ``cuda``).
    """

    device: str = "cpu"


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether it edited the graph, its remarks, its counts."""

    changed: bool
    remarks: tuple[Remark, ...] = ()
    statistics: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A rewrite of a `ModelGraph`.

    Subclasses set ``name`` (kebab-case), ``source`` (the paper), ``exact`` (same
    results up to rounding, so training works) and implement `run`. They keep no state.
    ``never_after`` names passes behind which this one cannot work, and why: a config
    that has them in that order is refused.

    ``selects_over``: what a choice is made over that tensor parallelism shares out, as
    a mean over heads. Such a pass runs in one process only, unless ``asks_ranks``: it
    adds the sums over ranks that its choices need (`graphopt.ir.shards`).
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    never_after: ClassVar[Mapping[str, str]] = {}

    @property
    def selects_over(self) -> Selects:
        """Return over what the pass chooses with these options."""
        return "nothing"

    @property
    def asks_ranks(self) -> bool:
        """Tell whether the pass itself brings in what other ranks have of it."""
        return False

    force: bool = option(False, "rewrite even where the prediction says it is slower")
    expect: int | None = option(
        None, "number of rewritten sites; any other number is an error", "sites"
    )

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Edit ``model`` and say what was done at every site considered."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")

    def cache_options(self) -> dict[str, Any] | None:
        """Return how to make the `graphopt.Cache` the pass works on; None for none."""
        return None

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, in declared order."""
        result = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != _default(item):
                result[item.name] = value
        return result


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default
