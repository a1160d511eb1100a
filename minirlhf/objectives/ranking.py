"""Losses of a ranking by reward: Bradley-Terry for two responses, Plackett-Luce for any number of them.

Both return one loss per comparison, unreduced. They know only differences of rewards: a constant added to all
rewards of a prompt changes nothing, which is why a reward model is centred afterwards.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_label_smoothing,
    check_same_shape,
    check_tokens,
    widen,
)
from minirlhf.objectives.masked import select, sequence_sum


def bradley_terry_loss(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: Scalar | None = None,
) -> Tensor:
    """Negative log-likelihood of each comparison under the Bradley-Terry model.

        loss = -log σ(r⁺ - r⁻ - m)
        with label smoothing ε:  (1 - ε) · loss(r⁺, r⁻) + ε · loss(r⁻, r⁺)

    Bradley & Terry 1952; as the loss of a reward model, Ouyang et al. 2022, Eq. 1 (arXiv:2203.02155), there
    averaged over pairs. The margin is Touvron et al. 2023, "Llama 2", Eq. 2 (arXiv:2307.09288). Smoothing
    takes a share ε of the labels for flipped; the flipped pair keeps its margin.

    Args:
        chosen_reward: [B] r⁺ = r(x, y⁺), in reward units (differences are log-odds, in nats).
        rejected_reward: [B] r⁻ = r(x, y⁻).
        margin: [B] m, how much better the chosen response must be; None means 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels; None means 0.

    Returns:
        [B] losses in nats, positive; log 2 where r⁺ - r⁻ = m. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or label_smoothing is outside [0, 0.5).

    Gradient: ∂loss/∂r⁺ = -σ(-(r⁺ - r⁻ - m)) without smoothing; ∂loss/∂r⁻ is its opposite.

    >>> bradley_terry_loss(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0]))
    tensor([0.0181, 4.0181])
    """
    rewards = {"chosen_reward": chosen_reward, "rejected_reward": rejected_reward}
    if margin is not None:
        rewards["margin"] = margin
    check_floating(**rewards)
    check_same_shape(**rewards)
    gap = widen(chosen_reward) - widen(rejected_reward)
    required = 0.0 if margin is None else margin
    loss = -F.logsigmoid(gap - required)
    if label_smoothing is None:
        return loss
    check_label_smoothing(label_smoothing)
    flipped = -F.logsigmoid(-gap - required)
    return (1 - label_smoothing) * loss + label_smoothing * flipped


def plackett_luce_loss(reward: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of each ranking under the Plackett-Luce model.

        loss = Σₖ [log Σ_{j >= k} e^(rⱼ) - rₖ]

    where the items stand from best to worst and k, j run over those that count: the best is chosen among all,
    the next among the rest, and so on. Plackett 1975, "The Analysis of Permutations"; Luce 1959, "Individual
    Choice Behavior"; for language models, Rafailov et al. 2023, "Direct Preference Optimization", appendix
    A.3 (arXiv:2305.18290). With two items it is `bradley_terry_loss`.

    Args:
        reward: [B, K] rewards of the responses to one prompt, listed from best to worst (differences are
            log-odds, in nats). Where the mask is False they may hold anything.
        mask: [B, K] bool, True = there is an item. Rankings of unequal length share a batch by it.

    Returns:
        [B] losses in nats, at least 0; log n! where n items have equal rewards, 0 for fewer than two items.
        Reduce them yourself.

    Raises:
        ValueError: the shapes differ, reward is not floating point, or mask is not bool.

    Gradient: ∂loss/∂rᵢ = Σ_{k <= i} pₖ(i) - 1, where pₖ(i) is the probability that item i is chosen at stage
    k. A row of gradients sums to 0.

    >>> reward = torch.tensor([[2.0, 1.0, 0.0], [4.0, 0.0, torch.nan]])
    >>> plackett_luce_loss(reward, torch.tensor([[True, True, True], [True, True, False]]))
    tensor([0.7209, 0.0181])
    """
    check_tokens(mask, reward=reward)
    r = select(reward, mask)
    later = torch.ones(r.shape[-1:] * 2, dtype=torch.bool, device=r.device).triu(diagonal=1)
    rest = later & mask[..., None, :]  # [B, K, K]: for each stage, the items that it leaves behind
    contested = mask & rest.any(dim=-1)  # the last item is chosen with certainty
    # Each stage is Bradley-Terry of the chosen item against the log-sum-exp of the rest, which keeps the
    # digits of a stage that is nearly certain. A stage without a rest looks at all items: its result is
    # dropped, and a log-sum-exp over nothing would leave NaN in the gradient.
    opponents = torch.where(rest | ~contested[..., None], r[..., None, :], -torch.inf)
    return sequence_sum(-F.logsigmoid(r - opponents.logsumexp(dim=-1)), contested)
