"""What a reward model must beat: length alone, and the words of a response without prompt or order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.data.records import PairExample
from minirlhf.objectives.ranking import bradley_terry_loss

_STEPS, _RATE, _RIDGE = 300, 0.05, 1e-3


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
    """
    difference = _count_difference(train, vocab_size)
    weight = torch.zeros(vocab_size, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=_RATE)
    for _ in range(_STEPS):
        score = difference @ weight
        loss = bradley_terry_loss(score, torch.zeros_like(score)).mean() + _RIDGE * weight.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    margin = _count_difference(test, vocab_size) @ weight.detach()
    return float(((margin > 0).float() + 0.5 * (margin == 0).float()).mean())


def _longer_wins(pairs: Sequence[PairExample]) -> float:
    gap = torch.tensor([len(pair.chosen.ids) - len(pair.rejected.ids) for pair in pairs])
    return float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean())


def _count_difference(pairs: Sequence[PairExample], vocab_size: int) -> Tensor:
    """Sparse [N, V]: how often each id occurs in the chosen response more than in the rejected one."""
    rows, columns, values = [], [], []
    for row, pair in enumerate(pairs):
        for side, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            rows += [row] * len(side.ids)
            columns += side.ids  # the prompt is on both sides and cancels
            values += [sign] * len(side.ids)
    indices = torch.tensor([rows, columns])
    size = (len(pairs), vocab_size)
    return torch.sparse_coo_tensor(indices, torch.tensor(values), size, check_invariants=False).coalesce()
