"""Print the source of the kernels of int8 linears from their templates.

Templates are those of `graphopt.codegen.triton.emit`; ``%head|`` repeats a line for
each row that has sums of its own, or for each part of a value but the first.
"""

from __future__ import annotations

from functools import cache

import torch

from graphopt.codegen.triton.emit import _Template, _template_text
from graphopt.codegen.triton.int8_spec import LIST_ROWS, ProductSpec, RowsSpec
from graphopt.codegen.triton.spec import DTYPES

# Steps of the first and the last code, and bytes of a row that are read at once.
LEAST, MOST, BLOCK_K = -128, 127, 128
# Numbers of a type that make up a float32: 8 bits of each, or 11.
_PARTS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}


@cache
def emit_product(spec: ProductSpec) -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    parts = _PARTS[spec.dtype]
    chosen = {
        "SHADOW": spec.has_shadow,
        "BIAS": spec.has_bias,
        "TOKEN": spec.by_token,
        "STATIC": not spec.by_token,
        "SINGLE": parts == 1,
        "PIECES": parts > 1,
    }
    words = {
        "DTYPE": DTYPES[spec.dtype],
        "LIST_ROWS": str(LIST_ROWS),
        "BLOCK_K": str(BLOCK_K),
        "LEAST": str(LEAST),
        "MOST": str(MOST),
    }
    rest = tuple({"mask": ""} for _ in range(parts - 1))
    flags = frozenset(name for name, on in chosen.items() if on)
    template = _Template(flags, words, rest, ())
    source = template.fill(_template_text("int8_product.py.in"))
    for name in ("lists", "shadow"):
        text = template.fill(_template_text(f"int8_{name}.py.in"))
        source = source.replace(f"%{name}\n", text if spec.has_shadow else "")
    return source


@cache
def emit_rows(spec: RowsSpec) -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    matrix = spec.is_matrix
    chosen = {"MATRIX": matrix, "VECTOR": not matrix, "BIAS": spec.has_bias}
    bias = " + bias[:, None]" if matrix else " + bias"
    words = {
        "ROWS": str(spec.rows),
        "DTYPE": DTYPES[spec.dtype],
        "PLUS_BIAS": bias if spec.has_bias else "",
    }
    own = 0 if matrix else spec.rows
    rows = tuple({"i": row, "mask": ""} for row in range(own))
    flags = frozenset(name for name, on in chosen.items() if on)
    return _Template(flags, words, rows, ()).fill(_template_text("int8_rows.py.in"))
