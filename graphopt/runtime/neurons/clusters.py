"""Clusters of texts by the neurons that they activate, made offline, in a file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from graphopt.errors import ConfigError

_FORMAT = "graphopt-clusters-1"
_ROUNDS = 100


@dataclass(frozen=True)
class Clusters:
    """For each layer ``shares`` [K, F]: what part of a cluster's counts a neuron has.

    ``about``: where they come from (model, text, seed, ...).
    """

    shares: dict[int, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write the shares beside ``path``, as .safetensors, and TOML about them."""
        path = Path(path)
        tensors = {str(i): x.contiguous() for i, x in self.shares.items()}
        save_file(tensors, path.with_suffix(".safetensors"))
        about = {"format": _FORMAT, **self.about, "layers": sorted(self.shares)}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in about.items()]
        path.write_text("".join(lines), encoding="utf-8")


def read_clusters(path: str | Path) -> Clusters:
    """Read what `Clusters.write` wrote; ConfigError for another file."""
    path = Path(path)
    try:
        about = tomllib.loads(path.read_text(encoding="utf-8"))
        if about.get("format") != _FORMAT:
            raise ConfigError(f"{path}: no file of clusters ({_FORMAT})")
        stored = load_file(path.with_suffix(".safetensors"))
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot read the clusters: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    # Arrays: a file of tensors cannot be read where all tensors are fake (explain).
    shares = {int(name): torch.tensor(array) for name, array in stored.items()}
    return Clusters(shares, about)


def cluster_texts(counts: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the shares [K, F] of ``clusters`` clusters of texts.

    counts [N, F] of N texts in one layer. K-means (Lloyd) on shares of counts; the
    first centres are drawn far from each other (k-means++) with ``seed``, and a cluster
    that loses its last text takes the one that is farthest from its own. The same
    numbers come out every time.
    """
    texts = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    centres = _far_apart(texts, clusters, torch.Generator().manual_seed(seed))
    nearest = None
    for _ in range(_ROUNDS):
        away = _away(texts, centres)
        found = _none_empty(away.argmin(1), away)
        if nearest is not None and torch.equal(found, nearest):
            break
        nearest = found
        centres = torch.stack([texts[found == k].mean(0) for k in range(clusters)])
    return centres.float()


def _far_apart(texts: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(texts), (), generator=generator))]
    while len(chosen) < clusters:
        away = _away(texts, texts[chosen]).amin(1)
        away[chosen] = 0.0
        # Texts that are all alike are as far from each other as any.
        away = away if away.any() else torch.ones_like(away)
        chosen.append(int(torch.multinomial(away, 1, generator=generator)))
    return texts[chosen]


def _none_empty(found: Tensor, away: Tensor) -> Tensor:
    """Give each cluster without a text the one that is farthest from its own."""
    for lost in range(away.shape[1]):
        if not (found == lost).any():
            own = away.gather(1, found[:, None])[:, 0]
            shared = found.bincount(minlength=away.shape[1])[found] > 1
            found[torch.where(shared, own, -1.0).argmax()] = lost
    return found


def _away(texts: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances [N, K]."""
    return torch.cdist(texts, centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2
