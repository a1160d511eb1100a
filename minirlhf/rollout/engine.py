"""Continuous batching: a fixed number of slots; a row that ends gives its slot to the next prompt at once.

One round of the loop takes up new prompts where slots are free (one forward pass for all newcomers), gives
every other live row its next state (one forward pass of one token each), and draws a token for all of them
from one product with the unembedding. A row's uniforms come from who it is, so who else is in the batch, and
when, changes nothing but the rounding of its logits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.attention import decoding, prefilling
from minirlhf.rollout.draw import check_law, inverse_cdf
from minirlhf.rollout.pages import NOBODY, PAGE, Pages, pages_for, table_of
from minirlhf.rollout.parts import Part

Law = Callable[[Tensor], Tensor]
"""Logits [B, V] -> normalised log-probabilities [B, V], as `partial(sampling_law, temperature=0.7)`."""

_PREFILL_TOKENS = 8192  # most of one forward pass, padding included, unless one part alone has more
_REFILL = 8  # new prompts wait until one slot in this many is free: a forward pass reads all weights

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


class Answers(NamedTuple):
    """Responses as they grow: tokens, logp, sampled_logp [B, N]; lengths, stop [B]; boundary []."""

    tokens: Tensor
    logp: Tensor
    sampled_logp: Tensor
    lengths: Tensor
    stop: Tensor
    boundary: Tensor


class Engine:
    """The state of one call: live rows in slots 0 .. n - 1, the arenas, the prompts still to take up.

    Args:
        parts: what to answer, in order; a part has at most `slots` rows.
        beginning: whole pages of tokens that every prompt begins with.
        limits: [B] most tokens of each row.
        uniform: fp64 [B, N] of token t of row b, N being the largest limit.
        stops: int64 [k] stop ids on the parameters' device.
        answers: where to write; rows are those of `parts`.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        parts: Sequence[Part],
        beginning: tuple[int, ...],
        *,
        law: Law,
        slots: int,
        limits: _Ints,
        uniform: Tensor,
        stops: Tensor,
        answers: Answers,
    ) -> None:
        self.model, self.params, self.law, self.slots = model, params, law, slots
        self.queue, self.beginning = deque(parts), beginning
        self.uniform, self.stops, self.answers = uniform, stops, answers
        self.unembedding = model.unembedding(params)
        self.device, self.limits = stops.device, limits
        self.row, self.position, self.drawn = (np.zeros(0, dtype=np.int64) for _ in range(3))
        self.token, self.sampled = stops.new_zeros(0), 0
        self._allocate(parts)
        self.use = CacheUse(0, 0, sum(len(each.start) for each in self.arenas), self._page_bytes())

    def _allocate(self, parts: Sequence[Part]) -> None:
        """Arenas for the worst case: the rows that need most, all live, all as long as they may become."""
        shape, before, slots = self.model.cache, len(self.beginning), self.slots
        own, shared = [], []
        for part in parts:
            alone = len(part.rows) == 1
            full = (len(part.prompt) - before) // PAGE
            rest = len(part.prompt) - before - (0 if alone else full * PAGE)
            own += [pages_for(rest + int(self.limits[row])) for row in part.rows]
            shared += [] if alone else [full]
        like = self.unembedding.new_empty(0)

        def arena(pages: list[int], rows: int, width: int) -> Pages:
            return Pages(shape, sum(sorted(pages, reverse=True)[:rows]), width, like)

        self.own = arena(own, slots, 1)
        self.groups = arena(shared, slots, max(len(part.rows) for part in parts)) if any(shared) else None
        self.common = arena([before // PAGE], 1, slots) if before else None
        self.arenas = [each for each in (self.common, self.groups, self.own) if each is not None]
        self.prefix = self._read_beginning() if self.common is not None else []

    @torch.no_grad()
    def _read_beginning(self) -> list[tuple[Tensor, Tensor]]:
        kept: list[tuple[Tensor, Tensor]] = []
        tokens = torch.tensor([self.beginning], device=self.device)
        positions = torch.arange(tokens.shape[1], device=self.device)
        attend = prefilling(lambda layer, keys, values: kept.append((keys, values)), [])
        self.model.states(self.params, tokens, positions, attend)
        assert self.common is not None
        count = tokens.shape[1] // PAGE
        self.common.take(np.full((count, self.slots), NOBODY), np.arange(count) * PAGE)
        for layer, (keys, values) in enumerate(kept):
            self.common.keys[layer][:] = _paged(keys)[0]
            self.common.values[layer][:] = _paged(values)[0]
        return kept

    @torch.no_grad()
    def run(self) -> Iterator[_Ints]:
        """Yields the rows that ended after each round; their answers are complete then."""
        checked = False
        while self.queue or len(self.row):
            joining = self._next_parts()
            states = [self._decode()] if len(self.row) else []
            if joining:
                states.append(self._prefill(joining))
            logits = torch.nn.functional.linear(torch.cat(states), self.unembedding).float()
            law_logp = self.law(logits)
            if not checked:
                check_law(law_logp, logits)
                checked = True
            self._note_use()
            yield self._draw(logits, law_logp)

    def _next_parts(self) -> list[Part]:
        free, width, joining = self.slots - len(self.row), 0, []
        if len(self.row) and free < max(1, self.slots // _REFILL):
            return joining
        while self.queue and len(self.queue[0].rows) <= free:
            part = self.queue[0]
            width = max(width, len(part.prompt) - len(self.beginning))
            if joining and width * (len(joining) + 1) > _PREFILL_TOKENS:
                break
            joining.append(self.queue.popleft())
            free -= len(part.rows)
        return joining

    def _decode(self) -> Tensor:
        """States [n, D] of the live rows' last tokens."""
        fresh = np.flatnonzero(self.position % PAGE == 0)
        self.own.take(fresh[:, None], self.position[fresh])
        arenas = [each for each in self.arenas if each.used]
        table = table_of(arenas, len(self.row), self.device)
        page, position = self._there(self.own.last_pages(len(self.row))), self._there(self.position)
        attend = decoding(arenas, table, page, position)
        states = self.model.states(self.params, self.token[:, None], position[:, None], attend)
        self.position = self.position + 1
        return states[:, 0]

    def _prefill(self, parts: list[Part]) -> Tensor:
        """Reads the parts' prompts, puts their rows into the next slots; states [k, D] after each prompt."""
        before, count = len(self.beginning), len(self.row)
        lengths = np.array([len(part.prompt) for part in parts]) - before
        samples = np.array([len(part.rows) for part in parts])
        rows = [torch.tensor(part.prompt[before:]) for part in parts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        first = count + np.cumsum(samples) - samples  # the slot of each part's first row
        writes = self._placed(lengths, samples, first)

        def write(layer: int, keys: Tensor, values: Tensor) -> None:
            for leaves, new in ((keys, "keys"), (values, "values")):
                pieces = _paged(leaves)  # [b, T / PAGE, H, PAGE, Dh]
                for arena, there, part, piece in writes:
                    getattr(arena, new)[layer][there] = pieces[part, piece]

        positions = before + torch.arange(tokens.shape[1], device=self.device)
        states = self.model.states(self.params, tokens, positions, prefilling(write, self.prefix))
        last = states[torch.arange(len(parts)), self._there(lengths - 1)]
        repeats = self._there(samples)
        self.row = np.concatenate([self.row, np.array([row for part in parts for row in part.rows])])
        self.position = np.concatenate([self.position, np.repeat(lengths + before, samples)])
        self.drawn = np.concatenate([self.drawn, np.zeros(int(samples.sum()), dtype=np.int64)])
        self._see_beginning()
        return last.repeat_interleave(repeats, dim=0)

    def _placed(
        self, lengths: _Ints, samples: _Ints, first: _Ints
    ) -> list[tuple[Pages, slice, Tensor, Tensor]]:
        """Takes pages for new prompts: (arena, its new pages, and of each the part and its piece)."""
        before = len(self.beginning)
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
        writes = []
        for arena, placed in ((self.groups, shared), (self.own, own)):
            if arena is None or not placed:
                continue
            pieces = np.array([piece for _, _, piece in placed])
            readers = np.array([each for each, _, _ in placed]).reshape(len(placed), -1)
            there = arena.take(readers, before + pieces * PAGE)
            part = self._there(np.array([part for _, part, _ in placed]))
            writes.append((arena, there, part, self._there(pieces)))
        return writes

    def _draw(self, logits: Tensor, law_logp: Tensor) -> _Ints:
        """One token for every live row; rows that end leave. Returns them."""
        row, at = self._there(self.row), self._there(self.drawn)
        uniform = self.uniform[self.row, self.drawn]
        token, near = inverse_cdf(law_logp, uniform)
        out, column = self.answers, token[:, None]
        out.tokens[row, at] = token
        out.logp[row, at] = logits.gather(1, column)[:, 0] - logits.logsumexp(-1)
        out.sampled_logp[row, at] = law_logp.gather(1, column)[:, 0].float()
        out.boundary.add_(near.sum())
        self.token, self.drawn, self.sampled = token, self.drawn + 1, self.sampled + len(token)
        stopped = torch.isin(token, self.stops)
        ended = stopped.cpu().numpy() | (self.drawn == self.limits[self.row])
        if not ended.any():
            return np.zeros(0, dtype=np.int64)
        gone = self._there(np.flatnonzero(ended))
        out.lengths[row[gone]] = self._there(self.drawn[ended])
        reason = torch.where(token == self.stops[0], 0, 1) if len(self.stops) else torch.zeros_like(token)
        out.stop[row[gone]] = torch.where(stopped, reason, 2)[gone]
        leaving = self.row[ended]
        self._close_up(~ended)
        return leaving

    def _close_up(self, stays: NDArray[np.bool_]) -> None:
        slot = np.where(stays, np.cumsum(stays) - 1, NOBODY)
        self.row, self.position, self.drawn = (each[stays] for each in (self.row, self.position, self.drawn))
        self.token = self.token[self._there(np.flatnonzero(stays))]
        for arena in self.arenas:
            if arena is not self.common:
                arena.renumber(slot)
        self._see_beginning()

    def _see_beginning(self) -> None:
        if self.common is not None:
            self.common.readers[:] = NOBODY
            self.common.readers[:, : len(self.row)] = np.arange(len(self.row))

    def _note_use(self) -> None:
        pages = sum(each.used for each in self.arenas)
        if pages > self.use.pages:
            shared = sum(each.used for each in self.arenas if each is not self.own)
            newest = self.own.start[: self.own.used]
            # A row's own pages are full but the last, whose tokens end with the row.
            end = self.position[self.own.readers[: self.own.used, 0]]
            tokens = shared * PAGE + int(np.minimum(end - newest, PAGE).sum())
            self.use = self.use._replace(tokens=tokens, pages=pages)

    def _page_bytes(self) -> int:
        return sum(leaf[0].nbytes for leaf in (*self.own.keys, *self.own.values))

    def _there(self, values: _Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _paged(leaf: Tensor) -> Tensor:
    """[B, H, T, Dh] -> [B, ⌈T / PAGE⌉, H, PAGE, Dh], zeros behind the end."""
    short = -leaf.shape[2] % PAGE
    return torch.nn.functional.pad(leaf, (0, 0, 0, short)).unflatten(2, (-1, PAGE)).transpose(1, 2)
