"""Threads of a CPU as processors, each with its share of torch's threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack

import torch

from graphopt.runtime.schedule.board import Board
from graphopt.runtime.schedule.dag import Dag
from graphopt.runtime.schedule.policies import Processor
from graphopt.runtime.schedule.program import ChunkRun
from graphopt.runtime.schedule.simulator import Timeline


class Workers:
    """Up to ``most`` worker threads, no more than torch has threads; a `Machine`.

    Raises what a task raises, when no worker runs one any more.
    """

    def __init__(self, most: int) -> None:
        self._threads = torch.get_num_threads()
        count = max(1, min(most, self._threads))
        self._share = max(1, self._threads // count)
        self._processors = tuple(Processor(f"worker {i}") for i in range(count))
        self._pool = ThreadPoolExecutor(count, "graphopt-chunks")

    @property
    def processors(self) -> tuple[Processor, ...]:
        """Return the workers."""
        return self._processors

    def in_order(self, runs: Sequence[ChunkRun], groups: int) -> None:
        """Run in the thread that asks, which has all of torch's threads."""
        for run in runs:
            for _ in range(groups):
                run.step()
            run.keep()

    def timed(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Run in the thread that asks; see `Machine`."""
        return [_timed_chunk(run, groups) for run in runs]

    def timed_alone(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Run in one worker."""
        found: list[list[float]] = []

        def work() -> None:
            found.extend(self.timed(runs, groups))

        self._together([work])
        return found

    def out_of_order(
        self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline
    ) -> None:
        """Run each task in the worker that is free first, in the plan's order."""
        board = Board(dag, [ran.task for ran in timeline.ran])
        lock = threading.Lock()
        groups = len(dag.tasks) // len(runs)

        def work(processor: Processor) -> None:
            while (number := board.take(processor.name)) is not None:
                task = dag.tasks[number]
                run = runs[task.chunk]
                run.step()
                if task.position == groups - 1:
                    with lock:  # chunks share the tensors of all tokens
                        run.keep()
                board.end(number)

        jobs = [_watched(board, work, p) for p in self._processors]
        self._together(jobs, board.fail)
        board.check()

    def seconds(self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline) -> float:
        """Run and return the seconds that it took."""
        start = time.perf_counter()
        self.out_of_order(runs, dag, timeline)
        return time.perf_counter() - start

    def _together(
        self,
        jobs: Sequence[Callable[[], None]],
        stop: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """Run each job in a worker of its own; return when all have ended.

        ``stop`` is called when the wait is interrupted.
        """
        modes = _modes()
        futures = [self._pool.submit(self._as_here, job, modes) for job in jobs]
        _join(futures, stop)
        # A worker's share became torch's number for threads that are yet to start.
        torch.set_num_threads(self._threads)
        for future in futures:
            future.result()

    def _as_here(self, job: Callable[[], None], modes: _Modes) -> None:
        """Run ``job`` with the worker's share of threads, and the caller's modes."""
        if torch.get_num_threads() != self._share:
            torch.set_num_threads(self._share)
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            job()


_Modes = Sequence[Callable[[], AbstractContextManager[object]]]


def _modes() -> _Modes:
    """Return this thread's modes of autograd, which a worker has not."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (
        lambda: torch.inference_mode(inference),
        lambda: torch.set_grad_enabled(grad),
    )


def _watched(
    board: Board, work: Callable[[Processor], None], processor: Processor
) -> Callable[[], None]:
    def job() -> None:
        try:
            work(processor)
        except BaseException as error:
            board.fail(error)

    return job


def _join(
    futures: Sequence[Future[None]], stop: Callable[[BaseException], None]
) -> None:
    """Wait for all: an interrupt must not leave a worker with the caller's tensors."""
    try:
        wait(futures)
    except BaseException as error:
        stop(error)
        wait(futures)
        raise


def _timed_chunk(run: ChunkRun, groups: int) -> list[float]:
    seconds = []
    for position in range(groups):
        start = time.perf_counter()
        run.step()
        if position == groups - 1:
            run.keep()
        seconds.append(time.perf_counter() - start)
    return seconds
