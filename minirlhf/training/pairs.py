"""How reward model and preference training read pairs: both sides of a pair in one forward pass, then apart.

A set of N pairs is one batch of 2N rows: the chosen ones, then the rejected ones in the same order. A
micro-batch of b pairs is 2b rows in the same layout. What a loss measures on each pair goes to the pair's own
slot of the whole batch, so that the contributions of micro-batches add up to the table [B] of the batch, and
one set of formulas serves a step and the validation set.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.records import PairExample, Sequences
from minirlhf.data.rows import Rows, checked_pair_rows, gather
from minirlhf.data.spool import LazySequence
from minirlhf.models.interface import LanguageModel
from minirlhf.models.packing import Packing, pack
from minirlhf.runs import InputError
from minirlhf.training.device import move
from minirlhf.training.loop import Step, held, longest_first
from minirlhf.training.packed import Pack, PackedRows, packed


class PairRows(NamedTuple):
    """A set of N pairs.

    rows: 2N rows, row i and row N + i are the sides of pair i.
    extra: [N] tensors that belong to a pair, by name (a margin, the reference's log-probs).
    """

    rows: Rows
    extra: dict[str, Tensor]


class PairBatch(NamedTuple):
    """A micro-batch of b out of a batch of B pairs.

    rows: 2b rows, chosen then rejected.
    extra: [b] tensors by name.
    slot: [b] the place of each pair in the batch.
    size: B.
    packing: how the rows are computed; None: as padded rows, each side with a prompt of its own.
    """

    rows: Sequences
    extra: dict[str, Tensor]
    slot: Tensor
    size: int
    packing: Packing | None = None


def pair_rows(examples: Sequence[PairExample], *, name: str, model: LanguageModel) -> PairRows:
    """The pairs as rows, each read once and checked.

    Raises:
        InputError: there is none, or one is unusable (see `data.batches.validate_pairs`).
    """
    if not examples:
        raise InputError(f"expected at least one {name} pair, got none")
    return PairRows(checked_pair_rows(examples, vocab_size=model.config.vocab_size), {})


def pair_lengths(pairs: PairRows) -> Tensor:
    """[N] tokens of the longer side of each pair."""
    chosen, rejected = pairs.rows.lengths.chunk(2)
    return torch.maximum(chosen, rejected)


def cut_pairs(
    pairs: PairRows, index: Tensor, *, micro_batch_size: int, device: torch.device, pack: Pack = pack
) -> Step:
    """The pairs at `index` as micro-batches, packed where that pays; normalised by pairs."""
    count, size = len(pairs.rows.lengths) // 2, len(index)
    parts, slots = index.split(micro_batch_size), torch.arange(size).split(micro_batch_size)

    def micro_batch(i: int) -> PairBatch:
        rows = gather(pairs.rows, torch.cat([parts[i], parts[i] + count]))
        extra = {key: value[parts[i]] for key, value in pairs.extra.items()}
        packing = pack(rows.tokens, rows.lengths)
        return move(PairBatch(rows, extra, slots[i], size, packing), device)

    tokens = int(pairs.rows.lengths[index].sum() + pairs.rows.lengths[index + count].sum())
    normaliser = torch.full((), float(size), device=device)
    return Step(LazySequence(len(parts), micro_batch), normaliser, tokens)


def cut_all(pairs: PairRows, *, micro_batch_size: int, device: torch.device) -> Step:
    """All pairs as one batch, longest first."""
    lengths = pair_lengths(pairs)
    index = longest_first(lengths, torch.arange(len(lengths)))
    return held(cut_pairs(pairs, index, micro_batch_size=micro_batch_size, device=device))


def table(batch: PairBatch, **values: Tensor) -> dict[str, Tensor]:
    """Each [b] tensor of values, detached, as [B]: at the slots of these pairs, 0 at all others."""
    empty = torch.zeros(batch.size, device=batch.slot.device)
    return {name: empty.index_copy(0, batch.slot, value.detach().float()) for name, value in values.items()}


@torch.no_grad()
def per_row(
    function: Callable[[PackedRows], Tensor],
    rows: Rows | Sequences,
    *,
    micro_batch_size: int,
    device: torch.device,
    sides: int = 1,
) -> Tensor:
    """function(rows) -> [B] over many rows, on the CPU: forwarded longest first, returned in order.

    Args:
        micro_batch_size: most rows per forward pass, but at least one row of every side.
        sides: 2 where the rows are N pairs, so that both sides of a pair share a forward pass; 1: of none.
    """
    longest = rows.lengths.cpu().view(sides, -1).amax(0)
    order = longest_first(longest, torch.arange(len(longest)))
    offsets = torch.arange(sides)[:, None] * len(longest)
    parts = [(part + offsets).flatten() for part in order.split(max(1, micro_batch_size // sides))]
    found = torch.cat([function(move(packed(gather(rows, part)), device)) for part in parts]).cpu()
    return torch.zeros_like(found).index_copy(0, torch.cat(parts), found)
