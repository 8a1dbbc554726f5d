"""The many rows of `benchmarks.linear`: float32 and int8, of a SmolLM2 layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compare
from graphopt import ops as _registered  # noqa: F401

MANY = (256, 2048)
# [N, K] and how many of them a layer has.
LAYER = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
# Of the values 0.3 % are outliers, in 3 % of the channels (Xu et al. 2025).
_OUTLIERS, _HOT = 0.003, 0.03
_CAPACITY, _ROOM, _RANGE = 0.05, 144, 4.0
_PER_RUN = 8  # layers: their weights together are not in a cache
_ops = torch.ops.graphopt


@torch.no_grad()
def int8_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each shape and number of rows: seconds by side, of one call."""
    torch._dynamo.reset()
    return [
        {"outputs": n, "width": k, "rows": count, **_seconds(n, k, count)}
        for count in counts
        for n, k in LAYER
    ]


def _seconds(outputs: int, width: int, count: int) -> dict[str, float]:
    weights = [torch.nn.Parameter(torch.randn(outputs, width)) for _ in range(_PER_RUN)]
    x = torch.randn(count, width).clamp(-_RANGE, _RANGE)
    hot = torch.rand(width) < _HOT
    beyond = torch.where(hot & (torch.rand_like(x) < _OUTLIERS / _HOT), 3 * _RANGE, x)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": lambda w: F.linear(x, w),
        "onednn": lambda w: _ops.onednn_linear(x, w),
        "shadow": lambda w: _coded(beyond, w, _settings(1.0)),
        "no outlier": lambda w: _coded(x, w, _settings(1.0)),
        "pruned": lambda w: _coded(x, w, _settings(0.0)),
        "dynamic": lambda w: _ops.int8_linear(x, w, None, False, False),
    }
    runs = {name: _repeated(side, weights) for name, side in sides.items()}
    found = compare(runs, runs=5, warm=1)
    return {name: found[name].best / _PER_RUN for name in runs}


def _repeated(
    side: Callable[[Tensor], Tensor], weights: list[Tensor]
) -> Callable[[], list[Tensor]]:
    return lambda: [side(weight) for weight in weights]


def _settings(shadow: float) -> Tensor:
    return torch.tensor([_RANGE / 127, shadow])


_quantize: Any = torch.compile(lambda x, row: _ops.quantize(x, row), dynamic=False)


def _coded(x: Tensor, weight: Tensor, row: Tensor) -> Tensor:
    codes = _quantize(x, row)
    args = (codes, row, _CAPACITY, _ROOM, False, False)
    result: Tensor = _ops.shadow_linear(x, weight, None, *args)
    return result


def int8_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the speedup of all linears of a layer over float32, by number of rows."""
    summary = {}
    for count in sorted({row["rows"] for row in rows}):
        parts = [row for row in rows if row["rows"] == count]
        for key, name in (("", "shadow"), ("_pruned", "pruned"), ("_onednn", "onednn")):
            total = _total(parts, "float32") / _total(parts, name)
            summary[f"speedup{key}_{count}"] = round(total, 3)
    return summary


def _total(rows: list[dict[str, Any]], side: str) -> float:
    return sum(row[side] * LAYER[row["outputs"], row["width"]] for row in rows)
