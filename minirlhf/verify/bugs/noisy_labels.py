"""Known bugs of conservative and of robust DPO."""

import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def conservative_dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Right."""
    logits = beta * ((chosen_logp - rejected_logp) - (ref_chosen_logp - ref_rejected_logp))
    kept = -F.logsigmoid(logits)
    flipped = -F.logsigmoid(-logits)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def _cdpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "conservative_dpo", conservative_dpo, right, wrong, seen)


def robust_dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Right."""
    logits = beta * ((chosen_logp - rejected_logp) - (ref_chosen_logp - ref_rejected_logp))
    kept = -F.logsigmoid(logits)
    flipped = -F.logsigmoid(-logits)
    mixed = (1 - label_smoothing) * kept - label_smoothing * flipped
    return mixed / (1 - 2 * label_smoothing)


def _rdpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "robust_dpo", robust_dpo, right, wrong, seen)


_REFERENCE = " - (ref_chosen_logp - ref_rejected_logp)"
_MIXED = "(1 - label_smoothing) * kept + label_smoothing * flipped"
BUGS = (
    _cdpo("weights swapped", _MIXED, "label_smoothing * kept + (1 - label_smoothing) * flipped", "bugs Z06"),
    _cdpo("smoothing dropped", _MIXED, "kept", "Liger #1082, TRL #7062: keyword dropped at the adapter"),
    _cdpo("smoothing on one term", _MIXED, "kept + label_smoothing * flipped", "bugs Z06"),
    _cdpo("kept term alone is scaled", _MIXED, "(1 - label_smoothing) * kept"),
    _cdpo("flipped term subtracted", _MIXED, "(1 - label_smoothing) * kept - label_smoothing * flipped",
          "the numerator of robust DPO"),
    _cdpo("robust DPO instead", _MIXED,
          "((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)"),
    _cdpo("flipped term detached", "flipped = -F.logsigmoid(-logits)",
          "flipped = -F.logsigmoid(-logits).detach()"),
    _cdpo("labels smoothed towards one half", _MIXED,
          "(1 - label_smoothing / 2) * kept + label_smoothing / 2 * flipped",
          "cross-entropy's label smoothing"),
    _cdpo("margin shrunk instead", _MIXED, "-F.logsigmoid((1 - 2 * label_smoothing) * logits)"),
    _cdpo("reference forgotten", _REFERENCE, "", "Liger #405, unsloth-zoo #832"),
    _cdpo("reference sign flipped", _REFERENCE, " + (ref_chosen_logp - ref_rejected_logp)"),
    _cdpo("loss negated", _MIXED, "-(1 - label_smoothing) * kept - label_smoothing * flipped",
          "Liger-Kernel #484"),
    _cdpo("beta forgotten", "logits = beta * (", "logits = ("),
    _cdpo("flipped term without beta", "-F.logsigmoid(-logits)", "-F.logsigmoid(-logits / beta)"),
    _cdpo("log(sigmoid) overflows", "kept = -F.logsigmoid(logits)", "kept = -logits.sigmoid().log()",
          "tinker-cookbook #188"),
    _cdpo("probabilities mixed, not losses", _MIXED,
          "-((1 - label_smoothing) * (-kept).exp() + label_smoothing * (-flipped).exp()).log()"),
    _cdpo("loss of the mean margin", "kept = -F.logsigmoid(logits)", "kept = -F.logsigmoid(logits.mean())"),
    _rdpo("divisor forgotten", "mixed / (1 - 2 * label_smoothing)", "mixed", "common: biased, and smaller"),
    _rdpo("divisor is 1 - ε", "1 - 2 * label_smoothing", "1 - label_smoothing"),
    _rdpo("divisor multiplies", "mixed / (1 - 2 * label_smoothing)", "mixed * (1 - 2 * label_smoothing)"),
    _rdpo("divisor is 1 + 2ε", "1 - 2 * label_smoothing", "1 + 2 * label_smoothing"),
    _rdpo("flipped term added", "kept - label_smoothing * flipped", "kept + label_smoothing * flipped",
          "conservative DPO's numerator"),
    _rdpo("weights swapped", "(1 - label_smoothing) * kept - label_smoothing * flipped",
          "label_smoothing * kept - (1 - label_smoothing) * flipped", "bugs Z06"),
    _rdpo("terms swapped", "(1 - label_smoothing) * kept - label_smoothing * flipped",
          "(1 - label_smoothing) * flipped - label_smoothing * kept"),
    _rdpo("smoothing dropped", "mixed / (1 - 2 * label_smoothing)", "kept", "Liger #1082"),
    _rdpo("conservative DPO instead", "mixed / (1 - 2 * label_smoothing)",
          "(1 - label_smoothing) * kept + label_smoothing * flipped"),
    _rdpo("1 - ε forgotten", "(1 - label_smoothing) * kept", "kept"),
    _rdpo("flipped term detached", "flipped = -F.logsigmoid(-logits)",
          "flipped = -F.logsigmoid(-logits).detach()"),
    _rdpo("only one term divided", "mixed / (1 - 2 * label_smoothing)",
          "(1 - label_smoothing) * kept / (1 - 2 * label_smoothing) - label_smoothing * flipped"),
    _rdpo("clamped at 0", "mixed / (1 - 2 * label_smoothing)",
          "(mixed / (1 - 2 * label_smoothing)).clamp(min=0)", "common: a loss 'cannot' be negative"),
    _rdpo("reference forgotten", _REFERENCE, "", "Liger #405, unsloth-zoo #832"),
    _rdpo("chosen and rejected swapped", "(chosen_logp - rejected_logp)", "(rejected_logp - chosen_logp)"),
    _rdpo("beta forgotten", "logits = beta * (", "logits = ("),
    _rdpo("log(sigmoid) overflows", "flipped = -F.logsigmoid(-logits)",
          "flipped = -(-logits).sigmoid().log()", "tinker-cookbook #188"),
)  # fmt: skip
