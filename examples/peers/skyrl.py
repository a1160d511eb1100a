"""SkyRL: losses, advantages, KL and importance weights of its training backend."""

from typing import Any

from torch import Tensor

from peers.frame import Page, Subject, by_group, load, right_aligned, with_attributes

_PACKAGES = ("skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils")
PPO = Page("skyrl.backends.skyrl_train.utils.ppo_utils", skipped=_PACKAGES)
TENSORS = Page("skyrl.backends.skyrl_train.utils.torch_utils", skipped=_PACKAGES)
CORRECTION = Page("skyrl.backends.skyrl_train.utils.off_policy_correction_utils", skipped=_PACKAGES)
_NO_CORRECTION = with_attributes(
    tis_ratio_type=None,
    sequence_mask_metric=None,
    outlier_token_is_threshold_low=None,
    outlier_token_is_threshold_high=None,
    token_mask_is_threshold_low=None,
    token_mask_is_threshold_high=None,
)


def _config(low: float, high: float, kind: str = "regular", dual: float = 3.0) -> Any:
    """What a policy loss reads of the algorithm's settings."""
    return with_attributes(
        policy_loss_type=kind,
        eps_clip_low=low,
        eps_clip_high=high,
        clip_ratio_c=dual,
        cispo=with_attributes(cispo_eps_clip_low=low, cispo_eps_clip_high=high),
        loss_reduction="sequence_mean",
        off_policy_correction=_NO_CORRECTION,
    )


def _reduced(advantage: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """The advantages as its trainer scales them: a policy loss is a sum, whatever the reduction."""
    theirs = load(PPO).apply_loss_reduction_to_advantages_minibatch
    return theirs(advantage, mask, reduction, len(advantage), advantage.shape[1])


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    *,
    reduction: str,
) -> Tensor:
    """The default loss, of advantages scaled for the reduction."""
    kind = "regular" if dual_clip is None else "dual_clip"
    config, scaled = (
        _config(clip_low, clip_high, kind, dual_clip or 3.0),
        _reduced(advantage, mask, reduction),
    )
    return load(PPO).ppo_policy_loss(logp, old_logp, scaled, config, mask)[0]


def gspo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """GSPO with the reduction that it asks for; an advantage per token, as the trainer has."""
    scaled = _reduced(advantage.unsqueeze(1).expand_as(logp), mask, "sequence_mean")
    return load(PPO).gspo_policy_loss(logp, old_logp, scaled, _config(clip_low, clip_high), mask)[0]


def cispo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """CISPO, of advantages scaled for a token mean."""
    config, scaled = _config(clip_low, clip_high), _reduced(advantage, mask, "token_mean")
    return load(PPO).compute_policy_loss_cispo(logp, old_logp, scaled, config, mask)[0]


def critic_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """`ppo_critic_loss`."""
    return load(PPO).ppo_critic_loss(value, old_value, ret, with_attributes(value_clip=clip), mask)[0]


def reduced_losses(losses: Tensor, mask: Tensor, *, reduction: str) -> Tensor:
    """The sum of losses scaled as advantages are: the reduction of one batch."""
    return load(PPO).reduce_loss(_reduced(losses, mask, reduction), mask)


def grpo_outcome_advantage(reward: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """GRPO, divided by the standard deviation of the group."""
    theirs = load(PPO).compute_grpo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i, epsilon=epsilon)[0], reward, mask)


def grpo_outcome_advantage_without_std(reward: Tensor, mask: Tensor) -> Tensor:
    """GRPO as Dr. GRPO has it."""
    theirs = load(PPO).compute_grpo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i, grpo_norm_by_std=False)[0], reward, mask)


def rloo_outcome_advantage(reward: Tensor, mask: Tensor) -> Tensor:
    """Leave-one-out."""
    theirs = load(PPO).compute_rloo_outcome_advantage
    return by_group(lambda r, m, i: theirs(r, m, i)[0], reward, mask)


