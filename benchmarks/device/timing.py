"""Milliseconds on a CUDA device, and rows that bear a side that cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

DEVICE = "cuda"
SIDES = ("graphopt", "cudnn", "flash", "flex", "inductor")
DENSE = ("cudnn", "flash", "inductor")
ROUNDS = 2
Row = dict[str, Any]
Run = Callable[[], object]


def row(what: str, pattern: str, tokens: int, found: Mapping[str, Any]) -> Row:
    """Return a row; ``speedup`` is over the fastest dense side that ran."""
    dense = min((found[n] for n in DENSE if found.get(n)), default=None)
    own = found.get("graphopt")
    return {
        "what": what,
        "pattern": pattern,
        "tokens": tokens,
        **{f"{n}_ms": found[n] and round(found[n], 4) for n in SIDES if n in found},
        "speedup": round(dense / own, 3) if dense and own else None,
    }


def compare(sides: Mapping[str, Run], label: str, notes: list[str]) -> dict[str, Any]:
    """Return each side's milliseconds, the best of rounds taken turn by turn.

    A side that fails, in whatever way, is None from then on and leaves a note.
    """
    best: dict[str, float | None] = {}
    for turn in range(1 + ROUNDS):
        for name, side in sides.items():
            if turn and best[name] is None:
                continue
            try:
                best[name] = _turn(side, best.get(name))
            except Exception as error:
                best[name] = None
                notes.append(f"{label}, {name}: {_reason(error)}")
            if best[name] is None:  # only now does nothing hold the memory of the try
                torch.cuda.empty_cache()
    return best


def _turn(side: Run, known: float | None) -> float:
    """Return the lower of ``known`` and a new time; the first turn compiles, tunes."""
    if known is None:
        side()
        return milliseconds(side, 1)
    return min(known, milliseconds(side, max(1, min(20, int(50 / known)))))


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:160]}"


def milliseconds(side: Run, calls: int) -> float:
    """Return the time of one of ``calls``, queued so that launches hide behind work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        side()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls
