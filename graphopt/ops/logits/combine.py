"""``graphopt::combine_logits``: base + beta * sum_i w_i (tuned_i - reference_i).

Emulated fine-tuning (Mitchell et al. 2023, equation 4) and proxy-tuning (Liu et al.
2024, equation 2): raw logits serve, since softmax forgets what all tokens have in
common. base [..., V0], tuned and reference one tensor [..., Vi] a pair; weights [P]
and beta [] are float32. Vocabularies of different padding are cut to the tokens that
all have; the result [..., V] is float32 (float64 for float64 logits).

Tokens that a model excludes: minus infinity of the base stays; a reference that is
minus infinity says nothing of its token, so that pair counts as zero there, whatever
the tuned model says; a tuned model alone excludes it where its factor is positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "combine_logits(Tensor base, Tensor[] tuned, Tensor[] reference, Tensor weights, "
    "Tensor beta) -> Tensor"
)


def combine_logits(
    base: Tensor,
    tuned: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
) -> Tensor:
    """Return the combined logits; see the module.

    Terms are added to one another before they are to the base, so that the order of two
    pairs does not change a bit. Raises ValueError for pairs that are not whole.
    """
    check_pairs(tuned, reference, weights)
    size = shared_vocabulary(base, tuned, reference)
    result = widened(base, size)
    terms = [
        _term(widened(t, size), widened(r, size), beta * weights[i])
        for i, (t, r) in enumerate(zip(tuned, reference, strict=True))
    ]
    return result + sum(terms[1:], terms[0]) if terms else result


def shared_vocabulary(
    base: Tensor, tuned: Sequence[Tensor], reference: Sequence[Tensor]
) -> int:
    """Return how many tokens all the logits have."""
    return min(logits.shape[-1] for logits in (base, *tuned, *reference))


def widened(logits: Tensor, size: int) -> Tensor:
    """Return the first ``size`` logits in float32, or in their own wider type."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[..., :size].to(wide)


def check_pairs(
    tuned: Sequence[Tensor], reference: Sequence[Tensor], weights: Tensor
) -> None:
    """Raise ValueError unless there is a reference and a weight for each tuned."""
    if not len(tuned) == len(reference) == weights.shape[0]:
        raise ValueError(
            f"graphopt.combine_logits: {len(tuned)} tuned and {len(reference)} "
            f"reference logits with {weights.shape[0]} weights; give one of each a pair"
        )


def _term(tuned: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    never = -torch.inf
    unknown = reference == never
    excluded = (tuned == never) & ~unknown
    difference = torch.where(unknown | excluded, 0.0, tuned - reference)
    excluding = torch.where(factor > 0, never, 0.0).to(tuned.dtype)
    return torch.where(excluded, excluding, factor * difference)


# Decomposed wherever it is traced, so that it has derivatives and fuses.
torch.library.impl(_library, "combine_logits", "CompositeImplicitAutograd")(
    combine_logits
)
