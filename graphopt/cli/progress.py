"""A progress bar for commands that take long."""

from __future__ import annotations

import sys
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


@contextmanager
def progress_bar() -> Iterator[Say]:
    """Show a bar on stderr, or a line a step where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, of: print(
            f"{what} ({done + 1} of {of})", file=sys.stderr, flush=True
        )
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, of: bar.update(
            task, description=what, completed=done, total=of
        )
