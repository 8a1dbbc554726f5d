"""Emulated fine-tuning as a logits processor: base + beta (tuned - reference).

One class for both of vLLM's model runners: the first hands lists of tokens that grow,
the second tensors by slot. Sources as in `graphopt.ops.logits.combine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1
from vllm.v1.sample.logits_processor import process_dict_updates

from graphopt.errors import ConfigError, GraphoptError
from graphopt.integrations.vllm.rows import Row, SmallModels
from graphopt.integrations.vllm.settings import check_backend, read_settings

try:
    from vllm.v1.worker.gpu.sample.logits_processor import (
        LogitsProcessor as RunnerV2,
    )
except ImportError:  # older than the second runner
    RunnerV2 = object

BETA = "graphopt_beta"  # a request's own, in its sampling parameters' extra_args

_Tokens = tuple[Row, list[int], list[int]]


class LogitArithmeticProcessor(RunnerV1, RunnerV2):
    """Adds to the served model's logits what small models have learnt.

    Without ``ensemble`` in the settings it does nothing. Every rank that samples gets
    the full logits and runs the small models; their caches lie outside vLLM's.
    """

    def __init__(self, vllm_config: Any, *more: Any) -> None:
        """``more``: (device, is_pin_memory) of runner 1, (req_states,) of runner 2."""
        settings = read_settings(vllm_config)
        check_backend(settings, vllm_config)
        pairs = settings.pairs
        self._states = more[0] if len(more) == 1 else None
        self._models: SmallModels | None = None
        self._requests: dict[int, _Tokens] = {}
        self._slots: dict[int, Row] = {}
        if pairs is not None and get_pp_group().is_last_rank:
            device = torch.device(more[0] if len(more) > 1 else more[0].device)
            dtype = vllm_config.model_config.dtype
            self._models = SmallModels(pairs, device, dtype)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ConfigError, a ValueError to vLLM, for a beta that is no number."""
        try:
            _beta(sampling_params)
        except GraphoptError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        """Tell whether the likeliest token stays the same."""
        return self._models is None

    def update_state(self, batch_update: Any) -> None:
        """Runner 1: take rows in, out and to other places."""
        process_dict_updates(self._requests, batch_update, self._new)

    def _new(
        self, params: Any, prompt: list[int] | None, output: list[int]
    ) -> _Tokens | None:
        if self._models is None:
            return None
        if prompt is None:
            raise GraphoptError(
                "ensemble: the small models need tokens, not embeddings"
            )
        return Row(_beta(params)), list(prompt), output

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Runner 2: a request enters a slot."""
        self._slots[req_idx] = Row(_beta(sampling_params))
        return self._models is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Return logits [rows, V] with every request's pairs combined in."""
        if self._models is None:
            return logits
        rows = self._by_list() if ctx is None else self._by_slot(ctx)
        for place, row, tokens in rows:
            combined = self._models.combine(logits[place], row, tokens)
            logits[place] = combined.to(logits.dtype)
        return logits

    def _by_list(self) -> list[tuple[int, Row, Sequence[int]]]:
        return [
            (place, row, [*prompt, *output])
            for place, (row, prompt, output) in self._requests.items()
        ]

    def _by_slot(self, ctx: Any) -> list[tuple[int, Row, Sequence[int]]]:
        held = self._states.all_token_ids.gpu  # type: ignore[union-attr]
        slots, lengths = ctx.expanded_idx_mapping.tolist(), (ctx.pos + 1).tolist()
        return [
            (place, self._slots[slot], held[slot, :length].tolist())
            for place, (slot, length) in enumerate(zip(slots, lengths, strict=True))
        ]


def _beta(params: Any) -> float | None:
    value = (getattr(params, "extra_args", None) or {}).get(BETA)
    if value is None or (isinstance(value, (int, float)) and value == value):
        return value
    raise ConfigError(f"extra_args['{BETA}'] is a number, not {value!r}")


__all__ = ["BETA", "LogitArithmeticProcessor"]
