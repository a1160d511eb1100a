"""OpenRLHF: losses, KL estimates and rewards of `openrlhf.models`, advantages of its experience maker."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

LOSS = Page("openrlhf.models.loss", unused=("deepspeed",), skipped=("openrlhf.models",))
MODELS = Page("openrlhf.models.utils", unused=("deepspeed",), skipped=("openrlhf.models",))
MAKER = Page(
    "openrlhf.trainer.ppo_utils.experience_maker",
    unused=("deepspeed", "openrlhf.trainer.ray.launcher"),
    skipped=("openrlhf.models", "openrlhf.trainer.ray"),
)
CONTROLLER = Page("openrlhf.trainer.ppo_utils.kl_controller")


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    *,
    by_token: bool,
) -> Tensor:
    """`PolicyLoss`, averaged over tokens or over samples."""
    loss = load(LOSS).PolicyLoss(clip_low, clip_high, dual_clip, token_level_loss=by_token)
    return loss(logp, old_logp, advantage, mask)[0]


def gspo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """`PolicyLoss` of type gspo; an advantage per token, as the trainer has."""
    loss = load(LOSS).PolicyLoss(clip_low, clip_high, policy_loss_type="gspo")
    return loss(logp, old_logp, advantage.unsqueeze(1).expand_as(logp), mask)[0]


def corrected_policy_weights(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, **limits: Any) -> Tensor:
    """The weight that `PolicyLoss` gives to each token, read off its gradient at ratio 1 and A = -1."""
    new = logp.detach().clone().requires_grad_()
    correction = {"is_correction_level": "token", "is_correction_threshold": (limits["low"], limits["high"])}
    loss = load(LOSS).PolicyLoss(is_correction_mode=limits["mode"], **correction)
    total = loss(new, logp.detach(), -torch.ones_like(new), mask, behaviour_logp, batch_num_tokens=1)[0]
    return torch.autograd.grad(total, new)[0]


def masking_policy_loss(
    logp: Tensor, behaviour_logp: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    """Its correction of the sampler's log-probs in mode "mask"."""
    return corrected_policy_weights(logp, behaviour_logp, mask, low=low, high=high, mode="mask")


