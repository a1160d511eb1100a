"""TRL before 1.0: the losses that are methods, PPO with a critic, and the helpers of `trl.core`."""

import math
from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes
from peers.trl import DPO, HELPERS, KTO, odds_ratio_loss, simpo_loss, trainer

CORE, PPO, ORPO, CPO = Page("trl.core"), *(Page(f"trl.trainer.{n}_trainer") for n in ("ppo", "orpo", "cpo"))


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    *,
    loss_type: str,
) -> Tensor:
    """`DPOTrainer.dpo_loss`."""
    theirs = trainer(reference_free=False, f_divergence_type="reverse_kl", f_divergence_params=None,
                     loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)  # fmt: skip
    pairs = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return load(DPO).DPOTrainer.dpo_loss(theirs, *pairs)[0]


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`KTOTrainer.kto_loss`: the desirable first, then the others, which are put back into their rows."""
    theirs = trainer(calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=desirable_weight,
                     undesirable_weight=undesirable_weight)  # fmt: skip
    good, bad, beyond = desirable, ~desirable, torch.zeros_like(logp)
    losses = load(KTO).KTOTrainer.kto_loss(
        theirs, logp[good], logp[bad], beyond + kl, ref_logp[good], ref_logp[bad], beyond
    )[0]
    return losses[torch.argsort(torch.cat([good.nonzero(), bad.nonzero()]).flatten())]


def _ppo(**config: Any) -> Any:
    usual = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 1.0, "ratio_threshold": math.inf,
             "whiten_rewards": False}  # fmt: skip
    return with_attributes(config=with_attributes(**(usual | config)))


def ppo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float
) -> Tensor:
    """The first loss of `PPOTrainer.loss`."""
    zero, logits = torch.zeros_like(advantage), torch.zeros(*logp.shape, 2, dtype=logp.dtype)
    theirs = _ppo(cliprange=epsilon)
    return load(PPO).PPOTrainer.loss(theirs, old_logp, zero, logits, zero, logp, mask, advantage, zero)[0]


def ppo_value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The second loss of `PPOTrainer.loss`."""
    zero, logits = torch.zeros_like(ret), torch.zeros(*ret.shape, 2, dtype=ret.dtype)
    theirs = _ppo(cliprange_value=clip)
    return load(PPO).PPOTrainer.loss(theirs, zero, old_value, logits, value, zero, mask, zero, ret)[1]


def ppo_advantages(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
    """`PPOTrainer.compute_advantages`."""
    theirs = _ppo(gamma=gamma, lam=lam)
    return load(PPO).PPOTrainer.compute_advantages(theirs, value, reward, mask)[1:]


def ppo_kl_penalty(logp: Tensor, ref_logp: Tensor, *, kl_penalty: str) -> Tensor:
    """`PPOTrainer._kl_penalty`."""
    return load(PPO).PPOTrainer._kl_penalty(_ppo(kl_penalty=kl_penalty), logp, ref_logp)


def ppo_full_kl_penalty(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`PPOTrainer._kl_penalty` of the whole vocabulary, from log-probs."""
    theirs, laws = _ppo(kl_penalty="full"), (logits.log_softmax(-1), ref_logits.log_softmax(-1))
    return load(PPO).PPOTrainer._kl_penalty(theirs, *laws)


def ppo_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """`PPOTrainer.compute_rewards`."""
    theirs = _ppo(kl_penalty="kl")
    theirs.kl_ctl, page = with_attributes(value=beta), load(PPO)
    theirs._kl_penalty = lambda new, ref: page.PPOTrainer._kl_penalty(theirs, new, ref)
    return page.PPOTrainer.compute_rewards(theirs, score, logp, ref_logp, mask)[0]


def adaptive_kl_controller(
    coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float
) -> float:
    """One update of `AdaptiveKLController`."""
    controller = load(HELPERS).AdaptiveKLController(float(coefficient), target, horizon)
    controller.update(float(kl), n_steps)
    return float(controller.value)


def top_k_top_p_filtering(
    logits: Tensor, temperature: float, top_k: float | None = None, top_p: float | None = None
) -> Tensor:
    """Filtered logits, of logits divided by the temperature."""
    keep = {"top_k": int(top_k or 0), "top_p": 1.0 if top_p is None else top_p}
    return load(CORE).top_k_top_p_filtering(logits / temperature, **keep)


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("trl", function, kind, page, call, adapter)


_PAIRS = {"sigmoid": "dpo", "hinge": "hinge", "robust": "robust_dpo"}

SUBJECTS = (
    *(_subject(f"DPOTrainer.dpo_loss {name}", kind, DPO, dpo_loss, fixed={"loss_type": name})
      for name, kind in _PAIRS.items()),
    _subject("DPOTrainer.dpo_loss sigmoid, label_smoothing", "conservative_dpo", DPO, dpo_loss,
             fixed={"loss_type": "sigmoid"}),
    _subject("DPOTrainer.dpo_loss ipo", "ipo", DPO, dpo_loss, fixed={"loss_type": "ipo"}, tau="beta"),
    _subject("DPOTrainer.get_batch_logps", "sequence_logp", DPO),
    _subject("KTOTrainer.kto_loss", "kto", KTO, kto_loss),
    _subject("KTOTrainer.get_batch_logps average_log_prob", "sequence_logp", KTO,
             fixed={"average_log_prob": True}),
    _subject("ORPOTrainer.odds_ratio_loss", "orpo", ORPO, odds_ratio_loss, fixed={"page": ORPO}),
    _subject("CPOTrainer.cpo_loss simpo", "simpo", CPO, simpo_loss, fixed={"page": CPO}),
    _subject("PPOTrainer.loss, policy", "clipped_surrogate", PPO, ppo_policy_loss, clip_low="epsilon",
             clip_high="epsilon"),
    _subject("PPOTrainer.loss, value", "clipped_value_loss", PPO, ppo_value_loss),
    _subject("PPOTrainer.compute_advantages", "gae", PPO, ppo_advantages),
    *(_subject(f"PPOTrainer._kl_penalty {name}", "kl_estimator", PPO, ppo_kl_penalty,
               fixed={"kl_penalty": name}) for name in ("kl", "abs", "mse")),
    _subject("PPOTrainer._kl_penalty full", "exact_kl", PPO, ppo_full_kl_penalty),
    _subject("PPOTrainer.compute_rewards", "kl_shaped_reward_from_logps", PPO, ppo_rewards),
    _subject("AdaptiveKLController.update", "adaptive_kl", HELPERS, adaptive_kl_controller),
    _subject("masked_mean", "token_mean", CORE),
    _subject("masked_mean axis=-1", "sequence_mean", CORE, fixed={"axis": -1}),
    _subject("masked_whiten", "whiten", CORE),
    _subject("masked_whiten shift_mean=False", "whiten_scale_only", CORE, fixed={"shift_mean": False}),
    _subject("whiten", "whiten", CORE),
    _subject("logprobs_from_logits", "token_logp", CORE),
    _subject("entropy_from_logits", "entropy", CORE),
    _subject("top_k_top_p_filtering", "sampling_law", CORE, top_k_top_p_filtering),
)  # fmt: skip
