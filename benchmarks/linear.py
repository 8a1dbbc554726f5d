"""How fast are linears over few rows, and over many in int8?

Few rows: BLAS (``F.linear``) against the dot products of `skinny-linear`, compiled by
Inductor, over enough matrices that none stays in a cache; GB/s counts every weight
once. Sizes are those of FFNs of 135 M to 8 B parameters, [N, K].

Many rows: ``F.linear`` in float32 against `shadow-outlier` (codes made by Inductor, the
int8 product, the shadow of 0.3 % of the values), the same without outliers, a scale a
token, and `onednn-linear` in float32, over the linears of a SmolLM2 layer; the speedup
is that of all seven linears together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, keep
from benchmarks.int8_linear import MANY, int8_rows, int8_summary
from graphopt.ops import skinny_linear

SHAPES = ((1536, 576), (576, 1536), (3072, 768), (8192, 2048), (2048, 8192))
ROWS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 300e6  # of weights that a run reads: no cache holds them


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every shape, type and number of rows; the summary has the worst cases."""
    shapes, rows_of = (SHAPES[:1], ROWS[:1]) if quick else (SHAPES, ROWS)
    rows = [
        _row(*shape, count, dtype, 10e6 if quick else _BYTES)
        for dtype in DTYPES
        for shape in shapes
        for count in rows_of
    ]
    many = int8_rows((16,) if quick else MANY)
    summary = {**_summary(rows), **int8_summary(many)}
    return keep("linear", [*rows, *many], summary, quick=quick)


@torch.no_grad()
def _row(
    outputs: int, width: int, count: int, dtype: torch.dtype, total: float
) -> dict[str, Any]:
    matrices = max(1, int(total / (outputs * width * dtype.itemsize)))
    weights = [torch.randn(outputs, width, dtype=dtype) for _ in range(matrices)]
    x = torch.randn(count, width, dtype=dtype)
    torch._dynamo.reset()
    skinny = torch.compile(skinny_linear, dynamic=False)
    sides = {
        "blas": lambda: [F.linear(x, w) for w in weights],
        "skinny": lambda: [skinny(x, w) for w in weights],
    }
    found = compare(sides, runs=3, warm=1)
    size = sum(w.nbytes for w in weights)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "outputs": outputs,
        "width": width,
        "rows": count,
        "blas_gb_s": round(size / found["blas"].best / 1e9, 1),
        "skinny_gb_s": round(size / found["skinny"].best / 1e9, 1),
        "speedup": round(found["blas"].best / found["skinny"].best, 2),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def worst(dtype: str, most: int) -> float:
        return min(
            r["speedup"] for r in rows if r["dtype"] == dtype and r["rows"] <= most
        )

    return {
        "float32_worst_of_4_rows": worst("float32", 4),
        "bfloat16_worst_of_1_row": worst("bfloat16", 1),
        "float16_worst_of_1_row": worst("float16", 1),
    }


if __name__ == "__main__":
    print(main()["summary"])
