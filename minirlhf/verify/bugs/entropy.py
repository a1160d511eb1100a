"""Known bugs of the entropy, exact and from sampled tokens, and of the bonus that is made of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    logp = F.log_softmax(logits, dim=-1)
    terms = logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)
    return torch.where(mask, -terms.sum(-1), 0.0)


def mean_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Right: the mean over the positions that count, as it is logged."""
    probs = torch.softmax(logits, dim=-1)
    values = torch.logsumexp(logits, dim=-1) - (probs * logits).sum(-1)
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def entropy_loss(logits: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Right."""
    logp = F.log_softmax(logits, dim=-1)
    negative = (logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)).sum(-1)
    return beta * torch.where(mask, negative, 0.0)


def sampled_entropy_loss(logp: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Right."""
    surrogate = logp.detach() * logp
    return beta * torch.where(mask, surrogate, 0.0)


def entropy_reward(logp: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Right."""
    surprise = -logp.detach()
    return beta * torch.where(mask, surprise, 0.0)


def _exact(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "entropy", entropy, right, wrong, seen)


def _mean(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "entropy", mean_entropy, right, wrong, seen)


def _loss(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "entropy_loss", entropy_loss, right, wrong, seen)


def _sampled(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sampled_entropy_loss", sampled_entropy_loss, right, wrong, seen)


def _reward(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "entropy_reward", entropy_reward, right, wrong, seen)


_TERMS = "logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)"

BUGS = (
    _exact("entropy negated", "-terms.sum(-1)", "terms.sum(-1)", "lucidrains c816ae6"),
    _exact("mean over the vocabulary", "-terms.sum(-1)", "-terms.mean(-1)"),
    _exact("softmax over the tokens", "F.log_softmax(logits, dim=-1)", "F.log_softmax(logits, dim=1)"),
    _exact("softmax over the batch", "F.log_softmax(logits, dim=-1)", "F.log_softmax(logits, dim=0)"),
    _exact("probabilities forgotten", "logp.exp() * torch.where", "torch.where"),
    _exact("probabilities detached", "logp.exp() * torch.where", "logp.exp().detach() * torch.where"),
    _exact("last token left out", "-terms.sum(-1)", "-terms[..., :-1].sum(-1)"),
    _exact("most probable token only", "-terms.sum(-1)", "-terms.amin(-1)"),
    _exact("divided by log V", "-terms.sum(-1)", "-terms.sum(-1) / "
           "torch.tensor(logits.shape[-1]).double().log()"),
    _exact("softmax twice", "F.log_softmax(logits, dim=-1)", "F.log_softmax(logits.softmax(-1), dim=-1)"),
    _exact("surprise of the most probable token", "-terms.sum(-1)", "-logp.amax(-1)"),
    _exact("collision entropy", "-terms.sum(-1)", "-logp.exp().square().sum(-1).log()"),
    _mean("mean over pads", "torch.where(mask, values, 0.0).sum() / mask.sum()", "values.mean()",
          "TRL #6809"),
    _mean("pads filled with 1", "torch.where(mask, values, 0.0).sum() / mask.sum()",
          "torch.where(mask, values, 1.0).mean()", "TRL #2022, #6121"),
    _mean("positions shifted by one", "torch.where(mask, values, 0.0)",
          "torch.where(mask.roll(1, dims=-1), values, 0.0)", "bugs A10: unshifted logits"),
    _mean("log Z forgotten", "torch.logsumexp(logits, dim=-1) - (probs * logits).sum(-1)",
          "-(probs * logits).sum(-1)"),
    _loss("probabilities detached", "(logp.exp() * torch.where", "(logp.exp().detach() * torch.where"),
    _loss("bonus called a loss", "beta * torch.where", "-beta * torch.where", "SB3 #130"),
    _loss("beta forgotten", "beta * torch.where", "torch.where"),
    _loss("beta squared", "beta * torch.where", "beta**2 * torch.where"),
    _loss("mean over the vocabulary", "0.0)).sum(-1)", "0.0)).mean(-1)"),
    _loss("softmax over the tokens", "F.log_softmax(logits, dim=-1)", "F.log_softmax(logits, dim=1)"),
    _loss("log-probs summed without their probabilities", "(logp.exp() * torch.where", "(torch.where"),
    _loss("last token left out", "0.0)).sum(-1)", "0.0))[..., :-1].sum(-1)"),
    _loss("nan_to_num hides only the forward pass", "logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)",
          "torch.nan_to_num(logp.exp() * logp)", "TRL #7221, #7252"),
    _loss("probability of the most probable token",
          "(logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)).sum(-1)",
          "logp.exp().amax(-1)"),
    _sampled("log π as a loss does nothing", "logp.detach() * logp", "logp",
             "oracles 0.3: a common entropy bonus"),
    _sampled("-log π as a loss does nothing", "logp.detach() * logp", "-logp", "SB3 #130"),
    _sampled("surprise not detached", "logp.detach() * logp", "logp * logp"),
    _sampled("score detached", "logp.detach() * logp", "logp.detach() * logp.detach()"),
    _sampled("entropy lowered", "logp.detach() * logp", "-logp.detach() * logp", "lucidrains c816ae6"),
    _sampled("probability for the score", "logp.detach() * logp", "logp.detach() * logp.exp()"),
    _sampled("probability for the surprise", "logp.detach() * logp", "logp.detach().exp() * logp"),
    _sampled("p log p of the sampled token", "logp.detach() * logp", "logp.exp() * logp",
             "lucidrains c816ae6"),
    _sampled("beta squared", "beta * torch.where", "beta**2 * torch.where"),
    _sampled("beta forgotten", "beta * torch.where", "torch.where"),
    _reward("sign flipped", "-logp.detach()", "logp.detach()", "lucidrains c816ae6"),
    _reward("p log p of the sampled token", "-logp.detach()", "-(logp.exp() * logp).detach()"),
    _reward("probability for the log-prob", "-logp.detach()", "-logp.exp().detach()"),
    _reward("one minus the probability", "-logp.detach()", "(1 - logp.exp()).detach()"),
    _reward("squared surprise", "-logp.detach()", "logp.detach().square()"),
    _reward("surprise held at 1", "-logp.detach()", "(-logp.detach()).clamp(max=1.0)"),
    _reward("averaged over the row", "-logp.detach()", "-logp.detach() / mask.sum(-1, keepdim=True)"),
    _reward("every token is paid for all before it", "-logp.detach()",
            "-torch.where(mask, logp, 0.0).detach().cumsum(-1)"),
    _reward("log-probs shifted by a token", "-logp.detach()", "-logp.detach().roll(1, dims=-1)",
            "prime-rl #1525"),
    _reward("beta forgotten", "beta * torch.where", "torch.where"),
)  # fmt: skip
