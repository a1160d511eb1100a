"""Which pairs move the validation loss, and how noisy a batch's gradient is: one gradient per pair, by vmap.

    influence of pair i = g_i · g_V,    g_i = ∂ loss_i/∂θ,  g_V = ∂ (mean validation loss)/∂θ

A step of gradient descent of size η on pair i alone lowers the validation loss by η times that, to first
order: TracIn at one checkpoint (Pruthi et al. 2020, arXiv:2002.08484, section 3.1). A pair with a large
negative influence pulls against what the held-out pairs say, as one whose label is wrong does. The cosine is
the same without the gradients' lengths.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from minirlhf.data.records import Sequences
from minirlhf.data.rows import gather
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training.device import device_of, move
from minirlhf.training.loop import Step, longest_first
from minirlhf.training.pairs import PairBatch, PairRows, pair_lengths
from minirlhf.training.progress import progress
from minirlhf.training.update import Loss, NonFiniteError, gradient, listed, non_finite

GRADIENT_MEMORY = 2**30
"""Bytes of per-pair gradients at a time."""


class NoiseScale(NamedTuple):
    """Of the gradients of single pairs, estimated without bias from N of them.

    variance: tr Σ, the sum of the variances of all components. signal: |G|², of the expected gradient.
    scale: B = tr Σ / |G|², in pairs: in a batch of so many, noise and signal are equal; inf where the signal
        cannot be told from 0.
    """

    variance: float
    signal: float
    scale: float


class Influence(NamedTuple):
    """Of each training pair, [N] on the CPU, fp64; and the noise scale of all of them.

    influence: g_i · g_V, in units of the loss per unit of step size. cosine: of that angle, in [-1, 1].
    gradient_norm: |g_i|. loss: of the pair.
    """

    influence: Tensor
    cosine: Tensor
    gradient_norm: Tensor
    loss: Tensor
    noise: NoiseScale


def noise_scale(mean_square: float, square_of_mean: float, count: int) -> NoiseScale:
    """The gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162, Eq. 2.8 and appendix A.1).

        tr Σ = N/(N-1) (mean |g_i|² - |mean g_i|²),    |G|² = |mean g_i|² - tr Σ / N,    B = tr Σ / |G|²

    Args:
        mean_square: mean |g_i|². square_of_mean: |mean g_i|². count: N, at least 2.

    Raises:
        ValueError: fewer than two gradients, or a mean square below the square of the mean.

    >>> noise_scale(5.0, 2.0, 4)
    NoiseScale(variance=4.0, signal=1.0, scale=4.0)
    """
    if count < 2:
        raise ValueError(f"the noise of gradients needs at least two of them, got {count}")
    spread = mean_square - square_of_mean
    if not spread >= -1e-6 * mean_square:
        raise ValueError(f"the mean square {mean_square} is below the square of the mean {square_of_mean}")
    variance = count / (count - 1) * max(spread, 0.0)
    signal = square_of_mean - variance / count
    return NoiseScale(variance, signal, variance / signal if signal > 0 else math.inf)


def influence(params: Params, pairs: PairRows, validation: Step, *, loss: Loss) -> Influence:
    """The influence of every pair on the validation set's mean loss.

    Args:
        params: what is differentiated.
        pairs: the training pairs, with whatever extra tensors the loss reads.
        validation: the held-out pairs, cut.
        loss: of pairs, as a stage has it.

    Raises:
        InputError: fewer than two training pairs.
        NonFiniteError: a gradient is not finite.
    """
    count = len(pairs.rows.lengths) // 2
    if count < 2:
        raise InputError(f"influence needs at least two training pairs, got {count}")
    target, _, _ = gradient(params, validation.micro_batches, validation.normaliser, loss=loss)
    if bad := non_finite(target):
        raise NonFiniteError(0, f"the validation pairs' gradient of {listed(bad)}")
    towards = pytree.tree_leaves(target)
    size = max(1, GRADIENT_MEMORY // sum(leaf.nbytes for leaf in towards))
    order = longest_first(pair_lengths(pairs), torch.arange(count))
    sums = [torch.zeros_like(leaf) for leaf in towards]
    found = torch.zeros(3, count, dtype=torch.float64)  # dot product, squared norm, loss
    parts = order.split(size)
    with progress("influence", len(parts)) as advance:
        for part in parts:
            gradients, losses = pair_gradients(params, pairs, part, loss=loss)
            leaves = [leaf.flatten(1) for leaf in pytree.tree_leaves(gradients)]
            dots = _summed([leaf @ other.flatten() for leaf, other in zip(leaves, towards, strict=True)])
            squares = _summed([leaf.square().sum(1) for leaf in leaves])
            found[:, part] = torch.stack([dots, squares, losses.cpu().double()])
            for total, leaf in zip(sums, leaves, strict=True):
                total += leaf.sum(0).view_as(total)
            advance(int(pairs.rows.lengths[torch.cat([part, part + count])].sum()))
    if not bool(found.isfinite().all()):
        raise NonFiniteError(0, f"the gradient of training pair {int((~found.isfinite()).nonzero()[0, 1])}")
    dots, squares, losses = found
    length = float(_summed([leaf.square().sum()[None] for leaf in towards])) ** 0.5
    of_mean = float(_summed([(leaf / count).square().sum()[None] for leaf in sums]))
    norms = squares.sqrt()
    cosine = dots / (norms * length).clamp(min=torch.finfo(torch.float64).tiny)
    return Influence(dots, cosine, norms, losses, noise_scale(float(squares.mean()), of_mean, count))


def pair_gradients(params: Params, pairs: PairRows, index: Tensor, *, loss: Loss) -> tuple[Params, Tensor]:
    """Gradients of single pairs, each leaf [b, ...], and their losses [b].

    Args:
        index: [b] which pairs.
    """
    count, device = len(pairs.rows.lengths) // 2, device_of(params)
    rows = move(gather(pairs.rows, torch.cat([index, index + count])), device)
    sides = Sequences(*(torch.stack(field.chunk(2), dim=1) for field in rows))  # [b, 2, ...]
    extra = {name: value[index].to(device) for name, value in pairs.extra.items()}
    one, slot = torch.ones((), device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def of_pair(
        params: Params, rows: Sequences, extra: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alone = {name: value[None] for name, value in extra.items()}
        return loss(params, PairBatch(rows, alone, slot, 1), one)

    differentiated: Callable[..., tuple[Params, tuple[Tensor, dict[str, Tensor]]]]
    differentiated = torch.func.grad_and_value(of_pair, has_aux=True)
    with sdpa_kernel(SDPBackend.MATH):  # vmap would run the fused attention one pair after the other
        gradients, (losses, _) = torch.func.vmap(differentiated, in_dims=(None, 0, 0))(params, sides, extra)
    return gradients, losses.detach()


def _summed(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).cpu().double().sum(0)
