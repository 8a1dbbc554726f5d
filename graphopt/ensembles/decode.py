"""The decoding loop whose tokens come from one fused operator, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from graphopt.errors import GraphoptError

Scalars = tuple[bool, Tensor | None, Tensor | None]
"""Whether tokens are drawn, temperature [] and top_p []."""


def sampling_of(processors: Any, config: Any, model: Any) -> Scalars | str:
    """Return how tokens are to be sampled, or why the fused operator cannot do it."""
    if config.return_dict_in_generate and (
        config.output_scores or config.output_logits
    ):
        return "scores or logits are asked for"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if config.prefill_chunk_size is not None:
        return "the prompt is read in chunks"
    temperature = top_p = None
    for item in processors:
        if type(item) is TemperatureLogitsWarper and config.do_sample:
            temperature = float(item.temperature)
        elif type(item) is TopPLogitsWarper and config.do_sample and not top_p:
            top_p = float(item.top_p)
            if item.min_tokens_to_keep != 1 or model.top_p is not None:
                return "top_p of several tokens, or behind the base's own filter"
        else:
            return f"{type(item).__name__} changes the logits"
    device = model.device
    scalars = (
        None if x is None else torch.tensor(x, device=device)
        for x in (temperature, top_p)
    )
    return (bool(config.do_sample), *scalars)  # type: ignore[return-value]


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    how: Scalars,
    stopping: Any,
    config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """Generate behind input_ids [B, S] as transformers' sampling loop does."""
    drawn, *scalars = how
    rows, device = input_ids.shape[0], input_ids.device
    pad = config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping)
    unfinished = torch.ones(rows, dtype=torch.long, device=device)
    inputs = _first_inputs(model, input_ids, config, model_kwargs)
    while True:
        numbers = torch.rand(rows, device=device) if drawn else None
        outputs = model(**inputs, sampling=(numbers, *scalars), return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        tokens = outputs.tokens
        if bool((tokens < 0).any()):
            raise GraphoptError(
                "ensemble: a row has no token to choose: all logits are minus "
                "infinity or some are no numbers; check the members' weights"
            )
        if ends:
            tokens = tokens * unfinished + pad.to(device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping(input_ids, None)
        if unfinished.max() == 0:
            break
        cached = model_kwargs.get("past_key_values") is not None
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if cached else None, **model_kwargs
        )
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    cache = model_kwargs.get("past_key_values")
    return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)


def _first_inputs(
    model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A cache may hold tokens already; input_ids then has them too, or not."""
    cache, length = model_kwargs.get("past_key_values"), None
    if cache is not None and (past := cache.get_seq_length()):
        mask = model_kwargs.get("attention_mask")
        known = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
        length = input_ids.shape[1] - past if known == input_ids.shape[1] else None
    return model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=length,
        is_first_iteration=True,
        **model_kwargs,
    )
