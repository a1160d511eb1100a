"""Where a mask meets a reduction, and nowhere else: sums, means and variances over the tokens that count.

`mask` is bool, True = counts. A mask selects, it never multiplies: 0 · NaN is NaN, so whatever lies under
the mask (padding, garbage, NaN) is replaced by 0 before anything is computed from it, and gets gradient 0.
Where nothing counts, every reduction here is 0.

Each name says over what it averages, since token mean and sequence mean weight long answers differently
(Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.1, arXiv:2503.20783).
"""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_mask,
    check_positive,
    check_tokens,
    widen,
)


def select(x: Tensor, mask: Tensor) -> Tensor:
    """x where it counts, exactly 0 elsewhere: the guard that every masked objective begins with.

        selectₜ = xₜ  if maskₜ  else 0

    Args:
        x: [B, T] or [B, T, ...] floating point; where the mask is False it may hold anything, NaN too.
        mask: [B, T] bool, True = counts.

    Returns:
        The shape of x, in fp32 (fp64 stays fp64).

    Raises:
        ValueError: mask is not bool, or its shape is not that of x (without trailing axes).

    Gradient: 1 where the mask is True, exactly 0 elsewhere, also where x is NaN or infinite.

    >>> select(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    check_floating(x=x)
    check_mask(mask)
    if x.shape[: mask.ndim] != mask.shape:
        raise ValueError(f"mask {list(mask.shape)} must match the leading axes of x {list(x.shape)}")
    trailing = (1,) * (x.ndim - mask.ndim)
    return torch.where(mask.reshape(*mask.shape, *trailing), widen(x), 0.0)


def token_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over all tokens that count: Σ_{b,t} mask · x.

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.

    Returns:
        [] in the units of x; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ, x is not floating point, or mask is not bool.

    Gradient: 1 for each token that counts.

    >>> token_sum(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(7.)
    """
    check_tokens(mask, x=x)
    return select(x, mask).sum()


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over all tokens that count, each token with the same weight: Σ mask · x / Σ mask.

    A long sequence weighs more than a short one. Means of micro-batches do not average to the mean of the
    batch: for gradient accumulation use `scaled_sum` with the token count of the whole batch.

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.

    Returns:
        [] in the units of x; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ, x is not floating point, or mask is not bool.

    Gradient: 1/n for each of the n tokens that count.

    >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 8.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    """
    return token_sum(x, mask) / mask.sum().clamp(min=1)  # 0/1 where nothing counts


def token_variance(x: Tensor, mask: Tensor, *, correction: int = 1) -> Tensor:
    """Variance over all tokens that count, by default the unbiased one.

        σ² = Σ mask · (x - μ)² / (n - correction),   μ = token_mean(x),  n = Σ mask

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.
        correction: 1 for the unbiased estimate (Bessel), 0 for the population variance.

    Returns:
        [] in squared units of x; 0 where n <= correction (one token has no spread).

    Raises:
        ValueError: the shapes differ, x is not floating point, mask is not bool, or correction is not 0 or 1.

    Gradient: 2 (x - μ) / (n - correction) for each token that counts.

    >>> token_variance(torch.tensor([[0.0, 1.0, torch.nan]]), torch.tensor([[True, True, False]]))
    tensor(0.5000)
    """
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, got {correction}")
    deviation = select(widen(x) - token_mean(x, mask), mask)
    return deviation.square().sum() / (mask.sum() - correction).clamp(min=1)  # 0/1 where n <= correction


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of each sequence: Σ_t mask · x. With log-probs: log π(y|x), summed.

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.

    Returns:
        [B] in the units of x; 0 for a row where nothing counts.

    Raises:
        ValueError: the shapes differ, x is not floating point, or mask is not bool.

    Gradient: 1 for each token that counts.

    >>> sequence_sum(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([3., 4.])
    """
    check_tokens(mask, x=x)
    return select(x, mask).sum(dim=-1)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence: Σ_t mask · x / Σ_t mask. With log-probs: log π(y|x), averaged.

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.

    Returns:
        [B] in the units of x; 0 for a row where nothing counts.

    Raises:
        ValueError: the shapes differ, x is not floating point, or mask is not bool.

    Gradient: 1/nᵦ for each of the nᵦ tokens of row b that count.

    >>> sequence_mean(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([1.5000, 4.0000])
    """
    return sequence_sum(x, mask) / mask.sum(dim=-1).clamp(min=1)  # 0/1 where nothing counts


def scaled_sum(x: Tensor, mask: Tensor, *, constant: Scalar) -> Tensor:
    """Sum over all tokens that count, divided by a constant: Σ mask · x / constant.

    The reduction that micro-batches and shards can share: with the token count of the *whole* batch as
    constant, the parts add up to its `token_mean`. With a fixed length, it is the unbiased aggregation of
    Liu et al. 2025 (arXiv:2503.20783, "Dr. GRPO", section 3.2).

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.
        constant: positive number, or tensor [].

    Returns:
        [] in the units of x; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ, x is not floating point, mask is not bool, or constant is not positive.

    Gradient: 1/constant for each token that counts.

    >>> scaled_sum(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]), constant=4)
    tensor(0.7500)
    """
    check_positive(constant=constant)
    return token_sum(x, mask) / constant
