"""Advantages of several samples of one prompt, compared with each other instead of with a critic.

`reward` is [P, G]: one row for each prompt, G samples of it. A sample that could not be scored (mask False)
takes no part: it gets 0, and the others are compared as if it did not exist. All three are 0 where nothing
can be compared: a row with one scored sample, or one whose rewards are equal.

Only the leave-one-out advantage gives ∇E[r] without bias; its gradient estimate is Σᵢ Aᵢ ∇log π(yᵢ)/G. The
centred one is (G-1)/G of it, and the normalised one weighs prompts by the inverse of their spread, which is
another objective (for rewards 0 and 1, in the limit of many samples, 2 arcsin √q of the success rate q).
"""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import Scalar, check_non_negative, check_tokens
from minirlhf.objectives.masked import select, sequence_mean


def rloo_advantage(reward: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE leave-one-out: each reward less the mean reward of the other samples.

        Aᵢ = rᵢ - 1/(n-1) Σ_{j != i} rⱼ,   n the scored samples of the prompt

    Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024,
    "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs"
    (arXiv:2402.14740). The baseline does not depend on its own sample, so it leaves no bias at any n >= 2.

    Args:
        reward: [P, G] the reward of each sample; anything where the mask is False.
        mask: [P, G] bool, True = was scored.

    Returns:
        [P, G] in reward units, exactly 0 where the mask is False and in a row with one scored sample. Each
        row sums to 0. n/(n-1) times `group_centred_advantage`.

    Raises:
        ValueError: the shapes differ, reward is not floating point, or mask is not bool.

    Gradient: ∂Aᵢ/∂rᵢ = 1, ∂Aᵢ/∂rⱼ = -1/(n-1). Advantages are constants, so the training step takes none.

    >>> import torch
    >>> rloo_advantage(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, True, True]]))
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    centred = group_centred_advantage(reward, mask)
    count = mask.sum(dim=-1, keepdim=True)
    return centred * count / (count - 1).clamp(min=1)


def group_centred_advantage(reward: Tensor, mask: Tensor) -> Tensor:
    """Each reward less the mean reward of all samples of its prompt, itself included.

        Aᵢ = rᵢ - 1/n Σⱼ rⱼ,   n the scored samples of the prompt

    Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", section 3.2 ("Dr. GRPO",
    arXiv:2503.20783). Since a sample is part of its own baseline, the policy gradient is (n-1)/n of the true
    one: the same direction where all prompts have the same n.

    Args:
        reward: [P, G] the reward of each sample; anything where the mask is False.
        mask: [P, G] bool, True = was scored.

    Returns:
        [P, G] in reward units, exactly 0 where the mask is False, and where all rewards of a row are equal.
        Each row sums to 0.

    Raises:
        ValueError: the shapes differ, reward is not floating point, or mask is not bool.

    Gradient: ∂Aᵢ/∂rᵢ = 1 - 1/n, ∂Aᵢ/∂rⱼ = -1/n. Advantages are constants, so the training step takes none.

    >>> import torch
    >>> group_centred_advantage(torch.tensor([[3.0, 1.0, torch.nan]]), torch.tensor([[True, True, False]]))
    tensor([[ 1., -1.,  0.]])
    """
    check_tokens(mask, reward=reward)
    deviation = reward - sequence_mean(reward, mask)[..., None]
    # Once more: three rewards of 0.1 have a rounded mean that is not 0.1. The rounding error is the same in
    # all of them and short, so that its own mean is exact, and equal rewards give exactly 0.
    return select(deviation - sequence_mean(deviation, mask)[..., None], mask)


def group_normalised_advantage(
    reward: Tensor, mask: Tensor, *, epsilon: Scalar = 1e-4, correction: int = 1
) -> Tensor:
    """Each reward less the mean of its prompt's samples, divided by their standard deviation.

        Aᵢ = (rᵢ - μ) / (σ + ε),   μ = 1/n Σⱼ rⱼ,   σ² = 1/(n - correction) Σⱼ (rⱼ - μ)²

    Shao et al. 2024, "DeepSeekMath", section 4.1.2 ("GRPO", arXiv:2402.03300), which leaves open which σ is
    meant. The default is that of the first implementations, the unbiased variance with ε beside σ.

    Args:
        reward: [P, G] the reward of each sample; anything where the mask is False.
        mask: [P, G] bool, True = was scored.
        epsilon: ε >= 0 in reward units, added to the standard deviation.
        correction: 1 for the unbiased variance (Bessel), 0 for that of the samples themselves.

    Returns:
        [P, G] without unit, exactly 0 where the mask is False, where all rewards of a row are equal and in a
        row with one scored sample, also with ε = 0. With ε = 0 the squares of a row sum to n - correction.

    Raises:
        ValueError: the shapes differ, reward is not floating point, mask is not bool, epsilon is negative, or
            correction is not 0 or 1.

    Gradient: goes through μ and σ too; advantages are constants, so the training step takes none.

    >>> import torch
    >>> reward, mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> group_normalised_advantage(reward, mask, epsilon=0.0)
    tensor([[ 0.5000,  0.5000,  0.5000, -1.5000]])
    """
    check_non_negative(epsilon=epsilon)
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, got {correction}")
    deviation = group_centred_advantage(reward, mask)
    degrees = (mask.sum(dim=-1) - correction).clamp(min=1)
    variance = (deviation.square().sum(dim=-1) / degrees)[..., None]  # 0 under the mask
    varies = variance > 0
    # The root of 0 has an infinite derivative, and ε may be 0: neither may be formed where nothing varies.
    spread = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0) + epsilon
    return deviation / torch.where(spread > 0, spread, 1.0)
