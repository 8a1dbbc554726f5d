"""The interpreter of the tests scans in the order it should, and catches overflow."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def compose(a, b, c, d):
    return a * c, c * b + d


@triton.jit
def scan(x_ptr, y_ptr, out_ptr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    place = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    pair = (tl.load(x_ptr + place), tl.load(y_ptr + place))
    _, out = tl.associative_scan(pair, AXIS, compose, REVERSE)
    tl.store(out_ptr + place, out)


@triton.jit
def add(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + 1)


def check_scan(axis, reverse):
    """Maps x -> a x + b, whose composition does not commute."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-3, 4, (2, 4, 8), generator=generator).float()
    out = torch.zeros(4, 8)
    scan[(1,)](a, b, out, axis, reverse)
    lines = [t.flip(axis) if reverse else t for t in (a, b)]
    expected, state = [], torch.zeros(8 if axis == 0 else 4)
    for one, other in zip(*(t.unbind(axis) for t in lines), strict=True):
        state = one * state + other
        expected.append(state)
    found = torch.stack(expected, axis)
    assert torch.equal(out, found.flip(axis) if reverse else found)


@pytest.mark.parametrize(("axis", "reverse"), [(0, False), (1, False), (1, True)])
def test_scans(interpreter, axis, reverse):
    interpreter.submit(check_scan, axis, reverse).result()


def check_overflow():
    out = torch.zeros(1, dtype=torch.int32)
    add[(1,)](torch.tensor([2**31 - 2], dtype=torch.int32), out)
    assert out == 2**31 - 1
    with pytest.raises(Exception, match="overflow of add"):
        add[(1,)](out, out)


def test_overflow(interpreter):
    interpreter.submit(check_overflow).result()
