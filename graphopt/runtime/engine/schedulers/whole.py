"""Schedulers that never cut a prompt, to compare with.

As Sarathi-Serve (arXiv 2403.02310), section 2.5, tells them apart.
"""

from __future__ import annotations

from graphopt.runtime.engine.schedulers.draft import Draft
from graphopt.runtime.engine.schedulers.steps import run_decodes, run_whole_prompts
from graphopt.runtime.engine.schedulers.views import Board, Plan


class PrefillFirst:
    """Whole prompts while any can run, decodes otherwise, never both (vLLM of 2023).

    Decodes stall for as long as prompts keep coming.
    """

    def plan(self, board: Board) -> Plan:
        """Return the next step."""
        draft = Draft(board)
        run_whole_prompts(draft, board.waiting)
        if not draft.shares:
            run_decodes(draft)
        return draft.plan()


class DecodeFirst:
    """All decodes, and whole prompts beside them (Orca)."""

    def plan(self, board: Board) -> Plan:
        """Return the next step."""
        draft = Draft(board)
        run_decodes(draft)
        run_whole_prompts(draft, board.waiting)
        run_decodes(draft)  # a prompt that gave up its pages left room
        return draft.plan()


class RequestLevel:
    """A batch of requests runs to its end before the next one is admitted.

    As in FasterTransformer: prompts first, and nobody joins once a token is decoded.
    """

    def __init__(self) -> None:
        self._closed = False

    def plan(self, board: Board) -> Plan:
        """Return the next step."""
        draft = Draft(board)
        self._closed &= bool(board.running)
        run_whole_prompts(draft, () if self._closed else board.waiting)
        if not draft.shares:
            self._closed = True
            run_decodes(draft)
        return draft.plan()
