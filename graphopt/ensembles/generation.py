"""What makes an ensemble a model that transformers' `generate` drives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin

from graphopt.ensembles.cache import EnsembleCache
from graphopt.ensembles.decode import decode, sampling_of
from graphopt.errors import ConfigError
from graphopt.remarks import Remark, missed

_PLAIN_CACHES = (None, "dynamic")


@dataclass(frozen=True)
class Prompts:
    """Prompts of members that read another than the base's: (ids, mask), by place.

    ``length``: the tokens of the base's prompt; those behind it all members share.
    """

    length: int
    own: tuple[tuple[Tensor, Tensor | None] | None, ...]

    def repeated(self, times: int) -> Prompts:
        """Return each row ``times`` times, one behind another."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(times, 0)

        own = [None if o is None else (rows(o[0]), rows(o[1])) for o in self.own]
        return Prompts(self.length, tuple(own))  # type: ignore[arg-type]


class EnsembleGeneration(GenerationMixin):
    """`generate` for an ensemble: caches and prompts of each member, fused sampling."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    input_modalities = ("text",)
    members: Any
    pairs: tuple[tuple[int, int], ...]
    config: Any
    generation_config: Any
    remarks: list[Remark]

    @property
    def device(self) -> torch.device:
        """Return where the members lie."""
        return self.members[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Return the base's type."""
        return self.members[0].dtype

    def can_generate(self) -> bool:
        """Return True."""
        return True

    def is_remote_code(self) -> bool:
        """Return False."""
        return False

    def get_experts_implementation(self) -> Mapping[str, str]:
        """Return how mixtures of experts run, as the base says it."""
        found = getattr(self.members[0], "get_experts_implementation", dict)
        return found()

    def get_input_embeddings(self) -> Any:
        """Return the base's."""
        return self.members[0].get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the base's."""
        return self.members[0].get_output_embeddings()

    def new_cache(self) -> EnsembleCache:
        """Return an empty cache of each member."""
        configs = (m.config.get_text_config(decoder=True) for m in self.members)
        return EnsembleCache([DynamicCache(config=c) for c in configs])

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        tuned_input_ids: Any = None,
        tuned_attention_mask: Any = None,
        reference_input_ids: Any = None,
        reference_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does, with its arguments and result.

        ``tuned_input_ids`` [B, S'] and ``tuned_attention_mask``: a prompt of their own
        for the tuned models (a chat template, say), or a list with one a pair, None
        for the base's; the same for references. Pad on the left.

        Greedy decoding and plain sampling (temperature and top_p; ``top_k=0``) take
        tokens from one fused operator; ``seed`` or ``torch.manual_seed`` repeats them,
        but transformers' own loop draws others. Whatever else `generate` is asked for
        (processors, beams, scores) works on the ensemble's logits; `remarks` says why.
        Raises ConfigError for prompts that do not fit the members.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        own: dict[int, tuple[Tensor, Tensor | None]] = {}
        sides = (
            (0, "tuned", tuned_input_ids, tuned_attention_mask),
            (1, "reference", reference_input_ids, reference_attention_mask),
        )
        for side, name, prompts, masks in sides:
            places = [pair[side] for pair in self.pairs]
            _add_prompts(own, name, places, prompts, masks)
        if own and ids is None:
            raise ConfigError("ensemble.generate: give the base's input_ids too")
        if own:
            assert ids is not None
            found = tuple(own.get(i) for i in range(len(self.members)))
            kwargs["prompts"] = Prompts(ids.shape[1], found)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: EnsembleCache | None = None,
        prompts: Prompts | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return what `forward` gets in one step, each member's inputs among it."""
        found: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            **kwargs,
        )
        if prompts is not None:
            new = input_ids[:, prompts.length :]
            caches = [None] * len(prompts.own)
            if past_key_values is not None:
                caches = past_key_values.members
            found["members"] = tuple(
                None if own is None else _inputs(own, new, cache)
                for own, cache in zip(prompts.own, caches, strict=True)
            )
        return found

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, **kwargs
        )
        if model_kwargs.get("prompts") is not None and expand_size > 1:
            model_kwargs["prompts"] = model_kwargs["prompts"].repeated(expand_size)
        return ids, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        given, kind = model_kwargs.get("past_key_values"), None
        kind = generation_config.cache_implementation
        if kind not in _PLAIN_CACHES:
            raise ConfigError(
                f"ensemble.generate: cache_implementation = '{kind}' makes one model's "
                "cache; give past_key_values = EnsembleCache([one for each member])"
            )
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        how = sampling_of(logits_processor, generation_config, self)
        self.remarks = []
        if isinstance(how, str) or synced_gpus:
            reason = how if isinstance(how, str) else "synced_gpus"
            self.remarks = [missed("sampling", "not-fused", reason)]
            more = (stopping_criteria, generation_config, synced_gpus, streamer)
            return super()._sample(input_ids, logits_processor, *more, **model_kwargs)
        more = (stopping_criteria, generation_config, streamer, model_kwargs)
        return decode(self, input_ids, how, *more)


def _add_prompts(
    own: dict[int, tuple[Tensor, Tensor | None]],
    name: str,
    places: Sequence[int],
    prompts: Any,
    masks: Any,
) -> None:
    """Add the prompts of one side's members to ``own``, by their place."""
    if prompts is None:
        return
    lists = [
        list(x) if isinstance(x, (list, tuple)) else [x] * len(places)
        for x in (prompts, masks)
    ]
    if any(len(x) != len(places) for x in lists):
        raise ConfigError(
            f"ensemble.generate: {name}_input_ids has {len(lists[0])} prompts and "
            f"{len(lists[1])} masks for {len(places)} pairs; give one each"
        )
    for place, ids, mask in zip(places, *lists, strict=True):
        if ids is None:
            continue
        if place == 0 or own.get(place, (ids, mask))[0] is not ids:
            raise ConfigError(
                f"ensemble.generate: {name}_input_ids gives a second prompt to a model "
                "that runs once; make it a member of its own: "
                "copy.copy(model) shares its weights"
            )
        padded = mask is not None and not bool((mask == 1).all())
        own[place] = (ids, mask if padded else None)


def _inputs(
    own: tuple[Tensor, Tensor | None], new: Tensor, cache: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a member's ids, mask and positions of the tokens it has not read."""
    prompt, mask = own
    past = 0 if cache is None else cache.get_seq_length()
    ids = torch.cat([prompt, new], 1)
    if mask is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    else:
        mask = torch.cat([mask, mask.new_ones(new.shape)], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    tail = (slice(None), slice(past, None))
    return ids[tail].contiguous(), mask, positions[tail].contiguous()
