"""Triton's interpreter (TRITON_INTERPRET=1): kernels in NumPy, on CPU tensors."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


def is_interpreted() -> bool:
    """Tell whether Triton interprets the kernels that are imported from now on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def repair_bfloat16_dot() -> None:
    """Make ``tl.dot`` of bfloat16 right in the interpreter.

    NumPy has no bfloat16, so the interpreter keeps the bits in uint16 and, as of Triton
    3.9, multiplies those integers. Widened operands give the products that a tensor
    core computes: exact, summed in float32.
    """
    import triton.language as tl

    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (_widen(interpreter, operand) for operand in (a, b))
        return original(self, a, b, *rest)

    builder.create_dot = create_dot


@cache
def repair_bfloat16_cast() -> None:
    """Make integers that become bfloat16 right in the interpreter.

    As of Triton 3.9 it keeps the integers where the bits belong.
    """
    import triton.language as tl

    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = original(self, source, tl.float32)
        return original(self, source, target)

    builder.cast_impl = cast_impl


def _widen(interpreter: Any, operand: Any) -> Any:
    import numpy as np
    import triton.language as tl

    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
