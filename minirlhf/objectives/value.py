"""Losses of the critic: half the squared error to the return, plain and clipped, and how much it explains."""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import Scalar, check_tokens, check_width, widen
from minirlhf.objectives.masked import select, token_variance


def value_loss(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    """Half the squared error of each value.

        lossₜ = ½ (Vₜ - Rₜ)²

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", Eq. 9 (arXiv:1707.06347), with the
    factor ½ of the first implementations.

    Args:
        value: [B, T] V before each token, in reward units.
        ret: [B, T] the returns that it should predict (`AdvantageEstimate.ret`).
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] losses in squared reward units, exactly 0 where the mask is False. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or mask is not bool.

    Gradient: ∂loss/∂value = V - R for each token that counts.

    >>> value_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([[True, False]]))
    tensor([[0.1250, 0.0000]])
    """
    check_tokens(mask, value=value, ret=ret)
    return 0.5 * (select(value, mask) - select(ret, mask)).square()


def clipped_value_loss(
    value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, *, clip: Scalar
) -> Tensor:
    """The larger of the value loss and the same loss with the value kept near the old one.

        lossₜ = ½ max[(Vₜ - Rₜ)², (V_clip - Rₜ)²],   V_clip = clip(Vₜ, V_oldₜ - ε, V_oldₜ + ε)

    From the reference implementation of PPO; described in Engstrom et al. 2020, "Implementation Matters in
    Deep Policy Gradients", section 3 (arXiv:2005.12729). The maximum makes it pessimistic: it is never below
    `value_loss`.

    Args:
        value: [B, T] V before each token, in reward units.
        old_value: [B, T] V of the same tokens when the rollout was collected.
        ret: [B, T] the returns that V should predict.
        mask: [B, T] bool, True = counts.
        clip: ε > 0, in reward units. Infinity never clips.

    Returns:
        [B, T] losses in squared reward units, exactly 0 where the mask is False. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or clip <= 0.

    Gradient: ∂loss/∂value = V - R, and 0 where |V - V_old| > ε and (V_clip - R)² > (V - R)².

    >>> t = torch.tensor
    >>> clipped_value_loss(t([[0.5]]), t([[0.0]]), t([[1.0]]), t([[True]]), clip=0.2)
    tensor([[0.3200]])
    """
    check_tokens(mask, value=value, old_value=old_value, ret=ret)
    check_width(clip=clip)
    v, old, target = select(value, mask), select(old_value, mask), select(ret, mask)
    clipped = torch.clamp(v, old - clip, old + clip)
    return 0.5 * torch.maximum((v - target).square(), (clipped - target).square())


def explained_variance(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    """The share of the variance of the returns that the values explain.

        1 - Var(R - V) / Var(R)

    1 is a perfect critic, 0 one that knows only the mean, below 0 one that is worse than a constant.

    Args:
        value: [B, T] V before each token.
        ret: [B, T] the returns.
        mask: [B, T] bool, True = counts.

    Returns:
        [] without unit; 0 where the returns do not vary (there is nothing to explain).

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or mask is not bool.

    Gradient: defined, but this is a metric and not meant as a loss.

    >>> value, ret = torch.tensor([[1.0, 1.5]]), torch.tensor([[1.0, 2.0]])
    >>> explained_variance(value, ret, torch.tensor([[True, True]]))
    tensor(0.7500)
    """
    check_tokens(mask, value=value, ret=ret)
    variance = token_variance(ret, mask)
    unexplained = token_variance(widen(ret) - widen(value), mask)
    varies = variance > 0
    return torch.where(varies, 1 - unexplained / torch.where(varies, variance, 1.0), 0.0)
