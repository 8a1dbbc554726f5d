"""A step in the making: shares given, pages claimed, the newest preempted."""

from __future__ import annotations

from collections import Counter

from graphopt.runtime.engine.schedulers.views import Board, Plan, View


class Draft:
    """Keeps count of budget and pages while a scheduler hands them out.

    ``running`` are the requests that run after this step, in order of arrival.
    """

    def __init__(self, board: Board) -> None:
        self.limits = board.limits
        self.running = list(board.running)
        self.shares: dict[int, int] = {}
        self.preempted: list[int] = []
        self.used = 0  # tokens given so far
        self._free = board.free
        self._holders = board.holders
        self._change: Counter[int] = Counter()
        self._claims: Counter[int] = Counter()

    @property
    def left(self) -> int:
        """Return the tokens left of the budget, never below zero."""
        return max(0, self.limits.budget - self.used)

    def room(self, view: View) -> int:
        """Return how many more tokens of a request the free pages can take."""
        pages = len(view.pages) + self._claims[view.request] + self._free
        return pages * self.limits.page_size - self._past(view)

    def give(self, view: View, tokens: int) -> bool:
        """Give a request more tokens and the pages they need; False without pages."""
        wanted = self.limits.pages(self._past(view) + tokens)
        claim = wanted - len(view.pages) - self._claims[view.request]
        if claim > self._free:
            return False
        self._free -= max(0, claim)
        self._claims[view.request] += max(0, claim)
        self.shares[view.request] = self.shares.get(view.request, 0) + tokens
        self.used += tokens
        return True

    def runs(self, view: View) -> bool:
        """Tell whether a running request was not preempted."""
        return view.request not in self.preempted

    def pending(self, view: View) -> int:
        """Return the tokens that a request has left to run behind its share."""
        return view.pending - self.shares.get(view.request, 0)

    def _past(self, view: View) -> int:
        return view.past + self.shares.get(view.request, 0)

    def preempt_newest(self) -> View:
        """Take pages and share from the newest running request and return it."""
        view = self.running.pop()
        self.used -= self.shares.pop(view.request, 0)
        self._free += self._claims.pop(view.request, 0)
        for page in view.pages:
            self._change[page] -= 1
            self._free += self._holders(page) + self._change[page] == 0
        self.preempted.append(view.request)
        return view

    def admit(self, view: View) -> bool:
        """Let a waiting request run, if pages for all its known tokens are free.

        The pages that running requests lack for theirs count as taken: a prompt is
        not begun to be thrown out by the end of another.
        """
        if self.preempted or len(self.running) >= self.limits.max_running:
            return False
        idle = sum(not self._holders(p) + self._change[p] for p in view.pages)
        if self._lack(view) + idle + sum(map(self._lack, self.running)) > self._free:
            return False
        self._free -= idle
        self._change.update(view.pages)
        self.running.append(view)
        return True

    def _lack(self, view: View) -> int:
        """Return the pages that a request's known tokens need and it has not yet."""
        has = len(view.pages) + self._claims[view.request]
        return max(0, self.limits.pages(view.length) - has)

    def trim(self, tokens: int) -> None:
        """Take back so many tokens, from the latest shares first."""
        for request in reversed(list(self.shares)):
            cut = min(tokens, self.shares[request])
            self.shares[request] -= cut
            tokens -= cut
            self.used -= cut
            if not self.shares[request]:
                del self.shares[request]

    def plan(self) -> Plan:
        """Return the step as it is now."""
        return Plan(self.shares, tuple(self.preempted))
