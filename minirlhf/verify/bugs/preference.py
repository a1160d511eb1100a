"""Known bugs of DPO, of the hinge and of the implicit reward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """Right."""
    policy_gap = chosen_logp - rejected_logp
    ref_gap = ref_chosen_logp - ref_rejected_logp
    h = policy_gap - ref_gap
    return -F.logsigmoid(beta * h)


def _dpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "dpo", dpo, right, wrong, seen)


def hinge(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """Right."""
    policy_gap = chosen_logp - rejected_logp
    ref_gap = ref_chosen_logp - ref_rejected_logp
    h = policy_gap - ref_gap
    return torch.relu(1 - beta * h)


def _hinge(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "hinge", hinge, right, wrong, seen)


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """Right."""
    ratio = logp - ref_logp
    return beta * ratio


def _reward(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "implicit_reward", implicit_reward, right, wrong, seen)


BUGS = (
    _dpo("reference forgotten", "h = policy_gap - ref_gap", "h = policy_gap", "Liger #405, unsloth-zoo #832"),
    _dpo("chosen and rejected swapped", "chosen_logp - rejected_logp", "rejected_logp - chosen_logp",
         "bugs Z05"),
    _dpo("reference sign flipped", "policy_gap - ref_gap", "policy_gap + ref_gap"),
    _dpo("loss negated", "-F.logsigmoid(beta * h)", "F.logsigmoid(beta * h)", "Liger-Kernel #484"),
    _dpo("beta forgotten", "beta * h", "h"),
    _dpo("beta divides", "beta * h", "h / beta"),
    _dpo("beta applied twice", "beta * h", "beta * beta * h", "tinker-cookbook #172"),
    _dpo("beta on the policy only", "h = policy_gap - ref_gap", "h = policy_gap - ref_gap / beta"),
    _dpo("log forgotten", "-F.logsigmoid(beta * h)", "-torch.sigmoid(beta * h)", "DS-Chat #501"),
    _dpo("sign inside the sigmoid, not outside", "-F.logsigmoid(beta * h)", "F.logsigmoid(-beta * h)"),
    _dpo("log(sigmoid) overflows", "-F.logsigmoid(beta * h)", "-torch.log(torch.sigmoid(beta * h))",
         "tinker-cookbook #188"),
    _dpo("log(1 + exp) overflows", "-F.logsigmoid(beta * h)", "torch.log(1 + torch.exp(-beta * h))"),
    _dpo("margin clamped", "h = policy_gap - ref_gap", "h = (policy_gap - ref_gap).clamp(-50, 50)",
         "TRL #3015, #5984"),
    _dpo("only the chosen reference", "ref_chosen_logp - ref_rejected_logp", "ref_chosen_logp"),
    _dpo("policy as its own reference", "h = policy_gap - ref_gap", "h = policy_gap - policy_gap.detach()",
         "TRL #495, #3194: the adapter left on"),
    _dpo("policy as its own reference, not detached", "h = policy_gap - ref_gap",
         "h = policy_gap - policy_gap"),
    _dpo("rejected side detached", "chosen_logp - rejected_logp", "chosen_logp - rejected_logp.detach()"),
    _dpo("chosen side detached", "chosen_logp - rejected_logp", "chosen_logp.detach() - rejected_logp"),
    _dpo("margin detached", "beta * h)", "beta * h.detach())"),
    _dpo("loss of the mean margin", "beta * h", "beta * h.mean()", "oracles D14"),
    _dpo("reference averaged over the batch", "policy_gap - ref_gap", "policy_gap - ref_gap.mean()"),
    _dpo("reference of another row", "policy_gap - ref_gap", "policy_gap - ref_gap.roll(1)",
         "open-instruct #1868"),
    _dpo("label smoothing left on", "-F.logsigmoid(beta * h)",
         "-0.9 * F.logsigmoid(beta * h) - 0.1 * F.logsigmoid(-beta * h)"),
    _dpo("probabilities for log-probs", "h = policy_gap - ref_gap", "h = policy_gap.exp() - ref_gap.exp()"),
    _dpo("half precision inside", "-F.logsigmoid(beta * h)",
         "-F.logsigmoid((beta * h).bfloat16()).to(h.dtype)"),
    _dpo("hinge in place of the sigmoid", "-F.logsigmoid(beta * h)", "torch.relu(1 - beta * h)"),
    _dpo("square in place of the sigmoid", "-F.logsigmoid(beta * h)", "(h - 1 / (2 * beta)) ** 2"),
    _hinge("reference forgotten", "h = policy_gap - ref_gap", "h = policy_gap",
           "Liger #405, unsloth-zoo #832"),
    _hinge("chosen and rejected swapped", "chosen_logp - rejected_logp", "rejected_logp - chosen_logp"),
    _hinge("reference sign flipped", "policy_gap - ref_gap", "policy_gap + ref_gap"),
    _hinge("sigmoid in place of the hinge", "torch.relu(1 - beta * h)", "-F.logsigmoid(beta * h)",
           "ms-swift #9925, #10167: hinge silently ran sigmoid"),
    _hinge("margin forgotten", "1 - beta * h", "-beta * h"),
    _hinge("margin of one half", "1 - beta * h", "0.5 - beta * h"),
    _hinge("margin in nats", "1 - beta * h", "1 - h"),
    _hinge("beta outside", "torch.relu(1 - beta * h)", "beta * torch.relu(1 - h)"),
    _hinge("margin of one over beta", "1 - beta * h", "1 / beta - h", "TRL #1615, the other way round"),
    _hinge("not clipped", "torch.relu(1 - beta * h)", "(1 - beta * h)"),
    _hinge("min for max", "torch.relu(1 - beta * h)", "torch.clamp(1 - beta * h, max=0)"),
    _hinge("clipped above as well", "torch.relu(1 - beta * h)", "torch.clamp(1 - beta * h, 0, 1)"),
    _hinge("sign of the margin", "1 - beta * h", "1 + beta * h"),
    _hinge("loss negated", "torch.relu(1 - beta * h)", "-torch.relu(1 - beta * h)", "Liger-Kernel #484"),
    _hinge("squared", "torch.relu(1 - beta * h)", "torch.relu(1 - beta * h) ** 2"),
    _hinge("smoothed", "torch.relu(1 - beta * h)", "F.softplus(1 - beta * h)"),
    _hinge("leaks beyond the margin", "torch.relu(1 - beta * h)", "F.leaky_relu(1 - beta * h)"),
    _hinge("rejected side detached", "chosen_logp - rejected_logp", "chosen_logp - rejected_logp.detach()"),
    _hinge("loss of the mean margin", "beta * h", "beta * h.mean()"),
    _reward("reference forgotten", "logp - ref_logp", "logp", "Liger #405"),
    _reward("reference sign flipped", "logp - ref_logp", "logp + ref_logp"),
    _reward("policy and reference swapped", "logp - ref_logp", "ref_logp - logp"),
    _reward("beta forgotten", "beta * ratio", "ratio"),
    _reward("beta divides", "beta * ratio", "ratio / beta"),
    _reward("beta applied twice", "beta * ratio", "beta * beta * ratio", "tinker-cookbook #172"),
    _reward("ratio of probabilities", "beta * ratio", "beta * ratio.exp()"),
    _reward("magnitude only", "beta * ratio", "beta * ratio.abs()"),
    _reward("clamped below", "beta * ratio", "beta * ratio.clamp(min=0)", "TRL #3015"),
    _reward("clamped far out", "beta * ratio", "beta * ratio.clamp(-100, 100)", "TRL #5984"),
    _reward("centred on the batch", "beta * ratio", "beta * (ratio - ratio.mean())"),
    _reward("beta on the policy only", "ratio = logp - ref_logp", "ratio = logp - ref_logp / beta"),
)  # fmt: skip
