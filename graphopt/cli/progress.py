"""A progress bar for commands that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Say = Callable[[str, int, int], None]
_SECONDS = 5.0  # between lines of a log


@contextmanager
def progress_bar() -> Iterator[Say]:
    """Show a bar on stderr, or a line every few seconds where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, of: bar.update(
            task, description=what, completed=done, total=of
        )


def _lines() -> Say:
    """Return what prints the first step, the last, and one every few seconds."""
    due = 0.0

    def say(what: str, done: int, of: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due or done + 1 == of:
            print(f"{what} ({done + 1} of {of})", file=sys.stderr, flush=True)
            due = now + _SECONDS

    return say
