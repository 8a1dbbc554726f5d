"""Operators on tokens that were dropped and may come back (LazyLLM's revival).

Shapes, wherever they are named: states [B, C, H], depth int32 [B, C], positions int64
[B, C] as in `graphopt.runtime.states.HiddenStates`; ``places`` int64 [B, S], a token's
place among all of its row, -1 for none; ``past`` int32 [B].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.ops.tokens.take import take_tokens

WHOLE = -1  # the depth of a token that is in every layer

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "hold_tokens(Tensor states, Tensor(a!) depth, Tensor positions, Tensor past, "
    "SymInt new) -> ()"
)
_library.define(
    "note_tokens(Tensor(a!) depth, Tensor(b!) positions, Tensor places, "
    "Tensor? position) -> ()"
)
_library.define(
    "leave_states(Tensor stream, Tensor places, Tensor? kept, Tensor(a!) states, "
    "Tensor(b!) depth, int point) -> ()"
)
_library.define("mark_whole(Tensor places, Tensor(a!) depth) -> ()")
_library.define("missing_places(Tensor places, Tensor depth, int point) -> Tensor")
_library.define("new_places(Tensor stream, Tensor past) -> Tensor")
_library.define("newest_token(Tensor stream) -> Tensor")
_library.define("take_states(Tensor states, Tensor places, Tensor stream) -> Tensor")
_library.define("live_places(Tensor? key_mask, Tensor past, SymInt tokens) -> Tensor")
_library.define("keep_places(Tensor scores, Tensor places, SymInt count) -> Tensor")


def hold_tokens(
    states: Tensor, depth: Tensor, positions: Tensor, past: Tensor, new: int
) -> None:
    """Note that a call which drops nothing appends ``new`` tokens to every row.

    Raises RuntimeError where tokens of the past are not in every layer: only
    `token-drop` knows what to do then.
    """
    place = torch.arange(depth.shape[1], device=depth.device)
    held = place < past[:, None]
    lost = held & (depth != WHOLE)
    if bool(lost.any()):
        raise RuntimeError(
            f"graphopt.Cache: {int(lost.sum())} of {int(past.sum())} tokens were "
            "dropped behind some layer, and this call attends to all; decode token by "
            "token with the pass 'token-drop' compiled in, or reset the cache"
        )
    fresh = ~held & (place < past[:, None] + new)
    depth.masked_fill_(fresh, WHOLE)


def note_tokens(
    depth: Tensor, positions: Tensor, places: Tensor, position: Tensor | None
) -> None:
    """Note the tokens that a call appends at ``places`` [B, S].

    position int64 [B or 1, S] is theirs, None where no layer needs it.
    """
    depth.scatter_(1, places, WHOLE)
    if position is not None:
        positions.scatter_(1, places, position.expand(places.shape))


def leave_states(
    stream: Tensor,
    places: Tensor,
    kept: Tensor | None,
    states: Tensor,
    depth: Tensor,
    point: int,
) -> None:
    """Leave behind drop ``point`` the hidden states of the tokens that reach it.

    stream [B, S, H] at ``places`` [B, S]; ``kept`` int64 [B, S'] are those of the S
    that go on; None for what is said later, by `mark_whole`.
    """
    row = torch.arange(places.shape[0], device=places.device)[:, None]
    states[row, places] = stream.to(states.dtype)
    depth.scatter_(1, places, point)
    if kept is not None:
        depth.scatter_(1, places.gather(1, kept), WHOLE)


def mark_whole(places: Tensor, depth: Tensor) -> None:
    """Note that the tokens at ``places`` [B, S] go on from the last drop."""
    depth.scatter_(1, places, WHOLE)


def missing_places(places: Tensor, depth: Tensor, point: int) -> Tensor:
    """Return those of ``places`` whose states lie behind drop ``point``, [B, S'].

    They ascend, and each row's newest token, always among them, is the last. S' is
    their number in the row that has most, at least 2; other rows repeat their newest.
    """
    missing = (places >= 0) & (depth.gather(1, places.clamp(min=0)) == point)
    newest = places.amax(1, keepdim=True)
    count = max(2, int(missing.sum(1).max()))
    order = torch.where(missing, places, newest).sort(1).values
    more = max(count - order.shape[1], 0)
    return torch.cat((order, newest.expand(-1, more)), 1)[:, :count].contiguous()


def new_places(stream: Tensor, past: Tensor) -> Tensor:
    """Return the places of the tokens that a call appends, [B, S]; stream [B, S, H]."""
    return past.long()[:, None] + torch.arange(stream.shape[1], device=past.device)


def take_states(states: Tensor, places: Tensor, stream: Tensor) -> Tensor:
    """Return the states at ``places`` [B, S] as such of ``stream`` [B, S', H].

    Raises RuntimeError where they have fewer channels.
    """
    found = take_tokens(states, places, 1).narrow(2, 0, stream.shape[2])
    return found.to(stream.dtype)


def newest_token(stream: Tensor) -> Tensor:
    """Return the last of stream [B, S, H], [B, 1, H]."""
    return stream[:, -1:]


def live_places(key_mask: Tensor | None, past: Tensor, tokens: int) -> Tensor:
    """Return the places of a row's real tokens, ascending, -1 behind them, [B, S].

    A decoding step: ``past`` tokens and a new one. key_mask bool [B, S], false for
    padding, or None; ``tokens`` S, those of the longest row.
    """
    place = torch.arange(tokens, device=past.device)
    real = place <= past[:, None]
    if key_mask is not None:
        real = real & key_mask[:, :tokens]
    return _ascending(torch.where(real, place, -1))


def keep_places(scores: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the ``count`` of ``places`` [B, S] that stay, ascending, -1 behind them.

    As `keep_tokens`: the newest stays, then the greatest scores [B, S], the earlier of
    equals.
    """
    newest = places.amax(1, keepdim=True)
    scores = scores.masked_fill(places < 0, float("-inf"))
    scores = scores.masked_fill(places == newest, float("inf"))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return _ascending(places.gather(1, order[:, :count]))


def _ascending(places: Tensor) -> Tensor:
    most = torch.iinfo(places.dtype).max
    order = places.masked_fill(places < 0, most).sort(1).values
    return order.masked_fill(order == most, -1)


def _implement(kind: str, *operators: Callable[..., Any]) -> None:
    for operator in operators:
        torch.library.impl(_library, operator.__name__, kind)(operator)


_implement("CompositeExplicitAutograd", hold_tokens, note_tokens, leave_states)
_implement("CompositeExplicitAutograd", mark_whole, missing_places)
_implement("CompositeImplicitAutograd", new_places, newest_token)
_implement("CompositeImplicitAutograd", take_states)
_implement("CompositeImplicitAutograd", live_places, keep_places)


@torch.library.register_fake("graphopt::hold_tokens", lib=_library)
@torch.library.register_fake("graphopt::note_tokens", lib=_library)
@torch.library.register_fake("graphopt::mark_whole", lib=_library)
def _nothing(*inputs: Any) -> None:
    return None


@torch.library.register_fake("graphopt::leave_states", lib=_library)
def _leave(stream: Tensor, places: Tensor, *_: Any) -> None:
    if tuple(stream.shape[:2]) != tuple(places.shape):
        text = f"{tuple(stream.shape)} is not of places {tuple(places.shape)}"
        raise ValueError(text)


@torch.library.register_fake("graphopt::missing_places", lib=_library)
def _missing(places: Tensor, depth: Tensor, point: int) -> Tensor:
    count = _compat.new_size(places, places.shape[1])
    return places.new_empty((places.shape[0], count))
