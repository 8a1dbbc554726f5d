"""Which pattern each query head of each layer gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from graphopt.codegen.predicates import BLOCK
from graphopt.ops.block_kinds import SPARSE_BLOCK, STRIDED_BLOCK

Pattern = Literal[
    "a-shape",
    "streaming",
    "sliding-window",
    "tri-shape",
    "vertical-slash",
    "block-sparse",
    "antidiagonal",
    "dense",
]
Index = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0)]
Stride = Literal[4, 8, 16]
Share = Annotated[float, Field(gt=0, le=1)]

# A window that no prompt reaches: such a head sees every earlier key.
UNBOUNDED = 2**31 - 1

# What a pattern takes where the config gives no sink or window, in tokens.
_SINK = {"vertical-slash": 30, "sliding-window": 0, "dense": 0}
_WINDOW = {"vertical-slash": 100, "dense": UNBOUNDED}
_BLOCK_PATTERNS = ("block-sparse", "antidiagonal")


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """One row of a heads table; later rows win.

    ``layers`` and ``heads`` are zero-based; left out, the row holds for all.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    layers: list[Index] | None = None
    heads: list[Index] | None = None
    pattern: Pattern | None = None
    sink: Tokens | None = None
    window: Width | None = None
    vertical: Tokens | None = None
    slash: Tokens | None = None
    last: Tokens | None = None
    blocks: Width | None = None
    stride: Stride | None = None
    threshold: Share | None = None

    def covers(self, layer: int, head: int) -> bool:
        """Tell whether the row speaks of this head."""
        in_layer = self.layers is None or layer in self.layers
        return in_layer and (self.heads is None or head in self.heads)


@dataclass(frozen=True)
class HeadPattern:
    """The pattern of one query head; sizes in tokens, None for the pattern's own."""

    pattern: Pattern
    sink: int | None = None
    window: int | None = None
    vertical: int = 0
    slash: int = 0
    last: int = 0
    blocks: int = 100
    stride: int = 16
    threshold: float = 0.9

    def overridden(self, rule: HeadRule) -> HeadPattern:
        """Return this pattern with what ``rule`` gives."""

        given = {name: getattr(rule, name) for name in self.__dataclass_fields__}
        return replace(self, **{k: v for k, v in given.items() if v is not None})

    def sizes(self) -> tuple[int, int]:
        """Return (sink, window) as the pattern takes them."""
        if self.pattern == "dense":
            return 0, UNBOUNDED
        sink = 0 if self.pattern == "sliding-window" else self.sink
        return (
            _SINK.get(self.pattern, 128) if sink is None else sink,
            _WINDOW.get(self.pattern, 1024) if self.window is None else self.window,
        )

    @property
    def is_static(self) -> bool:
        """Tell whether a predicate over (query, key) says which keys are seen."""
        return self.pattern not in ("vertical-slash", "tri-shape", *_BLOCK_PATTERNS)

    def row(self) -> VisitRow:
        """Return the pattern in terms of visit lists, blocks of 64 rows alike."""
        if self.pattern == "block-sparse":
            return VisitRow(0, 0, 0, 0, 0, blocks=self.blocks)
        if self.pattern == "antidiagonal":
            return VisitRow(0, 0, 0, 0, 0, stride=self.stride, threshold=self.threshold)
        sink, window = self.sizes()
        if self.pattern == "streaming":
            # Whole blocks back from the block's own: the farthest key is its first.
            window = max(window - BLOCK + 1, 1)
        selects = self.pattern == "vertical-slash"
        return VisitRow(
            sink,
            window,
            self.vertical if selects else 0,
            self.slash if selects else 0,
            self.last if self.pattern == "tri-shape" else 0,
        )


@dataclass(frozen=True, order=True)
class VisitRow:
    """What one head keeps: see `graphopt.ops.selection`; ``last`` rows are dense.

    ``blocks`` and ``stride`` are those of `graphopt.ops.block_selection`, 0 for heads
    without a block list; heads with one have no sink and no window.
    """

    sink: int
    window: int
    vertical: int
    slash: int
    last: int
    blocks: int = 0
    stride: int = 0
    threshold: float = 1.0

    @property
    def has_list(self) -> bool:
        """Tell whether the head visits the blocks of a list."""
        return self.blocks > 0 or self.stride > 0

    def exact_to(self) -> int:
        """Return the prompt length up to which every key is visited, in tokens.

        The first block and a row's own are always visited: two blocks are all.
        """
        if self.stride:
            return UNBOUNDED if self.threshold >= 1.0 else 2 * STRIDED_BLOCK
        return max(self.blocks, 2) * SPARSE_BLOCK if self.blocks else self.window

    def covered(self) -> int:
        """Return how many keys a row visits at least, where so many are there."""
        return self.exact_to() if self.has_list else self.sink + self.window
