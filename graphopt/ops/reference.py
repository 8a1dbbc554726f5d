"""References in plain ATen: the oracle of every kernel test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.codegen.predicates import BLOCK


def visible_keys(
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_len: int,
    kv_len: int,
    query_offset: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the boolean mask of a pattern, [H or 1, query_len, kv_len].

    Written out by hand and not derived from the predicates, to check these.
    """
    q = torch.arange(query_len, device=device)[None, :, None] + query_offset
    k = torch.arange(kv_len, device=device)[None, None, :]
    sinks = torch.tensor(list(sink), device=device)[:, None, None]
    windows = torch.tensor(list(window), device=device)[:, None, None]
    if pattern == "full":
        return (k >= 0).expand(1, query_len, kv_len)
    past = k <= q
    near = k > q - windows
    if pattern == "streaming":
        near = k // BLOCK > q // BLOCK - windows // BLOCK
    if pattern == "causal":
        return past
    if pattern == "sliding-window":
        return past & near
    return past & ((k < sinks) | near)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return attention over the keys of a static pattern, at least in float32.

    Shapes and arguments as `graphopt.ops.attention`; memory is [B, Hq, Sq, Skv].
    """
    mask = visible_keys(
        pattern, sink, window, query.shape[2], key.shape[2], query_offset, query.device
    )[None]
    return masked_attention(query, key, value, key_mask, mask, scale, softcap)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return attention where ``mask`` [B or 1, Hq or 1, Sq, Skv] and key_mask are true.

    At least in float32; rows without a key give zeros.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask.any(-1, True), 0.0)
    return (weights @ v).to(query.dtype).contiguous()