def gae_advantage_return(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
    """GAE, of responses that end in the last column, as its collator aligns them."""
    to, back = right_aligned(mask)
    theirs = load(PPO).compute_gae_advantage_return
    return tuple(back(result) for result in theirs(to(reward), to(value), to(mask), gamma, lam))


def reinforce_plus_plus_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The returns that REINFORCE++ whitens, of every row twice: it refuses to whiten a single token."""
    theirs = load(PPO).compute_reinforce_plus_plus_outcome_advantage
    return theirs(reward.repeat(2, 1), mask.repeat(2, 1), gamma=gamma)[1][: len(reward)]


def adaptive_kl_controller(
    coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float
) -> float:
    """One update of `AdaptiveKLController`."""
    controller = load(PPO).AdaptiveKLController(float(coefficient), target, horizon)
    controller.update(float(kl), n_steps)
    return float(controller.value)


def token_tis_ratio(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling, token level."""
    config = with_attributes(token_tis_ratio_clip_high=cap)
    return load(CORRECTION).compute_tis_ratio(logp, behaviour_logp, mask, "token", config)[0]


def sequence_tis_ratio(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling, sequence level: [B, 1], which the loss spreads over the tokens."""
    config = with_attributes(sequence_tis_ratio_clip_high=cap)
    ratio = load(CORRECTION).compute_tis_ratio(logp, behaviour_logp, mask, "sequence", config)[0]
    return ratio.expand_as(logp)


def token_mask(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """The mask of tokens whose ratio is in the band."""
    config = with_attributes(token_mask_is_threshold_low=low, token_mask_is_threshold_high=high)
    return load(CORRECTION).compute_token_mask(logp, behaviour_logp, mask, config)[0]


def sequence_mask(
    logp: Tensor, behaviour_logp: Tensor, mask: Tensor, low: float, high: float, *, metric: str
) -> Tensor:
    """The mask of sequences whose ratio is in the band: [B, 1], spread over the tokens."""
    limits = with_attributes(
        geo_mask_low=low, geo_mask_high=high, product_mask_low=low, product_mask_high=high
    )
    kept = load(CORRECTION).compute_sequence_mask(logp, behaviour_logp, mask, metric, limits)[0]
    return kept.expand_as(logp)


def entropy_from_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """`chunked_entropy_from_logits`, with gradients."""
    return load(TENSORS).chunked_entropy_from_logits(logits, True, mask, chunk_size=2)


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("skyrl", function, kind, page, call, adapter)


SUBJECTS = (
    *(_subject(f"ppo_policy_loss {name}", "clipped_surrogate", PPO, ppo_policy_loss,
               fixed={"reduction": name}) for name in ("token_mean", "sequence_mean")),
    _subject("gspo_policy_loss", "gspo", PPO, gspo_policy_loss),
    _subject("compute_policy_loss_cispo", "cispo", PPO, cispo_policy_loss),
    _subject("ppo_critic_loss", "clipped_value_loss", PPO, critic_loss),
    _subject("apply_loss_reduction_to_advantages_minibatch token_mean", "token_mean", PPO, reduced_losses,
             x="losses", fixed={"reduction": "token_mean"}),
    _subject("apply_loss_reduction_to_advantages_minibatch sequence_mean", "sequence_mean", PPO,
             reduced_losses, x="losses", fixed={"reduction": "sequence_mean"}),
    *(_subject(f"compute_approx_kl {name}", "kl_estimator", PPO, logp="log_probs", ref_logp="log_probs_base",
               fixed={"kl_estimator_type": name}) for name in ("k1", "k2", "k3", "abs")),
    *(_subject(f"compute_approx_kl {name}, as a loss", "kl_loss", PPO, logp="log_probs",
               ref_logp="log_probs_base", fixed={"kl_estimator_type": name}) for name in ("k2", "k3")),
    _subject("masked_whiten", "whiten", PPO),
    _subject("compute_gae_advantage_return", "gae", PPO, gae_advantage_return),
    _subject("compute_grpo_outcome_advantage", "group_normalised", PPO, grpo_outcome_advantage),
    _subject("compute_grpo_outcome_advantage, no std", "group_centred", PPO,
             grpo_outcome_advantage_without_std),
    _subject("compute_rloo_outcome_advantage", "rloo", PPO, rloo_outcome_advantage),
    _subject("compute_reinforce_plus_plus_outcome_advantage, returns", "discounted_return", PPO,
             reinforce_plus_plus_returns),
    _subject("AdaptiveKLController.update", "adaptive_kl", PPO, adaptive_kl_controller),
    _subject("compute_tis_ratio token", "truncated_importance_weight", CORRECTION, token_tis_ratio),
    _subject("compute_tis_ratio sequence", "truncated_importance_weight", CORRECTION, sequence_tis_ratio),
    _subject("compute_token_mask", "masked_importance_weight", CORRECTION, token_mask),
    *(_subject(f"compute_sequence_mask {name}", "masked_importance_weight", CORRECTION, sequence_mask,
               fixed={"metric": name}) for name in ("geometric", "product")),
    _subject("masked_mean", "token_mean", TENSORS),
    _subject("masked_mean dim=-1", "sequence_mean", TENSORS, fixed={"dim": -1}),
    _subject("logprobs_from_logits", "token_logp", TENSORS),
    _subject("chunked_entropy_from_logits", "entropy", TENSORS, entropy_from_logits),
)  # fmt: skip
