"""What do linears gain that skip the weights of small inputs or closed neurons?

`graphopt.ops.sparse_linear` (TEAL) and `graphopt.ops.sparse_up` (CATS) at several
sparsities against BLAS (``F.linear``) and, on a CPU, against the dot products of
`skinny-linear` compiled by Inductor, over enough matrices that none stays in a cache.
GB/s counts the weights that are read, so that it can be held against memory's rate;
speedups count time. On a GPU each side is one CUDA graph. Sizes are the linears of
SmolLM2-135M and Llama-3-8B, [N, K].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, keep
from graphopt.ops import skinny_linear

SMOLLM2 = ((1536, 576), (576, 1536), (576, 576), (192, 576))
LLAMA = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
SPARSITIES = (0.0, 0.25, 0.5, 0.75)
ROWS = (1, 4)
_BYTES = 300e6  # of weights that a run reads: no cache holds them

linear = torch.ops.graphopt.sparse_linear.default
up = torch.ops.graphopt.sparse_up.default
Sides = dict[str, Callable[[], object]]


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every shape, type and number of rows; the summary has 50 %, one row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32, torch.bfloat16)
    shapes = SMOLLM2[:1] if quick else SMOLLM2 + LLAMA
    rows = [
        _row(shape, count, dtype, device, 10e6 if quick else _BYTES)
        for dtype in dtypes
        for shape in shapes
        for count in (ROWS[:1] if quick else ROWS)
    ]
    return keep("sparse-linear", rows, _summary(rows), quick=quick)


@torch.no_grad()
def _row(
    shape: tuple[int, int], count: int, dtype: torch.dtype, device: str, total: float
) -> dict[str, Any]:
    matrices = max(1, int(total / (math.prod(shape) * dtype.itemsize)))
    weights = [torch.randn(shape, dtype=dtype, device=device) for _ in range(matrices)]
    x = torch.randn(count, shape[1], dtype=dtype, device=device)
    gate = torch.randn(count, shape[0], dtype=dtype, device=device)
    sides: Sides = {"blas": lambda: [F.linear(x, w) for w in weights]}
    if device == "cpu":
        torch._dynamo.reset()
        skinny = torch.compile(skinny_linear, dynamic=False)
        sides["skinny"] = lambda: [skinny(x, w) for w in weights]
    for sparsity in SPARSITIES:
        at, neurons = (_threshold(v, sparsity) for v in (x, gate))
        sides[f"teal_{sparsity:g}"] = lambda t=at: [
            linear(x, w, None, t) for w in weights
        ]
        sides[f"cats_{sparsity:g}"] = lambda t=neurons: [
            up(x, w, None, gate, t) for w in weights
        ]
    if device == "cuda":
        sides = {name: _captured(side) for name, side in sides.items()}
    found = compare(sides, runs=3, warm=1)
    best = {name: seconds.best for name, seconds in found.items()}
    facts = {"dtype": str(dtype).removeprefix("torch."), "outputs": shape[0]}
    facts |= {"width": shape[1], "rows": count, "matrices": matrices}
    return facts | _figures(best, x, gate, sum(w.nbytes for w in weights))


def _captured(side: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph: decoding has no time for launches."""
    side()  # compiles kernels and turns weights
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return graph.replay


def _threshold(values: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the magnitude up to which that share of ``values`` lies."""
    order = values.float().abs().flatten().sort().values
    least = order[round(sparsity * len(order)) - 1] if sparsity else order[0] * 0
    return least.clone()


def _figures(
    best: dict[str, float], x: torch.Tensor, gate: torch.Tensor, size: int
) -> dict[str, Any]:
    dense = {name: best[name] for name in ("blas", "skinny") if name in best}
    found: dict[str, Any] = {
        f"{name}_gb_s": round(size / seconds / 1e9, 1)
        for name, seconds in dense.items()
    }
    for sparsity in SPARSITIES:
        for method, values in (("teal", x), ("cats", gate)):
            name = f"{method}_{sparsity:g}"
            kept = (values.float().abs() > _threshold(values, sparsity)).any(0)
            read = size * float(kept.float().mean())
            found[f"{name}_gb_s"] = round(read / best[name] / 1e9, 1)
            found[f"{name}_speedup"] = round(min(dense.values()) / best[name], 2)
    return found


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Speedups over the faster dense product, of one row and half of the weights."""
    return {
        f"{method}_{r['dtype']}_{r['outputs']}x{r['width']}": r[f"{method}_0.5_speedup"]
        for r in rows
        if r["rows"] == 1
        for method in ("teal", "cats")
    }


if __name__ == "__main__":
    print(main()["summary"])
