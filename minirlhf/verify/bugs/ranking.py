"""Known bugs of Bradley-Terry and of Plackett-Luce."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def bradley_terry(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Right."""
    gap = chosen_reward - rejected_reward
    asked = torch.zeros_like(gap) if margin is None else margin
    kept = -F.logsigmoid(gap - asked)
    flipped = -F.logsigmoid(-gap - asked)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def _pair(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "bradley_terry", bradley_terry, right, wrong, seen)


def plackett_luce(reward: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    kept = reward.masked_fill(~mask, -1e30)
    left = kept.flip(-1).logcumsumexp(dim=-1).flip(-1)
    stages = left - kept
    return torch.where(mask, stages, 0.0).sum(dim=-1)


def _order(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "plackett_luce", plackett_luce, right, wrong, seen)


_LEFT = "kept.flip(-1).logcumsumexp(dim=-1).flip(-1)"
_MIXED = "(1 - label_smoothing) * kept + label_smoothing * flipped"
BUGS = (
    _pair("chosen and rejected swapped", "chosen_reward - rejected_reward",
          "rejected_reward - chosen_reward", "bugs Z05"),
    _pair("loss negated", _MIXED, "-(1 - label_smoothing) * kept - label_smoothing * flipped",
          "Liger-Kernel #484"),
    _pair("rewards added", "chosen_reward - rejected_reward", "chosen_reward + rejected_reward"),
    _pair("rejected reward forgotten", "chosen_reward - rejected_reward", "chosen_reward"),
    _pair("log forgotten", "kept = -F.logsigmoid(gap - asked)", "kept = -torch.sigmoid(gap - asked)",
          "DS-Chat #501"),
    _pair("log(sigmoid) overflows", "kept = -F.logsigmoid(gap - asked)",
          "kept = -torch.log(torch.sigmoid(gap - asked))", "tinker-cookbook #188"),
    _pair("log(sigmoid + 1e-8)", "kept = -F.logsigmoid(gap - asked)",
          "kept = -torch.log(torch.sigmoid(gap - asked) + 1e-8)", "common: saturates at 18.4"),
    _pair("hinge in place of the sigmoid", "kept = -F.logsigmoid(gap - asked)",
          "kept = torch.relu(1 - gap + asked)"),
    _pair("sign of the margin", "-F.logsigmoid(gap - asked)", "-F.logsigmoid(gap + asked)"),
    _pair("margin multiplies", "-F.logsigmoid(gap - asked)", "-F.logsigmoid(gap * (1 + asked))"),
    _pair("margin ignored", "-F.logsigmoid(gap - asked)", "-F.logsigmoid(gap)", "P20: a dead option"),
    _pair("margin averaged over the batch", "else margin", "else margin.mean()"),
    _pair("margin of every other pair too", "kept = -F.logsigmoid(gap - asked)",
          "kept = -F.logsigmoid(gap[:, None] - asked).mean(1)", "ms-swift #9927, TRL 0.11: [B, 1] - [B]"),
    _pair("margin outside the sigmoid", "-F.logsigmoid(gap - asked)", "-F.logsigmoid(gap) + asked"),
    _pair("smoothing weights swapped", _MIXED,
          "label_smoothing * kept + (1 - label_smoothing) * flipped if label_smoothing else kept",
          "bugs Z06"),
    _pair("smoothing on one term", _MIXED, "kept + label_smoothing * flipped", "bugs Z06"),
    _pair("smoothing dropped", _MIXED, "kept", "Liger #1082"),
    _pair("smoothed towards one half", _MIXED,
          "(1 - label_smoothing / 2) * kept + label_smoothing / 2 * flipped",
          "cross-entropy's label smoothing"),
    _pair("flipped term subtracted", _MIXED, "(1 - label_smoothing) * kept - label_smoothing * flipped",
          "robust DPO's numerator"),
    _pair("rejected side detached", "chosen_reward - rejected_reward",
          "chosen_reward - rejected_reward.detach()"),
    _pair("loss of the mean gap", "-F.logsigmoid(gap - asked)", "-F.logsigmoid(gap.mean() - asked)",
          "oracles D14"),
    _pair("gap normalised over the batch", "gap = chosen_reward - rejected_reward",
          "gap = (chosen_reward - rejected_reward) / (chosen_reward - rejected_reward).detach().norm()"),
    _pair("gap clamped", "gap = chosen_reward - rejected_reward",
          "gap = (chosen_reward - rejected_reward).clamp(-20, 20)"),
    _pair("squared error instead", "kept = -F.logsigmoid(gap - asked)",
          "kept = (1 - torch.sigmoid(gap - asked)) ** 2"),
    _pair("rejected of another prompt", "chosen_reward - rejected_reward",
          "chosen_reward - rejected_reward.roll(1)", "OpenRLHF: halves of a batch paired wrongly"),
    _order("worst item first", _LEFT, "kept.logcumsumexp(dim=-1)"),
    _order("nothing is removed", _LEFT, "kept.logsumexp(dim=-1, keepdim=True)"),
    _order("only the first choice", "torch.where(mask, stages, 0.0).sum(dim=-1)", "stages[..., 0]",
           "ListNet, not ListMLE"),
    _order("chosen item not among the left", "stages = left - kept",
           "stages = left.roll(-1, dims=-1) - kept"),
    _order("only the last choices", "torch.where(mask, stages, 0.0).sum(dim=-1)",
           "torch.where(mask, stages, 0.0)[..., 1:].sum(dim=-1)"),
    _order("loss negated", "left - kept", "kept - left", "Liger-Kernel #484"),
    _order("stages averaged over padding", "torch.where(mask, stages, 0.0).sum(dim=-1)",
           "torch.where(mask, stages, 0.0).mean(dim=-1)"),
    _order("mask dropped among the left", "reward.masked_fill(~mask, -1e30)", "reward"),
    _order("mask dropped among the stages", "torch.where(mask, stages, 0.0).sum(dim=-1)",
           "(left - reward).sum(dim=-1)"),
    _order("masked items at reward 0", "reward.masked_fill(~mask, -1e30)", "reward.masked_fill(~mask, 0.0)"),
    _order("exponentials overflow", _LEFT, "kept.exp().flip(-1).cumsum(dim=-1).flip(-1).log()"),
    _order("logarithm forgotten", _LEFT, "kept.exp().flip(-1).cumsum(dim=-1).flip(-1)"),
    _order("rewards for their exponentials", _LEFT, "kept.clamp(-9, 9).flip(-1).cumsum(dim=-1).flip(-1)"),
    _order("all pairs, equally", "torch.where(mask, stages, 0.0).sum(dim=-1)",
           "F.softplus(kept[:, None, :] - kept[:, :, None]).triu(1).sum(dim=(-1, -2))",
           "InstructGPT's K-wise loss"),
    _order("neighbours only", _LEFT, "torch.logaddexp(kept, kept.roll(-1, dims=-1))"),
    _order("those left are detached", "stages = left - kept", "stages = left.detach() - kept"),
    _order("along the batch", "logcumsumexp(dim=-1)", "logcumsumexp(dim=0)", "bugs Z11: silent where B = K"),
    _order("sum over the batch", "torch.where(mask, stages, 0.0).sum(dim=-1)",
           "torch.where(mask, stages, 0.0).sum(dim=0).sum().expand(len(mask))"),
)  # fmt: skip
