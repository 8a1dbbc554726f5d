"""Decode-maximal batches: every decode, and as much of prompts as the tiles take.

Source: SARATHI (arXiv 2308.16369), section 4; Sarathi-Serve (arXiv 2403.02310),
algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.runtime.engine.schedulers.draft import Draft
from graphopt.runtime.engine.schedulers.steps import make_room, prefills, run_decodes
from graphopt.runtime.engine.schedulers.views import Board, Plan, View


class Sarathi:
    """Decodes first, then prompts begun, then waiting ones, each first come first.

    The decodes count in the budget. Where work goes on in the next step anyway, the
    tokens of decodes and chunks together are a multiple of the tile: a matrix
    product takes as long for 129 rows as for 256.
    """

    def plan(self, board: Board) -> Plan:
        """Return the next step."""
        draft = Draft(board)
        run_decodes(draft)
        limit = board.limits.chunk_limit or board.limits.budget
        _continue(draft, limit)
        _admit(draft, board.waiting, limit)
        # What nobody else wants goes to those that the limit held back.
        for view in prefills(draft):
            _chunk(draft, view, board.limits.budget)
        _align(draft)
        return draft.plan()


def _continue(draft: Draft, limit: int) -> None:
    for view in prefills(draft):
        if draft.left and make_room(draft, view):
            _chunk(draft, view, limit)


def _admit(draft: Draft, waiting: Iterable[View], limit: int) -> None:
    for view in waiting:
        if not draft.left or not draft.admit(view):
            return
        _chunk(draft, view, limit)


def _chunk(draft: Draft, view: View, limit: int) -> None:
    tokens = min(draft.pending(view), draft.left, limit, draft.room(view))
    if tokens:
        draft.give(view, tokens)


def _align(draft: Draft) -> None:
    """Take back what is over a tile, unless chunks would get nothing."""
    over = draft.used % draft.limits.tile
    served = [view for view in draft.running if view.request in draft.shares]
    decodes = sum(view.decoding for view in served)
    if len(served) > 1 and draft.used - over > decodes:
        draft.trim(over)
