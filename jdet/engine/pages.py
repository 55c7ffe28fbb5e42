"""Pages of the cache: who holds them, and which are kept for prompts that begin alike."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full page's content: its tokens and, through `parent`, all before them."""
    return hashlib.sha256(parent + np.asarray(token_ids, "<i4").tobytes()).digest()


class PagePool:
    """Reference counts of `num_pages` pages, and a prefix cache over them.

    A page is free, held (by one request or, with equal content, by several), or kept: held by
    nobody, but found by its key until the room is needed. The page kept longest without use
    goes first.
    """

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._free = collections.deque(range(num_pages))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._key: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def num_pages(self) -> int:
        """All pages."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """Pages that `allocate` can still give: free and kept ones."""
        return len(self._free) + len(self._kept)

    def allocate(self) -> int | None:
        """A page for one holder, its old content forgotten; None where all are held."""
        if self._free:
            page = self._free.popleft()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page[self._key.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page with this content, held or kept."""
        return self._page.get(key)

    def hold(self, page: int) -> None:
        """One holder more of a page that `find` gave."""
        if not self._holders[page]:
            del self._kept[page]
        self._holders[page] += 1

    def name(self, page: int, key: bytes) -> None:
        """Let `find` find a held page. Of pages with equal content the first keeps the name."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is held by nobody")
        if key not in self._page and page not in self._key:
            self._page[key] = page
            self._key[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each of a request's pages.

        The last pages of a prompt are of use to fewer others than its first, and go first.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is held by nobody")
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._key:
                    self._kept[page] = None
                else:
                    self._free.append(page)
