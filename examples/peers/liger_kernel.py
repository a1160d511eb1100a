"""Liger Kernel: its fused linear layers for preferences, and the GRPO loss inside of its fused layer.

A layer takes hidden states, and computes log-probs by itself. Here each response is one token of a vocabulary
of two, and then one that is ignored; the hidden states are the logits of the policy and of the reference.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load

DPO, SIMPO, ORPO, CPO, KTO, GRPO = (
    Page(f"liger_kernel.chunked_loss.{name}_loss") for name in ("dpo", "simpo", "orpo", "cpo", "kto", "grpo")
)
_PLAIN = {"compute_nll_loss": False, "compiled": False}


def _hidden(logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
    """What a layer takes so that token 0 has these log-probs."""
    logits = [torch.stack([x, torch.log1p(-x.exp())], dim=-1) for x in (logp, ref_logp)]
    states = torch.cat(logits, dim=-1)
    policy, reference = torch.eye(4, dtype=logp.dtype).split(2)
    tokens = torch.tensor([[0, -100]]).expand(len(logp), 2)
    given = {"_input": torch.stack([states, states + 1.0], dim=1), "lin_weight": policy, "target": tokens}
    return given | {"ref_input": given["_input"].detach(), "ref_weight": reference}


def _answer(layer: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The loss of a layer that takes all or some of these."""
    taken = inspect.signature(layer.forward).parameters
    return layer(**{name: value for name, value in given.items() if name in taken})[0]


def _negative(*logps: Tensor) -> Tensor:
    """What is to be subtracted so that all are log-probs; a loss of their differences does not see it."""
    return torch.stack([*logps, torch.zeros_like(logps[0])]).amax(0).detach() + 0.125


def dpo_layer(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    **settings: Any,
) -> Tensor:
    """`LigerFusedLinearDPOLoss`."""
    policy, reference = (
        torch.cat([chosen_logp, rejected_logp]),
        torch.cat([ref_chosen_logp, ref_rejected_logp]),
    )
    above = _negative(policy, reference)
    layer = load(DPO).LigerFusedLinearDPOLoss(beta=beta, use_ref_model=True, **_PLAIN, **settings)
    return _answer(layer, _hidden(policy - above, reference - above))


def hinge_layer(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """`LigerFusedLinearDPOLoss` of type hinge."""
    pair = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return dpo_layer(*pair, beta, loss_type="hinge")


def robust_layer(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """`LigerFusedLinearDPOLoss` of type robust."""
    pair = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return dpo_layer(*pair, beta, loss_type="robust", label_smoothing=label_smoothing)


def _pair(chosen_logp: Tensor, rejected_logp: Tensor) -> dict[str, Tensor]:
    logps = torch.cat([chosen_logp, rejected_logp])
    return _hidden(logps, logps.detach())


def simpo_layer(chosen_logp: Tensor, rejected_logp: Tensor, beta: float, gamma: float) -> Tensor:
    """`LigerFusedLinearSimPOLoss`, of averaged log-probs."""
    layer = load(SIMPO).LigerFusedLinearSimPOLoss(beta=beta, gamma=gamma, **_PLAIN)
    above = _negative(chosen_logp, rejected_logp)
    return _answer(layer, _pair(chosen_logp - above, rejected_logp - above))


def cpo_layer(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """`LigerFusedLinearCPOLoss`: DPO of the log-ratios, since its reference is uniform."""
    chosen, rejected = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    layer, above = load(CPO).LigerFusedLinearCPOLoss(beta=beta, **_PLAIN), _negative(chosen, rejected)
    return _answer(layer, _pair(chosen - above, rejected - above))


def orpo_layer(chosen_logp: Tensor, rejected_logp: Tensor, weight: float) -> Tensor:
    """`LigerFusedLinearORPOLoss`, of averaged log-probs."""
    layer = load(ORPO).LigerFusedLinearORPOLoss(beta=weight, compiled=False)
    return _answer(layer, _pair(chosen_logp, rejected_logp))


def kto_layer(logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
    """`LigerFusedLinearKTOLoss`; the reference point comes detached."""
    above = _negative(logp, ref_logp)
    layer = load(KTO).LigerFusedLinearKTOLoss(beta=beta, compiled=False, use_ref_model=True)
    given = {"preference_labels": desirable, "kl": kl.detach()}
    return _answer(layer, _hidden(logp - above, ref_logp - above) | given)


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
    _subject("LigerFusedLinearDPOLoss", "dpo", DPO, dpo_layer),
    _subject("LigerFusedLinearDPOLoss hinge", "hinge", DPO, hinge_layer),
    _subject("LigerFusedLinearDPOLoss robust", "robust_dpo", DPO, robust_layer),
    _subject("LigerFusedLinearSimPOLoss", "simpo", SIMPO, simpo_layer),
    _subject("LigerFusedLinearORPOLoss", "orpo", ORPO, orpo_layer),
    _subject("LigerFusedLinearCPOLoss", "dpo", CPO, cpo_layer),
    _subject("LigerFusedLinearKTOLoss", "kto", KTO, kto_layer),
    *(_subject(f"LigerFusedLinearGRPOFunction {name}", "clipped_surrogate", GRPO, grpo_loss,
               fixed={"loss_type": name}) for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    _subject("LigerFusedLinearGRPOFunction sequence", "gspo", GRPO, gspo_loss),
    _subject("LigerFusedLinearGRPOFunction cispo", "cispo", GRPO, cispo_loss),
    _subject("LigerFusedLinearGRPOFunction, KL", "kl_loss", GRPO, kl_term, fixed={"corrected": False}),
    _subject("LigerFusedLinearGRPOFunction, KL corrected", "kl_loss", GRPO, kl_term,
             fixed={"corrected": True}),
)  # fmt: skip
