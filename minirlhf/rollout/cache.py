"""Which arena holds what: rows' own pages, prompts that several rows share, what all prompts begin with.

A page that somebody else reads, too, is full and stays as it is; a row writes into its own pages only.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.kernels.memory import Room
from minirlhf.models.interface import CacheShape
from minirlhf.rollout.pages import NOBODY, PAGE, Pages, pages_for
from minirlhf.rollout.parts import Part

_Ints = NDArray[np.int64]


class CacheUse(NamedTuple):
    """The KV cache when it was fullest.

    tokens: live tokens, each counted once however many rows read it. pages: in use, of PAGE tokens each.
    allocated: pages that the arenas could have held. page_bytes: of one page.
    """

    tokens: int
    pages: int
    allocated: int
    page_bytes: int


class Place(NamedTuple):
    """Where new prompts go: the n pages `there` of an arena get the `tokens` [n, PAGE] of a pool."""

    arena: Pages
    there: slice
    tokens: Tensor


class Cache:
    """The arenas of one call, for the worst case: the rows that need most, all live and at their limits.

    Args:
        before: tokens that all prompts begin with, whole pages.
        limits: [B] most tokens of each response.
    """

    def __init__(
        self, shape: CacheShape, parts: Sequence[Part], before: int, slots: int, limits: _Ints,
        *, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        capacity, page_bytes = capacity_of(parts, before, slots, limits), bytes_of_page(shape, dtype)
        if device.type == "cpu":
            self.room = Room("KV cache", sum(capacity) * page_bytes)
            empty = partial(self.room.take, dtype=dtype)
        else:
            empty = partial(torch.empty, dtype=dtype, device=device)
        self.before, self.device = before, device
        self.own = Pages(shape, capacity[0], 1, empty)
        widest = max(len(part.rows) for part in parts)
        self.groups = Pages(shape, capacity[1], widest, empty) if capacity[1] else None
        self.common = Pages(shape, capacity[2], slots, empty) if capacity[2] else None
        self.arenas = [each for each in (self.common, self.groups, self.own) if each is not None]
        self.use = CacheUse(0, 0, sum(capacity), page_bytes)

    def used(self) -> list[Pages]:
        """The arenas that hold anything; the rows' own pages last."""
        return [each for each in self.arenas if each.used]

    def grow(self, position: _Ints, *, clear: bool) -> None:
        """Takes a page for every row whose next token, at its position, begins one.

        clear: sets it to zero; for readers that read a page as a whole.
        """
        fresh = np.flatnonzero(position % PAGE == 0)
        pages = self.own.take(fresh[:, None], position[fresh])
        if clear:
            self.own.clear(pages)

    def keep_beginning(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        """Stores what all prompts begin with: per layer keys and values [1, H, before, Dh]."""
        assert self.common is not None
        count = self.before // PAGE
        self.common.take(np.full((count, self.common.readers.shape[1]), NOBODY), np.arange(count) * PAGE)
        for layer, (keys, values) in enumerate(kept):
            for leaf, pages in ((keys, self.common.keys), (values, self.common.values)):
                pages[layer][:] = leaf[0].unflatten(1, (-1, PAGE)).transpose(0, 1)

    def place(self, lengths: _Ints, samples: _Ints, first: _Ints, pool: Tensor) -> list[Place]:
        """Takes pages for new prompts.

        Args:
            lengths: [k] tokens of each prompt behind the common beginning.
            samples: [k] rows that read it, in slots first .. first + samples - 1.
            pool: int64 [k, T] where each of these tokens is in the pool; anything in the padding.
        """
        # Behind a prompt's end its last token, so that no row's page ever holds what another one left.
        column = np.minimum(np.arange(pages_for(pool.shape[1]) * PAGE), lengths[:, None] - 1)
        pieces_of = pool.gather(1, torch.from_numpy(column).to(self.device)).unflatten(1, (-1, PAGE))
        own: list[tuple[int, int, int]] = []  # slot, part, piece
        shared: list[tuple[_Ints, int, int]] = []
        for part, (length, count, slot) in enumerate(zip(lengths, samples, first, strict=True)):
            full = length // PAGE if count > 1 else 0
            if full and self.groups is not None:
                readers = np.full(self.groups.readers.shape[1], NOBODY)
                readers[:count] = np.arange(slot, slot + count)
                shared += [(readers, part, piece) for piece in range(full)]
            own += [
                (each, part, piece)
                for each in range(slot, slot + count)
                for piece in range(full, pages_for(length))
            ]
        places = []
        for arena, placed in ((self.groups, shared), (self.own, own)):
            if arena is None or not placed:
                continue
            pieces = np.array([piece for _, _, piece in placed])
            readers = np.array([each for each, _, _ in placed]).reshape(len(placed), -1)
            there = arena.take(readers, self.before + pieces * PAGE)
            parts = torch.tensor([part for _, part, _ in placed], device=self.device)
            places.append(Place(arena, there, pieces_of[parts, torch.from_numpy(pieces).to(self.device)]))
        return places

    def write(self, places: list[Place], layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores a layer's keys and values [1, H, N, Dh] of the pool of new prompts."""
        for leaf, name in ((keys, "keys"), (values, "values")):
            by_token = leaf[0].transpose(0, 1)
            for arena, there, tokens in places:
                getattr(arena, name)[layer][there] = by_token[tokens].transpose(1, 2)

    def renumber(self, slot: _Ints) -> None:
        """Rows moved or ended: slot[s] is where the row of slot s is now, or NOBODY."""
        for arena in self.arenas:
            if arena is not self.common:
                arena.renumber(slot)

    def read_by(self, rows: int) -> None:
        """Slots 0 .. rows - 1 are live, and read the common beginning."""
        if self.common is not None:
            self.common.readers[:] = NOBODY
            self.common.readers[:, :rows] = np.arange(rows)

    def note_use(self, position: _Ints) -> None:
        """Keeps `use` if the cache was never fuller; position: [rows] tokens of each live row."""
        pages = sum(each.used for each in self.arenas)
        if pages > self.use.pages:
            shared = sum(each.used for each in self.arenas if each is not self.own)
            # A row's own pages are full but the last, whose tokens end with the row.
            end = position[self.own.readers[: self.own.used, 0]]
            tokens = shared * PAGE + int(np.minimum(end - self.own.start[: self.own.used], PAGE).sum())
            self.use = self.use._replace(tokens=tokens, pages=pages)


def capacity_of(parts: Sequence[Part], before: int, slots: int, limits: _Ints) -> list[int]:
    """Pages of rows, of prompts that rows share, and of what all begin with, in the worst case of `Cache`."""
    own, shared = [], []
    for part in parts:
        alone = len(part.rows) == 1
        full = (len(part.prompt) - before) // PAGE
        rest = len(part.prompt) - before - (0 if alone else full * PAGE)
        own += [pages_for(rest + int(limits[row])) for row in part.rows]
        shared += [] if alone else [full]
    return [sum(sorted(pages, reverse=True)[:slots]) for pages in (own, shared)] + [before // PAGE]


def bytes_of_page(shape: CacheShape, dtype: torch.dtype) -> int:
    """Keys and values of PAGE tokens in all layers."""
    return 2 * shape.layers * shape.heads * PAGE * shape.width * dtype.itemsize
