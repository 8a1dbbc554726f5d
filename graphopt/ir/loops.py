"""A loop inside a graph: a prompt's layers run chunk by chunk.

The loop is a module that the graph calls, and its body a graph of its own, which later
passes rewrite and which is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class LoopResult:
    """What comes out: tokens of body output ``index`` joined along ``axis``.

    With ``state`` it is the loop's own tensor of that number, which has them all.
    """

    index: int
    axis: int
    state: bool = False


@dataclass(frozen=True)
class LoopState:
    """A tensor [B, H, T, D] that the chunks fill: H ``heads`` of ``width`` channels."""

    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, batch: Any, tokens: Any) -> Tensor:
        """Return a state for ``tokens`` tokens, whose memory is token by token."""
        sizes = (tokens, batch, self.heads, self.width)
        made = torch.empty(sizes, dtype=self.dtype, device=self.device)
        return made.permute(1, 2, 0, 3)


class ChunkLoop(nn.Module):
    """Run ``body`` on ``chunk`` tokens after ``chunk`` tokens of a prompt.

    The last chunk ends with the prompt: it takes some tokens of the one before again,
    and of a prompt that is shorter than a chunk it begins before the first token, with
    zeros that see no key and are no key. So its last rows are always the prompt's last
    tokens, which selections go by.

    Called with the tensors of all tokens, one for each of ``axes`` (their axis of
    tokens), then the mask of padding [B, T] if it is ``masked``, then what is the same
    for every chunk. The body takes the chunk's part of the former; the number of tokens
    before it; the states [B, H, past + chunk, D], where it writes its own keys and
    values; the mask of as many tokens; and the rest. It returns other results.

    States lie token by token, so that the first tokens of one are laid out alike
    whatever the length of the prompt.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        chunk: int,
        axes: tuple[int, ...],
        states: tuple[LoopState, ...],
        results: tuple[LoopResult, ...],
        masked: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.chunk, self.axes, self.masked = chunk, axes, masked
        self.states, self.results = states, results
        self.compiled: Any = None  # what runs instead of the body

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        """Return the results in order, each with the tokens of all chunks."""
        parts, rest = given[: len(self.axes)], list(given[len(self.axes) :])
        batch, tokens = parts[0].shape[0], parts[0].shape[self.axes[0]]
        states = [state.empty(batch, tokens) for state in self.states]
        mask = rest.pop(0).t().contiguous() if self.masked else None
        run = self.body if self.compiled is None else self.compiled
        joined: dict[int, Tensor] = {}
        for start in range(0, tokens, self.chunk):
            past = min(start, tokens - self.chunk)
            seen = past + self.chunk
            chunks = [
                take_chunk(x, past, self.chunk, axis)
                for x, axis in zip(parts, self.axes, strict=True)
            ]
            rows = [state.narrow(2, 0, seen) for state in states]
            shown = [] if mask is None else [mask[:seen].t()]
            outputs = run(*chunks, past, *rows, *shown, *rest)
            self._keep(joined, outputs, past, tokens)
        return tuple(
            states[r.index] if r.state else joined[r.index] for r in self.results
        )

    def _keep(
        self, joined: dict[int, Tensor], outputs: Any, past: int, tokens: int
    ) -> None:
        new = min(self.chunk, tokens)
        for result in self.results:
            if result.state:
                continue
            made, axis = outputs[result.index], result.axis
            if result.index not in joined:
                sizes = list(made.shape)
                sizes[axis] = tokens
                joined[result.index] = made.new_empty(sizes)
            part = joined[result.index].narrow(axis, max(past, 0), new)
            part.copy_(made.narrow(axis, self.chunk - new, new))


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


def loop_of(node: fx.Node) -> ChunkLoop | None:
    """Return the loop that ``node`` calls, or None."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    module = owner.get_submodule(str(node.target))
    return module if isinstance(module, ChunkLoop) else None


def find_loop(gm: fx.GraphModule) -> fx.Node | None:
    """Return the node of ``gm`` that calls a loop, or None."""
    calls = gm.graph.find_nodes(op="call_module")
    return next((node for node in calls if loop_of(node) is not None), None)


def innermost(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph that has the layers: the body of a loop, or ``gm`` itself."""
    node = find_loop(gm)
    loop = None if node is None else loop_of(node)
    return gm if loop is None else loop.body
