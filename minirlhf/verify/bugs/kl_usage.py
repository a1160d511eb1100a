"""Known bugs of the KL as a loss and as a reward."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def k2_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Right."""
    log_ratio = logp - ref_logp
    loss = 0.5 * log_ratio.square()
    return beta * torch.where(mask, loss, 0.0)


def score_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right: k1 as the reward of a policy gradient."""
    penalty = (logp - ref_logp).detach()
    return torch.where(mask, penalty * logp, 0.0)


def ratio_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right: k3 under the ratio to its own law."""
    ratio = torch.exp(logp - logp.detach())
    log_ratio = ref_logp - logp
    return torch.where(mask, ratio * (torch.expm1(log_ratio) - log_ratio), 0.0)


def mean_k3_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Right, of the other direction: the loss of GRPO, a mean over tokens."""
    log_ratio = ref_logp - logp
    loss = torch.expm1(log_ratio) - log_ratio
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def kl_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Right."""
    log_ratio = (logp - ref_logp).detach()
    penalty = beta * log_ratio
    return torch.where(mask, -penalty, 0.0)


def _k2(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_loss", k2_loss, right, wrong, seen)


def _score(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_loss", score_loss, right, wrong, seen)


def _ratio(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_loss", ratio_loss, right, wrong, seen)


def _k3(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_loss", mean_k3_loss, right, wrong, seen)


def _reward(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_reward", kl_reward, right, wrong, seen)


_REPELS = "TRL PPOConfig (k3), TRL #5889; oracles 0.3"

BUGS = (
    _k2("k1 as a loss does nothing", "0.5 * log_ratio.square()", "log_ratio",
        "open-instruct #534, NeMo-RL #2506"),
    _k2("KL raised", "0.5 * log_ratio.square()", "-0.5 * log_ratio.square()",
        "bugs E08: KL subtracted from a loss"),
    _k2("half forgotten", "0.5 * log_ratio.square()", "log_ratio.square()"),
    _k2("absolute value as a loss", "0.5 * log_ratio.square()", "log_ratio.abs()", "verl's kl_penalty abs"),
    _k2("reference forgotten", "logp - ref_logp", "logp", "unsloth-zoo #832"),
    _k2("loss detached", "0.5 * log_ratio.square()", "0.5 * log_ratio.detach().square()", "NeMo-RL #2958"),
    _k2("one factor detached", "0.5 * log_ratio.square()", "0.5 * log_ratio * log_ratio.detach()"),
    _k2("beta forgotten", "beta * torch.where", "torch.where", "TRL #18"),
    _k2("beta squared", "beta * torch.where", "beta**2 * torch.where"),
    _k2("beta divides", "beta * torch.where", "1 / beta * torch.where"),
    _k2("squared difference of probabilities", "logp - ref_logp", "logp.exp() - ref_logp.exp()"),
    _k2("log-ratio weighted with the probability", "0.5 * log_ratio.square()", "logp.exp() * log_ratio"),
    _k2("log-ratio held at 0", "logp - ref_logp", "(logp - ref_logp).clamp(min=0)"),
    _score("penalty not detached", "(logp - ref_logp).detach()", "(logp - ref_logp)"),
    _score("k3 as the penalty of a score-function loss", "(logp - ref_logp).detach()",
           "(torch.expm1(ref_logp - logp) + logp - ref_logp).detach()", _REPELS),
    _score("k2 as the penalty of a score-function loss", "(logp - ref_logp).detach()",
           "(0.5 * (logp - ref_logp) ** 2).detach()", _REPELS),
    _score("score detached", "penalty * logp", "penalty * logp.detach()"),
    _score("penalty of the wrong sign", "(logp - ref_logp).detach()", "(ref_logp - logp).detach()"),
    _score("ratio for the log-ratio", "(logp - ref_logp).detach()", "(logp - ref_logp).exp().detach()"),
    _score("probability for the log-prob", "penalty * logp", "penalty * logp.exp()"),
    _ratio("ratio inverted", "logp - logp.detach()", "logp.detach() - logp"),
    _ratio("ratio to the reference", "logp - logp.detach()", "logp - ref_logp"),
    _ratio("k3 of the other direction under the ratio", "log_ratio = ref_logp - logp",
           "log_ratio = logp - ref_logp"),
    _ratio("k3 detached under a detached ratio", "logp - logp.detach()",
           "logp.detach() - logp.detach() - ref_logp"),
    _k3("k3 of the other direction as a loss", "log_ratio = ref_logp - logp", "log_ratio = logp - ref_logp"),
    _k3("k3 of the ratio as a loss", "torch.expm1(log_ratio) - log_ratio",
        "torch.expm1(log_ratio.exp()) - log_ratio.exp()", "rocket-learn #12"),
    _k3("log-ratio detached inside k3", "torch.expm1(log_ratio) - log_ratio",
        "torch.expm1(log_ratio) - log_ratio.detach()", "oracles 1.4"),
    _k3("exponential detached inside k3", "torch.expm1(log_ratio)", "torch.expm1(log_ratio.detach())"),
    _k3("clamp after the exponential", "torch.expm1(log_ratio) - log_ratio",
        "(torch.exp(log_ratio) - 1 - log_ratio).clamp(max=10.0)", "OpenRLHF #525, TRL #3015"),
    _k3("mean over pads", "torch.where(mask, loss, 0.0).sum() / mask.sum()", "loss.mean()", "TRL #6809"),
    _reward("k3 as a reward", "beta * log_ratio", "beta * (torch.expm1(-log_ratio) + log_ratio)", _REPELS),
    _reward("k2 as a reward", "beta * log_ratio", "beta * 0.5 * log_ratio.square()", "verl's kl_penalty mse"),
    _reward("absolute value as a reward", "beta * log_ratio", "beta * log_ratio.abs()",
            "TRL's kl_penalty abs"),
    _reward("KL rewarded", "-penalty", "penalty", "lm-human-preferences; rl-llm-wiki #114"),
    _reward("reference forgotten", "logp - ref_logp", "logp"),
    _reward("policy forgotten", "logp - ref_logp", "-ref_logp"),
    _reward("beta forgotten", "beta * log_ratio", "log_ratio", "TRL #18"),
    _reward("beta squared", "beta * log_ratio", "beta * beta * log_ratio"),
    _reward("only what exceeds the reference is paid for", "beta * log_ratio",
            "beta * log_ratio.clamp(min=0)"),
    _reward("log-ratio weighted with the probability", "beta * log_ratio", "beta * logp.exp() * log_ratio"),
    _reward("ratio for the log-ratio", "(logp - ref_logp).detach()", "(logp - ref_logp).exp().detach()"),
    _reward("averaged over the row", "beta * log_ratio", "beta * log_ratio / mask.sum(-1, keepdim=True)"),
    _reward("every token pays for all before it", "beta * log_ratio",
            "beta * torch.where(mask, log_ratio, 0.0).cumsum(-1)"),
    _reward("batch mean subtracted", "(logp - ref_logp).detach()",
            "(logp - ref_logp - (logp - ref_logp)[mask].mean()).detach()"),
    _reward("reference shifted by a token", "logp - ref_logp", "logp - ref_logp.roll(1, dims=-1)",
            "prime-rl #1525"),
)  # fmt: skip
