"""Known bugs of importance weights."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def truncated_importance_weight(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Right."""
    log_ratio = torch.where(mask, logp - behaviour_logp, 0.0)
    rho = torch.exp(log_ratio)
    weight = torch.clamp(rho, max=cap)
    return torch.where(mask, weight, 0.0).detach()


def masked_importance_weight(logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, low: float,
                             high: float) -> Tensor:  # fmt: skip
    """Right."""
    log_ratio = torch.where(mask, logp - behaviour_logp, 0.0)
    rho = torch.exp(log_ratio)
    kept = (rho >= low) & (rho <= high)
    return torch.where(kept & mask, rho, 0.0).detach()


def _cut(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "truncated_importance_weight", truncated_importance_weight, right, wrong, seen)


def _band(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "masked_importance_weight", masked_importance_weight, right, wrong, seen)


BUGS = (
    _cut("ratio inverted", "logp - behaviour_logp", "behaviour_logp - logp"),
    _cut("weight not detached", ".detach()", "", "oracles T3"),
    _cut("cap forgotten", "torch.clamp(rho, max=cap)", "rho"),
    _cut("cap is a floor", "torch.clamp(rho, max=cap)", "torch.clamp(rho, min=cap)", "bugs Z03"),
    _cut("cap on the log ratio", "torch.clamp(rho, max=cap)", "torch.exp(torch.clamp(log_ratio, max=cap))",
         "OpenRLHF #1335"),
    _cut("1 + cap", "max=cap", "max=1 + cap"),
    _cut("cut below at 1/C too", "torch.clamp(rho, max=cap)", "torch.clamp(rho, 1 / cap, cap)"),
    _cut("exp forgotten", "torch.exp(log_ratio)", "log_ratio"),
    _cut("ratio linearised", "torch.exp(log_ratio)", "1 + log_ratio"),
    _cut("beyond the cap nothing", "torch.clamp(rho, max=cap)", "torch.where(rho > cap, 0.0, rho)"),
    _cut("beyond the cap 1", "torch.clamp(rho, max=cap)", "torch.where(rho > cap, 1.0, rho)"),
    _cut("normalised over the batch", "weight = torch.clamp(rho, max=cap)",
         "weight = torch.clamp(rho, max=cap) / torch.clamp(rho, max=cap)[mask].mean()"),
    _cut("sequences masked, tokens uncut", "weight = torch.clamp(rho, max=cap)",
         "weight = rho * (torch.exp(log_ratio.sum(-1) / mask.sum(-1).clamp(min=1)) <= cap)[:, None]",
         "OpenRLHF seq-mask-tis"),
    _cut("mean over the padding too", "torch.exp(log_ratio)",
         "torch.exp(log_ratio.mean(-1, keepdim=True)).expand_as(log_ratio)", "SkyRL #1305"),
    _cut("running product", "torch.exp(log_ratio)", "torch.exp(log_ratio.cumsum(-1))"),
    _cut("capped from the second token on", "torch.clamp(rho, max=cap)",
         "torch.cat([rho[:, :1], rho[:, 1:].clamp(max=cap)], -1)"),
    _band("ratio inverted", "logp - behaviour_logp", "behaviour_logp - logp"),
    _band("weight not detached", ".detach()", "", "oracles T3"),
    _band("clamped, not masked", "torch.where(kept & mask, rho, 0.0)",
          "torch.where(mask, rho.clamp(low, high), 0.0)"),
    _band("kept outside", "(rho >= low) & (rho <= high)", "(rho < low) | (rho > high)"),
    _band("upper limit only", "(rho >= low) & (rho <= high)", "rho <= high"),
    _band("lower limit only", "(rho >= low) & (rho <= high)", "rho >= low"),
    _band("either limit", "(rho >= low) & (rho <= high)", "(rho >= low) | (rho <= high)"),
    _band("outside 1", "torch.where(kept & mask, rho, 0.0)",
          "torch.where(mask, torch.where(kept, rho, 1.0), 0.0)"),
    _band("band on the log ratio", "(rho >= low) & (rho <= high)",
          "(log_ratio >= low) & (log_ratio <= high)"),
    _band("band around 1", "(rho >= low) & (rho <= high)", "(rho >= 1 - low) & (rho <= 1 + high)"),
    _band("band in log space, symmetric", "(rho >= low) & (rho <= high)", "log_ratio.abs() <= high - 1"),
    _band("one token drops its sequence", "kept = (rho >= low) & (rho <= high)",
          "kept = ((rho >= low) & (rho <= high)).all(-1, keepdim=True)"),
    _band("exp forgotten", "torch.exp(log_ratio)", "log_ratio"),
    _band("limits exchanged", "(rho >= low) & (rho <= high)", "(rho >= 1 / high) & (rho <= 1 / low)"),
    _band("renormalised to the tokens kept", "torch.where(kept & mask, rho, 0.0)",
          "torch.where(kept & mask, rho, 0.0) * mask.sum() / (kept & mask).sum().clamp(min=1)"),
)  # fmt: skip
