"""``graphopt::packed_attention``: attention of prompts that lie end to end.

Shapes: query [B, Hq, L, D], key [B, Hkv, L, D], value [B, Hkv, L, Dv], result
[B, Hq, L, Dv], B rows of L tokens that are read as one row of B * L. Prompt r has the
tokens ``starts[r]`` to ``starts[r] + lengths[r] - 1`` of it (int32 [R]) and attends to
itself alone: the block diagonal of Prepacking (Zhao et al. 2024), as one run of keys a
prompt. ``slots`` [R, S] are those of `pack_prompts`: no prompt is longer than S. All
three lie on the device of the query, and nothing waits for it. ``key_mask``
bool [B, L]; ``pattern``, ``sink``, ``window``, ``scale`` and ``softcap`` as in
`graphopt.ops.attention`, counted from each prompt's start. Tokens of no prompt get 0.

The result's memory is token by token, [B, L, Hq, Dv], which is what a model asks for
next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.recompute import register_backward
from graphopt.ops.reference import attention_reference

_library = torch.library.Library("graphopt", "FRAGMENT")
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor starts, Tensor lengths, "
    "Tensor slots, Tensor? key_mask, str pattern, int[] sink, int[] window, "
)
_library.define(
    f"packed_attention({_ARGUMENTS}float? scale=None, float softcap=0.0) -> Tensor"
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Call ``graphopt::packed_attention``; see the module for shapes."""
    return torch.ops.graphopt.packed_attention(
        query, key, value, starts, lengths, slots, key_mask, pattern, sink, window,
        scale, softcap,
    )  # fmt: skip


def _result(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


@torch.library.register_fake("graphopt::packed_attention", lib=_library)
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _result(query, value)


def packed_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend prompt by prompt in plain ATen; any device and float."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = _row(query), _row(key), _row(value)
    mask = None if key_mask is None else key_mask.reshape(1, -1)
    found = [q.new_zeros((1, q.shape[1], q.shape[2], v.shape[-1]))]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        own_q, own_k, own_v = (x.narrow(2, start, length) for x in (q, k, v))
        shown = None if mask is None else mask.narrow(1, start, length)
        part = attention_reference(
            own_q, own_k, own_v, shown, pattern, sink, window, 0, scale, softcap
        )
        after = q.shape[2] - start - length
        found.append(torch.nn.functional.pad(part, (0, 0, start, after)))
    return _as_rows(torch.stack(found).sum(0), query)


def _row(x: Tensor) -> Tensor:
    """Return x [B, H, L, D] as one row, [1, H, B * L, D]; a view where it can be."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _as_rows(row: Tensor, like: Tensor) -> Tensor:
    """Return the one row [1, H, B * L, Dv] as the rows of ``like``, token by token."""
    tokens = row[0].transpose(0, 1).contiguous()
    return tokens.view(like.shape[0], like.shape[2], *tokens.shape[1:]).transpose(1, 2)


@torch.library.impl(_library, "packed_attention", "CPU")
def _cpu(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.cpp import attention as cpp

    if not cpp.supports(query.dtype):
        return packed_reference(query, *inputs)
    return launched(cpp.launch_packed, query, *inputs)


@torch.library.impl(_library, "packed_attention", "CUDA")
def _cuda(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.triton import packed

    if not packed.supports(query.dtype):
        return packed_reference(query, *inputs)
    return launched(packed.launch, query, *inputs)


def launched(
    launch: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Run a kernel's ``launch`` on the rows as one; see the module for the rest."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = _result(query, value).zero_()
    mask = None if key_mask is None else key_mask.reshape(1, -1)
    rows = (_row(query), _row(key), _row(value))
    where = (starts, lengths, slots.shape[1])
    launch(*rows, *where, mask, pattern, sink, window, scale, softcap, _row(out))
    return out


register_backward(
    _library,
    "packed_attention",
    f"{_ARGUMENTS}float? scale, float softcap",
    packed_reference,
)
