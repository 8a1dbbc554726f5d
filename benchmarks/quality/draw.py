"""The two pictures of the fidelity benchmark."""

from __future__ import annotations

from typing import Any

_MARKS = "osD^vPX*"


def draw_speedup(axes: Any, rows: list[dict[str, Any]], tokens: int) -> None:
    """KL against the speedup of a prefill, a colour a pattern."""
    own = _measured(rows, tokens, baseline=False)
    _scatter(axes, own, "speedup")
    axes.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"speedup over dense at {tokens} tokens, same runner")
    axes.legend(fontsize=8)


def draw_density(axes: Any, rows: list[dict[str, Any]], tokens: int) -> None:
    """KL against the share of pairs visited; crosses are the baselines."""
    _scatter(axes, _measured(rows, tokens, baseline=False), "density")
    for name, color in (("random columns", "black"), ("window", "grey")):
        others = _measured(rows, tokens, baseline=True)
        others = [r for r in others if r["config"].endswith(name)]
        places = [[r[k] for r in others] for k in ("density", "mean_kl")]
        axes.scatter(*places, marker="x", color=color, label=name)
    axes.set(xlabel=f"share of the causal pairs visited at {tokens} tokens")
    axes.legend(fontsize=8)


def _measured(
    rows: list[dict[str, Any]], tokens: int, baseline: bool
) -> list[dict[str, Any]]:
    return [
        r
        for r in rows
        if r["tokens"] == tokens and "mean_kl" in r and r["baseline"] == baseline
    ]


def _scatter(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    for index, name in enumerate(dict.fromkeys(r["pattern"] for r in rows)):
        own = sorted((r for r in rows if r["pattern"] == name), key=lambda r: r[key])
        places = [[r[k] for r in own] for k in (key, "mean_kl")]
        axes.plot(*places, marker=_MARKS[index % len(_MARKS)], label=name)
    axes.set(yscale="log", ylabel="mean KL to dense, nats (last 256 positions)")
