"""Known bugs of the policy gradient and of PPO's clipped surrogate."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float,
                      clip_high: float, dual_clip: float | None = None) -> Tensor:  # fmt: skip
    """Right."""
    rho = torch.exp(logp - old_logp)
    cut = torch.clamp(rho, 1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(rho * advantage, cut * advantage)
    if dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    return torch.where(mask, -surrogate, 0.0)


def token_mean_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float,
                         clip_high: float) -> Tensor:  # fmt: skip
    """Right: averaged over the tokens."""
    rho = torch.exp(logp - old_logp)
    cut = torch.clamp(rho, 1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-rho * advantage, -cut * advantage)
    counts = mask.to(loss.dtype)
    total = torch.where(mask, loss, 0.0).sum()
    return total / counts.sum()


def sequence_mean_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *,
                            clip_low: float,
                            clip_high: float) -> Tensor:  # fmt: skip
    """Right: averaged over the tokens of each sequence, then over the sequences."""
    rho = torch.exp(logp - old_logp)
    cut = torch.clamp(rho, 1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-rho * advantage, -cut * advantage)
    row = torch.where(mask, loss, 0.0).sum(-1)
    length = mask.sum(-1)
    return (row / length).mean()


def policy_gradient(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    weight = -advantage
    loss = weight * logp
    return torch.where(mask, loss, 0.0)


def token_mean_policy_gradient(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Right: averaged over the tokens."""
    kept = torch.where(mask, -advantage * logp, 0.0)
    total, count = kept.sum(), mask.sum()
    return total / count


def _clip(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "clipped_surrogate", clipped_surrogate, right, wrong, seen)


def _mean(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "clipped_surrogate", token_mean_surrogate, right, wrong, seen)


def _rows(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "clipped_surrogate", sequence_mean_surrogate, right, wrong, seen)


def _gradient(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "policy_gradient", policy_gradient, right, wrong, seen)


def _gradient_mean(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "policy_gradient", token_mean_policy_gradient, right, wrong, seen)


