"""The rows and the figures of the comparison with llama.cpp."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Seconds
from benchmarks.llama_cpp_worker import SIDES

DENSE, LLAMA_CPP = "inductor", "llama.cpp"
Row = dict[str, Any]


def row(context: int, phase: str, side: str, tokens: int, found: Seconds) -> Row:
    """Return a row: ``tokens`` read in ``phase`` at ``context`` by ``side``."""
    engines = {DENSE: DENSE} | dict.fromkeys(SIDES, LLAMA_CPP)
    return {
        "context": context,
        "phase": phase,
        "engine": engines.get(side, "graphopt"),
        "side": side,
        "seconds": round(found.best, 4),
        "tokens_per_second": round(tokens / found.best, 2),
        "utilisation": round(found.utilisation, 3),
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return the best graphopt side's tokens a second over llama.cpp's best.

    By phase and context, and the least of each phase; with the mean KL, at worst, of
    the decoding sides that these figures are of.
    """
    figures: dict[str, Any] = {}
    for phase in ("decode", "prefill"):
        contexts = sorted({r["context"] for r in rows})
        pairs = {
            c: [_best(rows, c, phase, engine) for engine in ("graphopt", LLAMA_CPP)]
            for c in contexts
        }
        ratios = {
            c: round(own["tokens_per_second"] / peer["tokens_per_second"], 3)
            for c, (own, peer) in pairs.items()
        }
        name = f"{phase}_vs_llamacpp"
        figures[name] = min(ratios.values())
        figures |= {f"{name}_{c}": ratio for c, ratio in ratios.items()}
        if phase == "decode":
            own, peer = zip(*pairs.values(), strict=True)
            figures["decode_kl"] = max(r["mean_kl"] for r in own)
            figures["llamacpp_kl"] = max(r["mean_kl"] for r in peer)
    return figures


def _best(rows: list[Row], context: int, phase: str, engine: str) -> Row:
    wanted = (context, phase, engine)
    found = [r for r in rows if (r["context"], r["phase"], r["engine"]) == wanted]
    return max(found, key=lambda r: r["tokens_per_second"])
