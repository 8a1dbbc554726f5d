"""Plans keep budget, pages and order, whatever the board; and what each policy is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime.engine.schedulers import SCHEDULERS, Board, Limits, Plan, View

SIZE = 4
_NO_PAGES: list[int] = []


@dataclass
class Boards:
    """Makes boards in which every request can run alone."""

    limits: Limits
    running: list[View] = field(default_factory=list)
    waiting: list[View] = field(default_factory=list)
    free: int = 100

    def _view(self, length: int, past: int, decoding: bool, served: int) -> View:
        first = sum(len(view.pages) for view in self.running)
        pages = list(range(first, first + self.limits.pages(past)))
        request = len(self.running) + len(self.waiting)
        return View(request, length, past, decoding, served, pages)

    def decode(self, length: int, served: int = 0) -> Boards:
        self.running.append(self._view(length, length - 1, True, served))
        return self

    def prefill(self, length: int, past: int = 0) -> Boards:
        self.running.append(self._view(length, past, False, 0))
        return self

    def wait(self, *lengths: int) -> Boards:
        for length in lengths:
            self.waiting.append(self._view(length, 0, False, 0))
        return self

    def board(self) -> Board:
        return Board(
            self.running, iter(self.waiting), self.free, lambda page: 1, self.limits
        )


def _limits(budget: int = 16, tile: int = 8, **given: Any) -> Limits:
    return Limits(budget, tile, **{"max_running": 50, "page_size": SIZE, **given})


def _plan(scheduler: str, boards: Boards) -> Plan:
    return SCHEDULERS[scheduler]().plan(boards.board())


@st.composite
def boards(draw: Any) -> Boards:
    tile = draw(st.sampled_from([1, 4, 8]))
    budget = tile * draw(st.integers(1, 3))
    limit = draw(st.sampled_from([None, 1, 3, 7]))
    running = draw(st.integers(1, 8))
    made = Boards(_limits(budget, tile, max_running=running, chunk_limit=limit))
    for _ in range(draw(st.integers(0, running))):
        length = draw(st.integers(2, 30))
        if draw(st.booleans()):
            made.decode(length, draw(st.integers(0, 5)))
        else:
            made.prefill(length, draw(st.integers(0, length - 1)))
    made.wait(*draw(st.lists(st.integers(1, 30), max_size=4)))
    held = sum(len(view.pages) for view in made.running)
    lengths = [view.length for view in (*made.running, *made.waiting)]
    alone = made.limits.pages(max(lengths, default=0)) - held
    made.free = draw(st.integers(max(0, alone), max(0, alone) + 10))
    return made


@settings(max_examples=300, deadline=None)
@given(boards=boards(), scheduler=st.sampled_from(sorted(SCHEDULERS)))
def test_every_plan_is_sound(boards, scheduler):
    plan = _plan(scheduler, boards)
    views = {view.request: view for view in (*boards.running, *boards.waiting)}
    running = [view.request for view in boards.running]
    assert plan.shares or not views
    assert not set(plan.shares) & set(plan.preempted)
    # The newest go first, and nobody is admitted to pages that others lacked.
    assert list(plan.preempted) == running[::-1][: len(plan.preempted)]
    admitted = [request for request in plan.shares if request not in running]
    assert admitted == [view.request for view in boards.waiting][: len(admitted)]
    assert not (admitted and plan.preempted)
    kept = len(running) - len(plan.preempted) + len(admitted)
    assert kept <= boards.limits.max_running
    for request, tokens in plan.shares.items():
        assert 0 < tokens <= views[request].pending
    _check_pages(boards, plan, views)
    _check_budget(boards, plan, scheduler, views)


def _check_pages(boards: Boards, plan: Plan, views: dict[int, View]) -> None:
    free = boards.free + sum(len(views[request].pages) for request in plan.preempted)
    claims = [
        max(0, boards.limits.pages(views[r].past + n) - len(views[r].pages))
        for r, n in plan.shares.items()
    ]
    assert sum(claims) <= free


def _check_budget(
    boards: Boards, plan: Plan, scheduler: str, views: dict[int, View]
) -> None:
    total, limits = sum(plan.shares.values()), boards.limits
    decodes = sum(views[request].decoding for request in plan.shares)
    if scheduler == "sarathi":
        assert total <= limits.budget
        if total % limits.tile and decodes < total and len(plan.shares) > 1:
            assert total // limits.tile * limits.tile <= decodes
        return
    whole = [n for r, n in plan.shares.items() if not views[r].decoding]
    assert all(n == views[r].pending for r, n in plan.shares.items())
    assert decodes <= limits.budget
    assert total <= max(limits.budget, decodes + whole[0] if whole else 0)


def test_decodes_count_in_the_budget_and_chunks_fill_it():
    plan = _plan("sarathi", Boards(_limits()).decode(9).decode(7).prefill(30).wait(5))
    assert plan.shares == {0: 1, 1: 1, 2: 14}


def test_decodes_and_chunks_end_with_a_tile():
    plan = _plan("sarathi", Boards(_limits()).decode(9).decode(7).prefill(9))
    assert plan.shares == {0: 1, 1: 1, 2: 6}


def test_a_prompt_alone_is_not_cut_for_a_tile():
    assert _plan("sarathi", Boards(_limits()).wait(9)).shares == {0: 9}


def test_what_is_cut_for_a_tile_is_of_the_newest():
    plan = _plan("sarathi", Boards(_limits()).decode(9).wait(5, 4))
    assert plan.shares == {0: 1, 1: 5, 2: 2}
    plan = _plan("sarathi", Boards(_limits()).decode(9).wait(7, 2))
    assert plan.shares == {0: 1, 1: 7}


def test_more_decodes_than_the_budget_take_turns():
    boards = Boards(_limits(budget=2, tile=2)).prefill(9)
    for served in (5, 3, 4, 3):
        boards.decode(9, served)
    assert _plan("sarathi", boards).shares == {2: 1, 4: 1}


def test_a_long_prompt_leaves_room_for_a_short_one_that_waits():
    boards = Boards(_limits(chunk_limit=8)).prefill(100).wait(6)
    assert _plan("sarathi", boards).shares == {0: 10, 1: 6}
    boards = Boards(_limits(chunk_limit=8)).prefill(100)
    assert _plan("sarathi", boards).shares == {0: 16}


def test_the_newest_gives_its_pages_to_an_older_decode():
    boards = Boards(_limits()).decode(5).decode(7).prefill(16, 8).wait(3)
    boards.free = 0
    plan = _plan("sarathi", boards)
    assert plan == Plan({0: 1, 1: 1}, (2,))


def test_a_request_without_pages_left_gives_up_its_own():
    boards = Boards(_limits()).decode(7).decode(5)
    boards.free = 0
    assert _plan("sarathi", boards) == Plan({0: 1}, (1,))


def test_the_turn_of_one_that_gives_up_its_pages_goes_to_another():
    boards = Boards(_limits(budget=1, tile=1)).decode(7, served=2).decode(5, served=1)
    boards.free = 0
    assert _plan("sarathi", boards) == Plan({0: 1}, (1,))


def test_pages_that_two_share_are_free_when_both_are_out():
    shared = [7, 8]
    views = [
        View(0, 5, 4, True, 0, [1]),
        View(1, 9, 8, True, 0, shared),
        View(2, 10, 8, False, 0, shared),
    ]
    holders = {1: 1, 7: 2, 8: 2}
    board = Board(views, (), 0, holders.__getitem__, _limits())
    assert SCHEDULERS["sarathi"]().plan(board) == Plan({0: 1}, (2, 1))


def test_idle_pages_that_a_waiting_request_uses_are_taken():
    # Both find pages 0 and 1, which nobody holds: 3 are free, 1 each is to come.
    views = [View(at, 10, 8, False, 0, [0, 1]) for at in range(2)]
    board = Board((), iter(views), 3, lambda page: 0, _limits())
    assert SCHEDULERS["sarathi"]().plan(board).shares == {0: 2}
    board = Board((), iter(views), 4, lambda page: 0, _limits(tile=1))
    assert SCHEDULERS["sarathi"]().plan(board).shares == {0: 2, 1: 2}


def test_no_prompt_is_begun_on_pages_that_another_will_need():
    # The first needs ten pages, the second two: twelve let both run.
    boards = Boards(_limits(chunk_limit=8), free=11).prefill(40).wait(8)
    assert _plan("sarathi", boards).shares == {0: 16}
    boards.free = 12
    assert _plan("sarathi", boards).shares == {0: 8, 1: 8}


def test_a_page_that_was_to_be_taken_is_free_again_when_its_request_is_out():
    boards = Boards(_limits(), free=1).prefill(20, 8).decode(9)
    assert _plan("sarathi", boards) == Plan({0: 12}, (1,))


def test_decodes_run_where_a_prompt_gave_up_its_pages():
    # The prompt throws out the newest, whose turn it was, and then itself.
    boards = Boards(_limits(budget=1, tile=1), free=0)
    boards.decode(12, served=5).prefill(20, 8).decode(4, served=0)
    assert _plan("decode-first", boards) == Plan({0: 1}, (2, 1))


def test_a_chunk_that_pages_cut_short_is_run():
    boards = Boards(_limits(), free=1).decode(30).prefill(20, 8)
    assert _plan("sarathi", boards).shares == {0: 1, 1: 4}


@pytest.mark.parametrize(
    ("scheduler", "shares"),
    [
        ("sarathi", {0: 1, 1: 1, 2: 14}),
        ("prefill-first", {2: 20}),
        ("decode-first", {0: 1, 1: 1, 2: 20}),
        ("request-level", {2: 20}),
    ],
)
def test_schedulers_differ_in_how_a_prompt_joins_decodes(scheduler, shares):
    assert _plan(scheduler, Boards(_limits()).decode(9).decode(7).wait(20)).shares == (
        shares
    )


def test_request_level_admits_nobody_until_its_batch_ends():
    scheduler = SCHEDULERS["request-level"]()
    limits = _limits(max_running=2)
    assert scheduler.plan(Boards(limits).wait(5, 5, 5).board()).shares == {0: 5, 1: 5}
    decoding = Boards(limits).decode(6).decode(6).wait(5)
    assert scheduler.plan(decoding.board()).shares == {0: 1, 1: 1}
    assert scheduler.plan(Boards(limits).decode(7).wait(5).board()).shares == {0: 1}
    assert scheduler.plan(Boards(limits).wait(5).board()).shares == {0: 5}
