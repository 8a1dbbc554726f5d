"""What the rows of the fidelity benchmark come to."""

from __future__ import annotations

from typing import Any


def summary(
    rows: list[dict[str, Any]], lengths: tuple[int, ...], positions: int
) -> dict[str, Any]:
    """Return KL by method at its default, and what else the rows come to."""
    longest = max(lengths)
    kl = {
        r["config"]: r["mean_kl"]
        for r in rows
        if r["tokens"] == longest and r.get("default") and "mean_kl" in r
    }
    return {
        f"kl_{longest}": kl,
        "positions": positions,
        "behind_a_baseline": _behind(rows),
        f"best_speedup_{longest}_within_kl_0.05": _best_speedup(rows, longest),
    }


def _behind(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows whose KL is no lower than that of a baseline of their density.

    A row that visits everything is dense attention, and so is its baseline.
    """
    measured = [r for r in rows if "mean_kl" in r and r["density"] < 1]
    own = {(r["config"], r["tokens"]): r for r in measured if not r["baseline"]}
    found = set()
    for row in (r for r in measured if r["baseline"]):
        name, tokens = row["config"].split(" / ")[0], row["tokens"]
        if own[name, tokens]["mean_kl"] >= row["mean_kl"]:
            found.add(f"{row['config']} at {tokens}")
    return sorted(found)


def _best_speedup(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any] | None:
    near = [
        r
        for r in rows
        if r["tokens"] == tokens and r.get("mean_kl", 1.0) <= 0.05 and "speedup" in r
    ]
    if not near:
        return None
    best = max(near, key=lambda r: r["speedup"])
    return {key: best[key] for key in ("config", "speedup", "mean_kl", "density")}
