"""What several schedulers do in a step."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.runtime.engine.schedulers.draft import Draft
from graphopt.runtime.engine.schedulers.views import View


def run_decodes(draft: Draft) -> None:
    """Give each decoding request its token; the newest make room where pages lack.

    Where more decode than the budget allows, those go first that waited longest.
    """
    decoding = [view for view in draft.running if view.decoding]
    turn = sorted(decoding, key=lambda view: view.served)[: draft.left]
    chosen = {view.request for view in turn}
    for view in decoding:
        if view.request in chosen and make_room(draft, view):
            draft.give(view, 1)


def make_room(draft: Draft, view: View) -> bool:
    """Preempt the newest until a token more of a request fits; False if that is it."""
    while draft.runs(view) and draft.room(view) < 1:
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
        if not _give_whole(draft, view, first=view is begun[0]):
            return
    first = not begun
    for view in waiting:
        fits = first or view.pending <= draft.left
        if not fits or not draft.admit(view):
            return
        _give_whole(draft, view, first=first)
        first = False


def _give_whole(draft: Draft, view: View, first: bool) -> bool:
    fits = first or view.pending <= draft.left
    return fits and draft.give(view, view.pending)
