"""vLLM's cache [blocks, Hkv, PAGE, 2 D] as pages of graphopt's kernels.

A block holds, head by head, `PAGE` keys and then `PAGE` values. To the kernel that is
one head whose pages are (block, head, key or value), and each head of a request is a
row with a table of its own, so that heads need no layout of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import ConfigError
from graphopt.integrations.vllm.heads import Plan
from graphopt.ops.pages import PAGE

Which = tuple[Tensor, Tensor, Tensor]
"""starts int32 [R + 1], past int32 [R] and table int32 [R, M] of some requests."""


def blocks(cache: Tensor) -> Tensor:
    """Return the cache as [blocks, Hkv, 2, PAGE, D], keys then values."""
    count, heads, page, both = cache.shape
    if page != PAGE or not cache.is_contiguous():
        raise ConfigError(
            f"vLLM: graphopt's attention: a cache of blocks of {page} tokens, strides "
            f"{cache.stride()}; blocks are multiples of {PAGE} in one piece each"
        )
    return cache.view(count, heads, 2, PAGE, both // 2)


def write(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write key and value [N, Hkv, D] to ``slots`` [M], M <= N; below 0 is padding."""
    held = blocks(cache)
    real = slots >= 0
    if not bool(real.all()):
        key, value = key[: len(slots)][real], value[: len(slots)][real]
        slots = slots[real]
    block, place = slots // PAGE, slots % PAGE
    for index, x in enumerate((key, value)):
        held[block, :, index, place] = x[: len(slots)].to(cache.dtype)


def attend(
    output: Tensor,
    query: Tensor,
    cache: Tensor,
    which: Which,
    plan: Plan,
    scale: float,
    softcap: float,
    only: Sequence[int] | None = None,
) -> None:
    """Write attention of query [N, Hq, D] to ``output`` for the requests of ``which``.

    Keys and values of all their tokens are in ``cache``. ``only``: KV heads, all of one
    pattern; the other heads of ``output`` are left.
    """
    starts, past, table = which
    first, last = int(starts[0]), int(starts[-1])
    heads, tokens, channels = cache.shape[1], last - first, query.shape[-1]
    group = query.shape[1] // heads
    asked, held = (
        x[first:last].view(tokens, heads, group, channels) for x in (query, output)
    )
    pool = blocks(cache).view(1, -1, PAGE, channels)
    for sink, window, part in _alike(plan, only or range(heads), group):
        lines = torch.tensor(part, dtype=torch.int32)[:, None]
        # Rows are (head, request): the heads' tokens lie one behind the other.
        places = torch.arange(len(part), dtype=torch.int32)[:, None]
        begins = (starts[:-1] - first)[None] + places * tokens
        ends = begins.new_tensor([len(part) * tokens])
        pages = table[None] * (2 * heads) + 2 * lines[..., None]
        lying = asked[:, part].permute(2, 1, 0, 3)
        found = torch.ops.graphopt.ragged_page_attention(
            lying.reshape(1, group, len(part) * tokens, channels),
            torch.cat((begins.flatten(), ends)),
            past.repeat(len(part)),
            pages.flatten(0, 1),
            pool,
            pool[:, 1:],
            None,
            None,
            plan.pattern,
            sink,
            window,
            scale,
            softcap,
        )
        by_head = found.view(group, len(part), tokens, channels)
        held[:, part] = by_head.permute(2, 1, 0, 3)


def _alike(
    plan: Plan, heads: Sequence[int], group: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (sink, window, KV heads) of the heads that have the same table."""
    if len(plan.pairs) == 1:
        return [(plan.sink, plan.window, list(heads))]
    found: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for head in heads:
        own = plan.pairs[head * group : (head + 1) * group]
        found.setdefault(own, []).append(head)
    return [
        ([s for s, _ in own], [w for _, w in own], part) for own, part in found.items()
    ]
