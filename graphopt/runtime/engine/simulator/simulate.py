"""A discrete-event simulation of serving: the engine's schedulers, a model's cost.

Each of the pipeline's stages has a micro-batch in flight: as many batchers, each with
its share of the pages, take requests from one queue. A batcher plans its next
micro-batch when its last one has left the last stage and the first stage is free.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.errors import GraphoptError
from graphopt.ops.pages import PAGE
from graphopt.runtime.engine.batcher import Batcher
from graphopt.runtime.engine.job import Job, State
from graphopt.runtime.engine.options import EngineOptions
from graphopt.runtime.engine.pages import PagePool
from graphopt.runtime.engine.schedulers import SCHEDULERS
from graphopt.runtime.engine.simulator.cost import Load, StepCost
from graphopt.runtime.engine.simulator.pipeline import Pipeline
from graphopt.runtime.engine.simulator.report import Report, Served
from graphopt.runtime.engine.simulator.workload import Arrival
from graphopt.runtime.events import EventQueue


class _Request(Job):
    """A request that is only counted."""

    def __init__(self, id: int, arrival: Arrival) -> None:
        super().__init__(id)
        self.arrival = arrival
        self.times: list[float] = []
        self.bubble = 0.0

    @property
    def length(self) -> int:
        """Return how many tokens are known."""
        return self.arrival.prompt + len(self.times)

    def content(self, start: int, stop: int) -> tuple[int, ...]:
        """Refuse: no tokens are known here, so no pages can be shared."""
        raise NotImplementedError("simulated requests have no tokens")

    def accept(self, now: float) -> None:
        """Count one more token."""
        self.times.append(now)
        if len(self.times) == self.arrival.new:
            self.move(State.FINISHED)
        elif self.state is State.PREFILLING:
            self.move(State.DECODING)


class Simulation:
    """Serves arrivals by ``options`` on a device of ``cost``; runs once.

    ``pages`` are those of all micro-batches together; ``options.max_running`` holds
    for each of them. Raises GraphoptError for a request that can never fit.
    """

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        options: EngineOptions,
        cost: StepCost,
        pages: int,
        stages: int = 1,
        page_size: int = PAGE,
    ) -> None:
        self._cost = cost
        self._pipeline = Pipeline(stages)
        in_order = sorted(arrivals, key=lambda arrival: arrival.time)
        self._requests = [_Request(at, one) for at, one in enumerate(in_order)]
        self._to_come = list(reversed(self._requests))
        self._check_fit(pages // stages * page_size)
        queue: list[_Request] = []
        self._batchers = [
            Batcher(
                SCHEDULERS[options.scheduler](),
                PagePool(pages // stages, page_size, share=False),
                options.limits(page_size),
                queue,
            )
            for _ in range(stages)
        ]
        self._queue = queue
        self._flying: dict[int, list[tuple[_Request, int]]] = {}
        self._parked = set(range(stages))
        self._events: EventQueue[int] = EventQueue()  # of batchers
        self._fed = 0.0  # when a batcher last lacked requests
        self._bubble = 0.0

    def _check_fit(self, capacity: int) -> None:
        for request in self._requests:
            prompt, new = request.arrival.prompt, request.arrival.new
            if prompt + new - 1 > capacity:
                raise GraphoptError(
                    f"a request of {prompt} and {new} new tokens can never run: the "
                    f"pages of a micro-batch hold {capacity}; simulate more pages"
                )

    def run(self) -> Report:
        """Return what happened until the last request ended."""
        while self._events or self._to_come:
            if self._next_arrives_first():
                self._arrive()
            else:
                self._wake(*self._events.pop())
        return self._report()

    def _next_arrives_first(self) -> bool:
        coming = self._to_come
        return bool(coming) and coming[-1].arrival.time <= self._events.next_time

    def _arrive(self) -> None:
        request = self._to_come.pop()
        self._batchers[0].add(request)
        self._rouse(request.arrival.time)

    def _rouse(self, time: float) -> None:
        for batcher in sorted(self._parked):
            self._events.push(time, batcher)
            self._fed = time
        self._parked.clear()

    def _wake(self, time: float, batcher: int) -> None:
        """Take over what has left the pipeline, and send the next micro-batch."""
        for request, tokens in self._flying.pop(batcher, ()):
            self._complete(self._batchers[batcher], request, tokens, time)
        if time < self._pipeline.free_at:
            self._events.push(self._pipeline.free_at, batcher)
            return
        shares = self._batchers[batcher].plan()
        if self._queue:  # one that was preempted may find pages elsewhere
            self._rouse(time)
        if shares:
            self._send(time, batcher, shares)
        else:
            self._parked.add(batcher)

    def _send(
        self, time: float, batcher: int, shares: list[tuple[_Request, int]]
    ) -> None:
        seconds = self._cost.seconds(Load(job.past, new) for job, new in shares)
        fed = float("inf") if self._parked else self._fed
        passage = self._pipeline.run(time, seconds, fed)
        self._bubble += passage.bubble
        for request, _ in shares:
            request.bubble += passage.bubble
        self._flying[batcher] = shares
        self._events.push(passage.end, batcher)

    def _complete(
        self, batcher: Batcher[_Request], request: _Request, tokens: int, now: float
    ) -> None:
        batcher.advance(request, tokens)
        if request.past == request.length:
            request.accept(now)
        if request.state.ended:
            batcher.drop(request)

    def _report(self) -> Report:
        served = tuple(
            Served(r.arrival.time, tuple(r.times), r.preemptions, r.bubble)
            for r in self._requests
        )
        arrivals = [request.arrival for request in self._requests]
        return Report(
            served=served,
            tokens=sum(arrival.prompt + arrival.new for arrival in arrivals),
            seconds=max(s.token_times[-1] for s in served) - arrivals[0].time,
            steps=sum(batcher.steps for batcher in self._batchers),
            bubble_seconds=self._bubble,
            stages=self._pipeline.stages,
        )
