"""Processes that torchrun started: they join, compare notes, and never wait for ever.

torchrun, torch.distributed and its collectives do the work; here is what turns a rank
that is lost, or that runs something else, into one message on every rank.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from graphopt.errors import GraphoptError, RanksError

# What gloo says where a peer is gone or late; other backends have exceptions for it.
_LOST = ("gloo", "connection closed", "connection reset", "monitoredbarrier")


@dataclass(frozen=True)
class Ranks:
    """This process is ``rank`` of ``size``; an exchange may take ``limit`` seconds.

    ``group`` is for what ranks tell one another, on any device.
    """

    rank: int
    size: int
    limit: float
    group: Any = None

    def gather(self, prepare: Callable[[], Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return what ``prepare`` gives on every rank, in order.

        A GraphoptError that it raises on some rank is raised on all of them; RanksError
        if a rank does not answer in time.
        """
        import torch.distributed as dist

        mine: Any
        try:
            mine = dict(prepare())
        except RanksError:
            raise  # there is no one left to tell
        except GraphoptError as error:
            mine = error
        with self.watching():
            limit = timedelta(seconds=self.limit)
            dist.monitored_barrier(self.group, limit, wait_all_ranks=True)
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, mine, self.group)
        _raise_first(found)
        return found

    def agreed(self, prepare: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what ``prepare`` gives; RanksError unless it is so on every rank."""
        found = self.gather(prepare)
        if text := differences(found):
            raise RanksError(
                f"the ranks do not run the same: {text}; start all of them with one "
                "command, config, model and installation"
            )
        return found[self.rank]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn what is raised where another rank is lost into RanksError."""
        try:
            yield
        except GraphoptError:
            raise
        except Exception as error:
            if not _is_lost(error):
                raise
            cause = str(error).strip().splitlines()[0]
            raise RanksError(
                f"rank {self.rank} of {self.size} lost another rank: it ended, or did "
                f"not answer for {self.limit:g} s; see its own error, or give slow "
                f"ranks longer with --rank-timeout ({cause})"
            ) from error


def _is_lost(error: Exception) -> bool:
    import torch.distributed as dist

    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in said for word in _LOST)


def _raise_first(found: Sequence[Any]) -> None:
    """Raise the first error among what the ranks said, and say whose it is."""
    failed = {i: x for i, x in enumerate(found) if isinstance(x, GraphoptError)}
    if not failed:
        return
    rank, error = next(iter(failed.items()))
    if len(failed) == len(found):
        raise error
    raise type(error)(f"rank {rank}: {error}")


def differences(found: Sequence[Mapping[str, Any]]) -> str:
    """Say which ranks differ in what; nothing where all are alike."""
    parts = []
    for key in dict.fromkeys(k for said in found for k in said):
        values: dict[str, list[int]] = {}
        for rank, said in enumerate(found):
            values.setdefault(str(said.get(key, "none")), []).append(rank)
        if len(values) > 1:
            told = (f"{value} on {_named(ranks)}" for value, ranks in values.items())
            parts.append(f"{key} is {', '.join(told)}")
    return "; ".join(parts)


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@contextmanager
def joined(limit: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end.

    ``limit``: seconds that an exchange may take, the wait for slower ranks included.
    RanksError where one is missing, dies, or is stopped because another one died.
    """
    import torch.distributed as dist

    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), limit)
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        with ranks.watching():
            yield replace(ranks, group=_join(limit))
            dist.destroy_process_group()
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is a message to print
        raise
    signal.signal(signal.SIGTERM, before)


def _join(limit: float) -> Any:
    """Make the group of all ranks; return one by gloo for what they say."""
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    wait = timedelta(seconds=limit)
    dist.init_process_group(backend, timeout=wait)
    return dist.new_group(timeout=wait, backend="gloo")


def _stopped(number: int, frame: Any) -> None:
    rank = os.environ.get("RANK", "?")
    raise RanksError(
        f"rank {rank}: stopped by torchrun because another rank ended; its error is "
        "the one to look at"
    )
