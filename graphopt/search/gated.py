"""Attention with a gate a KV head: part full, part streaming, in eager torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.errors import ModelError

_NAME = "graphopt-gates"
# What a model may ask of attention that the two kernels here do not do.
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")


class Gates(nn.Module):
    """``alpha`` [layers, KV heads] in [0, 1]; 1 is full attention.

    With ``mixed`` off every head is full, whatever its gate. ``sink``, ``recent``:
    tokens that a streaming head sees.
    """

    def __init__(self, layers: int, kv_heads: int, sink: int, recent: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(layers, kv_heads))
        self.sink, self.recent = sink, recent
        self.mixed = True

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Be transformers' attention function: result [B, S, Hq, D].

        out = alpha * full + (1 - alpha) * streaming (Xiao et al. 2024, equation 1).
        """
        _refuse(module, attention_mask, options)
        full = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        if self.mixed:
            mask = self._streaming(query.shape[2], query.device)
            near = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
            )
            gate = self.alpha[module.layer_idx].to(query.dtype)
            group = query.shape[1] // key.shape[1]
            gate = gate.repeat_interleave(group)[None, :, None, None]
            full = gate * full + (1 - gate) * near
        return full.transpose(1, 2).contiguous(), None

    def _streaming(self, tokens: int, device: torch.device) -> Tensor:
        row = torch.arange(tokens, device=device)[:, None]
        key = torch.arange(tokens, device=device)[None]
        return (key <= row) & ((key < self.sink) | (key > row - self.recent))


def _refuse(module: Any, mask: Tensor | None, options: dict[str, Any]) -> None:
    asked = [name for name in _UNKNOWN if options.get(name) is not None]
    if asked or mask is not None or getattr(module, "layer_idx", None) is None:
        what = ", ".join(asked) or ("a mask" if mask is not None else "no layer index")
        raise ModelError(
            f"{type(module).__name__} wants {what}: gates are trained for models of "
            "plain causal attention in every layer"
        )


@contextmanager
def gated(model: Any, gates: Gates) -> Iterator[None]:
    """Let ``model`` attend through ``gates`` while the body runs."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, gates.attend)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
