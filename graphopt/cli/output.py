"""What commands print: tables and JSON to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def stdout() -> Console:
    """Return the console of results; wide in a pipe, so that lines stay whole."""
    return Console(
        width=None if sys.stdout.isatty() else _pipe_width(), highlight=False
    )


def _pipe_width() -> int:
    return int(os.environ.get("COLUMNS", 160))


def print_error(message: str) -> None:
    """Print one error message to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.capture() as word:
        console.print("[bold red]error:[/]", end=" ")
    # In one write: other ranks may be printing theirs.
    sys.stderr.write(f"{word.get()}{message}\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """Print ``value`` as one line of JSON, the last line of the command."""
    print(json.dumps(value, default=str), flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Print a table; numbers are right-aligned and cut to four digits."""
    rows = [list(row) for row in rows]
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(
            column, justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row), style=None)
    stdout().print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3g}"
    return escape(str(value))


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show ``text``, a spinner and the elapsed time on stderr while the body runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{text} ...", file=sys.stderr, flush=True)
        yield
        return
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(text)
        yield
