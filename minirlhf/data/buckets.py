"""Batches of rows of similar length: less padding for a little less randomness."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def bucketed_order(
    lengths: Sequence[int], *, batch_size: int, window: int, generator: torch.Generator, skip: int = 0
) -> Iterator[Tensor]:
    """One epoch like `epoch_order`, but rows are sorted by length inside windows of `window` batches.

    The order is random between windows, and the batches of a window come in random order: only which rows
    share a batch depends on length. window=1 is `epoch_order` with sorted batches. The last, smaller batch
    may come anywhere in the last window.

    Args:
        lengths: tokens of each row.
        batch_size: indices of a batch.
        window: batches that are sorted together; larger saves more padding.
        generator: of the order.
        skip: batches at the beginning to leave out, to restart inside an epoch.

    Returns:
        iterator over ceil(n / batch_size) - skip int64 tensors.
    """
    if not lengths or batch_size < 1 or window < 1 or skip < 0:
        raise ValueError(
            f"expected lengths, batch_size >= 1, window >= 1, skip >= 0; "
            f"got {len(lengths)} lengths, {batch_size}, {window}, {skip}"
        )
    known = torch.tensor(lengths)
    batches: list[Tensor] = []
    for rows in torch.randperm(len(lengths), generator=generator).split(batch_size * window):
        cut = rows[known[rows].argsort(stable=True)].split(batch_size)
        batches += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return iter(batches[skip:])


def padding_waste(lengths: Sequence[int], batches: Sequence[Tensor]) -> float:
    """The share of token slots that hold padding when these batches of indices are collated.

    >>> padding_waste([2, 4, 4, 4], [torch.tensor([0, 1]), torch.tensor([2, 3])])
    0.125
    """
    slots = sum(len(batch) * max(lengths[i] for i in batch.tolist()) for batch in batches)
    if not slots:
        raise ValueError("expected at least one batch of rows with tokens, got none")
    return 1 - sum(lengths[i] for batch in batches for i in batch.tolist()) / slots
