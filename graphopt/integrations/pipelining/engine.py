"""Many requests through a pipeline: SARATHI's batches, one a stage in flight.

As in `graphopt.runtime.engine.simulator`: as many batchers as micro-batches, each with
its share of the pages, take requests from one queue. All of a step run together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphopt.errors import ConfigError
from graphopt.integrations.pipelining.ragged import RaggedPipeline
from graphopt.runtime.engine.admission import checked_prompt
from graphopt.runtime.engine.batch import Piece
from graphopt.runtime.engine.batcher import Batcher
from graphopt.runtime.engine.models import for_model
from graphopt.runtime.engine.options import EngineOptions
from graphopt.runtime.engine.pages import PagePool
from graphopt.runtime.engine.request import Request, RequestError
from graphopt.runtime.engine.sampling import SamplingParams
from graphopt.runtime.engine.schedulers import SCHEDULERS

_Shares = list[tuple[Request, int]]


class PipelineEngine:
    """Serves requests on ``pipeline``, ``micro_batches`` at a time (one a rank).

    Every rank makes it and calls it alike: the plan of a step, and the tokens drawn,
    are the same on all. ``options``: as of `graphopt.runtime.Engine`; ``budget`` is
    that of one micro-batch, and a bucket of the pipeline holds as many tokens.
    """

    def __init__(
        self,
        pipeline: RaggedPipeline,
        model: nn.Module,
        options: EngineOptions | None = None,
        micro_batches: int | None = None,
    ) -> None:
        self.options = for_model(options or EngineOptions(), model)
        self.pipeline = pipeline
        self.micro_batches = micro_batches or pipeline.ranks
        pipeline.bucket(self.options.budget)
        if self.options.max_running > pipeline.rows:
            raise ConfigError(
                f"pipelining: max_running = {self.options.max_running} requests in "
                f"micro-batches of {pipeline.rows} rows; give the pipeline more rows"
            )
        self.steps = 0
        self._queue: list[Request] = []
        self._submitted = 0
        self._share = pipeline.pages // self.micro_batches
        self._batchers = [self._batcher() for _ in range(self.micro_batches)]

    def _batcher(self) -> Batcher[Request]:
        size = self.pipeline.page_size
        return Batcher(
            SCHEDULERS[self.options.scheduler](),
            PagePool(self._share, size, self.options.share_prefixes),
            self.options.limits(size),
            self._queue,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None
    ) -> list[list[int]]:
        """Return the new tokens of each prompt.

        Raises RequestError for a prompt that cannot be served, ConfigError for
        sampling without a seed, which each rank would draw otherwise.
        """
        params = params or SamplingParams()
        if params.temperature and params.seed is None:
            raise ConfigError(
                "pipelining: temperature without a seed: ranks would draw different "
                "tokens; give SamplingParams(seed=...)"
            )
        requests = [self._submit(prompt, params) for prompt in prompts]
        while self.step():
            pass
        failed = next((r.error for r in requests if r.error is not None), None)
        if failed is not None:
            raise failed
        return [r.tokens[r.prompt_length :] for r in requests]

    def _submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        room = _Room(self._share, self.pipeline.page_size)
        tokens = checked_prompt(prompt, params, None, room, self.options)
        own = () if params.ignore_eos else self.options.eos_token_ids
        ends = frozenset((*params.stop_token_ids, *own))
        now = time.perf_counter()
        request = Request(self._submitted, tokens, params, ends, None, now)
        self._submitted += 1
        self._batchers[0].add(request)
        return request

    @torch.no_grad()
    def step(self) -> bool:
        """Run one step of all micro-batches; False if there was nothing to run."""
        plans = [batcher.plan() for batcher in self._batchers]
        if not any(plans):
            return False
        self.steps += 1
        found = self.pipeline.run(
            [
                [_piece(*share, place * self._share) for share in shares]
                for place, shares in enumerate(plans)
            ]
        )
        for batcher, shares, logits in zip(self._batchers, plans, found, strict=True):
            self._settle(batcher, shares, logits)
        return True

    def _settle(
        self, batcher: Batcher[Request], shares: _Shares, logits: Tensor
    ) -> None:
        rows = iter(logits)
        for request, tokens in shares:
            row = next(rows) if request.past + tokens == request.length else None
            batcher.advance(request, tokens)
            if row is not None:
                self._accept(request, row)
            if request.state.ended:
                batcher.drop(request)

    def _accept(self, request: Request, row: Tensor) -> None:
        if not bool(row.isfinite().all()):
            request.fail(ValueError("its logits are not finite"), self.steps)
            return
        token = request.sampler.draw(row, request.drawn)
        request.accept(token, time.perf_counter())


class _Room:
    """The pages of one micro-batch, as `checked_prompt` asks for them."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Refuse: this only tells sizes."""
        raise RequestError("a micro-batch runs in its pipeline")


def _piece(request: Request, tokens: int, first_page: int) -> Piece:
    end = request.past + tokens
    return Piece(
        request=request.id,
        tokens=request.content(request.past, end),
        past=request.past,
        pages=tuple(first_page + page for page in request.pages),
        samples=end == request.length,
    )
