"""Decode steps on a GPU as recorded graphs: one launch for a step instead of one for each of its operations.

At batch 64 a step of GPT-2 124M in bf16 has to move 0.55 GB, 0.17 ms on an H100, in 175 operations, of which
each takes Python longer to launch. A graph is recorded once for a number of rows (slots, a quarter, ...) and
then fits every step: what changes lies in the memory of an `Upload`, and attention finds its pages there.
Rows that there are not are computed along, and thrown away. Graphs belong to one call of the sampler: they
hold the addresses of its parameters.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.models.interface import Attend
from minirlhf.rollout.attention import paging
from minirlhf.rollout.drawing import Drawn, drawn
from minirlhf.rollout.engine import Engine
from minirlhf.rollout.pages import entries_by_row, pages_for
from minirlhf.rollout.upload import Upload

Record = Callable[[Callable[[], Drawn]], tuple[Drawn, Callable[[], None]]]
"""step -> (its results, what does the step again and puts its results into the same tensors)."""

_FEWER = 4  # from one graph to the next smaller one
_CLOSE = 0.05  # nats; the same operations of the same numbers in bf16, perhaps summed in another order


def graph_on(device: torch.device) -> Record:
    """`Record` by a CUDA graph; what it calls has been called before, so that nothing is compiled in it."""

    def record(step: Callable[[], Drawn]) -> tuple[Drawn, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            out = step()
        return out, graph.replay

    return record


class RecordingEngine(Engine):
    """`Engine` where `kernels.paged` runs: decode steps without newcomers are recorded."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        longest = max(len(part.prompt) for part in self.queue) + int(self.limits.max())
        self.upload = Upload(self.slots, self.slots * pages_for(longest), self.device)
        self.steps = Steps(self.slots, graph_on(self.device))

    def _decode(self) -> tuple[Drawn, Tensor]:
        rows = len(self.row)
        self._newest()
        said = self.upload.said(rows)
        said.token.copy_(self.token)
        self.position = self.position + 1
        return self.steps(rows, self._step), said.where

    def _newest(self) -> tuple[Attend, Tensor]:
        rows = len(self.row)
        self.cache.grow(self.position, clear=False)
        self.upload.send(
            entries_by_row(self.cache.arenas, rows), position=self.position,
            into=self.cache.own.last_pages(rows), row=self.row, drawn=self.drawn,
            uniform=self.uniform.numpy()[self.row, self.drawn],
        )  # fmt: skip
        reads = self.upload.said(rows).reads
        return paging(self.cache.arenas, reads), reads.position

    def _step(self, rows: int) -> Drawn:
        """The step of the first so many slots: of all that it reads, only numbers change between steps."""
        token, reads, _, uniform = self.upload.said(rows)
        positions = reads.position.clamp(min=0)  # of a row that there is not, any
        attend = paging(self.cache.arenas, reads)
        states = self.model.states(self.params, token[:, None], positions[:, None], attend)
        return drawn(self._logits(states[:, 0]), self.law, uniform)


class Steps:
    """Does steps by graphs, each recorded when it is first asked for.

    The first step of each size is done as it is, recorded, and replayed: if it cannot be recorded (a law that
    looks at numbers) or gives other tokens, that is said once, and steps are done as they are from then on.

    A step takes a number of rows, and reads and writes memory that stays where it is. It is not kept here: it
    knows the engine, whose cache a circle of references would hold in memory after the call.

    Args:
        slots: most rows.
    """

    def __init__(self, slots: int, record: Record) -> None:
        self.record = record
        self.sizes = [slots]
        while self.sizes[-1] >= 2 * _FEWER:
            self.sizes.append(self.sizes[-1] // _FEWER)
        self.graphs: dict[int, tuple[Drawn, Callable[[], None]]] = {}
        self.refused = False

    def __call__(self, rows: int, step: Callable[[int], Drawn]) -> Drawn:
        """What was drawn for the first so many slots; valid until the next call."""
        if self.refused:
            return step(rows)
        size = min(each for each in self.sizes if each >= rows)
        if size not in self.graphs:
            return self.make_ready(size, rows, step)
        out, replay = self.graphs[size]
        replay()
        return _of(out, rows)

    def make_ready(self, size: int, rows: int, step: Callable[[int], Drawn]) -> Drawn:
        """Does the step as it is, and records it."""
        plain = _of(step(size), rows)
        try:
            out, replay = self.record(lambda: step(size))
        except RuntimeError as error:  # torch's, for whatever a graph cannot hold
            self._refuse(f"{error}".partition("\n")[0])
            return plain
        replay()
        if bool(_agree(plain, _of(out, rows))):
            self.graphs[size] = out, replay
            return plain
        self._refuse("replayed, one drew other tokens")
        return step(rows)  # once more: what the replay has written into the cache is as wrong

    def _refuse(self, reason: str) -> None:
        self.refused = True
        warnings.warn(
            f"decode steps are not recorded, which makes them slower: {reason}", RuntimeWarning, stacklevel=2
        )


def _of(drawn: Drawn, rows: int) -> Drawn:
    return Drawn(*(each[:rows] for each in drawn))


def _agree(a: Drawn, b: Drawn) -> Tensor:
    """bool []: the same tokens with about the same log-probs, draws next to a boundary aside."""
    same = (a.token == b.token) & ((a.logp - b.logp).abs() < _CLOSE)
    return (same | a.near_boundary).all()
