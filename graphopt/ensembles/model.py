"""`Ensemble`: the module that runs all members and combines their logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphopt.ensembles.cache import EnsembleCache
from graphopt.ensembles.generation import EnsembleGeneration
from graphopt.errors import ConfigError
from graphopt.ops.logits import nucleus, sample_logits

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
"""A member's own input_ids, attention_mask and position_ids."""
Sampling = tuple[Tensor | None, Tensor | None, Tensor | None]
"""uniform [B] (None: the likeliest token), temperature [] and top_p []."""


@dataclass
class EnsembleOutput(CausalLMOutputWithPast):
    """``logits`` [B, S, V] float32, or ``tokens`` int64 [B] where it sampled."""

    tokens: Tensor | None = None


class Ensemble(EnsembleGeneration, nn.Module):
    """A causal language model made of several; `graphopt.ensemble` makes one.

    ``weights`` float32 [pairs] and ``beta`` float32 [] are buffers: to write to them
    compiles nothing anew. ``top_p``, a buffer or None, filters by the base's tokens.
    """

    weights: Tensor
    beta: Tensor
    top_p: Tensor | None

    def __init__(
        self,
        members: Sequence[nn.Module],
        pairs: Sequence[tuple[int, int]],
        weights: Tensor,
        beta: float,
        top_p: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.pairs = tuple(pairs)
        base: Any = members[0]
        device = next(base.parameters()).device
        share = None if top_p is None else torch.tensor(float(top_p), device=device)
        self.register_buffer("weights", weights.float().to(device), persistent=False)
        self.register_buffer(
            "beta", torch.tensor(float(beta), device=device), persistent=False
        )
        self.register_buffer("top_p", share, persistent=False)
        self.config = base.config
        self.generation_config = copy.deepcopy(base.generation_config)
        self._accepted = tuple(
            frozenset(inspect.signature(m.forward).parameters) for m in members
        )
        self.train(base.training)

    @property
    def base(self) -> Any:
        """Return the large model."""
        return self.members[0]

    @property
    def vocabulary(self) -> int:
        """Return how many tokens all members have."""
        return min(m.config.get_text_config().vocab_size for m in self.members)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        members: Sequence[Inputs | None] | None = None,
        sampling: Sampling | None = None,
        return_dict: bool | None = None,
    ) -> EnsembleOutput:
        """Return the combined logits of input_ids [B, S], or a token of each row.

        ``members``: the inputs of members that read another prompt, by their place;
        None for those that read the base's. ``sampling`` samples from the last
        position, and no logits come back. Raises ConfigError for another kind of cache.
        """
        keep = 1 if sampling is not None else logits_to_keep
        if members is not None and not isinstance(keep, Tensor) and keep == 0:
            raise ConfigError(
                "Ensemble: prompts of their own end together, so say how many "
                "positions before the end are wanted: logits_to_keep=1"
            )
        cache = self._cache(past_key_values, use_cache)
        shared = (input_ids, attention_mask, position_ids)
        logits = []
        for place in range(len(self.members)):
            own = None if members is None else members[place]
            logits.append(self._logits(place, own or shared, cache, keep))
        if sampling is None:
            return EnsembleOutput(logits=self.combine(logits), past_key_values=cache)
        tokens = self.sample([rows[:, -1] for rows in logits], sampling)
        return EnsembleOutput(tokens=tokens, past_key_values=cache)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place as `torch.nn.Module.compile` does.

        Under ``backend="graphopt"`` without a pass config, `logit-arithmetic` is one of
        the passes.
        """
        options = kwargs.get("options") or {}
        own = kwargs.get("backend") == "graphopt" or "config" in options
        if own and options.get("config") is None:
            passes = [{"name": "logit-arithmetic"}]
            kwargs["options"] = {**options, "config": {"pass": passes}}
        super().compile(*args, **kwargs)

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the ensemble's logits [..., V] from its members', [..., Vi] each."""
        combined = self._combined(logits)
        if self.top_p is None:
            return combined
        base = logits[0][..., : combined.shape[-1]].float()
        return combined.masked_fill(~nucleus(base, self.top_p), -torch.inf)

    def sample(self, logits: Sequence[Tensor], sampling: Sampling) -> Tensor:
        """Return a token of each row, int64 [B], from the members' logits [B, Vi]."""
        uniform, temperature, top_p = sampling
        large = None
        if self.top_p is not None:
            top_p, large = self.top_p, logits[0]
        combined = self._combined(logits)
        return sample_logits(combined, uniform, temperature, top_p, large)

    def _combined(self, logits: Sequence[Tensor]) -> Tensor:
        tuned = [logits[t] for t, _ in self.pairs]
        reference = [logits[r] for _, r in self.pairs]
        # The operator itself: a graph then has it as one node.
        return torch.ops.graphopt.combine_logits(
            logits[0], tuned, reference, self.weights, self.beta
        )

    def _logits(
        self, place: int, inputs: Inputs, cache: EnsembleCache | None, keep: Any
    ) -> Tensor:
        """Run one member; positions and what to keep go to those that take them."""
        ids, mask, positions = inputs
        given = {"position_ids": positions, "logits_to_keep": keep}
        more = {k: v for k, v in given.items() if k in self._accepted[place]}
        past = None if cache is None else cache.members[place]
        found = self.members[place](
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past,
            use_cache=cache is not None,
            return_dict=True,
            **more,
        ).logits
        if "logits_to_keep" in more or isinstance(keep, Tensor) or keep == 0:
            return found
        return found[:, -keep:]

    def _cache(
        self, cache: EnsembleCache | None, use_cache: bool | None
    ) -> EnsembleCache | None:
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            return self.new_cache() if wanted and not self.training else None
        if not isinstance(cache, EnsembleCache):
            raise ConfigError(
                f"Ensemble: past_key_values is a {type(cache).__name__}; make it with "
                "ensemble.new_cache(), or EnsembleCache([one for each member])"
            )
        return cache
