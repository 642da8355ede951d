"""Memory for keys and values: pages of a fixed number of positions, which rows share where they begin alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

SLAB_BYTES = 32 << 20


class PagePool:
    """Pages of `page_floats` float32 numbers, by their address. A page is free again when all who hold it released it.

    Memory grows by slabs of SLAB_BYTES, or of one page where a page is larger, and is kept until the pool goes.
    """

    def __init__(self, page_floats: int):
        self._page_floats = page_floats
        self._slabs: list[Tensor] = []
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()

    @property
    def page_bytes(self) -> int:
        return self._page_floats * 4

    @property
    def used(self) -> int:
        """Pages that someone holds."""
        return len(self._holders)

    def take(self) -> int:
        """The address of a page that nobody held, its content undefined."""
        if not self._free:
            count = max(1, SLAB_BYTES // self.page_bytes)
            slab = torch.empty(count, self._page_floats)
            self._slabs.append(slab)
            self._free += [slab.data_ptr() + number * self.page_bytes for number in reversed(range(count))]
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, held once more."""
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            del self._holders[page]
            self._free.append(page)


@dataclass(eq=False)
class CachedRow:
    """A text whose first `length` tokens have their keys and values in `pages`, in order."""

    length: int = 0
    pages: list[int] = field(default_factory=list)
