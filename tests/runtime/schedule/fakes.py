"""A compiled body that only writes down what it does."""

from __future__ import annotations

import random
import threading
import time

from graphopt.runtime.schedule.program import TaskProgram


class Log:
    """Who ran which (chunk, position), in order; fails at ``bad``, if given."""

    def __init__(self, groups, bad=None, seconds=0.0):
        self.groups, self.bad, self.seconds = tuple(groups), bad, seconds
        self.steps: list[tuple[int, int]] = []
        self.began: dict[tuple[int, int], int] = {}
        self.threads: set[int] = set()
        self.modes: list[tuple[bool, bool]] = []
        self.lock = threading.Lock()

    @property
    def program(self):
        return TaskProgram(self.groups, self.start)

    def start(self, chunk):
        for position in range(len(self.groups)):
            with self.lock:
                self.began[chunk, position] = len(self.steps)
                self.threads.add(threading.get_ident())
            if (chunk, position) == self.bad:
                raise ValueError("a kernel failed")
            time.sleep(self.seconds * random.random())
            with self.lock:
                self.steps.append((chunk, position))
            yield (chunk, position)


class Call:
    """Stands for a `LoopCall` of so many chunks."""

    def __init__(self, chunks, chunk=256, overlaps=False, batch=1):
        self.pasts = [chunk * i for i in range(chunks)]
        if overlaps:
            self.pasts[-1] -= chunk // 3
        self.overlaps, self.batch = overlaps, batch
        self.kept: dict[int, object] = {}

    def arguments(self, index):
        return (index,)

    def keep(self, index, outputs):
        self.kept[index] = outputs
