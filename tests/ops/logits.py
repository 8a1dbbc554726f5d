"""Random logits of several models, and samples in float64."""

from __future__ import annotations

import torch

from graphopt.ops.logits.fused import combine_sample_reference


def members(rows, vocab, pairs, dtype=torch.float32, seed=0, scale=3.0):
    """Base, tuned and reference logits, weights and beta; padding differs."""
    generator = torch.Generator().manual_seed(seed)

    def logits(extra=0):
        found = scale * torch.randn(rows, vocab + extra, generator=generator)
        return found.to(dtype)

    tuned = [logits(3 * i) for i in range(pairs)]
    reference = [logits(1) for _ in range(pairs)]
    weights = torch.rand(pairs, generator=generator) + 0.2
    return logits(2), tuned, reference, weights, torch.tensor(0.8)


def wide(given):
    """The same in float64."""
    base, tuned, reference, weights, beta = given
    parts = ([t.double() for t in side] for side in (tuned, reference))
    return base.double(), *parts, weights.double(), beta.double()


def oracle(given, *how):
    """Tokens in float64."""
    return combine_sample_reference(*wide(given), *how)


def settings(rows, drawn, temperature, top_p, of_base):
    """What `combine_sample` takes behind the logits; numbers far from any edge."""
    numbers = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    scalars = (None if x is None else torch.tensor(x) for x in (temperature, top_p))
    return numbers if drawn else None, *scalars, of_base
