"""``Engine``: requests in, tokens out, one batch of pieces a step.

Source: SARATHI (arXiv 2308.16369) and Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.runtime.engine.admission import checked_prompt
from graphopt.runtime.engine.batch import Executor, Piece
from graphopt.runtime.engine.batcher import Batcher
from graphopt.runtime.engine.faults import Outcome, Row, run_pieces
from graphopt.runtime.engine.handle import Handle
from graphopt.runtime.engine.job import State
from graphopt.runtime.engine.models import compiled_executor, for_model
from graphopt.runtime.engine.options import EngineOptions
from graphopt.runtime.engine.pages import PagePool
from graphopt.runtime.engine.request import Request
from graphopt.runtime.engine.sampling import SamplingParams
from graphopt.runtime.engine.schedulers import SCHEDULERS
from graphopt.runtime.engine.statistics import StepStatistics
from graphopt.runtime.engine.stops import Decoder, TextStream

_KEPT_STEPS = 1024
_Shares = list[tuple[Request, int]]


class Engine:
    """Serves many requests by continuous batching; safe to use from several threads.

    ``model``: a causal language model of transformers, which is compiled for steps of
    any mixture of prompt chunks and decodes (`ragged-batch`), with the passes of
    ``config`` behind it; or an `Executor`. ``pages``: of 64 tokens, for the keys and
    values of all requests of a model. ``tokenizer``, as of transformers, is needed for
    prompts and stop strings of text. ``clock`` gives the seconds of the statistics.
    ``history`` holds the latest steps.

    Raises ConfigError for a model whose attention requests cannot share, and for a
    config or options that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module | Executor,
        config: Any = None,
        *,
        options: EngineOptions | None = None,
        tokenizer: Any = None,
        pages: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options = options or EngineOptions()
        if isinstance(model, nn.Module):
            self.options = for_model(self.options, model)
            executor = compiled_executor(model, config, self.options, pages)
        else:
            executor = model
        self.history: deque[StepStatistics] = deque(maxlen=_KEPT_STEPS)
        self._executor = executor
        self._tokenizer = tokenizer
        self._clock = clock
        self._lock = threading.RLock()
        self._submitted = 0
        pool = PagePool(executor.pages, executor.page_size, self.options.share_prefixes)
        self._batcher: Batcher[Request] = Batcher(
            SCHEDULERS[self.options.scheduler](),
            pool,
            self.options.limits(executor.page_size),
        )

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Handle:
        """Queue a prompt, text or token ids, and return its handle.

        Raises RequestError for a prompt that is empty or can never fit, or text
        without a tokenizer.
        """
        params = params or SamplingParams()
        tokens = checked_prompt(
            prompt, params, self._tokenizer, self._executor, self.options
        )
        text = None
        if self._tokenizer is not None:
            text = TextStream(Decoder(self._tokenizer, tokens), params.stop)
        own = () if params.ignore_eos else self.options.eos_token_ids
        ends = frozenset((*params.stop_token_ids, *own))
        with self._lock:
            now = self._clock()
            request = Request(self._submitted, tokens, params, ends, text, now)
            self._submitted += 1
            self._batcher.add(request)
        return Handle(self, request)

    @property
    def idle(self) -> bool:
        """Tell whether no request waits or runs."""
        return not (self._batcher.waiting or self._batcher.running)

    @property
    def free_pages(self) -> int:
        """Return how many pages nobody holds."""
        return self._batcher.pool.free

    def run(self) -> None:
        """Run steps until all requests have ended."""
        while self.step() is not None:
            pass

    def step(self) -> StepStatistics | None:
        """Run one step; None if there was nothing to run.

        A request whose piece or token fails ends as failed, the others go on.
        """
        with self._lock:
            if self.idle:
                return None
            return self._step()

    def cancel(self, handle: Handle) -> bool:
        """End a request and free its pages; False if it had ended before."""
        request = handle.request
        with self._lock:
            if request.state.ended:
                return False
            self._batcher.drop(request)
            request.cancel()
            return True

    def check(self) -> None:
        """Raise AssertionError where requests, queues and pages disagree."""
        with self._lock:
            self._batcher.check()
            for request in self._batcher.running:
                assert request.state in (State.PREFILLING, State.DECODING)
            assert all(r.state is State.WAITING for r in self._batcher.waiting)

    @torch.no_grad()
    def _step(self) -> StepStatistics:
        self._drop_ended()  # of a step that was interrupted
        preempted = self._batcher.preemptions
        shares = self._batcher.plan()
        preempted = self._batcher.preemptions - preempted
        decodes = sum(request.state is State.DECODING for request, _ in shares)
        start = self._clock()
        outcome = run_pieces(self._executor, [_piece(*share) for share in shares])
        self._settle(shares, outcome)
        ended = self._drop_ended()
        statistics = StepStatistics(
            step=self._batcher.steps,
            tokens=sum(tokens for _, tokens in shares),
            decodes=decodes,
            chunks=len(shares) - decodes,
            preempted=preempted,
            failed=sum(request.error is not None for request in ended),
            ended=len(ended),
            free_pages=self.free_pages,
            seconds=self._clock() - start,
        )
        self.history.append(statistics)
        return statistics

    def _drop_ended(self) -> list[Request]:
        ended = [r for r in self._batcher.running if r.state.ended]
        for request in ended:
            self._batcher.drop(request)
        return ended

    def _settle(self, shares: _Shares, outcome: Outcome) -> None:
        """Take over what was run: pages, tokens, failures."""
        for request, tokens in shares:
            try:
                self._take_over(request, tokens, outcome)
            except Exception as error:
                request.fail(error, self._batcher.steps)

    def _take_over(self, request: Request, tokens: int, outcome: Outcome) -> None:
        if request.id in outcome.failures:
            raise outcome.failures[request.id]
        token = None
        if request.past + tokens == request.length:
            token = _draw(request, outcome.rows[request.id])
        self._batcher.advance(request, tokens)
        if token is not None:
            request.accept(token, self._clock())


def _draw(request: Request, row: Row) -> int:
    if row.likeliest is None:
        raise ValueError("its logits are not finite")
    if request.sampler.is_argmax(request.drawn):
        return row.likeliest
    return request.sampler.draw(row.logits, request.drawn)


def _piece(request: Request, tokens: int) -> Piece:
    end = request.past + tokens
    return Piece(
        request=request.id,
        tokens=request.content(request.past, end),
        past=request.past,
        pages=tuple(request.pages),
        samples=end == request.length,
    )
