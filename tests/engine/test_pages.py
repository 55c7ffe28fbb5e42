"""The page pool: nothing leaks, nothing is freed twice, nothing held is given away."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jdet.engine.pages import PagePool, page_key

PAGES = 6


class PoolMachine(RuleBasedStateMachine):
    """Requests that take pages, name them, find them and give them back, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.named: dict[bytes, int] = {}

    def holders(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.held)

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        pages = []
        for _ in range(count):
            available = self.pool.available
            page = self.pool.allocate()
            assert (page is None) == (available == 0)
            if page is not None:
                assert self.holders(page) == 0 and page not in pages
                self.named = {k: p for k, p in self.named.items() if p != page}
                pages.append(page)
        if pages:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=st.integers(0, 3))
    def name(self, data: st.DataObject, content: int) -> None:
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        key = page_key(b"", [content])
        if key not in self.named and page not in self.named.values():
            self.named[key] = page
        self.pool.name(page, key)

    @rule(content=st.integers(0, 3))
    def reuse(self, content: int) -> None:
        key = page_key(b"", [content])
        page = self.pool.find(key)
        assert page == self.named.get(key)
        if page is not None:
            self.pool.hold(page)
            self.held.append([page])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.pool.release(pages)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = {page for pages in self.held for page in pages}
        assert self.pool.available == PAGES - len(held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_page_given_back_twice_is_refused() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    assert page is not None
    pool.release([page])
    with pytest.raises(ValueError, match="held by nobody"):
        pool.release([page])
    with pytest.raises(ValueError, match="held by nobody"):
        pool.name(page, b"key")


def test_the_page_longest_unused_goes_first_and_the_ends_of_prompts_before_their_beginnings() -> (
    None
):
    pool = PagePool(4)
    pages = [pool.allocate() for _ in range(4)]
    first, second = [p for p in pages[:2] if p is not None], [p for p in pages[2:] if p is not None]
    for i, page in enumerate([*first, *second]):
        pool.name(page, bytes([i]))
    pool.release(first)
    pool.release(second)
    pool.hold(first[0])  # used again
    pool.release([first[0]])
    assert [pool.allocate() for _ in range(4)] == [first[1], second[1], second[0], first[0]]


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8), st.integers(0, 7))
def test_a_key_names_all_tokens_up_to_its_page(tokens: list[int], at: int) -> None:
    key = page_key(page_key(b"", tokens), [1, 2])
    other = list(tokens)
    other[at % len(tokens)] ^= 1
    assert page_key(page_key(b"", tokens), [1, 2]) == key
    assert page_key(page_key(b"", other), [1, 2]) != key
