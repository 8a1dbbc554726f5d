"""``graphopt::combine_sample``: combine, filter and sample in one kernel.

`combine_logits`, then `sample_logits` of what it gives, with no vector of logits
written between or behind them: base [B, V0], one tuned and one reference [B, Vi] a
pair, the result int64 [B]. ``of_base``: the filter keeps tokens of the base's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.logits.combine import check_pairs, combine_logits
from graphopt.ops.logits.sample import check_rows, sample_reference

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "combine_sample(Tensor base, Tensor[] tuned, Tensor[] reference, Tensor weights, "
    "Tensor beta, Tensor? uniform=None, Tensor? temperature=None, "
    "Tensor? top_p=None, bool of_base=False) -> Tensor"
)


def combine_sample(
    base: Tensor,
    tuned: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    of_base: bool = False,
) -> Tensor:
    """Call ``graphopt::combine_sample``; see the module."""
    given = (base, list(tuned), list(reference), weights, beta)
    more = (uniform, temperature, top_p, of_base)
    return torch.ops.graphopt.combine_sample(*given, *more)


def combine_sample_reference(
    base: Tensor,
    tuned: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    of_base: bool = False,
) -> Tensor:
    """Combine and sample in plain ATen, on any device."""
    logits = combine_logits(base, tuned, reference, weights, beta)
    large = base if of_base else None
    return sample_reference(logits, uniform, temperature, top_p, large)


@torch.library.register_fake("graphopt::combine_sample", lib=_library)
def _fake(
    base: Tensor,
    tuned: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
    uniform: Tensor | None = None,
    *_: Any,
) -> Tensor:
    check_pairs(tuned, reference, weights)
    for logits in (base, *tuned, *reference):
        check_rows("combine_sample", logits, uniform)
    return base.new_empty(base.shape[:1], dtype=torch.int64)


@torch.library.impl(_library, "combine_sample", "CUDA")
def _cuda(*inputs: Any) -> Tensor:
    from graphopt.codegen.triton import combine as kernel

    return _run(kernel, *inputs)


@torch.library.impl(_library, "combine_sample", "CPU")
def _cpu(*inputs: Any) -> Tensor:
    from graphopt.codegen.cpp import combine as kernel

    return _run(kernel, *inputs)


def _run(
    kernel: Any,
    base: Tensor,
    tuned: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
    *rest: Any,
) -> Tensor:
    members = [base]
    for pair in zip(tuned, reference, strict=True):
        members += pair
    if not kernel.combines(members):
        return combine_sample_reference(base, tuned, reference, weights, beta, *rest)
    factors = (beta * weights).float()
    return kernel.combine_sample(members, factors, *rest)
