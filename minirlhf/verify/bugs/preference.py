"""Known bugs of DPO and its relatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def dpo(chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor,
        beta: float) -> Tensor:  # fmt: skip
    """Right."""
    policy_gap = chosen_logp - rejected_logp
    ref_gap = ref_chosen_logp - ref_rejected_logp
    h = policy_gap - ref_gap
    return -F.logsigmoid(beta * h)


def _dpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "dpo", dpo, right, wrong, seen)


BUGS = (
    _dpo("reference forgotten", "h = policy_gap - ref_gap", "h = policy_gap", "Liger #405, unsloth-zoo #832"),
    _dpo("chosen and rejected swapped", "chosen_logp - rejected_logp", "rejected_logp - chosen_logp"),
    _dpo("reference sign flipped", "policy_gap - ref_gap", "policy_gap + ref_gap"),
    _dpo("loss negated", "-F.logsigmoid(beta * h)", "F.logsigmoid(beta * h)", "Liger-Kernel #484"),
    _dpo("beta forgotten", "beta * h", "h"),
    _dpo("beta divides", "beta * h", "h / beta"),
    _dpo("log forgotten", "-F.logsigmoid(beta * h)", "-torch.sigmoid(beta * h)", "DS-Chat #501"),
)
