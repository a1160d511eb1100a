"""verl: losses, advantages, KL and masked statistics of `verl.trainer.ppo` and `verl.utils`."""

from typing import Any

from torch import Tensor

from peers.frame import Page, Subject, by_group, load, placed_on_last, with_attributes

ALGOS = Page("verl.trainer.ppo.core_algos")
TENSORS = Page("verl.utils.torch_functional")
CORRECTION = Page("verl.trainer.ppo.rollout_corr_helper")
CONFIG = Page("verl.workers.config")
_NEVER = 1e30
"""A dual clip out of reach: theirs cannot be switched off."""


def _actor(low: float, high: float, dual: float = _NEVER) -> Any:
    """What the actor reads when it computes its loss."""
    limits = {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": dual}
    return load(CONFIG).ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **limits)


def compute_policy_loss_vanilla(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = _NEVER,
    *,
    mode: str = "token-mean",
) -> Tensor:
    """The default loss of the actor."""
    config = _actor(clip_low, clip_high, dual_clip)
    return load(ALGOS).compute_policy_loss_vanilla(
        old_logp, logp, advantage, mask, loss_agg_mode=mode, config=config
    )[0]


def compute_policy_loss_gspo(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Its loss by sequence, aggregated as it recommends; an advantage per token, as the actor has."""
    config = _actor(clip_low, clip_high)
    per_token = advantage.unsqueeze(1).expand_as(logp)
    return load(ALGOS).compute_policy_loss_gspo(old_logp, logp, per_token, mask, config=config)[0]


def compute_policy_loss_cispo(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """CISPO."""
    config = _actor(clip_low, clip_high)
    return load(ALGOS).compute_policy_loss_cispo(old_logp, logp, advantage, mask, config=config)[0]


def compute_policy_loss_gpg(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE, without an old policy."""
    return load(ALGOS).compute_policy_loss_gpg(logp, logp, advantage, mask, config=_actor(0.2, 0.2))[0]


def compute_policy_loss_reinforce(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE, without importance weights."""
    return load(ALGOS).compute_policy_loss_reinforce(
        logp.detach(), logp, advantage, mask, config=_actor(0.2, 0.2)
    )[0]


def accumulated_agg_loss(losses: Tensor, mask: Tensor, micro_batch_size: float, *, mode: str) -> Tensor:
    """`agg_loss` of each micro-batch, told the tokens and rows of the whole batch, as the actor tells it."""
    rows, total = int(micro_batch_size), losses.new_zeros(())
    for part, kept in zip(losses.split(rows), mask.split(rows), strict=True):
        whole = {"batch_num_tokens": mask.sum(), "global_batch_size": (mask.sum(1) > 0).sum()}
        total = total + load(ALGOS).agg_loss(part, kept, loss_agg_mode=mode, **whole)
    return total


def adaptive_kl_controller(
    coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float
) -> float:
    """One update of `AdaptiveKLController`."""
    controller = load(ALGOS).AdaptiveKLController(float(coefficient), target, horizon)
    controller.update(float(kl), n_steps)
    return float(controller.value)


def grpo_outcome_advantage(reward: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """GRPO, divided by the standard deviation of the group."""
    theirs = load(ALGOS).compute_grpo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i, epsilon=epsilon)[0], reward, mask)


def grpo_outcome_advantage_without_std(reward: Tensor, mask: Tensor) -> Tensor:
    """GRPO as Dr. GRPO has it."""
    theirs = load(ALGOS).compute_grpo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i, norm_adv_by_std_in_grpo=False)[0], reward, mask)


def grpo_vectorized_outcome_advantage(reward: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """The same, vectorised."""
    theirs = load(ALGOS).compute_grpo_vectorized_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i, epsilon=epsilon)[0], reward, mask)


def rloo_outcome_advantage(reward: Tensor, mask: Tensor) -> Tensor:
    """Leave-one-out."""
    theirs = load(ALGOS).compute_rloo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i)[0], reward, mask)


def rloo_vectorized_outcome_advantage(reward: Tensor, mask: Tensor) -> Tensor:
    """Leave-one-out, vectorised."""
    theirs = load(ALGOS).compute_rloo_vectorized_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i)[0], reward, mask)


def reinforce_plus_plus_baseline(reward: Tensor, mask: Tensor) -> Tensor:
    """Centred by group, then whitened over the batch."""
    theirs = load(ALGOS).compute_reinforce_plus_plus_baseline_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i)[0], reward, mask)


def reinforce_plus_plus_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The returns that REINFORCE++ whitens, of every row twice: it refuses to whiten a single token."""
    theirs = load(ALGOS).compute_reinforce_plus_plus_outcome_advantage
    config = with_attributes(gamma=gamma)
    return theirs(reward.repeat(2, 1), mask.repeat(2, 1), config=config)[1][: len(reward)]


def compute_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """KL-shaped rewards; the score comes placed on the last token, as its reward manager places it."""
    return load(ALGOS).compute_rewards(placed_on_last(score, mask), logp, ref_logp, beta)


def importance_weights(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling, token level."""
    theirs = load(CORRECTION).compute_rollout_correction_weights
    return theirs(logp - behaviour_logp, mask, rollout_is="token", rollout_is_threshold=cap)[0]


def sequence_importance_weights(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling, sequence level."""
    theirs = load(CORRECTION).compute_rollout_correction_weights
    return theirs(logp - behaviour_logp, mask, rollout_is="sequence", rollout_is_threshold=cap)[0]


def icepop_weights(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """IcePop: a weight outside of its band is 0. It refuses a lower limit of 0."""
    theirs, band = load(CORRECTION).compute_rollout_correction_weights, f"{max(low, 1e-30)}_{high}"
    return theirs(logp - behaviour_logp, mask, rollout_is="token", rollout_is_threshold=band)[0]


def entropy_with_chunking(logits: Tensor) -> Tensor:
    """Entropy of a list of laws, [B, T, V] as [B * T, V]."""
    flat = load(TENSORS).entropy_from_logits_with_chunking(logits.flatten(0, 1), chunk_size=2)
    return flat.reshape(logits.shape[:2])


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("verl", function, kind, page, call, adapter)


_AGGREGATES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "token-sum": "sequence_sum",
}
_ESTIMATES = ("k1", "k2", "k3", "abs")

SUBJECTS = (
    *(
        _subject(f"agg_loss {mode}", kind, ALGOS, x="loss_mat", mask="loss_mask",
                 fixed={"loss_agg_mode": mode})
        for mode, kind in _AGGREGATES.items()
    ),
    *(
        _subject(f"agg_loss {mode}, accumulated", "gradient_accumulation", ALGOS, accumulated_agg_loss,
                 fixed={"mode": mode})
        for mode in (*_AGGREGATES, "seq-mean-token-sum-norm")
    ),
    _subject("compute_policy_loss_vanilla", "clipped_surrogate", ALGOS, compute_policy_loss_vanilla),
    _subject("compute_policy_loss_vanilla seq-mean-token-mean", "clipped_surrogate", ALGOS,
             compute_policy_loss_vanilla, fixed={"mode": "seq-mean-token-mean"}),
    _subject("compute_policy_loss_gspo", "gspo", ALGOS, compute_policy_loss_gspo),
    _subject("compute_policy_loss_cispo", "cispo", ALGOS, compute_policy_loss_cispo),
    _subject("compute_policy_loss_gpg", "policy_gradient", ALGOS, compute_policy_loss_gpg),
    _subject("compute_policy_loss_reinforce", "policy_gradient", ALGOS, compute_policy_loss_reinforce),
    _subject("compute_value_loss", "clipped_value_loss", ALGOS, value="vpreds", old_value="values",
             ret="returns", clip="cliprange_value", fixed={"loss_agg_mode": "token-mean"}),
    *(_subject(f"kl_penalty {name}", "kl_estimator", ALGOS, fixed={"kl_penalty": name})
      for name in _ESTIMATES),
    *(_subject(f"kl_penalty {name}, as a loss", "kl_loss", ALGOS, fixed={"kl_penalty": name})
      for name in ("k2", "k3", "k1+", "k3+")),
    _subject("compute_gae_advantage_return", "gae", ALGOS, reward="token_level_rewards"),
    _subject("compute_grpo_outcome_advantage", "group_normalised", ALGOS, grpo_outcome_advantage),
    _subject("compute_grpo_outcome_advantage, no std", "group_centred", ALGOS,
             grpo_outcome_advantage_without_std),
    _subject("compute_grpo_vectorized_outcome_advantage", "group_normalised", ALGOS,
             grpo_vectorized_outcome_advantage),
    _subject("compute_rloo_outcome_advantage", "rloo", ALGOS, rloo_outcome_advantage),
    _subject("compute_rloo_vectorized_outcome_advantage", "rloo", ALGOS, rloo_vectorized_outcome_advantage),
    _subject("compute_reinforce_plus_plus_baseline_outcome_advantage", "group_normalised", ALGOS,
             reinforce_plus_plus_baseline),
    _subject("compute_reinforce_plus_plus_outcome_advantage, returns", "discounted_return", ALGOS,
             reinforce_plus_plus_returns),
    _subject("compute_rewards", "kl_shaped_reward_from_logps", ALGOS, compute_rewards),
    _subject("AdaptiveKLController.update", "adaptive_kl", ALGOS, adaptive_kl_controller),
    _subject("compute_rollout_correction_weights token", "truncated_importance_weight", CORRECTION,
             importance_weights),
    _subject("compute_rollout_correction_weights sequence", "truncated_importance_weight", CORRECTION,
             sequence_importance_weights),
    _subject("compute_rollout_correction_weights IcePop", "masked_importance_weight", CORRECTION,
             icepop_weights),
    _subject("masked_mean", "token_mean", TENSORS),
    _subject("masked_mean axis=-1", "sequence_mean", TENSORS, fixed={"axis": -1}),
    _subject("masked_sum axis=-1", "sequence_sum", TENSORS, fixed={"axis": -1}),
    _subject("masked_whiten", "whiten", TENSORS, fixed={"shift_mean": True}),
    _subject("masked_whiten shift_mean=False", "whiten_scale_only", TENSORS, fixed={"shift_mean": False}),
    _subject("logprobs_from_logits", "token_logp", TENSORS),
    _subject("logprobs_from_logits_naive", "token_logp", TENSORS),
    _subject("entropy_from_logits", "entropy", TENSORS),
    _subject("entropy_from_logits_with_chunking", "entropy", TENSORS, entropy_with_chunking),
    _subject("compute_entropy_loss", "entropy", ALGOS),
)  # fmt: skip
