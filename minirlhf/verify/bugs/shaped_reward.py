"""Known bugs of KL-shaped rewards and of the adaptive coefficient."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def kl_shaped_reward(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Right."""
    kl = torch.where(mask, kl, 0.0)
    reward = -beta * kl
    order = torch.arange(1, mask.shape[1] + 1)
    last = (mask * order).argmax(dim=1)
    rows = torch.arange(len(score))
    reward[rows, last] += score * mask.any(dim=1)
    return reward


def kl_shaped_reward_from_logps(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor,
                                beta: float) -> Tensor:  # fmt: skip
    """Right."""
    kl = torch.where(mask, logp - ref_logp, 0.0)
    reward = -beta * kl
    left = mask.flip(1).cumsum(1).flip(1)
    last = mask & (left == 1)
    return reward + torch.where(last, score.unsqueeze(1), 0.0)


def adaptive_kl(coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float) -> Tensor:
    """Right."""
    error = (kl / target - 1).clamp(-0.2, 0.2)
    factor = 1 + error * n_steps / horizon
    return coefficient * factor


def _shaped(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_shaped_reward", kl_shaped_reward, right, wrong, seen)


def _logps(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "kl_shaped_reward_from_logps", kl_shaped_reward_from_logps, right, wrong, seen)


def _adaptive(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "adaptive_kl", adaptive_kl, right, wrong, seen)


BUGS = (
    _shaped("KL paid instead of charged", "reward = -beta * kl", "reward = beta * kl", "bugs E09"),
    _shaped("both signs flipped", "return reward", "return -reward", "bugs E09"),
    _shaped("no penalty", "reward = -beta * kl", "reward = -beta * 0 * kl"),
    _shaped("beta forgotten", "reward = -beta * kl", "reward = -kl"),
    _shaped("beta divides", "reward = -beta * kl", "reward = -kl / beta"),
    _shaped("beta on the score too", "return reward",
            "reward[rows, last] += (beta - 1) * score; return reward"),
    _shaped("score in the last column", "last = (mask * order).argmax(dim=1)",
            "last = torch.full((len(mask),), -1)",
            "TRL #1893, #5338"),
    _shaped("score on the first token", "last = (mask * order).argmax(dim=1)",
            "last = mask.long().argmax(dim=1)",
            "oracles 3.5"),
    _shaped("score on the token before the last", "(mask * order).argmax(dim=1)",
            "(mask * order).argmax(dim=1) - 1",
            "gpt-neox #1285"),
    _shaped("score one slot late, lost when there is none", "rows = torch.arange(len(score))",
            "rows = torch.arange(len(score))[last + 1 < len(order)]; last = last[rows] + 1; "
            "score, mask = score[rows], mask[rows]", "TRL #3750"),
    _shaped("position counted from the start of the response", "(mask * order).argmax(dim=1)",
            "mask.sum(dim=1) - 1",
            "TRL #1718"),
    _shaped("score on every token", "reward[rows, last] += score * mask.any(dim=1)",
            "reward = (reward + score.unsqueeze(1)) * mask", "oracles 3.5"),
    _shaped("score in place of the penalty", "reward[rows, last] += score", "reward[rows, last] = score"),
    _shaped("score of truncated rows dropped", "score * mask.any(dim=1)", "score * ~mask[:, -1]",
            "oracles 3.5"),
    _shaped("score divided among the tokens", "reward[rows, last] += score * mask.any(dim=1)",
            "reward = (reward + (score / mask.sum(1).clamp(min=1)).unsqueeze(1)) * mask"),
    _shaped("KL of the row on its last token alone", "reward = -beta * kl",
            "reward = torch.zeros_like(kl); score = score - beta * kl.sum(1)", "TRL #2562"),
    _shaped("penalty averaged over the row", "reward = -beta * kl",
            "reward = -beta * kl / mask.sum(1, keepdim=True).clamp(min=1)"),
    _shaped("only costs, never gains", "reward = -beta * kl", "reward = -beta * kl.clamp(min=0)"),
    _logps("direction of the KL turned", "logp - ref_logp", "ref_logp - logp", "lucidrains 2bb47d4"),
    _logps("reference forgotten", "logp - ref_logp", "logp"),
    _logps("reference added", "logp - ref_logp", "logp + ref_logp"),
    _logps("ratio for its logarithm", "logp - ref_logp", "(logp - ref_logp).exp()"),
    _logps("weighted by the probability", "logp - ref_logp", "logp.exp() * (logp - ref_logp)"),
    _logps("KL paid instead of charged", "reward = -beta * kl", "reward = beta * kl", "bugs E09"),
    _logps("k2 without its half", "logp - ref_logp", "(logp - ref_logp).square()"),
    _logps("k3 of the other direction", "logp - ref_logp", "(logp - ref_logp).expm1() - (logp - ref_logp)"),
    _logps("log ratio clamped", "logp - ref_logp", "(logp - ref_logp).clamp(-1, 1)"),
    _logps("padding decides where the last token is", "left = mask.flip(1).cumsum(1).flip(1)",
           "mask = torch.ones_like(mask); left = mask.flip(1).cumsum(1).flip(1)", "TRL #1893"),
    _logps("score broadcast along the wrong axis", "score.unsqueeze(1)", "score", "TRL 4db63af98"),
    _logps("score on the first token", "mask.flip(1).cumsum(1).flip(1)", "mask.cumsum(1)", "oracles 3.5"),
    _logps("score on the token before the last", "left == 1", "left == 2", "gpt-neox #1285"),
    _logps("score on every token", "mask & (left == 1)", "mask", "oracles 3.5"),
    _logps("KL of the whole row on every token", "reward = -beta * kl",
           "reward = -beta * kl.sum(1, keepdim=True) * mask",
           "TRL #2562"),
    _logps("shifted by one token", "logp - ref_logp", "logp - ref_logp.roll(1, dims=1)", "prime-rl #1525"),
    _adaptive("direction turned", "kl / target - 1", "1 - kl / target", "oracles A2"),
    _adaptive("ratio turned over", "kl / target - 1", "target / kl - 1"),
    _adaptive("difference for the ratio", "kl / target - 1", "kl - target"),
    _adaptive("1 not subtracted", "kl / target - 1", "kl / target"),
    _adaptive("not clipped", ".clamp(-0.2, 0.2)", ""),
    _adaptive("clipped on one side", ".clamp(-0.2, 0.2)", ".clamp(max=0.2)"),
    _adaptive("never lowered", ".clamp(-0.2, 0.2)", ".clamp(0, 0.2)"),
    _adaptive("clipped at 2", ".clamp(-0.2, 0.2)", ".clamp(-2, 2)"),
    _adaptive("ratio clipped instead of its distance from 1", "(kl / target - 1).clamp(-0.2, 0.2)",
              "(kl / target).clamp(0.2, 1.2) - 1"),
    _adaptive("steps and horizon exchanged", "n_steps / horizon", "horizon / n_steps"),
    _adaptive("steps forgotten", "n_steps / horizon", "1 / horizon"),
    _adaptive("share of the horizon forgotten", "error * n_steps / horizon", "error"),
    _adaptive("added to the coefficient", "coefficient * factor", "coefficient + factor - 1"),
    _adaptive("the factor alone", "coefficient * factor", "0 * coefficient + factor"),
    _adaptive("never updated", "coefficient * factor", "coefficient",
              "TRL #18, lm-human-preference-details dc2f18b"),
)  # fmt: skip
