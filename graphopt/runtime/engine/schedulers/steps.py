"""What several schedulers do in a step."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.runtime.engine.schedulers.draft import Draft
from graphopt.runtime.engine.schedulers.views import View


def run_decodes(draft: Draft) -> None:
    """Give each decoding request its token; the newest make room where pages lack.

    Where more decode than the budget allows, those go first that waited longest.
    """
    while turn := _next_decodes(draft):
        for view in turn:
            if make_room(draft, view):
                draft.give(view, 1)


def _next_decodes(draft: Draft) -> list[View]:
    """Return whose turn it is, in order of arrival: as many as the budget has left.

    One that has to give up its own pages leaves its place to another.
    """
    decoding = [
        view
        for view in draft.running
        if view.decoding and view.request not in draft.shares
    ]
    turn = sorted(decoding, key=lambda view: view.served)[: draft.left]
    return sorted(turn, key=lambda view: view.request)


def make_room(draft: Draft, view: View, tokens: int = 1) -> bool:
    """Preempt the newest until tokens of a request fit; False if it is itself out."""
    while draft.runs(view) and draft.room(view) < tokens:
        draft.preempt_newest()
    return draft.runs(view)


def prefills(draft: Draft) -> list[View]:
    """Return the running requests whose prompts are not through."""
    return [view for view in draft.running if not view.decoding]


def run_whole_prompts(draft: Draft, waiting: Iterable[View]) -> None:
    """Give prompts their whole length, first come first, while the budget lasts.

    The first one may exceed the budget: it would never run otherwise.
    """
    begun = prefills(draft)
    for view in begun:
        fits = view is begun[0] or view.pending <= draft.left
        if fits and make_room(draft, view, view.pending):
            draft.give(view, view.pending)
    first = not begun
    for view in waiting:
        fits = first or view.pending <= draft.left
        if not fits or not draft.admit(view):
            return
        draft.give(view, view.pending)
        first = False
