"""Examples that are read and padded only when a batch needs them: a set costs two numbers per example."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minirlhf.data.batches import validate, validate_pairs
from minirlhf.data.records import Example, PairExample, Sequences, collate, collate_pairs, take
from minirlhf.data.spool import LazySequence
from minirlhf.runs import InputError

_CHECKED_AT_ONCE = 256
Item = TypeVar("Item")
Batch = TypeVar("Batch")


class Rows(NamedTuple):
    """A set of N examples.

    Attributes:
        examples: read one by one, when a batch needs them.
        lengths: [N] int64, tokens of each.
        counted: [N] int64, tokens of each that count (are trained, are scored).
    """

    examples: Sequence[Example]
    lengths: Tensor
    counted: Tensor


def checked_rows(examples: Sequence[Example], *, vocab_size: int) -> Rows:
    """The examples as rows; each is read once and checked.

    Raises:
        InputError: one is unusable (see `data.batches.validate`).
    """
    blocks = list(_measured(examples, lambda some: (validate(collate(some), vocab_size=vocab_size),)))
    return Rows(examples, *(torch.cat([block[i] for block in blocks], dim=-1)[0] for i in (0, 1)))


def checked_pair_rows(pairs: Sequence[PairExample], *, vocab_size: int) -> Rows:
    """N pairs as 2N rows, the chosen sides and then the rejected ones; each pair is read once and checked.

    Raises:
        InputError: one is unusable (see `data.batches.validate_pairs`).
    """
    count = len(pairs)

    def side(row: int) -> Example:
        return pairs[row].chosen if row < count else pairs[row - count].rejected

    blocks = list(_measured(pairs, lambda some: validate_pairs(collate_pairs(some), vocab_size=vocab_size)))
    lengths, counted = (torch.cat([block[i] for block in blocks], dim=-1).flatten() for i in (0, 1))
    return Rows(LazySequence(2 * count, side), lengths, counted)


def gather(rows: Rows | Sequences, index: Tensor) -> Sequences:
    """The rows at `index` [K], padded to the longest of them."""
    if isinstance(rows, Sequences):
        return take(rows, index.to(rows.lengths.device))
    return collate(rows.examples[i] for i in index.tolist())


def _measured(
    items: Sequence[Item], check: Callable[[Sequence[Item]], tuple[Sequences, ...]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Lengths and counted tokens [sides, block] of one checked block after the other."""
    for start in range(0, len(items), _CHECKED_AT_ONCE):
        some = items[start : start + _CHECKED_AT_ONCE]
        try:
            sides = check(some)
        except InputError as error:
            where = f"examples {start} to {start + len(some) - 1}: " if len(some) < len(items) else ""
            raise InputError(f"{where}{error}") from None
        yield (
            torch.stack([side.lengths for side in sides]),
            torch.stack([side.mask.sum(1) for side in sides]),
        )
