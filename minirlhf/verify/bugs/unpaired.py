"""Known bugs of KTO and of its reference point."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Right."""
    s = logp - ref_logp
    above = beta * (s - kl.detach())
    good = desirable_weight * (1 - torch.sigmoid(above))
    bad = undesirable_weight * (1 - torch.sigmoid(-above))
    return torch.where(desirable, good, bad)


def _kto(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kto", kto, right, wrong, seen)


def kto_reference_point(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Right."""
    drift = (logp - ref_logp).mean()
    return drift.clamp(min=0).detach()


def _point(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kto_reference_point", kto_reference_point, right, wrong, seen)


BUGS = (
    _kto("reference point forgotten", "beta * (s - kl.detach())", "beta * s"),
    _kto("sign of the reference point", "s - kl.detach()", "s + kl.detach()"),
    _kto("reference point outside beta", "beta * (s - kl.detach())", "beta * s - kl.detach()"),
    _kto("batch mean for the reference point", "s - kl.detach()", "s - s.mean().detach()"),
    _kto("reference point for the desirable only", "1 - torch.sigmoid(-above)",
         "1 - torch.sigmoid(-beta * s)"),
    _kto("sign of the reference point, undesirable only", "1 - torch.sigmoid(-above)",
         "1 - torch.sigmoid(-beta * (s + kl.detach()))"),
    _kto("reference forgotten", "s = logp - ref_logp", "s = logp", "Liger #405"),
    _kto("policy and reference swapped", "s = logp - ref_logp", "s = ref_logp - logp"),
    _kto("labels swapped", "torch.where(desirable, good, bad)", "torch.where(desirable, bad, good)",
         "bugs Z05"),
    _kto("every response desirable", "torch.where(desirable, good, bad)", "good"),
    _kto("undesirable pushed up as well", "1 - torch.sigmoid(-above)", "1 - torch.sigmoid(above)"),
    _kto("undesirable with the wrong constant", "1 - torch.sigmoid(-above)", "-torch.sigmoid(-above)"),
    _kto("log-sigmoid for sigmoid", "1 - torch.sigmoid(above)", "-torch.log(torch.sigmoid(above))",
         "DPO's habit"),
    _kto("sigmoid not subtracted", "1 - torch.sigmoid(above)", "torch.sigmoid(above)"),
    _kto("beta forgotten", "beta * (s - kl.detach())", "(s - kl.detach())"),
    _kto("beta divides", "beta * (s - kl.detach())", "(s - kl.detach()) / beta"),
    _kto("weights ignored", "desirable_weight * (1 - torch.sigmoid(above))", "(1 - torch.sigmoid(above))"),
    _kto("weights swapped", "good = desirable_weight * (", "good = undesirable_weight * ("),
    _kto("weight inside the sigmoid", "desirable_weight * (1 - torch.sigmoid(above))",
         "(1 - torch.sigmoid(desirable_weight * above))"),
    _kto("weight not on the constant", "desirable_weight * (1 - torch.sigmoid(above))",
         "(1 - desirable_weight * torch.sigmoid(above))"),
    _kto("gain clamped", "beta * (s - kl.detach())", "beta * (s - kl.detach()).clamp(min=0)"),
    _kto("response detached", "above = beta * (s - kl.detach())",
         "above = beta * (s.detach() - kl.detach())"),
    _kto("mean of the desirable, for all", "torch.where(desirable, good, bad)",
         "good[desirable].mean() + bad[~desirable].mean()", "TRL #1380: NaN where a class is absent"),
    _point("not clamped", "drift.clamp(min=0)", "drift", "oracles K2"),
    _point("clamped before the mean", "(logp - ref_logp).mean()", "(logp - ref_logp).clamp(min=0).mean()"),
    _point("magnitudes averaged", "(logp - ref_logp).mean()", "(logp - ref_logp).abs().mean()"),
    _point("not detached", "drift.clamp(min=0).detach()", "drift.clamp(min=0)", "oracles K2"),
    _point("sum for mean", "(logp - ref_logp).mean()", "(logp - ref_logp).sum()", "HALOs e8c4e34"),
    _point("policy and reference swapped", "logp - ref_logp", "ref_logp - logp",
           "the other direction of the KL"),
    _point("reference forgotten", "logp - ref_logp", "logp"),
    _point("min for max", "drift.clamp(min=0)", "drift.clamp(max=0)"),
    _point("clamped above", "drift.clamp(min=0)", "drift.clamp(0, 10)", "TRL #5984"),
    _point("k3 for k1", "drift.clamp(min=0).detach()",
           "(torch.expm1(ref_logp - logp) + logp - ref_logp).mean().detach()"),
    _point("ratios averaged, not log-ratios", "(logp - ref_logp).mean()",
           "(logp - ref_logp).exp().mean().log()"),
    _point("squares averaged", "(logp - ref_logp).mean()", "((logp - ref_logp) ** 2).mean() / 2",
           "k2 for k1"),
    _point("one response for the batch", "(logp - ref_logp).mean()", "(logp - ref_logp)[0]"),
)  # fmt: skip
