"""Pages are found by content, held by count, and never lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphopt.runtime.engine.pages import PagePool

PAGES, SIZE = 8, 2


class _User:
    """A request: its tokens, its pages, and how many pages are published."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.pages: list[int] = []
        self.full = 0

    def prefix(self, pages: int) -> tuple[int, ...]:
        return tuple(self.tokens[: pages * SIZE])

    def content(self, start: int, stop: int) -> tuple[int, ...]:
        return tuple(self.tokens[start:stop])


class PoolMachine(RuleBasedStateMachine):
    """Against what a reader of the pages would find in them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.users: list[_User] = []
        self.written: dict[int, tuple[int, ...]] = {}  # all tokens up to a page's end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def begin(self, tokens: list[int]) -> None:
        user = _User(tokens)
        user.pages = self.pool.find(user.content, len(tokens))
        user.full = len(user.pages)
        for index, page in enumerate(user.pages):
            assert self.written[page] == user.prefix(index + 1)
        assert user.full * SIZE < len(tokens)
        assert user.full >= self._held_prefix(user)
        self.pool.hold(user.pages)
        self.users.append(user)

    def _held_prefix(self, user: _User) -> int:
        """Return how many pages of a prompt others have published and hold."""
        known = {o.prefix(n) for o in self.users for n in range(1, o.full + 1)}
        most = (len(user.tokens) - 1) // SIZE
        return max(n for n in range(most + 1) if not n or user.prefix(n) in known)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def write(self, data: Any) -> None:
        """Fill the next page, or take it where the tokens do not fill it."""
        user = data.draw(st.sampled_from(self.users))
        index = user.full
        if index * SIZE >= len(user.tokens):
            return
        if len(user.pages) == index:
            if not self.pool.free:
                return
            user.pages += self.pool.take(1)
        page = user.pages[index]
        assert self.pool.holders(page) == 1, "a page that is written is one's own"
        self.written[page] = user.prefix(index + 1)
        if (index + 1) * SIZE <= len(user.tokens):
            content = user.content(index * SIZE, (index + 1) * SIZE)
            before = user.pages[index - 1] if index else None
            user.pages[index] = self.pool.publish(before, content, page)
            assert self.written[user.pages[index]] == user.prefix(index + 1)
            user.full += 1

    @precondition(lambda self: self.users)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: Any, failed: bool) -> None:
        user = data.draw(st.sampled_from(self.users))
        self.users.remove(user)
        (self.pool.discard if failed else self.pool.release)(user.pages)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(user.pages for user in self.users)
        held = {page for user in self.users for page in user.pages}
        assert self.pool.free == PAGES - len(held)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestPool = PoolMachine.TestCase


def _fill(pool: PagePool, tokens: list[int]) -> list[int]:
    pages = pool.take(len(tokens) // SIZE)
    for index, page in enumerate(pages):
        before = pages[index - 1] if index else None
        content = tuple(tokens[index * SIZE : (index + 1) * SIZE])
        pages[index] = pool.publish(before, content, page)
    return pages


def _find(pool: PagePool, tokens: list[int]) -> list[int]:
    return pool.find(lambda start, stop: tuple(tokens[start:stop]), len(tokens))


def test_a_released_page_is_found_until_it_is_reused():
    pool = PagePool(3, SIZE)
    pages = _fill(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.free == 3
    assert _find(pool, [1, 2, 3, 4, 5]) == pages
    taken = pool.take(2)  # the blank page, then the end of the chain
    assert _find(pool, [1, 2, 3, 4, 5]) == pages[:1]
    pool.check([taken])


def test_the_page_used_longest_ago_is_reused_first():
    pool = PagePool(2, SIZE)
    first, second = _fill(pool, [1, 2]), _fill(pool, [3, 4])
    pool.release(first)
    pool.release(second)
    pool.hold(first)
    pool.release(first)
    assert pool.take(1) == second


def test_pages_of_equal_tokens_behind_other_tokens_are_not_shared():
    pool = PagePool(4, SIZE)
    one, other = _fill(pool, [1, 1, 2, 2]), _fill(pool, [3, 3, 2, 2])
    assert not set(one) & set(other)
    assert _find(pool, [2, 2, 0]) == []


def test_two_that_fill_equal_pages_at_once_end_with_one():
    pool = PagePool(4, SIZE)
    one, other = _fill(pool, [1, 2]), _fill(pool, [1, 2])
    assert one == other
    assert pool.holders(one[0]) == 2
    assert pool.free == 3


def test_the_last_token_of_a_prompt_is_never_found():
    pool = PagePool(4, SIZE)
    pages = _fill(pool, [1, 2, 3, 4])
    assert _find(pool, [1, 2, 3, 4]) == pages[:1]


def test_what_a_failed_request_wrote_is_not_found_but_what_others_built_on_is():
    pool = PagePool(4, SIZE)
    shared = _fill(pool, [1, 2])
    failed = [*shared, *pool.take(1)]
    pool.hold(shared)
    failed[1] = pool.publish(failed[0], (7, 7), failed[1])
    pool.release(shared)
    pool.discard(failed)
    assert _find(pool, [1, 2, 7, 7, 0]) == []
    one = _fill(pool, [1, 2, 3, 4])
    pool.hold(one[:1])
    pool.release(one)
    pool.discard(one[:1])
    assert _find(pool, [1, 2, 3, 4, 0]) == one
    pool.check([])


def test_without_sharing_nothing_is_found():
    pool = PagePool(4, SIZE, share=False)
    one, other = _fill(pool, [1, 2]), _fill(pool, [1, 2])
    assert one != other
    assert _find(pool, [1, 2, 3]) == []


def test_more_pages_than_are_free_are_refused():
    pool = PagePool(2, SIZE)
    pool.take(1)
    with pytest.raises(ValueError, match="2 pages are wanted, 1 are free"):
        pool.take(2)
