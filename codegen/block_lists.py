"""How kernels are given the block lists that `graphopt.ops.block_list` makes."""

from __future__ import annotations

import torch

BlockLists = tuple[torch.Tensor, torch.Tensor, tuple[int, ...], int]
"""key_blocks [B, Hb, R, N, 2], their counts [B, Hb, R], list of each head, tokens."""
