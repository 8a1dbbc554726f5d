"""Any order of submitting, stepping, cancelling and failing, against a model.

The model of the scheduler is what a user may rely on: who runs in a step, in which
order, within which budget, and what each request's tokens are. The watched executor
checks the pages of every piece.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from graphopt.runtime import Engine, EngineOptions, SamplingParams
from graphopt.runtime.engine import Handle, Piece, State
from graphopt.runtime.engine.schedulers import SCHEDULERS
from tests.runtime.engine.dense_executor import VOCABULARY, generated
from tests.runtime.engine.watched import FAULTS, WatchedExecutor

SIZE, PAGES, RUNNING, NEW = 4, 6, 6, 6
_STEM = [random.Random(5).randrange(VOCABULARY) for _ in range(17)]
# Some begin alike, for a page or more; the longest fills all but one of the pages.
PROMPTS = ([7], _STEM[:3], _STEM[:9], [*_STEM[:6], 1, 2, 3, 4], _STEM, [2, *_STEM])


@cache
def _wanted(prompt: int, sampled: bool) -> list[int]:
    options = {"temperature": 0.9} if sampled else {}
    return generated(PROMPTS[prompt], NEW, 7 if sampled else None, **options)


@dataclass
class _Known:
    """What the model knows of a request."""

    handle: Handle
    prompt: int
    sampled: bool
    new: int
    stored: int = 0  # tokens in pages

    @property
    def length(self) -> int:
        return len(PROMPTS[self.prompt]) + len(self.handle.tokens)

    @property
    def live(self) -> bool:
        return not self.handle.state.ended


class EngineMachine(RuleBasedStateMachine):
    """Submits, steps, cancels and fails requests in any order."""

    @initialize(
        scheduler=st.sampled_from(sorted(SCHEDULERS)),
        share=st.booleans(),
        limit=st.sampled_from([None, 2]),
        budget=st.sampled_from([(2, 2), (8, 4)]),
    )
    def begin(
        self, scheduler: str, share: bool, limit: int | None, budget: tuple[int, int]
    ) -> None:
        self.scheduler = scheduler
        self.budget, self.tile = budget
        self.executor = WatchedExecutor(PAGES, SIZE)
        options = EngineOptions(
            budget=self.budget,
            tile=self.tile,
            scheduler=scheduler,
            max_running=RUNNING,
            share_prefixes=share,
            chunk_limit=limit,
        )
        self.engine = Engine(self.executor, options=options)
        self.known: list[_Known] = []
        self.cancelled: set[int] = set()
        self.faulty: set[int] = set()

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        sampled=st.booleans(),
        new=st.integers(1, NEW),
    )
    def submit(self, prompt: int, sampled: bool, new: int) -> None:
        given: dict[str, Any] = {"temperature": 0.9, "seed": 7} if sampled else {}
        params = SamplingParams(max_new_tokens=new, **given)
        handle = self.engine.submit(PROMPTS[prompt], params)
        assert handle.id == len(self.known)
        self.known.append(_Known(handle, prompt, sampled, new))

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def _step(self) -> None:
        self.executor.runs.clear()
        before = [known for known in self.known if known.live]
        decoding = {k.handle.id for k in before if k.handle.state is State.DECODING}
        faulty = dict(self.executor.faults)
        statistics = self.engine.step()
        assert (statistics is None) == (not before)
        if statistics is None:
            return
        pieces = self.executor.runs[0]
        assert statistics.tokens == sum(len(piece.tokens) for piece in pieces)
        self._check_order(pieces, before, decoding)
        self._check_budget(pieces, decoding)
        for piece in pieces:
            self._check_piece(piece, faulty.get(piece.request))
        self._forget_preempted()

    def _check_order(
        self, pieces: list[Piece], before: list[_Known], decoding: set[int]
    ) -> None:
        """First come, first served: the oldest is served in every step."""
        requests = {piece.request for piece in pieces}
        # Where more decode than the budget allows, they take turns.
        at_once = len(decoding) <= self.budget
        if at_once and self.scheduler in ("sarathi", "decode-first"):
            assert before[0].handle.id in requests
        running = (State.PREFILLING, State.DECODING)
        live = [known.handle.state in running for known in self.known if known.live]
        assert live == sorted(live, reverse=True)
        assert sum(live) <= RUNNING

    def _check_budget(self, pieces: list[Piece], decoding: set[int]) -> None:
        total = sum(len(piece.tokens) for piece in pieces)
        decodes = [piece for piece in pieces if piece.request in decoding]
        assert all(len(piece.tokens) == 1 for piece in decodes)
        if self.scheduler == "sarathi":
            assert total <= self.budget
            # Decodes and chunks end with a tile, unless no work is left to cut.
            aligned = total % self.tile == 0 or total < self.tile or len(pieces) == 1
            assert aligned or total // self.tile * self.tile <= len(decodes)
        elif self.scheduler != "decode-first":
            assert len(decodes) in (0, len(pieces))

    def _check_piece(self, piece: Piece, fault: str | None) -> None:
        known = self.known[piece.request]
        text = [*PROMPTS[known.prompt], *_wanted(known.prompt, known.sampled)]
        end = piece.past + len(piece.tokens)
        assert list(piece.tokens) == text[piece.past : end]
        assert piece.past == known.stored or piece.past % SIZE == 0
        known.stored = end
        fails = fault in ("named", "misnamed", "unnamed") or (
            fault == "nan" and piece.samples
        )
        assert (known.handle.state is State.FAILED) == fails
        if piece.samples and not fails:
            assert end == known.length - 1, "a token was drawn for it"

    def _forget_preempted(self) -> None:
        for known in self.known:
            if known.handle.state is State.WAITING:
                known.stored = 0

    @precondition(lambda self: any(known.live for known in self.known))
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        known = data.draw(st.sampled_from([k for k in self.known if k.live]))
        assert known.handle.cancel()
        assert not known.handle.cancel()
        self.cancelled.add(known.handle.id)

    @precondition(lambda self: any(known.live for known in self.known))
    @rule(data=st.data(), fault=st.sampled_from(FAULTS))
    def fail(self, data: Any, fault: str) -> None:
        known = data.draw(st.sampled_from([k for k in self.known if k.live]))
        self.executor.faults[known.handle.id] = fault
        self.faulty.add(known.handle.id)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            for known in self.known:
                wanted = _wanted(known.prompt, known.sampled)
                tokens = known.handle.tokens
                assert tokens == wanted[: len(tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Each step gives a live request a token or a chunk; preempting costs again.
        for _ in range(40 * (len(self.known) + 1)):
            self._step()
        assert self.engine.idle, "some request never ends"
        assert self.engine.free_pages == PAGES
        for known in self.known:
            self._check_end(known)

    def _check_end(self, known: _Known) -> None:
        state, request = known.handle.state, known.handle.id
        if state is State.CANCELLED:
            assert request in self.cancelled
        elif state is State.FAILED:
            assert request in self.faulty
        else:
            wanted = _wanted(known.prompt, known.sampled)[: known.new]
            assert known.handle.result().tokens == wanted


EngineMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
TestEngineMachine = EngineMachine.TestCase
