"""A chunked prefill as a graph of tasks: (chunk, op group), with what each waits for.

llm.npu (Xu et al. 2025, section 3.4, equations 3 and 4): G[i, j] is op group j of chunk
i. A static group (norms, linears) needs G[i, j-1]; a dynamic one (attention) needs
G[0..i, j-1], for it reads the keys of every chunk up to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Group:
    """One op group of a chunk: the part ``name`` of ``layer``.

    ``processor`` names the one that runs it; None for whichever is free. A ``dynamic``
    group reads what group j - 1 of every chunk up to its own has written.
    """

    layer: int
    name: str
    dynamic: bool = False
    processor: str | None = None


@dataclass(frozen=True)
class Task:
    """Op group ``position`` (from 0) of a chunk; ``duration`` is in seconds."""

    chunk: int
    position: int
    group: Group
    duration: float

    @property
    def layer(self) -> int:
        """Return the layer that the group is a part of."""
        return self.group.layer

    @property
    def processor(self) -> str | None:
        """Return the processor that must run it; None for any."""
        return self.group.processor

    def runs_on(self, processor: str) -> bool:
        """Tell whether ``processor`` may run it."""
        return self.processor in (None, processor)


@dataclass(frozen=True)
class Dag:
    """Tasks in program order: chunk by chunk, and within one group by group.

    ``needs`` has the tasks that each one waits for. All come before it in program
    order, so that running in that order is always possible.
    """

    tasks: tuple[Task, ...]
    needs: tuple[tuple[int, ...], ...]

    @cached_property
    def unlocks(self) -> tuple[tuple[int, ...], ...]:
        """Return the tasks that wait for each one."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for task, needed in enumerate(self.needs):
            for other in needed:
                found[other].append(task)
        return tuple(map(tuple, found))


Duration = Callable[[int, int], float]  # of a chunk and a position, seconds


def chunk_dag(
    groups: Sequence[Group], chunks: int, duration: Duration, overlap: bool = False
) -> Dag:
    """Return the tasks of ``chunks`` chunks that each run through ``groups``.

    With ``overlap`` the last chunk takes tokens of the one before again, and so writes
    over keys that it reads (`graphopt.ir.loops.ChunkLoop`): each of its groups that
    writes keys, the one in front of a dynamic one, waits until they have been read.
    """
    size = len(groups)
    tasks = tuple(
        Task(chunk, position, group, duration(chunk, position))
        for chunk in range(chunks)
        for position, group in enumerate(groups)
    )
    needs = [_needs(groups, size, task) for task in tasks]
    if overlap and chunks > 1:
        last = (chunks - 1) * size
        for position in range(1, size):
            if groups[position].dynamic:
                needs[last + position - 1] += (last - size + position,)
    return Dag(tasks, tuple(needs))


def _needs(groups: Sequence[Group], size: int, task: Task) -> tuple[int, ...]:
    if task.position == 0:
        return ()
    first = 0 if groups[task.position].dynamic else task.chunk
    chunks = range(first, task.chunk + 1)
    return tuple(chunk * size + task.position - 1 for chunk in chunks)


def repeated(part: Sequence[Group], layers: int) -> list[Group]:
    """Return the groups of ``layers`` layers that are all like ``part``."""
    return [
        Group(layer, group.name, group.dynamic, group.processor)
        for layer in range(layers)
        for group in part
    ]
