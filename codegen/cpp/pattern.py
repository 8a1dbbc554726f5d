"""Print the part of a C++ kernel that knows which keys a pattern lets a query see."""

from __future__ import annotations

from typing import Any

from graphopt.codegen.cpp.kernel import fill
from graphopt.codegen.predicates import KeyRun, intervals, key_runs, predicate
from graphopt.codegen.printers import to_cpp


def pattern_text(pattern: str) -> str:
    """Return the part of a kernel that knows which keys ``pattern`` lets in."""
    pred = predicate(pattern)
    runs = key_runs(pred)
    parts = {
        "PATTERN": pattern,
        "PREDICATE": to_cpp(pred.expr),
        "RUN_COUNT": str(len(runs)),
        "RUNS": "\n".join(_print_run(i, run) for i, run in enumerate(runs)),
        "VISIBLE": "\n".join(_print_visible(i) for i in intervals(pred)),
    }
    return fill("pattern.cpp.in", parts)


def _print_run(index: int, run: KeyRun) -> str:
    bounds = (run.begin, run.end, run.full_begin, run.full_end)
    values = ", ".join("kv_len" if b is None else to_cpp(b) for b in bounds)
    return f"  runs[{index}] = {{{values}}};"


def _print_visible(interval: Any) -> str:
    lower = "0" if interval.lower is None else to_cpp(interval.lower)
    upper = "kv_len" if interval.upper is None else to_cpp(interval.upper)
    return f"  visible({lower}, {upper});"
