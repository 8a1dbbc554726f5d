"""Print which tiles a block of query rows visits, from the key runs of a predicate.

Every run splits into leading partial tiles, full tiles and trailing partial tiles. The
full tiles of all runs are numbered through and visited by one loop, the partial ones
by another: a loop per run would drain the load pipeline at each of its ends and keep
the addresses of every loop in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from graphopt.codegen.predicates import KeyRun
from graphopt.codegen.printers import to_triton


@dataclass(frozen=True)
class Section:
    """Consecutive tiles: names of the first key, the end, the first tile's number."""

    begin: str
    end: str
    number: str


@dataclass(frozen=True)
class Bounds:
    """The lines that compute all bounds, and the sections that the two loops visit."""

    lines: tuple[str, ...]
    full: tuple[Section, ...]
    partial: tuple[Section, ...]


@cache
def print_bounds(runs: tuple[KeyRun, ...]) -> Bounds:
    """Return the bounds of ``runs`` as text over q_first, q_last, sink and window.

    Kept, because sympy takes longer than all the rest of an emission and the kernels of
    a pattern share their bounds.
    """
    lines: list[str] = []
    full: list[tuple[str, str]] = []
    partial: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        lead = sympy.simplify(run.full_begin - run.begin) != 0
        lines += _print_run(index, run, lead)
        partial += [(f"begin_{index}", f"lead_end_{index}")] if lead else []
        full.append((f"full_{index}", f"full_end_{index}"))
        partial.append((f"full_end_{index}", f"end_{index}"))
    lines += _count("full", full)
    lines += _count("partial", partial)
    return Bounds(tuple(lines), _sections("full", full), _sections("partial", partial))


def _print_run(index: int, run: KeyRun, lead: bool) -> Iterator[str]:
    upper = "" if run.end is None else f" < {run.end}"
    yield f"# Run {index}: {run.begin} <= k{upper}"
    yield f"begin_{index} = {to_triton(sympy.Max(run.begin, 0))}"
    yield f"end_{index} = {_upper(run.end, 'kv_len')}"
    if lead:
        yield f"lead = tl.maximum({to_triton(run.full_begin)} - begin_{index}, 0)"
        yield f"full_{index} = begin_{index} + tl.cdiv(lead, BLOCK_N) * BLOCK_N"
        yield f"lead_end_{index} = tl.minimum(full_{index}, end_{index})"
    else:
        yield f"full_{index} = begin_{index}"
    shared = _upper(run.full_end, f"end_{index}")
    yield f"full_len = tl.maximum({shared} - full_{index}, 0)"
    yield f"full_end_{index} = full_{index} + full_len // BLOCK_N * BLOCK_N"


def _upper(bound: Any, limit: str) -> str:
    return limit if bound is None else f"tl.minimum({limit}, {to_triton(bound)})"


def _count(kind: str, parts: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the running count of tiles: ``<kind>_<i>`` starts part i."""
    total = "0"
    for index, (begin, end) in enumerate(parts):
        tiles = f"tl.cdiv(tl.maximum({end} - {begin}, 0), BLOCK_N)"
        name = (
            f"{kind}_tiles" if index == len(parts) - 1 else f"{kind}_from_{index + 1}"
        )
        yield f"{name} = {tiles}" if total == "0" else f"{name} = {total} + {tiles}"
        total = name


def _sections(kind: str, parts: Sequence[tuple[str, str]]) -> tuple[Section, ...]:
    return tuple(
        Section(begin, end, f"{kind}_from_{index}" if index else "0")
        for index, (begin, end) in enumerate(parts)
    )


def print_start(kind: str, sections: Sequence[Section]) -> str:
    """Return the lines that turn a tile's number into its first key and its end."""
    lines = []
    for section in sections:
        if section.number == "0":
            lines.append(f"start = {section.begin} + tile * BLOCK_N")
            lines.append(f"end = {section.end}")
            continue
        start = f"{section.begin} + (tile - {section.number}) * BLOCK_N"
        lines.append(f"start = tl.where(tile < {section.number}, start, {start})")
        lines.append(f"end = tl.where(tile < {section.number}, end, {section.end})")
    if kind == "full":
        lines = [line for line in lines if not line.startswith("end")]
    return "\n".join(" " * 8 + line for line in lines)
