"""Known bugs of GSPO and CISPO."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def gspo(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float,
         clip_high: float) -> Tensor:  # fmt: skip
    """Right."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    length = mask.sum(-1).clamp(min=1)
    s = torch.exp(log_ratio.sum(-1) / length)
    cut = torch.clamp(s, 1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(s * advantage, cut * advantage)
    return torch.where(mask.any(-1), loss, 0.0)


def gspo_of_tokens(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float,
                   clip_high: float) -> Tensor:  # fmt: skip
    """Right: spread over the tokens with a stop-gradient, averaged per sequence, then over the sequences."""
    length = mask.sum(-1, keepdim=True)
    mean = torch.where(mask, logp - old_logp, 0.0).sum(-1, keepdim=True) / length
    s = torch.exp(mean.detach() + logp - logp.detach())
    cut = torch.clamp(s, 1 - clip_low, 1 + clip_high)
    loss = torch.where(mask, torch.maximum(-s * advantage[:, None], -cut * advantage[:, None]), 0.0)
    return (loss.sum(-1) / length[:, 0]).mean()


def cispo(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float,
          clip_high: float) -> Tensor:  # fmt: skip
    """Right."""
    rho = torch.exp(logp - old_logp)
    weight = torch.clamp(rho, 1 - clip_low, 1 + clip_high).detach()
    loss = -weight * advantage * logp
    return torch.where(mask, loss, 0.0)


def _gspo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gspo", gspo, right, wrong, seen)


def _tokens(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gspo", gspo_of_tokens, right, wrong, seen)


def _cispo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "cispo", cispo, right, wrong, seen)


BUGS = (
    _gspo("product of the ratios", "log_ratio.sum(-1) / length", "log_ratio.sum(-1)"),
    _gspo("arithmetic mean of the ratios", "torch.exp(log_ratio.sum(-1) / length)",
          "torch.where(mask, torch.exp(log_ratio), 0.0).sum(-1) / length"),
    _gspo("mean over the padding too", "length = mask.sum(-1).clamp(min=1)",
          "length = torch.full_like(advantage, mask.shape[-1])", "SkyRL #1305"),
    _gspo("padding in the ratio", "torch.where(mask, logp - old_logp, 0.0)", "logp - old_logp"),
    _gspo("length off by one", "mask.sum(-1).clamp(min=1)", "(mask.sum(-1) - 1).clamp(min=1)"),
    _gspo("min and max swapped", "torch.minimum", "torch.maximum", "bugs Z03"),
    _gspo("clip forgotten", "torch.minimum(s * advantage, cut * advantage)", "s * advantage"),
    _gspo("clipped before multiplying by A", "torch.minimum(s * advantage, cut * advantage)",
          "torch.minimum(s, cut) * advantage", "takuseno/ppo #3"),
    _gspo("every token clipped first", "torch.where(mask, logp - old_logp, 0.0)",
          "torch.where(mask, torch.exp(logp - old_logp).clamp(1 - clip_low, 1 + clip_high).log(), 0.0)"),
    _gspo("clipped in log space", "torch.clamp(s, 1 - clip_low, 1 + clip_high)",
          "torch.exp(torch.clamp(torch.log(s), -clip_low, clip_high))"),
    _gspo("widths exchanged", "s, 1 - clip_low, 1 + clip_high", "s, 1 - clip_high, 1 + clip_low"),
    _gspo("ratio inverted", "logp - old_logp", "old_logp - logp"),
    _gspo("ratio detached", "s = torch.exp(log_ratio.sum(-1) / length)",
          "s = torch.exp(log_ratio.sum(-1) / length).detach()", "mlx-lm-lora #49"),
    _gspo("weighed with the length", "return torch.where(mask.any(-1), loss, 0.0)", "return loss * length",
          "OpenRLHF 1b23ecf0, TRL #3823"),
    _gspo("last token alone", "log_ratio.sum(-1) / length", "log_ratio[:, -1]"),
    _gspo("first token only in the gradient", "torch.where(mask, logp - old_logp, 0.0)",
          "torch.where(mask, torch.cat([logp[:, :1], logp[:, 1:].detach()], -1) - old_logp, 0.0)"),
    _tokens("token mean of sequence ratios", "(loss.sum(-1) / length[:, 0]).mean()",
            "loss.sum() / length.sum()",
            "OpenRLHF 1b23ecf0, TRL #3823"),
    _tokens("token ratio on top", "mean.detach() + logp - logp.detach()", "mean.detach() + logp - old_logp"),
    _tokens("gradient twice", "mean.detach() + logp - logp.detach()", "mean + logp - logp.detach()"),
    _cispo("weight not detached", ".detach()\n", "\n", "open-instruct #1269"),
    _cispo("log π forgotten", "-weight * advantage * logp", "-weight * advantage", "open-instruct #1269"),
    _cispo("surrogate in place of log π", "-weight * advantage * logp",
           "-torch.clamp(rho, 1 - clip_low, 1 + clip_high) * advantage", "open-instruct #1269"),
    _cispo("PPO's dead zone", "-weight * advantage * logp",
           "-torch.where((rho > 1 + clip_high) & (advantage > 0), 0.0, weight) * advantage * logp"),
    _cispo("tokens outside are dropped", "weight = torch.clamp(rho, 1 - clip_low, 1 + clip_high).detach()",
           "weight = torch.where((rho < 1 - clip_low) | (rho > 1 + clip_high), 0.0, rho).detach()"),
    _cispo("weight not clipped", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)", "rho"),
    _cispo("clipped in log space", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
           "torch.exp(torch.clamp(logp - old_logp, -clip_low, clip_high))"),
    _cispo("widths exchanged", "rho, 1 - clip_low, 1 + clip_high", "rho, 1 - clip_high, 1 + clip_low"),
    _cispo("lower limit only", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
           "torch.clamp(rho, min=1 - clip_low)"),
    _cispo("ratio inverted", "logp - old_logp", "old_logp - logp"),
    _cispo("pessimistic minimum kept", "-weight * advantage * logp",
           "-torch.minimum(weight * advantage, rho.detach() * advantage) * logp"),
    _cispo("log ratio for log π", "-weight * advantage * logp", "-weight * advantage * (logp - old_logp)"),
    _cispo("probability for its log", "advantage * logp", "advantage * torch.exp(logp)"),
    _cispo("log π detached, weight not", "-weight * advantage * logp", "-rho * advantage * logp.detach()"),
    _cispo("absolute advantage", "* advantage *", "* advantage.abs() *"),
    _cispo("ratio of the whole sequence", "torch.exp(logp - old_logp)",
           "torch.exp(torch.where(mask, logp - old_logp, 0.0).sum(-1, keepdim=True)).expand_as(logp)"),
    _cispo("old log-probs in the loss", "advantage * logp", "advantage * old_logp"),
)  # fmt: skip
