"""`EnsembleCache`: one transformers cache that holds a cache of each member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from graphopt.errors import ConfigError


class EnsembleCache(Cache):
    """The caches of an ensemble's members, the base's first.

    Members may hold different numbers of tokens, where their prompts differ; lengths
    asked of this object are those of the base. What is done to rows or tokens is done
    to every member.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__(layers=[])
        self.members = list(members)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the base's tokens."""
        return self.members[0].get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the most tokens that the base has room for, -1 for any number."""
        return self.members[0].get_max_length()

    @property
    def is_compileable(self) -> bool:
        """False: `generate` compiles nothing of its own accord."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Tell whether every member can forget its last tokens."""
        return all(getattr(m, "is_croppable", True) for m in self.members)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a negative number)."""
        self._each("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` [B]."""
        self._each("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._each("batch_select_indices", indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self._each("reset")

    def activate_past_recording(self) -> None:
        """Keep what cropping needs."""
        self._each("activate_past_recording")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ConfigError: each member writes to a cache of its own."""
        raise ConfigError(
            "EnsembleCache: a model wrote to the caches of all members; hand it to the "
            "Ensemble, or one of cache.members to a model"
        )

    def __len__(self) -> int:
        return len(self.members[0])

    def _each(self, method: str, *args: Any) -> None:
        for member in self.members:
            getattr(member, method)(*args)