def clipping_policy_loss(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Its correction in mode "clip", with no lower limit."""
    return corrected_policy_weights(logp, behaviour_logp, mask, low=0.0, high=cap, mode="clip")


def value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """`ValueLoss` with a clip."""
    return load(LOSS).ValueLoss(clip)(value, old_value, ret, mask)


def unclipped_value_loss(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    """`ValueLoss` without."""
    return load(LOSS).ValueLoss(None)(value, value.detach(), ret, mask)


def pairwise_loss(chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """`PairWiseLoss`."""
    return load(LOSS).PairWiseLoss()(chosen_reward, rejected_reward, margin)


def log_exp_loss(chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """`LogExpLoss`, which takes a margin too."""
    return load(LOSS).LogExpLoss()(chosen_reward, rejected_reward, margin)


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


def ipo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, tau: float
) -> Tensor:
    """`DPOLoss` with ipo=True, of summed log-probs."""
    loss = load(LOSS).DPOLoss(tau, ipo=True)
    return loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)[0]


def unbiased_kl(logp: Tensor, ref_logp: Tensor, *, estimator: str) -> Tensor:
    """`compute_approx_kl` with unbiased_gradient=True."""
    theirs = load(MODELS).compute_approx_kl
    return theirs(logp, ref_logp, kl_estimator=estimator, unbiased_gradient=True)


def compute_reward(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """KL-shaped rewards."""
    return load(MODELS).compute_reward(score, beta, kl, mask)


def masked_normalize(x: Tensor, mask: Tensor) -> Tensor:
    """`masked_normalize` over both axes."""
    return load(MODELS).masked_normalize(x, mask, dim=(0, 1))


def advantages_and_returns(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
    """`get_advantages_and_returns`, which reads nothing of its maker."""
    maker = load(MAKER).RemoteExperienceMaker
    return maker.get_advantages_and_returns(None, value, reward, mask, gamma, lam)


def cumulative_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """`get_cumulative_returns`, which reads nothing of its maker."""
    return load(MAKER).RemoteExperienceMaker.get_cumulative_returns(None, reward, mask, gamma)


def adaptive_kl_controller(
    coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float
) -> float:
    """One update of `AdaptiveKLController`."""
    controller = load(CONTROLLER).AdaptiveKLController(float(coefficient), target, horizon)
    controller.update(float(kl), n_steps)
    return float(controller.value)


def compute_entropy(logits: Tensor) -> Tensor:
    """`compute_entropy`, not compiled."""
    theirs = load(MODELS).compute_entropy
    return getattr(theirs, "_torchdynamo_orig_callable", theirs)(logits)


def log_probs_from_logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """`log_probs_from_logits` of a copy: it divides what it is given by the temperature, in place."""
    return load(MODELS).log_probs_from_logits(logits.clone(), tokens, temperature)


def group_advantage(reward: Tensor, estimator: str) -> Tensor:
    """The advantage of each sample, of one token, from `compute_advantages_and_returns`."""
    page, (prompts, samples) = load(MAKER), reward.shape
    maker = object.__new__(page.RemoteExperienceMaker)
    advantage = with_attributes(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=True)
    args = with_attributes(
        rollout=with_attributes(n_samples_per_prompt=samples),
        algo=with_attributes(advantage=advantage),
        reward=with_attributes(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    maker.strategy, maker.advantage_estimator = with_attributes(args=args), estimator
    maker.args, maker.kl_ctl = args, with_attributes(value=0.0)
    batch = page.Experience(
        index=list(range(prompts * samples)),
        rewards=reward.flatten(),
        kl=torch.zeros(prompts * samples, 1, dtype=reward.dtype),
        action_mask=torch.ones(prompts * samples, 1, dtype=torch.bool),
        info={},
    )
    return maker.compute_advantages_and_returns([batch])[0].advantages.reshape(reward.shape)


def rloo_advantage(reward: Tensor) -> Tensor:
    """Estimator rloo."""
    return group_advantage(reward, "rloo")


def dr_grpo_advantage(reward: Tensor) -> Tensor:
    """Estimator dr_grpo."""
    return group_advantage(reward, "dr_grpo")


def group_norm_advantage(reward: Tensor) -> Tensor:
    """Estimator group_norm."""
    return group_advantage(reward, "group_norm")


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("openrlhf", function, kind, page, call, adapter)


SUBJECTS = (
    _subject("aggregate_loss", "token_mean", LOSS, x="loss", mask="loss_mask"),
    _subject("aggregate_loss by sample", "sequence_mean", LOSS, x="loss", mask="loss_mask",
             fixed={"token_level_loss": False}),
    _subject("PolicyLoss", "clipped_surrogate", LOSS, policy_loss, fixed={"by_token": True}),
    _subject("PolicyLoss by sample", "clipped_surrogate", LOSS, policy_loss, fixed={"by_token": False}),
    _subject("PolicyLoss gspo", "gspo", LOSS, gspo_policy_loss),
    _subject("PolicyLoss, masked correction", "masked_importance_weight", LOSS, masking_policy_loss),
    _subject("PolicyLoss, clipped correction", "truncated_importance_weight", LOSS, clipping_policy_loss),
    _subject("ValueLoss", "clipped_value_loss", LOSS, value_loss),
    _subject("ValueLoss, no clip", "value_loss", LOSS, unclipped_value_loss),
    _subject("PairWiseLoss", "bradley_terry", LOSS, pairwise_loss),
    _subject("LogExpLoss", "bradley_terry", LOSS, log_exp_loss),
    _subject("DPOLoss", "dpo", LOSS, dpo_loss),
    _subject("DPOLoss label_smoothing", "conservative_dpo", LOSS, smoothed_dpo_loss),
    _subject("DPOLoss ipo", "ipo_summed", LOSS, ipo_loss),
    *(_subject(f"compute_approx_kl {name}", "kl_estimator", MODELS, fixed={"kl_estimator": name},
               logp="log_probs", ref_logp="log_probs_base") for name in ("k1", "k2", "k3")),
    *(_subject(f"compute_approx_kl {name}, unbiased gradient", "kl_loss", MODELS, unbiased_kl,
               fixed={"estimator": name}) for name in ("k1", "k2", "k3")),
    _subject("compute_reward", "kl_shaped_reward", MODELS, compute_reward),
    _subject("masked_mean", "token_mean", MODELS),
    _subject("masked_mean dim=-1", "sequence_mean", MODELS, fixed={"dim": -1}),
    _subject("masked_normalize", "whiten", MODELS, masked_normalize),
    _subject("log_probs_from_logits", "token_logp", MODELS, log_probs_from_logits),
    _subject("compute_entropy", "entropy", MODELS, compute_entropy),
    _subject("RemoteExperienceMaker.get_advantages_and_returns", "gae", MAKER, advantages_and_returns),
    _subject("RemoteExperienceMaker.get_cumulative_returns", "discounted_return", MAKER, cumulative_returns),
    _subject("RemoteExperienceMaker.compute_advantages_and_returns rloo", "rloo", MAKER, rloo_advantage),
    _subject("RemoteExperienceMaker.compute_advantages_and_returns dr_grpo", "group_centred", MAKER,
             dr_grpo_advantage),
    _subject("RemoteExperienceMaker.compute_advantages_and_returns group_norm", "group_normalised", MAKER,
             group_norm_advantage),
    _subject("AdaptiveKLController.update", "adaptive_kl", CONTROLLER, adaptive_kl_controller),
)  # fmt: skip
