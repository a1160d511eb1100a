"""Weights that correct for tokens which another policy sampled: an older one, or a faster copy of this one.

Both multiply a loss and are constants in it (the equations' stop-gradient). Tokens come from π_behaviour, the
law that the sampler recorded; with an engine of other numerics it differs from the trainer's own π_old.
"""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import Scalar, check_non_negative, check_tokens, check_width
from minirlhf.objectives.policy import ratio


def truncated_importance_weight(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, cap: Scalar) -> Tensor:
    """The importance ratio of each token, cut at a cap.

        wₜ = sg[min(ρₜ, C)],   ρₜ = π(yₜ|sₜ) / π_behaviour(yₜ|sₜ)

    where sg stops the gradient. Ionides 2008, "Truncated Importance Sampling"; for engines that sample with
    other numerics than the trainer, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training". The cap trades variance for bias: its expectation falls short of 1 by
    Σ π_behaviour (ρ - C)₊, the mass that was cut off.

    Args:
        logp: [B, T] log π of each token in nats, π the policy that is trained (or its copy at the start).
        behaviour_logp: [B, T] log π_behaviour of the same tokens, which were sampled from it.
        mask: [B, T] bool, True = counts.
        cap: C > 0, usually 2 or more. Infinity gives the plain importance ratio.

    Returns:
        [B, T] weights in [0, C], 1 where the policies agree (if C >= 1), exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, mask is not bool, or cap is not
            positive.

    Gradient: 0; the weight is detached.

    >>> logp, mask = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> truncated_importance_weight(logp, torch.tensor([[-0.5, -3.0, 0.0]]), mask, cap=2.0)
    tensor([[1.6487, 2.0000, 0.0000]])
    """
    check_tokens(mask, logp=logp, behaviour_logp=behaviour_logp)
    check_width(cap=cap)
    rho = ratio(logp, behaviour_logp, mask)
    return torch.minimum(rho, torch.ones_like(rho) * cap).detach()


def masked_importance_weight(
    logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, low: Scalar, high: Scalar
) -> Tensor:
    """The importance ratio of each token, and 0 where it leaves a band.

        wₜ = sg[ρₜ · 1[low <= ρₜ <= high]],   ρₜ = π(yₜ|sₜ) / π_behaviour(yₜ|sₜ)

    where sg stops the gradient. Ling Team 2025, "Every Step Evolves: Scaling Reinforcement Learning for
    Trillion-Scale Thinking Model" ("IcePop", arXiv:2510.18855). A token on which the two policies disagree
    that much is dropped, not weighted down: its gradient is taken for noise.

    Args:
        logp: [B, T] log π of each token in nats, π the policy that is trained (or its copy at the start).
        behaviour_logp: [B, T] log π_behaviour of the same tokens, which were sampled from it.
        mask: [B, T] bool, True = counts.
        low: the smallest ratio that is kept, at least 0 and at most high.
        high: the largest ratio that is kept. Infinity keeps all from low on.

    Returns:
        [B, T] weights, each 0 or in [low, high] with both bounds, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, mask is not bool, low is negative or
            above high, or high is not positive.

    Gradient: 0; the weight is detached.

    >>> logp, mask = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> masked_importance_weight(logp, torch.tensor([[-0.5, -3.0, 0.0]]), mask, low=0.5, high=2.0)
    tensor([[1.6487, 0.0000, 0.0000]])
    """
    check_tokens(mask, logp=logp, behaviour_logp=behaviour_logp)
    check_non_negative(low=low)
    check_width(high=high)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise ValueError(f"low must be at most high = {high}, got {low}")
    rho = ratio(logp, behaviour_logp, mask)
    kept = (low <= rho) & (rho <= high)
    return torch.where(kept, rho, 0.0).detach()
