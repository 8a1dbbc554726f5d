"""Print the source of the kernels of vertical-slash selection from their templates.

Templates are those of `graphopt.codegen.triton.emit`. ``%inputs``, ``%outputs``,
``%rows`` and ``%tile`` stand for what the two passes over the keys have in common.
"""

from __future__ import annotations

from functools import cache

import torch

from graphopt.codegen.predicates import BLOCK
from graphopt.codegen.triton.emit import _chunk_words, _Template, _template_text
from graphopt.codegen.triton.select_spec import CHUNK, ROWS, EstimateSpec
from graphopt.codegen.triton.spec import DTYPES

SPAN = 4096
"""Masses that one program of the choice reads at once."""


@cache
def emit_estimate(spec: EstimateSpec) -> str:
    """Return the source of the passes over the keys: it imports only Triton."""
    template = _template(spec)
    source = template.fill(_template_text("select_estimate.py.in"))
    inputs = template.fill(_template_text("select_inputs.py.in"))
    parts = {
        "inputs": inputs.replace("@OUTPUTS@\n", ""),
        "outputs": inputs.replace("@OUTPUTS@", "    masses_ptr,"),
        "rows": template.fill(_template_text("select_rows.py.in")),
        "tile": template.fill(_template_text("select_tile.py.in")),
    }
    for name, text in parts.items():
        source = source.replace(f"%{name}\n", text)
    return source


def _template(spec: EstimateSpec) -> _Template:
    single = spec.dtype == torch.float32
    unspecialized = ["rows", "kv_len", "query_offset"]
    unspecialized += [] if spec.has_key_mask else ["last"]
    flags = {
        "KEY_MASK" if spec.has_key_mask else "NO_MASK",
        "SOFTCAP" if spec.has_softcap else "NO_SOFTCAP",
        "SINGLE" if single else "HALF",
    }
    words = {
        "DTYPE": DTYPES[spec.dtype],
        "HEAD_DIM": str(spec.head_dim),
        "GROUP": str(spec.group),
        "ROWS": str(ROWS),
        "CHUNK": str(CHUNK),
        "UNSPECIALIZED": ", ".join(f'"{name}"' for name in unspecialized),
        "LAST_TYPE": _last_type(spec.has_key_mask),
    }
    inside = "inside[None, :]"
    head = _chunk_words(spec.head_dim, "d", "HEAD_DIM", inside, "partial")
    return _Template(frozenset(flags), words, () if single else tuple(head), ())


@cache
def emit_choice(has_key_mask: bool) -> str:
    """Return the source of the kernel that turns masses into lists."""
    sizes = ["kv_len", "run_capacity", "column_capacity"]
    unspecialized = sizes if has_key_mask else ["last", *sizes]
    words = {
        "BLOCK": str(BLOCK),
        "SPAN": str(SPAN),
        "UNSPECIALIZED": ", ".join(f'"{name}"' for name in unspecialized),
        "LAST_TYPE": _last_type(has_key_mask),
    }
    flags = frozenset({"KEY_MASK" if has_key_mask else "NO_MASK"})
    text = _template_text("select_choose.py.in")
    return _Template(flags, words, (), ()).fill(text)


def _last_type(has_key_mask: bool) -> str:
    return "torch.Tensor" if has_key_mask else "int"
