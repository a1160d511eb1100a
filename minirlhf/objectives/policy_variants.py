"""Two relatives of PPO's clipped surrogate: the ratio of whole sequences (GSPO), the clipped weight (CISPO).

Both take log-probs [B, T] of tokens sampled from π_old, aligned with the token that they score. They differ
in what a clip does: GSPO's stops the gradient of a whole sequence, CISPO's bounds it and stops none.
"""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import Scalar, check_per_sequence, check_tokens, check_width
from minirlhf.objectives.masked import select, sequence_mean
from minirlhf.objectives.policy import clipped_surrogate_loss, log_ratio, ratio


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: Scalar, clip_high: Scalar
) -> Tensor:
    """Group Sequence Policy Optimization: PPO's clipped surrogate on one ratio per sequence.

        loss = -min(s A, clip(s, 1 - ε_low, 1 + ε_high) A)
        s = (π(y|x) / π_old(y|x))^(1/|y|) = exp(1/|y| Σₜ log ρₜ)

    Zheng et al. 2025, "Group Sequence Policy Optimization", Eq. 5-7 (arXiv:2507.18071). The widths are much
    smaller than PPO's (there 3e-4 and 4e-4), since a mean of log ratios varies less than one of them.
    On sequences of one token it is `clipped_surrogate_loss`.

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens, which were sampled from π_old.
        advantage: [B] A, one for each sequence, in reward units or normalised within its group.
        mask: [B, T] bool, True = counts.
        clip_low: ε_low > 0. Infinity never clips.
        clip_high: ε_high > 0. Infinity never clips.

    Returns:
        [B] losses in the units of the advantage, exactly 0 for a row where nothing counts. Average them over
        *sequences*: spread over their tokens and averaged there, long answers would weigh more.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or a width is not
            positive.

    Gradient: ∂loss/∂logpₜ = -s A/|y| on every token that counts, and 0 for all of them where the clip is
    active: (A > 0 and s > 1 + ε_high) or (A < 0 and s < 1 - ε_low).

    >>> logp, mask = torch.tensor([[1.5, 1.5], [1.5, 9.0]]).log(), torch.tensor([[True, True], [True, False]])
    >>> gspo_loss(logp, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask, clip_low=0.2, clip_high=0.2)
    tensor([-1.2000,  1.5000])
    """
    check_tokens(mask, logp=logp, old_logp=old_logp)
    check_per_sequence("advantage", advantage, mask)
    mean_log_ratio = sequence_mean(log_ratio(logp, old_logp, mask), mask)[..., None]
    # The clip is PPO's: a sequence is a row of one element, which counts if any of its tokens does.
    return clipped_surrogate_loss(
        mean_log_ratio,
        torch.zeros_like(mean_log_ratio),
        advantage[..., None],
        mask.any(dim=-1, keepdim=True),
        clip_low=clip_low,
        clip_high=clip_high,
    )[..., 0]


def cispo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: Scalar, clip_high: Scalar
) -> Tensor:
    """Clipped importance-sampling-weight policy optimisation: REINFORCE under a clipped, constant weight.

        lossₜ = -sg[clip(ρₜ, 1 - ε_low, 1 + ε_high)] Aₜ log π(yₜ|sₜ),   ρₜ = π(yₜ|sₜ) / π_old(yₜ|sₜ)

    where sg stops the gradient. MiniMax 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with
    Lightning Attention", Eq. 4-5 (arXiv:2506.13585), which clips from above only (ε_low >= 1). Unlike PPO's,
    this clip silences no token: a ratio outside the band still gets the gradient of the bound.

    Args:
        logp: [B, T] log π of each token in nats.
        old_logp: [B, T] log π_old of the same tokens, which were sampled from π_old.
        advantage: [B, T] Aₜ, in reward units or normalised within its group.
        mask: [B, T] bool, True = counts.
        clip_low: ε_low > 0. From 1 on nothing is clipped from below.
        clip_high: ε_high > 0. Infinity never clips.

    Returns:
        [B, T] losses, exactly 0 where the mask is False. Reduce them yourself. The value means little (it
        scales with log π); the gradient is what is meant.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or a width is not
            positive.

    Gradient: ∂loss/∂logp = -clip(ρ) A, never 0 by clipping; 0 with respect to old_logp.

    >>> logp, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, False]])
    >>> cispo_loss(logp, logp - 9, torch.tensor([[2.0, 2.0]]), mask, clip_low=0.2, clip_high=0.2)
    tensor([[2.4000, 0.0000]])
    """
    check_tokens(mask, logp=logp, old_logp=old_logp, advantage=advantage)
    check_width(clip_low=clip_low, clip_high=clip_high)
    rho = ratio(logp, old_logp, mask)
    one = torch.ones_like(rho)
    weight = torch.minimum(torch.maximum(rho, one - clip_low), one + clip_high).detach()
    return weight * select(-advantage, mask) * select(logp, mask)
