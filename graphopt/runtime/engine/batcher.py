"""Plans steps and keeps the books: who waits, who runs, and whose the pages are."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from graphopt.runtime.engine.job import Job, State
from graphopt.runtime.engine.pages import PagePool
from graphopt.runtime.engine.schedulers import Board, Limits, Scheduler, View

J = TypeVar("J", bound=Job)


class Batcher(Generic[J]):
    """The requests of one scheduler and one pool, both queues in order of arrival.

    ``waiting`` may be a queue that several batchers take from.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: PagePool,
        limits: Limits,
        waiting: list[J] | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: list[J] = [] if waiting is None else waiting
        self.running: list[J] = []
        self.steps = 0
        self.preemptions = 0
        self._scheduler = scheduler

    def add(self, job: J) -> None:
        """Let a request wait for its turn."""
        insort(self.waiting, job, key=lambda other: other.id)

    def drop(self, job: J) -> None:
        """Forget a request, wherever it is, and free its pages.

        Nobody else is to find what a failed request has written.
        """
        (self.waiting if job in self.waiting else self.running).remove(job)
        if job.state is State.FAILED:
            self.pool.discard(job.pages)
        else:
            self.pool.release(job.pages)
        job.pages = []

    def plan(self) -> list[tuple[J, int]]:
        """Return who runs how many tokens now; their page tables cover those.

        Raises AssertionError where requests wait or run and the scheduler lets none.
        """
        found: dict[int, list[int]] = {}
        plan = self._scheduler.plan(self._board(found))
        jobs = {job.id: job for job in self.running}
        for request in plan.preempted:
            self._preempt(jobs[request])
        for request in plan.shares:
            if request not in jobs:
                jobs[request] = self._admit(request, found[request])
        shares = [(jobs[request], tokens) for request, tokens in plan.shares.items()]
        assert shares or not (self.running or self.waiting), (
            "the scheduler let none run"
        )
        self.steps += bool(shares)
        for job, tokens in shares:
            self._grow(job, tokens)
        return shares

    def advance(self, job: J, tokens: int) -> None:
        """Note that a running request's next tokens are in its pages now."""
        size = self.pool.page_size
        full = range(job.past // size, (job.past + tokens) // size)
        job.past += tokens
        job.served = self.steps
        for index in full if self.pool.share else ():
            before = job.pages[index - 1] if index else None
            content = job.content(index * size, (index + 1) * size)
            job.pages[index] = self.pool.publish(before, content, job.pages[index])

    def check(self) -> None:
        """Raise AssertionError where books and pool disagree, or order is lost."""
        assert all(not job.pages for job in self.waiting)
        self.pool.check(job.pages for job in self.running)
        ids = [job.id for job in (*self.running, *self.waiting)]
        assert ids == sorted(ids), "a newer request overtook an older one"

    def _board(self, found: dict[int, list[int]]) -> Board:
        return Board(
            running=[_view(job, job.pages) for job in self.running],
            waiting=self._waiting(found),
            free=self.pool.free,
            holders=self.pool.holders,
            limits=self.limits,
        )

    def _waiting(self, found: dict[int, list[int]]) -> Iterator[View]:
        for job in tuple(self.waiting):
            pages = self.pool.find(job.content, job.length)
            found[job.id] = pages
            yield _view(job, pages, len(pages) * self.pool.page_size)

    def _admit(self, request: int, pages: list[int]) -> J:
        job = next(job for job in self.waiting if job.id == request)
        self.waiting.remove(job)
        self.running.append(job)
        self.pool.hold(pages)
        job.pages = list(pages)
        job.past = job.shared = len(pages) * self.pool.page_size
        job.move(State.PREFILLING)
        return job

    def _preempt(self, job: J) -> None:
        self.running.remove(job)
        self.pool.release(job.pages)
        job.pages = []
        job.past = 0
        job.preemptions += 1
        self.preemptions += 1
        job.move(State.WAITING)
        self.add(job)

    def _grow(self, job: J, tokens: int) -> None:
        wanted = self.limits.pages(job.past + tokens)
        job.pages += self.pool.take(max(0, wanted - len(job.pages)))


def _view(job: Job, pages: list[int], past: int | None = None) -> View:
    return View(
        request=job.id,
        length=job.length,
        past=job.past if past is None else past,
        decoding=job.state is State.DECODING,
        served=job.served,
        pages=pages,
    )
