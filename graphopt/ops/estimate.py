"""Where the last queries look: attention mass by column and by distance."""

from __future__ import annotations

import torch
from torch import Tensor

LAST_QUERIES = 64


def last_queries_mass(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_offset: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return the mass by column and by distance, each float32 [B, Hq, Skv].

    The softmax of the last 64 real queries of each batch row (padding at the end is
    passed over), summed over these queries: ``columns[..., k]`` is the mass on key k,
    ``distances[..., d]`` that on keys d tokens before the query.
    """
    positions = last_positions(query, key_mask, query_offset)
    rows = (positions - query_offset)[:, None, :, None]
    rows = rows.expand(-1, query.shape[1], -1, query.shape[-1])
    scores = _scores(query.gather(2, rows), key, scale, softcap)
    place = torch.arange(key.shape[2], device=key.device)
    seen = (place <= positions[..., None])[:, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    mass = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    columns = mass.sum(2)
    source = positions[..., None] - place
    along = mass.gather(3, source.clamp_min(0)[:, None].expand_as(mass))
    return columns, along.masked_fill((source < 0)[:, None], 0.0).sum(2)


def last_positions(query: Tensor, key_mask: Tensor | None, query_offset: int) -> Tensor:
    """Return the positions of the last real queries, [B, up to 64], ascending."""
    batch, _, queries, _ = query.shape
    count = min(LAST_QUERIES, queries)
    last = torch.full((batch,), query_offset + queries - 1, device=query.device)
    if key_mask is not None:
        place = torch.arange(key_mask.shape[1], device=query.device)
        real = place.masked_fill(~key_mask, 0).amax(-1)
        last = real.clamp(min=query_offset + count - 1)
    return last[:, None] - torch.arange(count - 1, -1, -1, device=query.device)


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """Return scores [B, Hq, rows, Skv] in float32, key heads not repeated."""
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    stacked = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    scores = (stacked.float() * scale) @ key.float().mT
    scores = scores.view(batch, heads, rows, key.shape[2])
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
