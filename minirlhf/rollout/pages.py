"""The KV cache: pages of 32 tokens, of which those in use are always the first of their arena.

A row takes a page when it grows into one. When its last reader has ended, a page is free, and the last page
moves into its place: attention then runs over one contiguous piece of memory that has the size of what is
live, and a finished row's memory is the next row's. Which row reads a page, and which tokens it holds, is
bookkeeping on the host; the tensors are touched only to write, to move and to attend.
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.models.interface import CacheShape

PAGE = 32
"""Tokens. Half a page is what a row wastes on average; a page is what attention handles at a time."""

NOBODY = -1
Empty = Callable[[tuple[int, ...]], Tensor]
"""An uninitialised tensor of a shape."""

_Ints = NDArray[np.int64]


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class Pages:
    """An arena of pages, each read by at most `width` rows. Rows are known by their slot in the batch.

    keys, values: [layers, capacity, H, PAGE, Dh]; pages 0 .. used - 1 are in use.
    readers: [capacity, width] slots, NOBODY where there is none.
    start: [capacity] position of a page's first token in its rows.
    """

    def __init__(self, shape: CacheShape, capacity: int, width: int, empty: Empty) -> None:
        size = (shape.layers, capacity, shape.heads, PAGE, shape.width)
        self.keys, self.values = empty(size), empty(size)  # memory is the system's until written
        self.readers: _Ints = np.full((capacity, width), NOBODY)
        self.start: _Ints = np.zeros(capacity, dtype=np.int64)
        self.used = 0
        self.peak = 0

    def take(self, readers: _Ints, start: _Ints) -> slice:
        """New pages for readers [n, width] and tokens from start [n] on: the arena's next n pages.

        They hold anything until written. What lies behind a row's end is masked, but NaN times 0 is NaN: a
        page has to be filled as a whole, or cleared.

        Raises:
            RuntimeError: the arena is full; whoever admits rows has to count before.
        """
        first, end = self.used, self.used + len(start)
        if end > len(self.start):
            raise RuntimeError(f"{end} pages asked of an arena of {len(self.start)}")
        self.readers[first:end], self.start[first:end] = readers, start
        self.used, self.peak = end, max(self.peak, end)
        return slice(first, end)

    def clear(self, pages: slice) -> None:
        """Sets pages to zero."""
        for leaf in (self.keys, self.values):
            leaf[:, pages] = 0

    def renumber(self, slot: _Ints) -> None:
        """Rows moved or ended: slot[s] is where the row of slot s is now, or NOBODY. Frees unread pages."""
        live = self.readers[: self.used]
        live[:] = np.append(slot, NOBODY)[live]  # NOBODY reads the last entry: itself
        kept = (live != NOBODY).any(1)
        count = int(kept.sum())
        gaps, moved = np.flatnonzero(~kept[:count]), np.flatnonzero(kept[count:]) + count
        if len(gaps):
            source, target = torch.from_numpy(np.stack([moved, gaps])).to(self.keys.device)
            for leaf in (self.keys, self.values):
                leaf.index_copy_(1, target, leaf.index_select(1, source))
            self.readers[gaps], self.start[gaps] = self.readers[moved], self.start[moved]
        self.used = count

    def last_pages(self, rows: int) -> _Ints:
        """[rows] the page that holds the newest tokens of each slot."""
        page = np.empty(rows, dtype=np.int64)
        order = np.argsort(self.start[: self.used], kind="stable")
        page[self.readers[order, 0]] = order  # of several, the last assignment stays
        return page


class Entries(TypedDict):
    """What rows read, row after row: those of row b are first[b] .. first[b + 1] - 1.

    arena, at: [E] a page. start: [E] the position of its first token.
    """

    first: _Ints
    arena: _Ints
    at: _Ints
    start: _Ints


def entries_by_row(arenas: list[Pages], rows: int) -> Entries:
    """The pages in use, by reader."""
    reader, arena, at, start = [], [], [], []
    for number, each in enumerate(arenas):
        page, column = np.nonzero(each.readers[: each.used] != NOBODY)
        reader.append(each.readers[page, column])
        arena.append(np.full(len(page), number))
        at.append(page)
        start.append(each.start[page])
    row = np.concatenate(reader)
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    arena, at, start = (np.concatenate(each)[order] for each in (arena, at, start))
    return Entries(first=first, arena=arena, at=at, start=start)


class Table(NamedTuple):
    """Who reads what, for one layout of some arenas, on the device.

    readers: per arena [p, width], slots; `rows` for nobody.
    start: per arena [p].
    entry: int64 [E] which of the E partial results (all arenas' [p, width], flattened) have a reader.
    row: int64 [E] their readers.
    cell: int64 [E] their places in a table [rows, most], flattened.
    most: partial results of the row that has most.
    """

    readers: list[Tensor]
    start: list[Tensor]
    entry: Tensor
    row: Tensor
    cell: Tensor
    most: int


def table_of(arenas: list[Pages], rows: int, device: torch.device) -> Table:
    """The table of the pages that are in use now."""
    readers = [_narrow(each.readers[: each.used]) for each in arenas]
    flat = np.concatenate([each.ravel() for each in readers])
    entry = np.flatnonzero(flat != NOBODY)
    row = flat[entry]
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=rows)
    number = np.empty_like(row)  # of a row's partial results, counted from 0
    number[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    most = int(counts.max())

    def there(values: _Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return Table(
        readers=[there(np.where(each == NOBODY, rows, each)) for each in readers],
        start=[there(each.start[: each.used]) for each in arenas],
        entry=there(entry),
        row=there(row),
        cell=there(row * most + number),
        most=most,
    )


def _narrow(readers: _Ints) -> _Ints:
    """Without the last columns that hold nobody; at least one column."""
    columns = np.flatnonzero((readers != NOBODY).any(0))
    return readers[:, : columns[-1] + 1 if len(columns) else 1]
