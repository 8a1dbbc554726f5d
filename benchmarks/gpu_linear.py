"""Linears on a GPU at Llama-3-8B's shapes: int8 over many rows, and over few.

``int8`` rows: ``graphopt`` codes the activations (one compiled kernel) and multiplies,
with outliers in `OUTLIERS` of the channels, in `BEYOND` of the rows each; ``coded`` has
its codes already, as linears have that share an input; ``plain`` has no shadow.
``gemv`` rows: CUDA graphs over matrices that no cache holds, per matrix: ``graphopt``
reads int8 weights, ``sparse`` skips the columns of half of the inputs (TEAL). Both
against cuBLAS in bfloat16 (``F.linear``); GB/s counts the bytes of the whole weight as
a side keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device.timing import DEVICE, Row, Run, compare
from graphopt.ops.int8 import cuda_rows  # noqa: F401  (registers its kernel)
from graphopt.ops.int8.codes import MOST
from graphopt.ops.int8.cuda import codes_of

# [N, K]; the key's and the value's projection are [1024, 4096] each.
SHAPES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
OUTLIERS, BEYOND = 0.002, 0.05
_BYTES = 1e9  # of bfloat16 weights that a replay reads

shadow = torch.ops.graphopt.shadow_linear.default


@torch.compile(dynamic=True)
def quantize(x: Tensor, settings: Tensor) -> Tensor:
    return torch.ops.graphopt.quantize(x, settings)


def linear_rows(
    lengths: tuple[int, ...], counts: tuple[int, ...], notes: list[str]
) -> Iterator[Row]:
    """Compare every shape over so many rows: ``lengths`` in int8, ``counts`` few."""
    for name in SHAPES:
        for tokens in lengths:
            yield int8_row(name, tokens, notes)
        for count in counts:
            yield gemv_row(name, count, notes)
        torch.cuda.empty_cache()


@torch.no_grad()
def int8_row(name: str, tokens: int, notes: list[str]) -> Row:
    torch.manual_seed(0)
    outputs, width = SHAPES[name]
    weight = torch.nn.Parameter(_random(outputs, width), requires_grad=False)
    x = _with_outliers(_random(tokens, width))
    settings, without = (torch.tensor([4 / MOST, s], device=DEVICE) for s in (1.0, 0.0))
    codes = quantize(x, settings)

    def product(codes: Tensor, settings: Tensor) -> Tensor:
        return shadow(x, weight, None, codes, settings, 0.0, 1, False, False)

    sides: dict[str, Run] = {
        "graphopt": lambda: product(quantize(x, settings), settings),
        "coded": lambda: product(codes, settings),
        "plain": lambda: product(codes, without),
        "cublas": lambda: F.linear(x, weight),
    }
    times = compare(sides, f"int8 {name} over {tokens} rows", notes)
    return _row("int8", name, tokens, times) | {"tops": _rate(tokens, weight, times)}


@torch.no_grad()
def gemv_row(name: str, count: int, notes: list[str]) -> Row:
    torch.manual_seed(0)
    shape = SHAPES[name]
    copies = max(1, round(_BYTES / (2 * math.prod(shape))))
    weights = [
        torch.nn.Parameter(_random(*shape), requires_grad=False) for _ in range(copies)
    ]
    coded = [codes_of(weight, False, False) for weight in weights]
    x = _random(count, shape[1])
    half = x.float().abs().quantile(0.5)
    few, sparse = (
        torch.ops.graphopt.weight_only_rows.default,
        torch.ops.graphopt.sparse_linear.default,
    )
    sides: dict[str, Run] = {
        "graphopt": lambda: [few(x, codes, None, scales) for codes, scales in coded],
        "sparse": lambda: [sparse(x, weight, None, half) for weight in weights],
        "cublas": lambda: [F.linear(x, weight) for weight in weights],
    }
    sides = {side: _Captured(run) for side, run in sides.items()}
    times = compare(sides, f"gemv {name} over {count} rows", notes)
    times = {side: ms and ms / copies for side, ms in times.items()}
    rates = {f"{side}_gb_s": _bandwidth(side, shape, ms) for side, ms in times.items()}
    return _row("gemv", name, count, times) | rates


class _Captured:
    """The replay of a CUDA graph, captured at the first call: it may fail there."""

    def __init__(self, run: Run) -> None:
        self._run, self._graph = run, None

    def __call__(self) -> None:
        if self._graph is None:
            self._run()  # compiles, tunes and prepares weights
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()
        self._graph.replay()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def _with_outliers(x: Tensor) -> Tensor:
    """Return ``x`` [M, K] within the codes, but for some values of some channels."""
    rows, width = x.shape
    hot = torch.randperm(width, device=DEVICE)[: max(1, round(OUTLIERS * width))]
    beyond = torch.zeros_like(x, dtype=torch.bool)
    beyond[:, hot] = torch.rand(rows, len(hot), device=DEVICE) < BEYOND
    return torch.where(beyond, 10 * x.sign(), x.clamp(-4, 4))


def _row(what: str, name: str, rows: int, times: Mapping[str, Any]) -> Row:
    own, dense = times["graphopt"], times["cublas"]
    sizes = dict(zip(("outputs", "width"), SHAPES[name], strict=True))
    return {
        **{"what": what, "pattern": name, "tokens": rows, **sizes},
        **{f"{side}_ms": ms and round(ms, 4) for side, ms in times.items()},
        "speedup": round(dense / own, 3) if own and dense else None,
    }


def _rate(rows: int, weight: Tensor, times: Mapping[str, Any]) -> float | None:
    """Return 10^12 operations a second with the shadow."""
    own = times["graphopt"]
    return round(2 * rows * weight.numel() / own / 1e9, 1) if own else None


def _bandwidth(side: str, shape: tuple[int, int], ms: float | None) -> float | None:
    size = math.prod(shape) * (1 if side == "graphopt" else 2)
    return round(size / ms / 1e6, 1) if ms else None


def linear_summary(rows: list[Row]) -> dict[str, Any]:
    """Return the speedups of every shape, over the most rows and over one."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["what"] == "int8":
            found[f"int8_speedup_{row['pattern']}"] = row["speedup"]
        if row["what"] == "gemv" and row["tokens"] == 1:
            found[f"gemv_speedup_{row['pattern']}"] = row["speedup"]
    return found
