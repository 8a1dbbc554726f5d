"""One call of a chunk loop: what each chunk gets, and what comes of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from graphopt.ir.loops import ChunkLoop


class LoopCall:
    """The tensors of one call; chunks may run in any order that keeps their needs.

    ``pasts`` has the number of tokens before each chunk, negative for the one of a
    prompt that is shorter.
    """

    def __init__(self, loop: ChunkLoop, given: tuple[Any, ...]) -> None:
        self.chunk, self._axes, self._wanted = loop.chunk, loop.axes, loop.results
        self._parts = given[: len(self._axes)]
        rest = list(given[len(self._axes) :])
        self.batch = self._parts[0].shape[0]
        self.tokens = self._parts[0].shape[self._axes[0]]
        starts = range(0, self.tokens, self.chunk)
        self.pasts = [min(start, self.tokens - self.chunk) for start in starts]
        self._states = [s.empty(self.batch, self.tokens) for s in loop.states]
        self._mask = rest.pop(0).t().contiguous() if loop.masked else None
        self._rest = rest
        self._joined: dict[int, Tensor] = {}

    @property
    def overlaps(self) -> bool:
        """Tell whether the last chunk takes tokens of the one before again."""
        return len(self.pasts) > 1 and self.tokens % self.chunk != 0

    def arguments(self, index: int) -> tuple[Any, ...]:
        """Return what the body takes for chunk ``index``."""
        past = self.pasts[index]
        seen = past + self.chunk
        chunks = [
            take_chunk(x, past, self.chunk, axis)
            for x, axis in zip(self._parts, self._axes, strict=True)
        ]
        rows = [state.narrow(2, 0, seen) for state in self._states]
        shown = [] if self._mask is None else [self._mask[:seen].t()]
        return (*chunks, past, *rows, *shown, *self._rest)

    def keep(self, index: int, outputs: Any) -> None:
        """Take over what the body gave for chunk ``index``, but for tokens that the
        next chunk takes again."""
        past = self.pasts[index]
        start = max(past, 0)
        following = self.pasts[index + 1 :]
        new = (following[0] if following else self.tokens) - start
        for result in self._wanted:
            if not result.state:
                made, axis = outputs[result.index], result.axis
                part = self._all(result.index, made, axis).narrow(axis, start, new)
                part.copy_(made.narrow(axis, start - past, new))

    def _all(self, index: int, made: Tensor, axis: int) -> Tensor:
        if index not in self._joined:
            sizes = list(made.shape)
            sizes[axis] = self.tokens
            self._joined[index] = made.new_empty(sizes)
        return self._joined[index]

    def results(self) -> tuple[Tensor, ...]:
        """Return the results in order, each with the tokens of all chunks."""
        return tuple(
            self._states[r.index] if r.state else self._joined[r.index]
            for r in self._wanted
        )


def take_chunk(x: Tensor, start: int, size: int, axis: int) -> Tensor:
    """Return ``size`` tokens of x from ``start`` on, zeros before the first.

    Contiguous: the body is compiled for that.
    """
    if start >= 0:
        return x.narrow(axis, start, size).contiguous()
    sizes = list(x.shape)
    sizes[axis] = size
    padded = x.new_zeros(sizes)
    padded.narrow(axis, -start, size + start).copy_(x.narrow(axis, 0, size + start))
    return padded
