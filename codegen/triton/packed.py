"""Run attention over prompts that lie end to end on Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from graphopt.codegen.triton.attention import (
    attention_spec,
    require_runnable,
    run,
    supports,
    table_argument,
)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    key_mask: torch.Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """Run all prompts of a packed row; as `graphopt.ops.packed`, tensors of one row.

    The grid has room for prompts of ``longest`` tokens; programs beyond a prompt's end
    leave at once. ``out`` [1, Hq, N, Dv] may have any strides but that of its channels,
    and keeps what it had where there is no prompt. Raises KernelError for a dtype or a
    device that has no kernel.
    """
    require_runnable(query)
    tables = {"sink": sink, "window": window}
    kept = tuple(tables.values())
    spec = attention_spec(query, key, value, key_mask, pattern, kept, softcap)
    spec = replace(spec, packed=True)
    if out.numel() == 0:
        return
    if scale <= 0:
        # The kernel takes the row's maximum before it scales.
        query, scale = query * scale, 1.0
    mask = [] if key_mask is None else [key_mask]
    arguments: list[object] = [query, key, value, *mask, out]
    arguments += [table_argument(spec, tables[name], query) for name in spec.parameters]
    arguments += [starts, lengths, longest]
    arguments += [0, scale, *([softcap] if softcap else [])]
    run(spec, arguments, query, longest)


__all__ = ["launch", "supports"]
