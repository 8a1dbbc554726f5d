"""A loop inside a graph: a prompt's layers run chunk by chunk.

The loop is a module that the graph calls, and its body a graph of its own, which later
passes rewrite and which is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.loop_call import LoopCall

_BODY, _ORDER = "graphopt_loop_body", "graphopt_chunk_order"


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


@dataclass(frozen=True)
class ChunkOrder:
    """In which order chunks of a loop run, and on how many ``processors``.

    With ``force`` they run so even where one after the other was found to be faster.
    """

    policy: str
    processors: int
    force: bool = False


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
        self.scheduler: Any = None  # what runs all chunks of a `LoopCall`
        body.meta[_BODY] = True

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        """Return the results in order, each with the tokens of all chunks."""
        call = LoopCall(self, given)
        if self.scheduler is not None:
            self.scheduler(call)
            return call.results()
        run = self.body if self.compiled is None else self.compiled
        for index in range(len(call.pasts)):
            call.keep(index, run(*call.arguments(index)))
        return call.results()


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


def is_body(gm: fx.GraphModule) -> bool:
    """Tell whether ``gm`` is the body of a loop."""
    return bool(gm.meta.get(_BODY, False))


def set_order(body: fx.GraphModule, order: ChunkOrder) -> None:
    """Let the chunks of the loop around ``body`` run in ``order`` once compiled."""
    body.meta[_ORDER] = order


def order_of(body: fx.GraphModule) -> ChunkOrder | None:
    """Return what `set_order` set; None: one chunk after the other."""
    return body.meta.get(_ORDER)
