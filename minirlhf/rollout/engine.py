"""Continuous batching: a fixed number of slots; a row that ends gives its slot to the next prompt at once.

One round of the loop is one forward pass: over the newest token of every live row and, where slots are free,
over the prompts of newcomers beside them, packed, so that the weights are read once for both (Yu et al. 2022,
"Orca"). Then a token is drawn for every row from one product with the unembedding. A row's uniforms come from
who it is, so who else is in the batch, and when, changes nothing but the rounding of its logits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minirlhf.models.interface import Attend, LanguageModel, Params
from minirlhf.models.packing import Packing, pack, unpacked
from minirlhf.rollout.attention import beginning, beside, decoding, prefilling
from minirlhf.rollout.cache import Cache
from minirlhf.rollout.draw import check_law
from minirlhf.rollout.drawing import Drawn, drawn
from minirlhf.rollout.pages import NOBODY
from minirlhf.rollout.parts import Part

Law = Callable[[Tensor], Tensor]
"""Logits [B, V] -> normalised log-probabilities [B, V], as `partial(sampling_law, temperature=0.7)`."""

PREFILL_TOKENS = 8192  # of prompts in one forward pass, unless one prompt alone has more
_REFILL = 8  # new prompts wait until one slot in this many is free; with 16 as fast, with 32 slower (CPU)

_Ints = NDArray[np.int64]


class Answers(NamedTuple):
    """Responses as they grow: tokens, logp, sampled_logp [B, N]; lengths, stop [B]; boundary []."""

    tokens: Tensor
    logp: Tensor
    sampled_logp: Tensor
    lengths: Tensor
    stop: Tensor
    boundary: Tensor


class Engine:
    """The state of one call: live rows in slots 0 .. n - 1, the cache, the prompts still to take up.

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
        unembedding = model.unembedding(params)
        # Logits are fp32 products, as the trainer's are: in 16 bits they would be off by 2⁻⁹ of themselves.
        self.wide = torch.promote_types(unembedding.dtype, torch.float32)
        self.unembedding = unembedding.to(self.wide) if isinstance(unembedding, Tensor) else unembedding
        self.device, self.limits = stops.device, limits
        self.row, self.position, self.drawn = (np.zeros(0, dtype=np.int64) for _ in range(3))
        self.token, self.sampled, self.checked = stops.new_zeros(0), 0, False
        self.cache = Cache(
            model.cache,
            parts,
            len(beginning),
            slots,
            limits,
            dtype=unembedding.dtype,
            device=self.device,
        )
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer, what all prompts begin with
        if beginning:
            self._read_beginning()

    @torch.no_grad()
    def _read_beginning(self) -> None:
        tokens = torch.tensor([self.beginning], device=self.device)
        positions = torch.arange(tokens.shape[1], device=self.device)
        self.model.states(self.params, tokens, positions, beginning(self.prefix))
        self.cache.keep_beginning(self.prefix)

    @torch.no_grad()
    def run(self) -> Iterator[_Ints]:
        """Yields the rows that ended after each round; their answers are complete then."""
        while self.queue or len(self.row):
            joining = self._next_parts()
            draw, where = (self._drawn(self._join(joining)), self._where()) if joining else self._decode()
            self.cache.note_use(self.position)
            yield self._keep(draw, where)

    def _next_parts(self) -> list[Part]:
        free, tokens, joining = self.slots - len(self.row), 0, []
        if len(self.row) and free < max(1, self.slots // _REFILL):
            return joining
        while self.queue and len(self.queue[0].rows) <= free:
            part = self.queue[0]
            tokens += len(part.prompt) - len(self.beginning)
            if joining and tokens > PREFILL_TOKENS:
                break
            joining.append(self.queue.popleft())
            free -= len(part.rows)
        return joining

    def _decode(self) -> tuple[Drawn, Tensor]:
        """A decode step of the live rows; what is drawn after their newest tokens, and `_where` it goes."""
        attend, positions = self._newest()
        states = self.model.states(self.params, self.token[:, None], positions[:, None], attend)
        self.position = self.position + 1
        return self._drawn(states[:, 0]), self._where()

    def _newest(self) -> tuple[Attend, Tensor]:
        """How the live rows' newest tokens attend, which get their pages here, and their positions [n]."""
        self.cache.grow(self.position, clear=True)
        attend = decoding(self.cache.used(), self.position, self.device)
        return attend, self._there(self.position)

    def _drawn(self, states: Tensor) -> Drawn:
        """A token after each of the states [n, D] of the live rows."""
        logits = self._logits(states)
        if not self.checked:
            check_law(self.law(logits), logits)
            self.checked = True
        return drawn(logits, self.law, self.uniform[self.row, self.drawn])

    def _logits(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states.to(self.wide), self.unembedding).float()

    def _where(self) -> Tensor:
        """int64 [2, n] the place of every live row's next token in the answers."""
        return self._there(np.stack([self.row, self.drawn]))

    def _join(self, parts: list[Part]) -> Tensor:
        """Reads the parts' prompts beside the live rows' newest tokens; their rows get the next slots.

        Returns:
            States [n, D] of the newest tokens and, behind these, after the prompt of every new row.
        """
        before, count = len(self.beginning), len(self.row)
        lengths = np.array([len(part.prompt) for part in parts]) - before
        samples = np.array([len(part.rows) for part in parts])
        first = count + np.cumsum(samples) - samples  # the slot of each part's first row
        prompts = self._packed([part.prompt[before:] for part in parts])
        newest, newest_at = self._newest() if count else (None, prompts.positions[:0])  # its pages first
        places = self.cache.place(lengths, samples, first, prompts.slots)
        attend = prefilling(prompts, partial(self.cache.write, places), self.prefix)
        if newest is not None:
            attend = beside(attend, len(prompts.tokens), newest)
        tokens = torch.cat([prompts.tokens, self.token])[None]
        positions = torch.cat([before + prompts.positions, newest_at])[None]
        states = self.model.states(self.params, tokens, positions, attend)[0]
        last = prompts.slots.gather(1, self._there(lengths - 1)[:, None])[:, 0]
        self.row = np.concatenate([self.row, np.array([row for part in parts for row in part.rows])])
        self.position = np.concatenate([self.position + 1, np.repeat(lengths + before, samples)])
        self.drawn = np.concatenate([self.drawn, np.zeros(int(samples.sum()), dtype=np.int64)])
        self.cache.read_by(len(self.row))
        after = states[last.repeat_interleave(self._there(samples))]
        return torch.cat([states[len(prompts.tokens) :], after])

    def _packed(self, prompts: list[tuple[int, ...]]) -> Packing:
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in prompts], batch_first=True)
        packing = pack(rows, torch.tensor([len(each) for each in prompts])) or unpacked(rows)  # on the host
        return tree_map_only(Tensor, lambda leaf: leaf.to(self.device), packing)

    def _keep(self, draw: Drawn, where: Tensor) -> _Ints:
        """Writes down a token of every live row; rows that end leave. Returns them."""
        (row, at), out = where, self.answers
        token, near, *log_probs = draw
        out.tokens[row, at] = token
        out.logp[row, at], out.sampled_logp[row, at] = log_probs
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
        self.cache.renumber(slot)
        self.cache.read_by(len(self.row))

    def _there(self, values: _Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device)
