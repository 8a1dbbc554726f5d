"""How far two models' next-token distributions agree."""

from __future__ import annotations

from typing import Any

import torch


def agreement(reference: Any, other: Any) -> dict[str, float]:
    """Compare logits [steps, vocab] of the same tokens.

    ``top1_agreement`` is the share of steps with the same best token; ``mean_kl`` is
    the mean of KL(reference || other), in nats.
    """
    first, second = (torch.as_tensor(x).double() for x in (reference, other))
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = first.argmax(-1) == second.argmax(-1)
    return {
        "top1_agreement": float(same.double().mean()),
        "mean_kl": float(kl.mean().clamp_min(0.0)),
    }
