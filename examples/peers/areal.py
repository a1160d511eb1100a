"""AReaL: losses, KL estimates, normalisation and advantages."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

FUNCTIONAL = Page("areal.utils.functional.functional")
LOGPROBS = Page("areal.utils.functional.vocab_parallel")
DATA = Page("areal.utils.data")
ACTOR = Page("areal.trainer.ppo.actor", skipped=("areal.trainer", "areal.trainer.ppo"))


def ppo_actor_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """`ppo_actor_loss_fn` where behaviour and proximal policy are one."""
    theirs, limits = load(FUNCTIONAL).ppo_actor_loss_fn, {"eps_clip": clip_low, "eps_clip_higher": clip_high}
    return theirs(logp, old_logp, old_logp, advantage, loss_mask=mask, c_clip=dual_clip, **limits)[0]


def ppo_sequence_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """`ppo_actor_loss_fn` with a ratio per sequence; a token mean, here of one weight per sequence."""
    kept, per_token = mask.bool(), advantage.unsqueeze(1).expand_as(logp)
    loss = load(FUNCTIONAL).ppo_actor_loss_fn(
        logp, old_logp, old_logp, per_token / kept.sum(1, keepdim=True).clamp(min=1), clip_low, mask,
        eps_clip_higher=clip_high, importance_sampling_level="sequence",
    )[0]  # fmt: skip
    return loss * kept.sum() / len(logp)


def ppo_critic_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """`ppo_critic_loss_fn`, which takes single precision only."""
    theirs = load(FUNCTIONAL).ppo_critic_loss_fn
    return theirs(value.float(), old_value.float(), ret.float(), clip, mask.bool())[0]


def masked_normalization(x: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """`masked_normalization` over the batch."""
    return load(FUNCTIONAL).masked_normalization(x, mask, eps=epsilon)


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """`dpo_preference_loss` of the difference of the pair."""
    margin = (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)
    return load(FUNCTIONAL).dpo_preference_loss(margin, beta=beta)


def ipo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, tau: float
) -> Tensor:
    """`dpo_preference_loss` of type ipo, of log-probs averaged per token."""
    margin = (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)
    return load(FUNCTIONAL).dpo_preference_loss(margin, beta=tau, loss_type="ipo")


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, name: str) -> Tensor:
    """`KLEstimator`."""
    return load(DATA).KLEstimator(name)(logp, ref_logp)


def _normalised(reward: Tensor, **config: Any) -> Tensor:
    levels = {"mean_leave1out": False, "std_unbiased": True, "eps": 1e-5} | config
    norm = load(DATA).Normalization(with_attributes(group_size=reward.shape[1], **levels))
    return norm(reward.flatten()).reshape(reward.shape)


def group_normalised_reward(reward: Tensor, epsilon: float) -> Tensor:
    """`Normalization`, mean and standard deviation of the group."""
    return _normalised(reward, mean_level="group", std_level="group", eps=epsilon)


def batch_normalised_reward(reward: Tensor, epsilon: float) -> Tensor:
    """`Normalization`, mean of the group and standard deviation of the batch."""
    return _normalised(reward, mean_level="group", std_level="batch", eps=epsilon)


def leave_one_out_reward(reward: Tensor) -> Tensor:
    """`Normalization` by the mean of the others."""
    return _normalised(reward, mean_level="group", std_level=None, mean_leave1out=True)


def centred_reward(reward: Tensor) -> Tensor:
    """`Normalization` by the mean alone."""
    return _normalised(reward, mean_level="group", std_level=None)


def computed_advantages(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
    """`PPOActor._compute_advantages`: the rewards enter as its KL rewards do, one prompt token in front.

    Its rows are [prompt][response][padding], and what a slot holds is about the token after it.
    """
    rows, kept = len(reward), mask.bool()
    front = torch.zeros(rows, 1, dtype=reward.dtype)
    loss_mask = torch.cat([front, kept.to(reward.dtype)], dim=1)
    end = torch.arange(loss_mask.shape[1]) * loss_mask
    attended = torch.arange(loss_mask.shape[1] + 1) <= end.amax(1, keepdim=True)
    widened = {name: torch.cat([x, front], dim=1) for name, x in (("r", reward), ("v", value), ("m", kept))}
    actor = with_attributes(
        config=with_attributes(
            overlong_reward_penalty=False, use_decoupled_loss=False, recompute_logprob=True
        ),
        reward_bias=0.0, reward_scaling=1.0, reward_clip=1e9, reward_norm=None, adv_norm=None,
        mask_no_eos_with_zero=False, kl_ctl=-1.0, kl_estimator=lambda logp, ref: logp, discount=gamma,
        gae_lambda=lam,
    )  # fmt: skip
    data = {
        "input_ids": torch.zeros(rows, loss_mask.shape[1] + 1, dtype=torch.long),
        "rewards": torch.zeros(rows, dtype=reward.dtype),
        "loss_mask": torch.cat([loss_mask, front], dim=1),
        "prox_logp": torch.cat([widened["r"], front], dim=1),
        "attention_mask": attended,
        "values": torch.cat([widened["v"], front], dim=1),
    }
    done = load(ACTOR).PPOActor._compute_advantages(actor, data)
    return tuple(done[name][:, : reward.shape[1]].to(reward.dtype) for name in ("advantages", "returns"))


def gather_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """`gather_logprobs`, not compiled."""
    theirs = load(LOGPROBS)._gather_logprobs
    return getattr(theirs, "_torchdynamo_orig_callable", theirs)(logits, tokens, temperature)


def gathered_entropy(logits: Tensor) -> Tensor:
    """The entropy of `gather_logprobs_entropy`, not compiled."""
    theirs = load(LOGPROBS)._gather_logprobs_entropy
    plain = getattr(theirs, "_torchdynamo_orig_callable", theirs)
    return plain(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))[1]


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("areal", function, kind, page, call, adapter)


SUBJECTS = (
    _subject("ppo_actor_loss_fn", "clipped_surrogate", FUNCTIONAL, ppo_actor_loss),
    _subject("ppo_actor_loss_fn sequence", "gspo", FUNCTIONAL, ppo_sequence_loss),
    _subject("ppo_critic_loss_fn", "clipped_value_loss", FUNCTIONAL, ppo_critic_loss),
    _subject("masked_normalization", "whiten", FUNCTIONAL, masked_normalization),
    _subject("dpo_preference_loss", "dpo", FUNCTIONAL, dpo_loss),
    _subject("dpo_preference_loss ipo", "ipo", FUNCTIONAL, ipo_loss),
    *(_subject(f"KLEstimator {name}", "kl_estimator", DATA, kl_estimate, fixed={"name": name})
      for name in ("k1", "k2", "k3")),
    _subject("Normalization group, group", "group_normalised", DATA, group_normalised_reward),
    _subject("Normalization group, batch", "group_normalised", DATA, batch_normalised_reward),
    _subject("Normalization leave-one-out", "rloo", DATA, leave_one_out_reward),
    _subject("Normalization group, no std", "group_centred", DATA, centred_reward),
    _subject("PPOActor._compute_advantages", "gae", ACTOR, computed_advantages),
    _subject("gather_logprobs", "token_logp", LOGPROBS, gather_logprobs),
    _subject("gather_logprobs_entropy, entropy", "entropy", LOGPROBS, gathered_entropy),
)  # fmt: skip
