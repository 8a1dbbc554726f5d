"""``graphopt::choose_neurons``, ``nearest_neurons``: which neurons decoding computes.

CoreInfer (Wang et al. 2024): the neurons that most tokens of the prompt have among
their own (definition 2, stability), or those of the cluster of texts whose counts are
nearest to the prompt's (similarity). Of equal counts the first neurons are chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("choose_neurons(Tensor counts, Tensor(a!) indices) -> ()")
_library.define(
    "nearest_neurons(Tensor counts, Tensor shares, Tensor(a!) indices) -> ()"
)
_MULTIPLE = 16  # rows of gathered weights begin where vectors and tensor cores load


def kept_neurons(neurons: int, keep: float) -> int:
    """Return how many of ``neurons`` the share ``keep`` is, in whole groups of 16."""
    wanted = math.ceil(round(keep * neurons, 6))
    return min(neurons, -(-wanted // _MULTIPLE) * _MULTIPLE)


def best_neurons(counts: Tensor, number: int) -> Tensor:
    """Return the ``number`` neurons with the greatest counts [R, F], int64 [R, C]."""
    order = counts.sort(dim=1, descending=True, stable=True).indices
    return order[:, :number].sort(dim=1).values


def choose_neurons(counts: Tensor, indices: Tensor) -> None:
    """Write the neurons with the greatest counts to ``indices``."""
    indices.copy_(best_neurons(counts, indices.shape[1]))


def nearest_neurons(counts: Tensor, shares: Tensor, indices: Tensor) -> None:
    """Write the best neurons of the nearest of K clusters to ``indices``.

    shares [K, F] float32: what part of a cluster's counts each neuron has. Distances
    are Euclidean, between shares; of equal ones the first cluster is nearest.
    """
    total = counts.sum(1, keepdim=True).clamp(min=1)
    away = (counts / total)[:, None] - shares
    nearest = away.square().sum(2).argmin(1)
    indices.copy_(best_neurons(shares, indices.shape[1])[nearest])


def _implement(kind: str) -> None:
    torch.library.impl(_library, "choose_neurons", kind)(choose_neurons)
    torch.library.impl(_library, "nearest_neurons", kind)(nearest_neurons)


_implement("CompositeExplicitAutograd")


@torch.library.register_fake("graphopt::choose_neurons", lib=_library)
def _choose(counts: Tensor, indices: Tensor) -> None:
    _check(counts, indices)


@torch.library.register_fake("graphopt::nearest_neurons", lib=_library)
def _nearest(counts: Tensor, shares: Tensor, indices: Tensor) -> None:
    _check(counts, indices)
    if shares.shape[1] != counts.shape[1]:
        raise ValueError(
            f"graphopt.nearest_neurons: clusters of {shares.shape[1]} neurons for "
            f"counts of {counts.shape[1]}"
        )


def _check(counts: Tensor, indices: Tensor) -> None:
    if counts.shape[0] != indices.shape[0] or indices.shape[1] > counts.shape[1]:
        raise ValueError(
            f"graphopt.choose_neurons: indices {tuple(indices.shape)} do not fit "
            f"counts {tuple(counts.shape)}"
        )
