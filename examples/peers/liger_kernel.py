"""Liger Kernel: the losses inside its fused linear layers, on log-probs."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load

CHUNKED = "liger_kernel.chunked_loss."
DPO, SIMPO, ORPO, CPO, KTO, GRPO = (
    Page(CHUNKED + name)
    for name in ("dpo_loss", "simpo_loss", "orpo_loss", "cpo_loss", "kto_loss", "grpo_loss")
)
_SMOOTHING = "label_smoothing"


def _pairs(chosen_logp: Tensor) -> Tensor:
    """The labels of a whole batch of pairs: only how many they are is read."""
    return torch.zeros(2 * len(chosen_logp), 1, dtype=torch.long)


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    **fixed: Any,
) -> Tensor:
    """`LigerFusedLinearDPOFunction`."""
    loss = load(DPO).LigerFusedLinearDPOFunction.preference_loss_fn
    references = {"ref_chosen_logps": ref_chosen_logp, "ref_rejected_logps": ref_rejected_logp}
    return loss(chosen_logp, rejected_logp, _pairs(chosen_logp), beta=beta, **references, **fixed)[0]


def robust_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """`LigerFusedLinearDPOFunction` of type robust."""
    pair = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return dpo_loss(*pair, beta, loss_type="robust", label_smoothing=label_smoothing)


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, beta: float, gamma: float) -> Tensor:
    """`LigerFusedLinearSimPOFunction`, of averaged log-probs."""
    loss = load(SIMPO).LigerFusedLinearSimPOFunction.preference_loss_fn
    return loss(chosen_logp, rejected_logp, _pairs(chosen_logp), beta=beta, gamma=gamma)[0]


def odds_ratio_loss(chosen_logp: Tensor, rejected_logp: Tensor, weight: float) -> Tensor:
    """`LigerFusedLinearORPOFunction`, of averaged log-probs."""
    loss = load(ORPO).LigerFusedLinearORPOFunction.preference_loss_fn
    return loss(chosen_logp, rejected_logp, _pairs(chosen_logp), beta=weight)[0]


def cpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, beta: float
) -> Tensor:
    """`LigerFusedLinearCPOFunction`: DPO of the log-ratios, since its reference is uniform."""
    loss, pairs = load(CPO).LigerFusedLinearCPOFunction.preference_loss_fn, _pairs(chosen_logp)
    return loss(chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp, pairs, beta=beta)[0]


def kto_loss(logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
    """`LigerFusedLinearKTOFunction`; the reference point comes detached."""
    loss = load(KTO).LigerFusedLinearKTOFunction.preference_loss_fn
    return loss(logp, desirable, logp, ref_log_prob_chunk=ref_logp, beta=beta, kl=kl.detach())[0]


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    *,
    loss_type: str,
) -> Tensor:
    """`LigerFusedLinearGRPOFunction` without a reference; one advantage per sequence."""
    limits = {"epsilon_low": clip_low, "epsilon_high": clip_high, "delta": dual_clip}
    return load(GRPO).LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp, mask, advantage, mask, old_per_token_logps=old_logp, beta=0.0, loss_type=loss_type,
        max_completion_length=mask.shape[1], **limits,
    )[0]  # fmt: skip


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """`LigerFusedLinearGRPOFunction` with a ratio per sequence."""
    return load(GRPO).LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp, mask, advantage, mask, old_per_token_logps=old_logp, beta=0.0, loss_type="grpo",
        epsilon_low=clip_low, epsilon_high=clip_high, importance_sampling_level="sequence",
    )[0]  # fmt: skip


def cispo_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_high: float) -> Tensor:
    """`LigerFusedLinearGRPOFunction` of type cispo."""
    return load(GRPO).LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp, mask, advantage, mask, old_per_token_logps=old_logp, beta=0.0, loss_type="cispo",
        epsilon_high=clip_high,
    )[0]  # fmt: skip


def kl_term(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 1.0, *, corrected: bool) -> Tensor:
    """The KL term of `LigerFusedLinearGRPOFunction`: what is left without advantages."""
    return load(GRPO).LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp, mask, torch.zeros_like(logp[:, 0]), mask, ref_per_token_logps=ref_logp, beta=beta,
        loss_type="bnpo", use_bias_correction_kl=corrected,
    )[0]  # fmt: skip


def _subject(function: str, kind: str, page: Page, call: Any, **adapter: Any) -> Subject:
    return Subject("liger-kernel", function, kind, page, call, adapter)


SUBJECTS = (
    _subject("LigerFusedLinearDPOFunction", "dpo", DPO, dpo_loss),
    _subject("LigerFusedLinearDPOFunction hinge", "hinge", DPO, dpo_loss, fixed={"loss_type": "hinge"}),
    _subject("LigerFusedLinearDPOFunction robust", "robust_dpo", DPO, robust_dpo_loss),
    _subject("LigerFusedLinearSimPOFunction", "simpo", SIMPO, simpo_loss),
    _subject("LigerFusedLinearORPOFunction", "orpo", ORPO, odds_ratio_loss),
    _subject("LigerFusedLinearCPOFunction", "dpo", CPO, cpo_loss),
    _subject("LigerFusedLinearKTOFunction", "kto", KTO, kto_loss),
    *(_subject(f"LigerFusedLinearGRPOFunction {name}", "clipped_surrogate", GRPO, grpo_loss,
               fixed={"loss_type": name}) for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    _subject("LigerFusedLinearGRPOFunction sequence", "gspo", GRPO, gspo_loss),
    _subject("LigerFusedLinearGRPOFunction cispo", "cispo", GRPO, cispo_loss),
    _subject("LigerFusedLinearGRPOFunction, KL", "kl_loss", GRPO, kl_term, fixed={"corrected": False}),
    _subject("LigerFusedLinearGRPOFunction, KL corrected", "kl_loss", GRPO, kl_term, fixed={"corrected": True}),
)  # fmt: skip
