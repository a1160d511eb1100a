"""torchtune: preference losses, PPO's loss, rewards and advantages of `torchtune.rlhf`."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load

RLHF = Page("torchtune.rlhf")
LOSS = Page("torchtune.rlhf.loss")


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """`DPOLoss`."""
    return load(LOSS).DPOLoss(beta)(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)[0]


def smoothed_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """`DPOLoss` with label smoothing."""
    loss = load(LOSS).DPOLoss(beta, label_smoothing)
    return loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)[0]


def rso_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """`RSOLoss`, whose gamma is the weight of the implicit reward."""
    return load(LOSS).RSOLoss(beta)(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)[0]


def ppo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float
) -> Tensor:
    """`PPOLoss` where the critic is right, so that only the policy is left."""
    loss, zero = load(LOSS).PPOLoss(epsilon=epsilon), torch.zeros_like(advantage)
    return loss(old_logp, logp, advantage, zero, zero, zero, mask, mask)[0]


def ppo_value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """`PPOLoss` without advantages, so that only the critic is left."""
    loss, zero = load(LOSS).PPOLoss(value_clip_range=clip, value_coeff=1.0), torch.zeros_like(ret)
    return loss(zero, zero, zero, old_value, value, ret, mask, mask)[0]


def estimate_advantages(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
    """Rewards and values come with 0 under the mask, as the recipe makes them."""
    kept = mask.bool()
    rewards, values = torch.where(kept, reward, 0.0), torch.where(kept, value, 0.0)
    return load(RLHF).estimate_advantages(values, rewards, gamma, lam, masks=kept)


def advantages_before_whitening(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """The advantages that `estimate_advantages` whitens: its returns less the values."""
    return estimate_advantages(reward, value, mask, gamma, lam)[1] - value


def get_rewards_ppo(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """KL-shaped rewards; the score goes to the last token that counts."""
    last = (torch.arange(mask.shape[1]) * mask).amax(1).long()
    return load(RLHF).get_rewards_ppo(score, logp, ref_logp, beta, last)[0]


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("torchtune", function, kind, page, call, adapter)


SUBJECTS = (
    _subject("DPOLoss", "dpo", LOSS, dpo_loss),
    _subject("DPOLoss label_smoothing", "conservative_dpo", LOSS, smoothed_dpo_loss),
    _subject("RSOLoss", "hinge", LOSS, rso_loss),
    _subject("PPOLoss, policy", "clipped_surrogate", LOSS, ppo_policy_loss, clip_low="epsilon",
             clip_high="epsilon"),
    _subject("PPOLoss, value", "clipped_value_loss", LOSS, ppo_value_loss),
    _subject("estimate_advantages", "gae", RLHF, estimate_advantages),
    _subject("estimate_advantages, returns", "gae", RLHF, advantages_before_whitening),
    _subject("whiten", "whiten", RLHF),
    _subject("whiten shift_mean=False", "whiten", RLHF, fixed={"shift_mean": False}),
    _subject("masked_mean", "token_mean", RLHF),
    _subject("masked_mean dim=-1", "sequence_mean", RLHF, fixed={"dim": -1}),
    _subject("get_rewards_ppo", "kl_shaped_reward_from_logps", RLHF, get_rewards_ppo),
    _subject("logits_to_logprobs", "token_logp", RLHF),
    _subject("get_batch_log_probs", "sequence_logp", RLHF),
    _subject("get_batch_log_probs return_average_logprobs", "sequence_logp", RLHF,
             fixed={"return_average_logprobs": True}),
)  # fmt: skip
