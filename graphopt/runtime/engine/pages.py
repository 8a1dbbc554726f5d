"""Which pool pages are whose: reference counts, and full pages found by content.

A full page is found by the tokens of it and of all pages before it: a chain of nodes,
each the child of the node before. The key holds the tokens themselves, so that two
contents of equal hash are still two. A page that nobody holds any more keeps its
content and can be found again until it is reused, the longest unused first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from graphopt.ops.pages import PAGE

Content = Callable[[int, int], tuple[int, ...]]  # the tokens of [start, stop)
ROOT = 0  # the node before the first page of every request


@dataclass(frozen=True)
class _Node:
    id: int
    parent: int
    tokens: tuple[int, ...]
    page: int


class PagePool:
    """The pages of a pool: free, idle (nobody's, but with known content), or held."""

    def __init__(self, pages: int, page_size: int = PAGE, share: bool = True) -> None:
        self.pages = pages
        self.page_size = page_size
        self.share = share
        self._holders = [0] * pages
        self._blank = list(reversed(range(pages)))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes: dict[tuple[int, tuple[int, ...]], _Node] = {}
        self._node_of: dict[int, _Node] = {}
        self._children: Counter[int] = Counter()  # by node: a chain's end has none
        self._ids = count(ROOT + 1)

    @property
    def free(self) -> int:
        """Return how many pages can be taken: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    def holders(self, page: int) -> int:
        """Return how many requests hold a page."""
        return self._holders[page]

    def take(self, number: int) -> list[int]:
        """Return so many pages, held once each, their content unknown.

        Raises ValueError where fewer are free.
        """
        if number > self.free:
            raise ValueError(f"{number} pages are wanted, {self.free} are free")
        return [self._take() for _ in range(number)]

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def _forget(self, page: int) -> None:
        node = self._node_of.pop(page)
        del self._nodes[node.parent, node.tokens]
        self._children[node.parent] -= 1
        del self._children[node.id]

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that `find` returned once more."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold of each of a request's pages, given in their order.

        The last page goes first, so that no page is reused before those behind it,
        which are found through it alone.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._lay_down(page)

    def discard(self, pages: Sequence[int]) -> None:
        """Release pages whose content nobody should find: their request failed.

        Pages that another request uses, or has built on, stay as they are.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                node = self._node_of.get(page)
                if node is not None and not self._children[node.id]:
                    self._forget(page)
                self._lay_down(page)

    def _lay_down(self, page: int) -> None:
        if page in self._node_of:
            self._idle[page] = None
        else:
            self._blank.append(page)

    def find(self, content: Content, length: int) -> list[int]:
        """Return the pages that hold the first full pages of ``length`` tokens.

        At least one token is left over: its logits are still to be computed.
        """
        found: list[int] = []
        node = ROOT
        while self.share and (len(found) + 1) * self.page_size < length:
            start = len(found) * self.page_size
            key = (node, content(start, start + self.page_size))
            if key not in self._nodes:
                break
            node = self._nodes[key].id
            found.append(self._nodes[key].page)
        return found

    def publish(self, before: int | None, tokens: tuple[int, ...], page: int) -> int:
        """Let a held page be found by its tokens, behind page ``before``.

        Returns the page to hold from now on: where one of equal content is known,
        that one, and ``page`` is given up.
        """
        if not self.share:
            return page
        parent = ROOT if before is None else self._node_of[before].id
        known = self._nodes.get((parent, tokens))
        if known is not None:
            self.hold([known.page])
            self.release([page])
            return known.page
        node = _Node(next(self._ids), parent, tokens, page)
        self._nodes[parent, tokens] = self._node_of[page] = node
        self._children[parent] += 1
        return page

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the pool agrees with all requests' page tables.

        Every page is blank, idle or held, by as many requests as name it; every node
        but the first of a chain has a parent that is known.
        """
        named = Counter(page for table in tables for page in table)
        assert [named[page] for page in range(self.pages)] == self._holders
        held = [page for page, holders in enumerate(self._holders) if holders]
        assert sorted([*self._blank, *self._idle, *held]) == list(range(self.pages))
        assert self._node_of.keys() >= self._idle.keys()
        assert self._node_of.keys().isdisjoint(self._blank)
        known = {node.id for node in self._nodes.values()} | {ROOT}
        assert {node.parent for node in self._nodes.values()} <= known
        parents = Counter(node.parent for node in self._nodes.values())
        assert parents == +self._children
        pages = {node.page: node for node in self._nodes.values()}
        assert len(pages) == len(self._nodes) and pages == self._node_of
