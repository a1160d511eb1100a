"""Known bugs of KL estimators and of the exact KL."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    log_ratio = ref_logp - logp
    estimate = torch.expm1(log_ratio) - log_ratio
    return torch.where(mask, estimate, 0.0)


def k2(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    log_ratio = logp - ref_logp
    estimate = 0.5 * log_ratio.square()
    return torch.where(mask, estimate, 0.0)


def mean_k1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right: the mean over the tokens that count."""
    log_ratio = logp - ref_logp
    counted = torch.where(mask, log_ratio, 0.0)
    return counted.sum() / mask.sum()


def exact_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    logp = F.log_softmax(logits, dim=-1)
    ref_logp = F.log_softmax(ref_logits, dim=-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    return torch.where(mask, kl, 0.0)


def _k3(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_estimator", k3, right, wrong, seen)


def _k2(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_estimator", k2, right, wrong, seen)


def _k1(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_estimator", mean_k1, right, wrong, seen)


def _exact(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "exact_kl", exact_kl, right, wrong, seen)


_K3 = "torch.expm1(log_ratio) - log_ratio"
_SUM = "(logp.exp() * (logp - ref_logp)).sum(-1)"

BUGS = (
    _k3("k3 of the ratio instead of the log-ratio", _K3, "torch.expm1(log_ratio.exp()) - log_ratio.exp()",
        "rocket-learn #12"),
    _k3("minus one forgotten in k3", "torch.expm1(log_ratio)", "torch.exp(log_ratio)"),
    _k3("log-ratio added in k3", _K3, "torch.expm1(log_ratio) + log_ratio"),
    _k3("log-ratio forgotten in k3", _K3, "torch.expm1(log_ratio)"),
    _k3("exponent of the wrong sign", "torch.expm1(log_ratio)", "torch.expm1(-log_ratio)"),
    _k3("log-prob detached inside k3", _K3, "torch.expm1(log_ratio) - log_ratio.detach()",
        "oracles 1.4: the expected gradient does not see it"),
    _k3("exponential detached inside k3", "torch.expm1(log_ratio)", "torch.expm1(log_ratio.detach())"),
    _k3("k3 negated", "torch.where(mask, estimate, 0.0)", "-torch.where(mask, estimate, 0.0)"),
    _k3("policy forgotten", "ref_logp - logp", "ref_logp"),
    _k3("k3 weighted with the probability", _K3, f"logp.exp() * ({_K3})"),
    _k3("k3 held at 1", _K3, f"({_K3}).clamp(max=1.0)"),
    _k2("half forgotten in k2", "0.5 * log_ratio.square()", "log_ratio.square()"),
    _k2("half inside the square", "0.5 * log_ratio.square()", "(0.5 * log_ratio).square()"),
    _k2("difference of squares", "0.5 * log_ratio.square()", "0.5 * (logp.square() - ref_logp.square())"),
    _k2("squared difference of probabilities", "logp - ref_logp", "logp.exp() - ref_logp.exp()"),
    _k2("reference shifted by a token", "logp - ref_logp", "logp - ref_logp.roll(1, dims=-1)",
        "prime-rl #1525"),
    _k1("k1 with the wrong sign", "logp - ref_logp", "ref_logp - logp", "rl-llm-wiki #114"),
    _k1("approximate KL from the ratio", "logp - ref_logp", "-torch.exp(ref_logp - logp)",
        "OpenRLHF feeb0283"),
    _k1("k1 held at 0", "logp - ref_logp", "(logp - ref_logp).clamp(min=0)"),
    _k1("k1 weighted with the probability", "logp - ref_logp", "logp.exp() * (logp - ref_logp)"),
    _k1("reference forgotten", "logp - ref_logp", "logp"),
    _k1("mean over pads", "counted.sum() / mask.sum()", "log_ratio.mean()", "TRL #6809, SkyRL #1305"),
    _k1("mask shifted by a token", "torch.where(mask, log_ratio, 0.0)",
        "torch.where(mask.roll(1, dims=-1), log_ratio, 0.0)"),
    _k1("mean over rows for tokens", "counted.sum() / mask.sum()", "counted.sum(0).mean() / mask.sum()"),
    _exact("direction swapped", _SUM, "(ref_logp.exp() * (ref_logp - logp)).sum(-1)",
           "aprender #2153, TRL #3043"),
    _exact("weighted with the reference", _SUM, "(ref_logp.exp() * (logp - ref_logp)).sum(-1)"),
    _exact("KL negated", _SUM, "(logp.exp() * (ref_logp - logp)).sum(-1)"),
    _exact("mean over the vocabulary", _SUM, "(logp.exp() * (logp - ref_logp)).mean(-1)", "Liger #609"),
    _exact("probabilities forgotten", _SUM, "(logp - ref_logp).sum(-1)"),
    _exact("log-probs of the policy not normalised", "F.log_softmax(logits, dim=-1)", "logits"),
    _exact("log-probs of the reference not normalised", "F.log_softmax(ref_logits, dim=-1)", "ref_logits"),
    _exact("softmax over the batch", "F.log_softmax(logits, dim=-1)", "F.log_softmax(logits, dim=0)"),
    _exact("softmax over the tokens", "F.log_softmax(ref_logits, dim=-1)",
           "F.log_softmax(ref_logits, dim=1)"),
    _exact("probabilities detached", _SUM, "(logp.exp().detach() * (logp - ref_logp)).sum(-1)"),
    _exact("reference forgotten", _SUM, "(logp.exp() * logp).sum(-1)"),
    _exact("cross-entropy for KL", _SUM, "-(logp.exp() * ref_logp).sum(-1)"),
    _exact("both directions averaged", _SUM, "0.5 * ((logp.exp() - ref_logp.exp()) * (logp - "
           "ref_logp)).sum(-1)"),
    _exact("mixture for the reference", _SUM,
           "(logp.exp() * (logp - (0.5 * (logp.exp() + ref_logp.exp())).log())).sum(-1)",
           "TRL #3043, Liger #974"),
    _exact("most probable token only", _SUM, "(logp.exp() * (logp - ref_logp)).amax(-1)"),
)  # fmt: skip
