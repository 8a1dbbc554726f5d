"""What blocks of keys are worth to blocks of query rows, in plain ATen.

- ``antidiagonal`` (XAttention, Xu et al. 2025): in the strided map, element (i, j) is
  the sum of the scores on an antidiagonal of the square of ``stride`` queries and keys
  there; a block's value is the softmax mass of its part of that map.
- ``block-sparse`` (MInference, Jiang et al. 2024): the product of the blocks' mean
  query and mean key.

Keys that ``key_mask`` hides count as absent, and so do query rows at their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Grid:
    """The row blocks of a call against the blocks of its keys; sizes in tokens."""

    query_len: int
    kv_len: int
    offset: int
    block: int

    @property
    def rows(self) -> int:
        """Return the number of row blocks."""
        return -(-self.query_len // self.block)

    @property
    def keys(self) -> int:
        """Return the number of key blocks."""
        return -(-self.kv_len // self.block)

    def seen(self, rows: range, device: torch.device) -> Tensor:
        """Return which key blocks some row of a row block sees, [len(rows), K]."""
        return self._starts(device) <= self._last(rows, device)[:, None]

    def forced(self, rows: range, device: torch.device) -> Tensor:
        """Return what is always visited: the first block and the rows' own keys."""
        start, first = self._starts(device), self._first(rows, device)[:, None]
        own = (start == 0) | (start + self.block > first)
        return own & self.seen(rows, device)

    def _starts(self, device: torch.device) -> Tensor:
        return torch.arange(self.keys, device=device) * self.block

    def _first(self, rows: range, device: torch.device) -> Tensor:
        place = torch.arange(rows.start, rows.stop, device=device)
        return place * self.block + self.offset

    def _last(self, rows: range, device: torch.device) -> Tensor:
        end = self._first(rows, device) + self.block
        return end.clamp(max=self.query_len + self.offset) - 1


def real_rows(grid: Grid, key_mask: Tensor | None, query: Tensor) -> Tensor:
    """Return which query rows are no padding, [B or 1, rows * block]."""
    length = grid.rows * grid.block
    if key_mask is None:
        return (torch.arange(length, device=query.device) < grid.query_len)[None]
    own = key_mask[:, grid.offset : grid.offset + grid.query_len]
    return pad(own, (0, length - own.shape[1]))


def real_keys(grid: Grid, key_mask: Tensor | None, key: Tensor) -> Tensor:
    """Return which keys are there and visible, [B or 1, keys * block]."""
    if key_mask is None:
        key_mask = torch.ones(1, grid.kv_len, dtype=torch.bool, device=key.device)
    return pad(key_mask, (0, grid.keys * grid.block - grid.kv_len))


def zero_padded(values: Tensor, real: Tensor) -> Tensor:
    """Return [B, H, n, D] at ``real``'s length, zero where it is false."""
    values = pad(values, (0, 0, 0, real.shape[1] - values.shape[2]))
    return values.masked_fill(~real[:, None, :, None], 0.0)


def antidiagonal_mass(
    query: Tensor,
    key: Tensor,
    real: tuple[Tensor, Tensor],
    grid: Grid,
    rows: range,
    stride: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return the mass of each block, float32 [B, H, len(rows), K].

    ``query``, ``key``: [B, H, Sq', D], [B, Hkv, Skv', D] from `zero_padded` with the
    ``real`` of `real_rows` and `real_keys`. A row's total is its real strided rows.
    """
    batch, heads, _, dim = query.shape
    size, span = grid.block // stride, slice(*(r * grid.block for r in _ends(rows)))
    own = query[:, :, span].reshape(batch, heads, -1, stride, dim).flip(3).flatten(3)
    others = key.reshape(batch, key.shape[1], -1, stride * dim)
    scores = _product(own, others) * (scale / stride)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    shown = real[1].unflatten(1, (-1, stride)).any(-1)[:, None, None]
    seen = _strided_seen(grid, rows, stride, query.device) & shown
    mass = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    counted = real[0][:, span].unflatten(1, (-1, stride)).any(-1)
    mass = mass * counted[:, None, :, None]
    return mass.view(batch, heads, len(rows), size, -1, size).sum((3, 5))


def _strided_seen(grid: Grid, rows: range, stride: int, device: torch.device) -> Tensor:
    """Whether the first key of a group is not after the last query of another."""
    begin, end = (r * grid.block for r in _ends(rows))
    last = torch.arange(begin, end, stride, device=device) + stride
    last = last.clamp(max=grid.query_len) - 1 + grid.offset
    first = torch.arange(0, grid.keys * grid.block, stride, device=device)
    return first <= last[:, None]


def block_means(values: Tensor, real: Tensor, block: int) -> Tensor:
    """Return the mean of each block's real rows, float32 [B, H, blocks, D]; zero-safe.

    ``values`` from `zero_padded` with ``real``.
    """
    total = values.float().unflatten(2, (-1, block)).sum(3)
    count = real.unflatten(1, (-1, block)).sum(-1).clamp(min=1)
    return total / count[:, None, :, None]


def pooled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the product of mean queries and keys, float32 [B, H, rows, K]."""
    return _product(query, key) * scale


def _ends(rows: range) -> tuple[int, int]:
    return rows.start, rows.stop


def _product(query: Tensor, key: Tensor) -> Tensor:
    """Return query key^T in float32, key heads not repeated.

    On a GPU half precision is multiplied as it is and summed in float32.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    one = query.reshape(batch * kv_heads, heads // kv_heads * rows, dim)
    other = key.reshape(batch * kv_heads, -1, dim).mT
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        scores = torch.bmm(one, other, out_dtype=torch.float32)
    else:
        scores = one.float() @ other.float()
    return scores.view(batch, heads, rows, -1)
