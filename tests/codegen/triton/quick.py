"""Triton's interpreter with fewer calls of Python, for tests that wait for it.

As of Triton 3.9 a scan with a function of its own takes one element at a time, and each
call of a function in a kernel patches the whole language again, and each sum of
integers is checked for overflow by a dozen operations of the language.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any


def quicken() -> None:
    """Make scans and calls of this process's interpreter quick, with equal results."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    interpreter.ScanOps.generic_scan = _scan
    _patch_once_a_launch(interpreter)
    _look_kinds_up_once(interpreter)
    type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = _fits


def _scan(self: Any, values: tuple[Any, ...]) -> list[Any]:
    """Scan in doubling steps over whole arrays: like a GPU, it takes associativity."""
    import numpy as np

    shape, kinds = values[0].handle.data.shape, [value.dtype for value in values]
    place = np.indices(shape)[self.axis]
    own, step = [value.handle.data for value in values], 1
    while step < shape[self.axis]:
        before = [np.roll(data, step, self.axis) for data in own]
        pair = zip([*before, *own], kinds * 2, strict=True)
        found = self.combine_fn.fn(*(self.to_tensor(d, kind) for d, kind in pair))
        found = found if isinstance(found, tuple) else (found,)
        whole = zip(own, found, strict=True)
        own = [np.where(place < step, d, new.handle.data) for d, new in whole]
        step *= 2
    return [self.to_tensor(d, kind) for d, kind in zip(own, kinds, strict=True)]


def _patch_once_a_launch(interpreter: Any) -> None:
    """What a launch has patched stays so until it ends."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def patch_once(fn: Any) -> Any:
        modules = [m for m in fn.__globals__.values() if inspect.ismodule(m)]
        languages = tuple(sorted({id(m) for m in modules if m in _languages()}))
        if languages in patched:
            return interpreter._LangPatchScope()
        patched.add(languages)
        return patch(fn)

    def launch_patched(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched


def _languages() -> list[Any]:
    import triton.language as tl

    return [tl, tl.core]


def _look_kinds_up_once(interpreter: Any) -> None:
    """The interpreter makes a table of all data types for each value."""
    original = interpreter._get_np_dtype
    look_up = functools.cache(original)

    def kind_of(kind: Any) -> Any:
        scalar = kind.element_ty if kind.is_block() else kind
        # Pointers cannot be hashed.
        return original(kind) if scalar.is_ptr() else look_up(scalar)

    interpreter._get_np_dtype = kind_of


def _fits(self: Any, one: Any, other: Any, operation: Any) -> None:
    """Raise where integers overflow, as Triton's own check does."""
    import numpy as np

    if one.type.scalar.int_bitwidth >= 64:
        return
    name = operation.__name__
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    wide = exact(*(x.handle.data.astype(np.int64) for x in (one, other)))
    kind = one.type.scalar
    least, most = kind.get_int_min_value(), kind.get_int_max_value()
    assert least <= wide.min() and wide.max() <= most, f"overflow of {name}"
