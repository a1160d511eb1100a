"""What a reward model must beat: length alone, and the words of a response without prompt or order."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minirlhf.data.records import PairExample
from minirlhf.objectives.ranking import bradley_terry_loss

_STEPS, _RATE, _RIDGE = 300, 0.05, 1e-3
_PAIRS_AT_ONCE = 1024

FITTED_PAIRS = 50_000
"""Most pairs that a bag of words is fitted to; it is fitted in memory, and more would hardly move it."""


def length_only_accuracy(train: Sequence[PairExample], test: Sequence[PairExample]) -> float:
    """Accuracy on `test` of preferring the longer, or the shorter, response: whichever `train` prefers.

    Pairs of equal length count as half right.
    """
    longer = _longer_wins(train)
    accuracy = _longer_wins(test)
    return accuracy if longer >= 0.5 else 1 - accuracy


def bag_of_words_accuracy(
    train: Sequence[PairExample], test: Sequence[PairExample], *, vocab_size: int
) -> float:
    """Accuracy on `test` of a Bradley-Terry model that is linear in the response's token counts.

    Fitted to `train` by full-batch Adam with a small ridge: convex, deterministic, and blind to the prompt.
    Of more than `FITTED_PAIRS` pairs the first are fitted to: whoever passes more should say so.
    """
    difference = torch.cat(list(_count_differences(train[:FITTED_PAIRS], vocab_size))).coalesce()
    weight = torch.zeros(vocab_size, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=_RATE)
    for _ in range(_STEPS):
        score = difference @ weight
        loss = bradley_terry_loss(score, torch.zeros_like(score)).mean() + _RIDGE * weight.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    margin = torch.cat([part @ weight.detach() for part in _count_differences(test, vocab_size)])
    return float(((margin > 0).float() + 0.5 * (margin == 0).float()).mean())


def _longer_wins(pairs: Sequence[PairExample]) -> float:
    gap = torch.tensor([len(pair.chosen.ids) - len(pair.rejected.ids) for pair in pairs])
    return float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean())


def _count_differences(pairs: Sequence[PairExample], vocab_size: int) -> Iterator[Tensor]:
    """Sparse [block, V]: how often each id occurs in the chosen response more than in the rejected one."""
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        rows, columns, values = [], [], []
        some = pairs[start : start + _PAIRS_AT_ONCE]
        for row, pair in enumerate(some):
            for side, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
                rows += [row] * len(side.ids)
                columns += side.ids  # the prompt is on both sides and cancels
                values += [sign] * len(side.ids)
        indices, size = torch.tensor([rows, columns]), (len(some), vocab_size)
        # Made above, so they hold; torch 2.11 warns where this is not said for all operations.
        with torch.sparse.check_sparse_tensor_invariants(False):
            counts = torch.sparse_coo_tensor(indices, torch.tensor(values), size).coalesce()
        yield counts