BUGS = (
    _clip("min and max swapped", "torch.minimum(rho * advantage", "torch.maximum(rho * advantage",
          "bugs Z03"),
    _clip("clip forgotten", "torch.minimum(rho * advantage, cut * advantage)", "rho * advantage"),
    _clip("only the clipped term", "torch.minimum(rho * advantage, cut * advantage)", "cut * advantage",
          "open-instruct #1269: clipped tokens get no gradient"),
    _clip("clipped before multiplying by A", "torch.minimum(rho * advantage, cut * advantage)",
          "torch.minimum(rho, cut) * advantage", "takuseno/ppo #3, tensorforce #106, trax #396"),
    _clip("ratio inverted", "logp - old_logp", "old_logp - logp"),
    _clip("ratio without exp", "torch.exp(logp - old_logp)", "logp - old_logp"),
    _clip("ratio linearised", "torch.exp(logp - old_logp)", "1 + logp - old_logp"),
    _clip("clipped in log space", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
          "torch.exp(torch.clamp(logp - old_logp, -clip_low, clip_high))"),
    _clip("clipped around 0", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
          "torch.clamp(rho, -clip_low, clip_high)"),
    _clip("widths exchanged", "rho, 1 - clip_low, 1 + clip_high", "rho, 1 - clip_high, 1 + clip_low"),
    _clip("one width for both", "1 + clip_high", "1 + clip_low"),
    _clip("upper limit only", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
          "torch.clamp(rho, max=1 + clip_high)"),
    _clip("lower limit only", "torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
          "torch.clamp(rho, min=1 - clip_low)"),
    _clip("clip at 1 / (1 + ε)", "1 - clip_low", "1 / (1 + clip_low)"),
    _clip("advantages normalised inside, to their magnitude",
          "torch.minimum(rho * advantage, cut * advantage)",
          "torch.minimum(rho * advantage.sign(), cut * advantage.sign())"),
    _clip("ratio detached", "rho = torch.exp(logp - old_logp)", "rho = torch.exp(logp - old_logp).detach()",
          "mlx-lm-lora #49: no policy gradient"),
    _clip("log π detached in the unclipped term", "torch.minimum(rho * advantage",
          "torch.minimum(rho.detach() * advantage"),
    _clip("clip lets the gradient through", "cut = torch.clamp(rho, 1 - clip_low, 1 + clip_high)",
          "cut = rho + (torch.clamp(rho, 1 - clip_low, 1 + clip_high) - rho).detach()"),
    _clip("ratio of the whole sequence", "torch.exp(logp - old_logp)",
          "torch.exp(torch.where(mask, logp - old_logp, 0.0).sum(-1, keepdim=True)).expand_as(logp)"),
    _clip("mean ratio of the batch", "torch.exp(logp - old_logp)",
          "torch.exp(logp - old_logp) / torch.exp(logp - old_logp)[mask].mean().detach()"),
    _clip("advantage averaged over the row", "cut = torch",
          "advantage = torch.where(mask, advantage, 0.0).sum(-1, "
          "keepdim=True) / mask.sum(-1, keepdim=True); advantage = advantage.expand_as(rho); cut = torch"),
    _clip("mask on the ratio, not on the loss", "torch.where(mask, -surrogate, 0.0)",
          "torch.where(mask, -surrogate, 0.0) / mask.float().mean()"),
    _clip("dual clip for every sign",
          "torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)",
          "torch.maximum(surrogate, dual_clip * advantage)"),
    _clip("dual clip for the wrong sign", "advantage < 0", "advantage > 0"),
    _clip("dual clip is a minimum", "torch.maximum(surrogate, dual_clip * advantage)",
          "torch.minimum(surrogate, dual_clip * advantage)"),
    _clip("dual clip ignored", "if dual_clip is not None:", "if False:", "bugs P20: dead option"),
    _clip("dual clip at 1 + c", "dual_clip * advantage", "(1 + dual_clip) * advantage"),
    _mean("mask=advantages", "counts = mask.to(loss.dtype)", "counts = advantage", "verl #2506, #2513"),
    _mean("mean over all, sum over the masked", "torch.where(mask, loss, 0.0).sum()", "loss.sum()",
          "TRL #6809"),
    _mean("divided by the batch times the longest response", "counts.sum()",
          "(counts.sum(-1).max() * len(mask))"),
    _mean("divided by tokens twice", "total / counts.sum()", "total / counts.sum() / len(mask)",
          "twinkle #292"),
    _mean("count off by one", "counts.sum()", "(counts.sum() - 1).clamp(min=1)"),
    _mean("first token dropped", "total = torch.where(mask, loss, 0.0).sum()",
          "total = torch.where(mask, loss, 0.0)[:, 1:].sum()", "verl #3287: mask sliced at the wrong end"),
    _mean("mask shifted by one", "total = torch.where(mask, loss, 0.0)",
          "total = torch.where(mask.roll(1, -1), loss, 0.0)",
          "trlx #509"),
    _mean("clip of the mean ratio", "cut = torch.clamp(rho, 1",
          "cut = torch.clamp(rho.mean(-1, keepdim=True), 1"),
    _rows("length of the wrong axis", "mask.sum(-1)",
          "mask.sum(0)[: len(mask)] if mask.shape[0] <= mask.shape[1] else "
          "mask.sum(-1)", "OpenRLHF #1250: silent for square shapes"),
    _rows("one length for all", "mask.sum(-1)", "mask.sum(-1)[0]"),
    _rows("weighed with the length twice", "(row / length).mean()", "(row / length**2).mean()",
          "LLaMA-Factory #6722"),
    _gradient("absolute advantage", "weight = -advantage", "weight = -advantage.abs()"),
    _gradient("probability for its log", "weight * logp", "weight * torch.exp(logp)"),
    _gradient("log of the log", "weight * logp", "weight * torch.log(-logp)"),
    _gradient("log π detached", "weight * logp", "weight * logp.detach()",
              "mlx-lm-lora #49: no policy gradient"),
    _gradient("advantage squared", "-advantage", "-advantage * advantage"),
    _gradient("only good actions", "-advantage", "-advantage.clamp(min=0)"),
    _gradient("advantage standardised in the loss", "-advantage",
              "-advantage / (advantage[mask].abs().mean() + 1e-8)"),
    _gradient("centred in the loss", "-advantage", "-(advantage - advantage[mask].mean())"),
    _gradient("log π summed over the row", "weight * logp",
              "weight * torch.where(mask, logp, 0.0).sum(-1, keepdim=True)"),
    _gradient("missing unsqueeze", "loss = weight * logp",
              "loss = (weight.T if weight.shape[0] == weight.shape[1] else weight) * logp", "TRL 4db63af98"),
    _gradient("sign of log π", "weight * logp", "weight * logp.abs() * 0.5"),
    _gradient("weight of the last token for all", "weight = -advantage",
              "weight = -advantage[:, -1:].expand_as(logp)"),
    _gradient_mean("mask=advantages", "mask.sum()", "advantage.sum()", "verl #2506, #2513"),
    _gradient_mean("unmasked sum", "kept.sum(), mask.sum()", "(-advantage * logp).sum(), mask.sum()",
                   "TRL #6809"),
    _gradient_mean("mean of the log-probs times mean of the advantages", "return total / count",
                   "return -logp[mask].mean() * advantage[mask].mean()"),
)  # fmt: skip
