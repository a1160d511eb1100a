"""Losses of a pair that need no reference model: SimPO and ORPO, both on log-probs averaged per token.

Log-probs come in *summed* over the response tokens, as everywhere; these functions are given the lengths and
average themselves. Without a reference nothing but the data holds the policy near where it began: ORPO's
likelihood term does a part of that, SimPO has none.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_non_negative,
    check_positive,
    check_same_shape,
    widen,
)


def simpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Scalar,
    gamma: Scalar,
) -> Tensor:
    """Simple Preference Optimization: Bradley-Terry with a margin on averaged log-probs.

        loss = -log σ(β log π(y⁺)/|y⁺| - β log π(y⁻)/|y⁻| - γ)

    Meng, Xia & Chen 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", Eq. 6
    (arXiv:2405.14734). With γ > 0 it is not consistent: where y⁺ wins with probability p, the best margin is
    not the log-odds of p.

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, *summed* over response tokens; averaged here.
        rejected_logp: [B] log π(y⁻|x), likewise.
        chosen_length: [B] |y⁺|, the tokens that were summed; positive (0/0 is NaN), of any number type.
        rejected_length: [B] |y⁻|, likewise.
        beta: β > 0, reward units per nat *per token*; not DPO's β (the paper takes 2 to 2.5).
        gamma: γ >= 0, the margin that is asked for, in reward units.

    Returns:
        [B] losses in nats, positive; log 2 where the rewards differ by γ. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, beta <= 0, or gamma < 0.

    Gradient: ∂loss/∂chosen_logp = -β/|y⁺| σ(γ - z) and ∂loss/∂rejected_logp = β/|y⁻| σ(γ - z), where z is the
    difference of the rewards.

    >>> from torch import tensor as lp
    >>> simpo_loss(lp([-4.0]), lp([-2.0]), lp([5]), lp([2]), beta=2.0, gamma=1.0)
    tensor([1.0375])
    """
    check_positive(beta=beta)
    check_non_negative(gamma=gamma)
    chosen, rejected = _averaged(chosen_logp, rejected_logp, chosen_length, rejected_length)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    weight: Scalar,
) -> Tensor:
    """Odds Ratio Preference Optimization: the likelihood of the chosen response and the ratio of the odds.

        loss = -ℓ⁺ - λ log σ(z),   z = log odds(ℓ⁺) - log odds(ℓ⁻)
        log odds(ℓ) = ℓ - log(1 - e^ℓ),   ℓ = log π(y)/|y|

    Hong, Lee & Thorne 2024, "ORPO: Monolithic Preference Optimization without Reference Model", Eq. 6-7
    (arXiv:2403.07691). By expm1: formed as log(1 - e^ℓ), the odds of a response that is nearly certain
    would lose their digits and become infinite long before ℓ = 0.

    Args:
        chosen_logp: [B] log π(y⁺|x) <= 0 in nats, *summed* over response tokens; averaged here.
        rejected_logp: [B] log π(y⁻|x) <= 0, likewise.
        chosen_length: [B] |y⁺|, the tokens that were summed; positive (0/0 is NaN), of any number type.
        rejected_length: [B] |y⁻|, likewise.
        weight: λ >= 0, of the odds ratio; the paper takes 0.1 to 1.

    Returns:
        [B] losses in nats, positive; λ log 2 above the likelihood term where ℓ⁺ = ℓ⁻. A log-prob that has
        rounded to 0 is taken one rounding error below it; a positive one, which is none, gives NaN. Reduce
        them yourself.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or weight < 0.

    Gradient: ∂loss/∂ℓ⁺ = -1 - λ σ(-z)/(1 - e^(ℓ⁺)) and ∂loss/∂ℓ⁻ = λ σ(-z)/(1 - e^(ℓ⁻)); with respect to the
    summed log-probs, these divided by the lengths.

    >>> from torch import tensor as lp
    >>> orpo_loss(lp([-3.5]), lp([-2.2]), lp([5]), lp([2]), weight=0.1)
    tensor([0.7409])
    """
    check_non_negative(weight=weight)
    chosen, rejected = _averaged(chosen_logp, rejected_logp, chosen_length, rejected_length)
    return -chosen - weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _averaged(
    chosen_logp: Tensor, rejected_logp: Tensor, chosen_length: Tensor, rejected_length: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs per token of the chosen and of the rejected responses, in fp32 or fp64."""
    check_floating(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    check_same_shape(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    return widen(chosen_logp) / chosen_length, widen(rejected_logp) / rejected_length


def _log_odds(logp: Tensor) -> Tensor:
    """log p/(1 - p) of a log-probability: finite and of the right slope for every logp <= 0."""
    # At p = 1 the odds are infinite and their slope times σ(-z) = 0 is NaN, although the product has a limit.
    below = torch.where(logp == 0, logp - torch.finfo(logp.dtype).eps, logp)
    return below - torch.log(-torch.expm1(below))
