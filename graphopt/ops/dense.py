"""When an operator is plain causal attention, and ATen's kernel for it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def is_dense_causal(
    query: Tensor, key: Tensor, key_mask: Tensor | None, offset: int, softcap: float
) -> bool:
    """Plain causal prefill is ATen's: an unrewritten model has the same bits there."""
    fresh = offset == 0 and query.shape[2] == key.shape[2]
    return key_mask is None and fresh and softcap == 0.0


def dense_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return causal attention [B, Hq, S, Dv] by ATen's kernel, contiguous."""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out.contiguous()
