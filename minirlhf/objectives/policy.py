"""The policy losses of PPO: probability ratio, clipped surrogate, and the indicator of what was clipped.

Tokens were sampled from π_old. Log-probs, old log-probs and advantages are [B, T], aligned with the token
that they score. Nothing is detached: old log-probs and advantages are constants because the training step
says so, by `argnums`.
"""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import Scalar, check_positive, check_tokens, check_width
from minirlhf.objectives.masked import select


def log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log ρ of each token, the log of how much more probable it has become.

        log ρₜ = log π(yₜ|sₜ) - log π_old(yₜ|sₜ)

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 3 (arXiv:1707.06347).

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens, which were sampled from π_old.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats; 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: 1 with respect to logp, -1 with respect to old_logp, where the mask is True.

    >>> log_ratio(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.5000]])
    """
    check_tokens(mask, logp=logp, old_logp=old_logp)
    return select(logp, mask) - select(old_logp, mask)


def ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """ρ of each token, how many times more probable it has become.

        ρₜ = π(yₜ|sₜ) / π_old(yₜ|sₜ)

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 3 (arXiv:1707.06347).

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] without unit; 1 on the policy that sampled. 0, not 1, where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ρ with respect to logp, -ρ with respect to old_logp, where the mask is True.

    >>> ratio(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -9.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    return select(log_ratio(logp, old_logp, mask).exp(), mask)


def clip_indicator(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: Scalar, clip_high: Scalar
) -> Tensor:
    """Where the clip of the surrogate is active: the loss is constant there and its gradient 0.

        clippedₜ = (Aₜ > 0 and ρₜ > 1 + ε_high)  or  (Aₜ < 0 and ρₜ < 1 - ε_low)

    The dead zone of Schulman et al. 2017, Eq. 7 (arXiv:1707.06347); its mean is the clip fraction.

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens.
        advantage: [B, T] advantages, in reward units or whitened.
        mask: [B, T] bool, True = counts.
        clip_low: ε_low > 0; the ratio is not pushed below 1 - ε_low. Infinity never clips.
        clip_high: ε_high > 0; the ratio is not pushed above 1 + ε_high. Infinity never clips.

    Returns:
        [B, T] bool, False where the mask is False.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or a width is not
            positive.

    Gradient: none, the result is bool.

    >>> logp = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    >>> advantage, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> clip_indicator(logp, torch.zeros(1, 4), advantage, mask, clip_low=0.2, clip_high=0.2)
    tensor([[ True, False, False,  True]])
    """
    check_tokens(mask, logp=logp, old_logp=old_logp, advantage=advantage)
    check_width(clip_low=clip_low, clip_high=clip_high)
    rho = log_ratio(logp, old_logp, mask).exp()
    too_high = (advantage > 0) & (rho > 1 + clip_high)
    too_low = (advantage < 0) & (rho < 1 - clip_low)
    return too_high | too_low  # under the mask ρ is 1, which nothing clips


def clipped_surrogate_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> Tensor:
    """PPO's clipped surrogate of each token, as a loss to minimise.

        lossₜ = -min(ρₜ Aₜ, clip(ρₜ, 1 - ε_low, 1 + ε_high) Aₜ)
        with dual clip c, where Aₜ < 0:  lossₜ = -max(that minimum, c Aₜ)

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", Eq. 7 (arXiv:1707.06347). Unequal
    widths: Yu et al. 2025, "DAPO", section 3.1 (arXiv:2503.14476). Dual clip: Ye et al. 2020, "Mastering
    Complex Control in MOBA Games with Deep Reinforcement Learning", dual-clip PPO (arXiv:1912.09729).

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens, which were sampled from π_old.
        advantage: [B, T] Aₜ, in reward units or whitened.
        mask: [B, T] bool, True = counts.
        clip_low: ε_low > 0. Infinity never clips.
        clip_high: ε_high > 0. Infinity never clips.
        dual_clip: c > 1, a bound on the ratio where the advantage is negative; None means no bound.

    Returns:
        [B, T] losses in the units of the advantage, exactly 0 where the mask is False. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, a width is not
            positive, or dual_clip is not above 1.

    Gradient: ∂loss/∂logp = -ρ A, and 0 where a clip is active (`clip_indicator`, or A < 0 and ρ > c).

    >>> logp = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    >>> advantage, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> clipped_surrogate_loss(logp, torch.zeros(1, 4), advantage, mask, clip_low=0.2, clip_high=0.2)
    tensor([[-1.2000,  1.5000, -0.5000,  0.8000]])
    """
    clipped = clip_indicator(logp, old_logp, advantage, mask, clip_low=clip_low, clip_high=clip_high)
    adv = select(advantage, mask)
    one = torch.ones_like(adv)
    bound = torch.where(adv > 0, one + clip_high, one - clip_low)
    log_rho = log_ratio(logp, old_logp, mask)
    if dual_clip is not None:
        check_positive(dual_clip=dual_clip)
        if not isinstance(dual_clip, Tensor) and dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        runaway = (adv < 0) & (log_rho.exp() > dual_clip)
        bound = torch.where(runaway, dual_clip, bound)
        clipped = clipped | runaway
    # The minimum is written as a selection, and the ratio is formed only where it is selected: at a large
    # log ratio exp overflows, and the gradient of a branch that `minimum` discards would be 0 · inf = NaN.
    rho = torch.where(clipped | (adv == 0), 0.0, log_rho).exp()
    return select(-torch.where(clipped, bound, rho) * adv, mask)
