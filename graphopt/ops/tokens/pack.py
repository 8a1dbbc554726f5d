"""Operators that lay the prompts of a padded batch end to end, and back.

A padded batch has B rows of S tokens. Packed, its prompts lie one after the other in
B rows of L tokens that are read as one row of B * L: what works token by token does not
see where one row ends, so that a batch keeps its number of rows and only the number of
tokens changes. A prompt is what lies between the first and the last token of a row
that its mask shows; a hole in between stays, and stays hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import _compat

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "pack_prompts(Tensor mask, bool bins=False, SymInt room=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("take_packed(Tensor x, Tensor places, int axis) -> Tensor")
_library.define("unpack_tokens(Tensor x, Tensor slots, int axis) -> Tensor")


def pack_prompts(
    mask: Tensor, bins: bool = False, room: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where the prompts of ``mask`` bool [B, S] go.

    ``places`` int64 [B, L]: the token, row * S + column, that each packed place holds;
    unused places repeat the first token. ``starts`` and ``lengths`` int32 [B]: the
    place of each prompt's first token, and its tokens. ``slots`` int64 [B, S]: the
    place of every token of the batch, -1 for padding.

    Prompts lie without gaps (Prepacking, Zhao et al. 2024, with a kernel that takes
    them as they come); with ``bins`` in bins as long as the longest prompt, each in the
    fullest that it fits in, the longest first. ``room`` bins of S tokens are reserved,
    so that L does not depend on the data. Where the mask is on a GPU its lengths are
    waited for; one on the host costs nothing.

    Raises ValueError for a row without a token, and where prompts need more bins.
    """
    first, length = _spans(mask)
    lengths = length.tolist()
    if 0 in lengths:
        raise ValueError(
            f"packed-prefill: row {lengths.index(0)} of the attention mask is all "
            "padding: a prompt has at least one token; leave the row out"
        )
    batch, tokens = mask.shape
    begins, used = _binned(lengths) if bins else _end_to_end(lengths)
    if room and used > room * tokens:
        raise ValueError(
            f"packed-prefill: the prompts of this batch need {-(-used // tokens)} bins "
            f"of {tokens} tokens, and bins = {room}: raise it"
        )
    width = packed_width(batch, room * tokens or used)
    starts = torch.tensor(begins, device=mask.device)
    slots = _slots(mask, first, length, starts)
    places = _places(slots, batch * width).view(batch, width)
    return places, starts.int(), length.int(), slots


def packed_width(batch: int, tokens: int) -> int:
    """Return the tokens of each of ``batch`` rows that have room for ``tokens``.

    At least 2, as every size that varies: an axis of one would broadcast.
    """
    return max(2, (tokens + batch - 1) // batch)


def _spans(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first token of each row and the tokens up to its last, int64 [B]."""
    shown = mask.long()
    first = shown.argmax(1)
    last = mask.shape[1] - 1 - shown.flip(1).argmax(1)
    return first, torch.where(mask.any(1), last - first + 1, 0)


def _end_to_end(lengths: list[int]) -> tuple[list[int], int]:
    begins, used = [], 0
    for length in lengths:
        begins.append(used)
        used += length
    return begins, used


def _binned(lengths: list[int]) -> tuple[list[int], int]:
    """Best fit decreasing: the first of the fullest bins where a prompt fits."""
    capacity = max(lengths)
    filled: list[int] = []
    begins = [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        fits = [b for b, n in enumerate(filled) if n + lengths[row] <= capacity]
        if not fits:
            filled.append(0)
        chosen = max(fits, key=lambda b: filled[b]) if fits else len(filled) - 1
        begins[row] = chosen * capacity + filled[chosen]
        filled[chosen] += lengths[row]
    return begins, len(filled) * capacity


def _slots(mask: Tensor, first: Tensor, length: Tensor, starts: Tensor) -> Tensor:
    offset = torch.arange(mask.shape[1], device=mask.device) - first[:, None]
    inside = (offset >= 0) & (offset < length[:, None])
    return torch.where(inside, starts[:, None] + offset, -1)


def _places(slots: Tensor, size: int) -> Tensor:
    """Return the inverse of ``slots``, int64 [size]; what is padding goes nowhere."""
    places = slots.new_zeros(size + 1)
    tokens = torch.arange(slots.numel(), device=slots.device)
    places.scatter_(0, torch.where(slots < 0, size, slots).flatten(), tokens)
    return places[:size]


def take_packed(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """Return x [B or 1, ..., S, ...] packed: axis ``axis`` has the ``places`` [B, L].

    A first axis of one stands for every row, so the result's is B.
    """
    tokens = x.movedim(axis, 1)
    if x.shape[0] == 1:
        return tokens[0][places % x.shape[axis]].movedim(1, axis)
    return tokens.flatten(0, 1)[places].movedim(1, axis)


def unpack_tokens(x: Tensor, slots: Tensor, axis: int) -> Tensor:
    """Return x [B, ..., L, ...] as it was before packing: S on ``axis``, 0 for padding.

    ``slots`` int64 [B, S] as `pack_prompts` returns them.
    """
    tokens = x.movedim(axis, 1)
    found = tokens.flatten(0, 1)[slots.clamp(min=0)]
    hidden = (slots < 0).view(*slots.shape, *[1] * (x.ndim - 2))
    return found.masked_fill(hidden, 0).movedim(1, axis)


torch.library.impl(_library, "pack_prompts", "CompositeExplicitAutograd")(pack_prompts)
for _name, _function in (
    ("take_packed", take_packed),
    ("unpack_tokens", unpack_tokens),
):
    torch.library.impl(_library, _name, "CompositeImplicitAutograd")(_function)


@torch.library.register_fake("graphopt::pack_prompts", lib=_library)
def _(
    mask: Tensor, bins: bool = False, room: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = mask.shape
    width = (
        packed_width(batch, room * tokens) if room else _compat.new_size(mask, tokens)
    )
    places, slots = (
        mask.new_empty((batch, n), dtype=torch.int64) for n in (width, tokens)
    )
    starts, lengths = (mask.new_empty(batch, dtype=torch.int32) for _ in range(2))
    return places, starts, lengths, slots
