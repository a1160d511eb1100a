"""Known bugs of SimPO and of ORPO."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.verify.zoo import Bug


def simpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    """Right."""
    chosen = chosen_logp / chosen_length
    rejected = rejected_logp / rejected_length
    gap = beta * (chosen - rejected)
    return -F.logsigmoid(gap - gamma)


def _simpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "simpo", simpo, right, wrong, seen)


def orpo(
    chosen_logp: Tensor, rejected_logp: Tensor, chosen_length: Tensor, rejected_length: Tensor, weight: float
) -> Tensor:
    """Right."""
    chosen = chosen_logp / chosen_length
    rejected = rejected_logp / rejected_length
    chosen_odds = chosen - torch.log(-torch.expm1(chosen))
    rejected_odds = rejected - torch.log(-torch.expm1(rejected))
    odds_ratio = -F.logsigmoid(chosen_odds - rejected_odds)
    return -chosen + weight * odds_ratio


def _orpo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "orpo", orpo, right, wrong, seen)


BUGS = (
    _simpo("log-probs summed", "chosen - rejected", "chosen_logp - rejected_logp",
           "HALOs d8fd14f: a length that is always 1"),
    _simpo("only the chosen side averaged", "rejected_logp / rejected_length", "rejected_logp"),
    _simpo("one length for both", "rejected_logp / rejected_length", "rejected_logp / chosen_length"),
    _simpo("averaged twice", "chosen_logp / chosen_length", "chosen_logp / chosen_length ** 2",
           "LLaMA-Factory #6722"),
    _simpo("divided by the padded length", "chosen_logp / chosen_length",
           "chosen_logp / chosen_length.max()"),
    _simpo("square root of the length", "chosen_logp / chosen_length",
           "chosen_logp / chosen_length.double().sqrt()"),
    _simpo("multiplied by the length", "chosen_logp / chosen_length", "chosen_logp * chosen_length"),
    _simpo("one token too many", "chosen_logp / chosen_length", "chosen_logp / (chosen_length + 1)",
           "trlx #401: EOS"),
    _simpo("chosen and rejected swapped", "chosen - rejected", "rejected - chosen", "bugs Z05"),
    _simpo("sign of the margin", "gap - gamma", "gap + gamma"),
    _simpo("margin forgotten", "gap - gamma", "gap"),
    _simpo("margin divided by beta", "gap - gamma", "gap - gamma / beta",
           "SimPO: gamma_beta_ratio, not multiplied back"),
    _simpo("margin outside the sigmoid", "-F.logsigmoid(gap - gamma)", "-F.logsigmoid(gap) + gamma"),
    _simpo("beta forgotten", "beta * (chosen - rejected)", "(chosen - rejected)"),
    _simpo("beta divides", "beta * (chosen - rejected)", "(chosen - rejected) / beta"),
    _simpo("beta on one side", "beta * (chosen - rejected)", "beta * chosen - rejected"),
    _simpo("loss negated", "-F.logsigmoid(gap - gamma)", "F.logsigmoid(gap - gamma)", "Liger-Kernel #484"),
    _simpo("log forgotten", "-F.logsigmoid(gap - gamma)", "-torch.sigmoid(gap - gamma)", "DS-Chat #501"),
    _simpo("hinge in place of the sigmoid", "-F.logsigmoid(gap - gamma)", "torch.relu(gamma - gap)"),
    _simpo("log(sigmoid) overflows", "-F.logsigmoid(gap - gamma)", "-torch.log(torch.sigmoid(gap - gamma))",
           "tinker-cookbook #188"),
    _simpo("rejected side detached", "chosen - rejected", "chosen - rejected.detach()"),
    _simpo("loss of the mean margin", "gap - gamma", "gap.mean() - gamma"),
    _orpo("likelihood un-trained", "-chosen + weight", "chosen + weight", "LLaMA-Factory be0a807e8"),
    _orpo("odds ratio negated", "weight * odds_ratio", "-weight * odds_ratio", "Liger-Kernel #484"),
    _orpo("log-probs for log-odds", "chosen_odds - rejected_odds", "chosen - rejected"),
    _orpo("probabilities added, not odds", "chosen - torch.log(-torch.expm1(chosen))",
          "chosen + torch.log(-torch.expm1(chosen))"),
    _orpo("odds of one side only", "rejected - torch.log(-torch.expm1(rejected))", "rejected"),
    _orpo("1 + p for 1 - p", "chosen - torch.log(-torch.expm1(chosen))",
          "chosen - torch.log1p(chosen.exp())"),
    _orpo("log-sigmoid forgotten", "-F.logsigmoid(chosen_odds - rejected_odds)",
          "-(chosen_odds - rejected_odds)"),
    _orpo("odds without their logarithm", "chosen_odds - rejected_odds",
          "chosen_odds.exp() - rejected_odds.exp()"),
    _orpo("chosen and rejected swapped", "chosen_odds - rejected_odds", "rejected_odds - chosen_odds",
          "bugs Z05"),
    _orpo("weight forgotten", "weight * odds_ratio", "odds_ratio"),
    _orpo("weight on the likelihood", "-chosen + weight * odds_ratio", "-weight * chosen + odds_ratio"),
    _orpo("weight on everything", "-chosen + weight * odds_ratio", "weight * (odds_ratio - chosen)"),
    _orpo("weight inside the sigmoid", "(chosen_odds - rejected_odds)",
          "(weight * (chosen_odds - rejected_odds)) / weight"),
    _orpo("likelihood of the rejected", "-chosen + weight", "-rejected + weight"),
    _orpo("likelihood summed", "-chosen + weight", "-chosen_logp + weight", "TRL #1705"),
    _orpo("rejected not averaged", "rejected_logp / rejected_length", "rejected_logp"),
    _orpo("one length for both", "rejected_logp / rejected_length", "rejected_logp / chosen_length"),
    _orpo("averaged twice", "chosen_logp / chosen_length", "chosen_logp / chosen_length ** 2",
          "LLaMA-Factory #6722"),
    _orpo("odds detached", "weight * odds_ratio", "weight * odds_ratio.detach()"),
    _orpo("rejected side detached", "chosen_odds - rejected_odds", "chosen_odds - rejected_odds.detach()"),
    _orpo("odds of the mean", "chosen_odds - rejected_odds", "(chosen_odds - rejected_odds).mean()"),
    _orpo("log(sigmoid) overflows", "-F.logsigmoid(chosen_odds - rejected_odds)",
          "-torch.log(torch.sigmoid(chosen_odds - rejected_odds))", "tinker-cookbook #188"),
)  # fmt: skip
