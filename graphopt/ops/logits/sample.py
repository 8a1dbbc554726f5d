"""``graphopt::sample_logits``: a token of each row, likeliest or drawn.

logits [B, V]; the result is int64 [B]. Without ``uniform`` it is the likeliest token,
of equals the first. With ``uniform`` float32 [B], numbers from 0 to 1 that the caller
draws (and seeds), it is the token in whose part of the cumulative distribution of
logits / temperature the number falls. temperature [] > 0 and top_p [] from 0 to 1 are
float32 tensors, so that another value compiles nothing.

``top_p`` keeps the smallest set of likeliest tokens that holds so much of the mass;
tokens of equal probability stay or go together. It is that of logits / temperature, as
proxy-tuning and transformers have it; with ``large`` [B, >= V] it is that of those
logits, at temperature 1: the filter says which tokens are plausible at all, and must
not tighten as sampling grows sharper.

A row without a finite logit, or with one that is no number, gives -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "sample_logits(Tensor logits, Tensor? uniform=None, Tensor? temperature=None, "
    "Tensor? top_p=None, Tensor? large=None) -> Tensor"
)


def sample_logits(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    large: Tensor | None = None,
) -> Tensor:
    """Call ``graphopt::sample_logits``; see the module."""
    return torch.ops.graphopt.sample_logits(logits, uniform, temperature, top_p, large)


def nucleus(logits: Tensor, top_p: Tensor | float) -> Tensor:
    """Return which tokens the filter keeps, bool [..., V]."""
    masses = logits.softmax(-1)
    order = masses.sort(dim=-1, descending=True).values
    before = order.cumsum(-1) - order
    inside = (before < top_p) | (before == 0)
    least = torch.where(inside, order, torch.inf).amin(-1, keepdim=True)
    return masses >= least


def sample_reference(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    large: Tensor | None = None,
) -> Tensor:
    """Sample in plain ATen, on any device; arguments as in the module."""
    if uniform is None:
        temperature = None  # could only round two values to one
    scores = filtered(logits, temperature, top_p, large)
    if uniform is None:
        chosen = scores.argmax(-1)
    else:
        chosen = draw(scores.softmax(-1).double(), uniform)
    return torch.where(scores.amax(-1).isfinite(), chosen, -1)


def filtered(
    logits: Tensor,
    temperature: Tensor | None,
    top_p: Tensor | None,
    large: Tensor | None,
) -> Tensor:
    """Return logits / temperature, minus infinity for tokens that are filtered out."""
    scores = logits if temperature is None else logits / temperature
    if top_p is None:
        return scores
    judged = scores if large is None else large[..., : scores.shape[-1]].to(scores)
    return scores.masked_fill(~nucleus(judged, top_p), -torch.inf)


def draw(odds: Tensor, uniform: Tensor) -> Tensor:
    """Return the token of each row of odds [B, V] in whose part uniform [B] falls."""
    total = odds.cumsum(-1)
    target = uniform.double()[:, None] * total[:, -1:]
    chosen = (total <= target).sum(-1)
    # Rounding may put the target at the total: the last token that can be drawn.
    places = torch.arange(odds.shape[-1], device=odds.device)
    return chosen.minimum(torch.where(odds > 0, places, 0).amax(-1))


def _sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    large: Tensor | None = None,
) -> Tensor:
    if large is not None and top_p is not None:
        return sample_reference(logits, uniform, temperature, top_p, large)
    none = logits.new_zeros(0, dtype=torch.float32)
    return torch.ops.graphopt.combine_sample(
        logits, [], [], none, none.sum(), uniform, temperature, top_p
    )


torch.library.impl(_library, "sample_logits", "CompositeExplicitAutograd")(_sample)


@torch.library.register_fake("graphopt::sample_logits", lib=_library)
def _fake(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    large: Tensor | None = None,
) -> Tensor:
    check_rows("sample_logits", logits, uniform)
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def check_rows(name: str, logits: Tensor, uniform: Tensor | None) -> None:
    """Raise ValueError for logits or numbers of another shape."""
    if logits.ndim != 2 or (uniform is not None and uniform.ndim != 1):
        shape = None if uniform is None else tuple(uniform.shape)
        raise ValueError(
            f"graphopt.{name}: logits {tuple(logits.shape)} and uniform {shape}; "
            "give [B, V] and [B]"
        )
