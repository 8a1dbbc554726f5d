"""What the rows of the vision-drop benchmark come to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.quality.vision_sides import DENSE, MUST, PRESET, THRESHOLD, TUNED

Rows = list[dict[str, Any]]


def summary(rows: Rows, canvases: int) -> dict[str, Any]:
    """Return accuracy by kept vision tokens and method, and who wins where.

    ``must_behind`` and ``must_tuned_behind``: the counts at which a baseline is right
    as often or more. ``accuracy_error`` is the standard error of a share near 0.8.
    """
    answered = [r for r in rows if "accuracy" in r]
    dense = next(r for r in answered if r["config"] == DENSE)
    by_count: dict[int, dict[str, float]] = {}
    for row in answered:
        if row["config"] != DENSE and "mode=threshold" not in row["passes"]:
            own = by_count.setdefault(round(row["kept"]), {})
            own[row["config"]] = row["accuracy"]
    return {
        "dense_accuracy": dense["accuracy"],
        "accuracy": {round(dense["kept"]): {DENSE: dense["accuracy"]}, **by_count},
        "accuracy_error": round((0.8 * 0.2 / canvases) ** 0.5, 4),
        "best_method": {kept: _best(own) for kept, own in by_count.items()},
        "must_behind": _behind(by_count, MUST),
        "must_tuned_behind": _behind(by_count, TUNED),
        "threshold": {
            row["asked"]: {k: row[k] for k in ("kept", "accuracy")}
            for row in answered
            if row["config"] == THRESHOLD
        },
        "preset": {
            row["config"].removeprefix(PRESET).strip(): {
                k: row[k] for k in ("kept", "accuracy")
            }
            for row in answered
            if row["config"].startswith(PRESET)
        },
        "gflop_share": _by_model(rows, "gflop_share"),
        "layers_gflop_share": _by_model(rows, "layers_gflop_share"),
        "time_ratio": _by_model([r for r in rows if r.get("config") == MUST], "ratio"),
    }


def _best(own: dict[str, float]) -> str:
    """Return the best of the methods that nothing was tuned for."""
    return max((name for name in own if name != TUNED), key=lambda name: own[name])


def _behind(by_count: dict[int, dict[str, float]], name: str) -> list[int]:
    return [kept for kept, own in by_count.items() if own[name] <= max(_baselines(own))]


def _baselines(own: dict[str, float]) -> Iterable[float]:
    return (value for name, value in own.items() if name not in (MUST, TUNED))


def _by_model(rows: Rows, figure: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if figure in row:
            found.setdefault(row["model"], {})[row["kept"]] = row[figure]
    return found
