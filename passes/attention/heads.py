"""Which pattern each query head of each layer gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Pattern = Literal["a-shape", "streaming", "sliding-window", "dense"]
Index = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0)]

# A window that no prompt reaches: such a head sees every earlier key.
UNBOUNDED = 2**31 - 1
STREAMING_BLOCK = 64


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

    def covers(self, layer: int, head: int) -> bool:
        """Tell whether the row speaks of this head."""
        in_layer = self.layers is None or layer in self.layers
        return in_layer and (self.heads is None or head in self.heads)


@dataclass(frozen=True)
class HeadPattern:
    """The pattern of one query head; ``sink`` and ``window`` in tokens."""

    pattern: Pattern
    sink: int
    window: int

    def overridden(self, rule: HeadRule) -> HeadPattern:
        """Return this pattern with what ``rule`` gives."""
        return HeadPattern(
            rule.pattern or self.pattern,
            self.sink if rule.sink is None else rule.sink,
            self.window if rule.window is None else rule.window,
        )

    def canonical(self) -> tuple[str, int, int]:
        """Return (kernel pattern, sink, window): all but streaming are an A-shape."""
        if self.pattern == "dense":
            return "a-shape", 0, UNBOUNDED
        if self.pattern == "sliding-window":
            return "a-shape", 0, self.window
        return self.pattern, self.sink, self.window


@dataclass(frozen=True)
class LayerPattern:
    """One kernel call: a pattern with one sink and window for all heads or per head."""

    pattern: str
    sink: tuple[int, ...]
    window: tuple[int, ...]


def layer_pattern(heads: Sequence[HeadPattern]) -> LayerPattern | None:
    """Join the heads of a layer into one launch, or None when all heads are dense.

    Raises ValueError when streaming heads stand beside A-shape heads that are not
    dense: the two round their windows differently and have no common predicate.
    """
    if all(h.pattern == "dense" for h in heads):
        return None
    forms = [h.canonical() for h in heads]
    names = {
        name for name, _, window in forms if window != UNBOUNDED or name == "streaming"
    }
    if len(names) > 1:
        raise ValueError("streaming and a-shape heads in one layer")
    pattern = names.pop()
    wide = UNBOUNDED // STREAMING_BLOCK * STREAMING_BLOCK
    rows = [
        (sink, min(window, wide) if pattern == "streaming" else window)
        for _, sink, window in forms
    ]
    if len(set(rows)) == 1:
        rows = rows[:1]
    if pattern == "a-shape" and all(sink == 0 for sink, _ in rows):
        pattern = "sliding-window"
    return LayerPattern(pattern, tuple(r[0] for r in rows), tuple(r[1] for r in rows))
