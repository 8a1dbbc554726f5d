"""``graphopt::page_attention``: one query row attends to the pages that matter to it.

LServe (Yang et al. 2025, section 3.5; scores of Quest, Tang et al. 2024, eq. 1). The
score of `LOGICAL` tokens is ``sum_d max(q_d max_d, q_d min_d)`` over their statistics,
a page's the largest of its own; the query heads of a key head choose together, by the
largest of theirs. A head visits the page of the first visible token, the newest page,
and the best others, ``budget`` pages together; all pages where there are no more. The
choice is kept in ``selected`` (ascending, -1 behind the last) and made again when the
row has grown by ``interval`` tokens since ``selected_at`` (-1: no choice yet). Heads
with a ring visit all that it holds.

Shapes: query [B, Hq, 1, D]; then the arguments of `graphopt.ops.pages.held.Held`;
statistics [Hf, N, PAGE / LOGICAL, 2, D]; selected int32 [B, Hf, M]; selected_at int32
[B, Hf]; ``key_mask`` bool [B, >= tokens] or None. Result [B, Hq, 1, Dv]. Nothing waits
for the device and no shape depends on the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.ops.pages.held import HELD, Held
from graphopt.ops.pages.layout import LOGICAL, PAGE
from graphopt.ops.reference import masked_attention

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    f"page_attention(Tensor query, {HELD}Tensor statistics, Tensor(a!) selected, "
    "Tensor(b!) selected_at, Tensor? key_mask, int budget, int interval, "
    "float? scale=None, float softcap=0.0) -> Tensor"
)


@torch.library.register_fake("graphopt::page_attention", lib=_library)
def _fake(query: Tensor, *inputs: Any) -> Tensor:
    held = Held.of(*inputs[:15])
    _check(query)
    return query.new_empty((*query.shape[:3], held.full.widths()[1]))


def _check(query: Tensor) -> None:
    if query.shape[2] != 1:
        raise ValueError(
            f"graphopt.page_attention: {query.shape[2]} query rows; it decodes one"
        )


def page_attention_reference(query: Tensor, *inputs: Any) -> Tensor:
    """Attend through the boolean mask of what is visited; any device and float."""
    _check(query)
    held, (statistics, selected, selected_at) = Held.of(*inputs[:15]), inputs[15:18]
    key_mask, budget, interval, scale, softcap = _options(query, *inputs[18:])
    tokens = held.full.table.shape[1] * PAGE
    visible = torch.arange(tokens, device=query.device) < held.total[:, None]
    if key_mask is not None:
        visible &= _widened(key_mask, tokens)
    choice = choose(query, held, statistics, visible, budget)
    _keep_choice(choice, selected, selected_at, held.total, interval)
    seen = _seen(held, selected, visible)
    group = query.shape[1] // held.heads
    key, value = held.read(tokens, query.dtype)
    mask = seen.repeat_interleave(group, 1)[:, :, None]
    return masked_attention(query, key, value, None, mask, scale, softcap)


def _widened(key_mask: Tensor, tokens: int) -> Tensor:
    mask = key_mask[:, :tokens]
    return torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]))


def choose(
    query: Tensor, held: Held, statistics: Tensor, visible: Tensor, budget: int
) -> Tensor:
    """Return the pages chosen now, int32 [B, Hf, M], ascending, -1 behind the last.

    ``visible``: bool [B, M * PAGE]. Only pages with a visible token are ever chosen.
    """
    score = _scores(query, held, statistics)
    pages = torch.arange(score.shape[2], device=query.device)
    some = visible.unflatten(1, (-1, PAGE)).any(2)
    first = some.int().argmax(1, keepdim=True)
    newest = ((held.total - 1) // PAGE)[:, None]
    forced = ((pages == first) | (pages == newest))[:, None]
    score = score.masked_fill(forced, float("inf"))
    score = score.masked_fill(~some[:, None], float("-inf"))
    best = score.topk(min(budget, score.shape[2]), dim=-1)
    missing = best.values == float("-inf")
    page = best.indices.masked_fill(missing, score.shape[2]).sort(-1).values
    page = page.masked_fill(page == score.shape[2], -1).int()
    return torch.nn.functional.pad(page, (0, score.shape[2] - page.shape[2]), value=-1)


def _scores(query: Tensor, held: Held, statistics: Tensor) -> Tensor:
    """Return the score of every page, at least float32, [B, Hf, M]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query[:, :, 0].to(wide).unflatten(1, (held.heads, -1))[:, held.full_heads]
    low, high = statistics[:, held.full.table.long()].to(wide).unbind(4)
    bound = torch.maximum(
        torch.einsum("bhgd,hbmld->bhgmld", q, low),
        torch.einsum("bhgd,hbmld->bhgmld", q, high),
    ).sum(-1)
    begins = torch.arange(held.full.table.shape[1] * PAGE // LOGICAL).to(q.device)
    empty = begins * LOGICAL >= held.total[:, None]
    empty = empty.unflatten(1, (-1, PAGE // LOGICAL))[:, None, None]
    return bound.masked_fill(empty, float("-inf")).amax((2, 4))


def _keep_choice(
    choice: Tensor, selected: Tensor, at: Tensor, total: Tensor, interval: int
) -> None:
    """Write the choice where the last one is too old."""
    old = (at < 0) | (total[:, None] - at >= interval)
    selected.copy_(torch.where(old[..., None], choice, selected))
    at.copy_(torch.where(old, total[:, None], at))


def _seen(held: Held, selected: Tensor, visible: Tensor) -> Tensor:
    """Return the tokens each key head visits, bool [B, Hkv, M * PAGE]."""
    pages = torch.arange(selected.shape[2], device=selected.device)
    newest = ((held.total - 1) // PAGE)[:, None]
    chosen = (selected[..., None] == pages).any(2) | (pages == newest)[:, None]
    seen = chosen.new_empty((chosen.shape[0], held.heads, chosen.shape[2]))
    seen[:, held.full_heads] = chosen
    seen[:, list(held.ring_heads)] = held.in_rings(pages)[:, None]
    return seen.repeat_interleave(PAGE, 2) & visible[:, None]


@torch.library.impl(_library, "page_attention", "CUDA")
def _cuda(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.triton import pages_attention as kernel

    return _launched(kernel, query, *inputs)


@torch.library.impl(_library, "page_attention", "CPU")
def _cpu(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.cpp import page_attention as kernel

    return _launched(kernel, query, *inputs)


def _launched(kernel: Any, query: Tensor, *inputs: Any) -> Tensor:
    if not kernel.supports(query.dtype):
        return page_attention_reference(query, *inputs)
    _check(query)
    held, (statistics, selected, selected_at) = Held.of(*inputs[:15]), inputs[15:18]
    options = _options(query, *inputs[18:])
    return kernel.launch(query, *held, statistics, selected, selected_at, *options)


def _options(
    query: Tensor,
    key_mask: Tensor | None,
    budget: int,
    interval: int,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor | None, int, int, float, float]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return key_mask, budget, interval, scale, softcap
