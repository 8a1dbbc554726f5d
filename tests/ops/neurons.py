"""What the operators on neurons must give, token by token."""

from __future__ import annotations

import torch

from graphopt.ops.neurons import PARTS


def own_by_hand(values, parts, absolute):
    """The neurons of one token [F], sorted in Python; floats are compared exactly."""
    keys = [abs(v) if absolute else v for v in values.double().tolist()]
    active = [i for i, key in enumerate(keys) if key > 0]
    wanted = -(-len(active) * parts // PARTS)
    return sorted(active, key=lambda i: (-keys[i], i))[:wanted]


def counts_by_hand(inner, mask, rows, parts, absolute=False, weight=1):
    """Counts int32 [rows, F] of inner [B, S, F]; mask bool [B, S] or None."""
    batch, tokens, neurons = inner.shape
    counts = torch.zeros(rows, neurons, dtype=torch.int32)
    for b in range(batch):
        for s in range(tokens):
            if mask is None or mask[b, s]:
                own = own_by_hand(inner[b, s], parts, absolute)
                counts[b if rows > 1 else 0, own] += weight
    return counts


def activations(batch, tokens, neurons, dtype=torch.float32, coarse=False, seed=0):
    """SiLU(gate) * up of random numbers; ``coarse``: of few values, most of them ties.

    One token is all zero, one all negative, one has infinities and no numbers.
    """
    torch.manual_seed(seed)
    gate, up = torch.randn(2, batch, tokens, neurons)
    found = torch.nn.functional.silu(gate) * up
    found = (found * 4).round() / 4 if coarse else found
    found[0, 0] = 0.0
    if tokens > 2:
        found[-1, 1] = -found[-1, 1].abs() - 1
        found[-1, 2, :3] = torch.tensor([float("inf"), float("nan"), float("-inf")])
    return found.to(dtype)
