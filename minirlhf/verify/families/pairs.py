"""What losses of a preference pair share: arguments, changes of a case, a small world of three responses.

s = log π - log π_ref summed over the response, h = s(y⁺) - s(y⁻).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Ask, Case, Counts, Numbers, Reals
from minirlhf.verify.laws import column

LOGP = Reals(-8.0, -0.125)
FACTORS = {1.0: "nats", 1 / math.log(2): "bits (logarithms to base 2)"}
BOTH = ("chosen_logp", "rejected_logp")
LENGTHS = ("chosen_length", "rejected_length")
CHOSEN = ("chosen", "winner", "win", "winning", "preferred", "positive", "pos", "w")
REJECTED = ("rejected", "reject", "loser", "lose", "losing", "dispreferred", "negative", "neg", "l")
_LOG_PROBS = ("logps", "logp", "log_probs", "log_prob", "logprobs", "logprob", "lp", "")


def spellings(owners: Sequence[str], sides: Sequence[str], what: Sequence[str]) -> tuple[str, ...]:
    """The names that an argument may have elsewhere, in every order of their parts: policy_chosen_logps,
    chosen_policy_logps, logp_w, ref_logp_chosen; single letters alone say nothing."""
    parts = itertools.product(owners, sides, what)
    names = ("".join(order) for each in parts for order in itertools.permutations(each))
    return tuple(dict.fromkeys(name for name in names if len(name) > 1))


_POLICY = ("", "policy", "pi", "model", "actor")
_REFERENCE = ("ref", "reference", "piref", "pi_ref", "sft", "base")
POLICY_PAIR = (
    Argument("chosen_logp", ("B",), LOGP, "log π(y⁺|x) in nats, summed over the response",
             synonyms=spellings(_POLICY, CHOSEN, _LOG_PROBS)),
    Argument("rejected_logp", ("B",), LOGP, "log π(y⁻|x), likewise",
             synonyms=spellings(_POLICY, REJECTED, _LOG_PROBS)),
)  # fmt: skip
PAIR = (
    *POLICY_PAIR,
    Argument("ref_chosen_logp", ("B",), LOGP, "log π_ref(y⁺|x), likewise",
             synonyms=spellings(_REFERENCE, CHOSEN, _LOG_PROBS)),
    Argument("ref_rejected_logp", ("B",), LOGP, "log π_ref(y⁻|x), likewise",
             synonyms=spellings(_REFERENCE, REJECTED, _LOG_PROBS)),
)  # fmt: skip
_LENGTH = ("length", "lengths", "len", "lens", "tokens", "num_tokens", "n_tokens", "token_count", "size")
LENGTH_PAIR = (
    Argument("chosen_length", ("B",), Counts(1, 8),
             "|y⁺|, the tokens that were summed; absent: the log-probs come in averaged",
             neutral=lambda case: torch.ones_like(case["chosen_logp"], dtype=torch.int64),
             synonyms=spellings(("",), CHOSEN, _LENGTH)),
    Argument("rejected_length", ("B",), Counts(1, 8), "|y⁻|, likewise",
             neutral=lambda case: torch.ones_like(case["rejected_logp"], dtype=torch.int64),
             synonyms=spellings(("",), REJECTED, _LENGTH)),
)  # fmt: skip
BETA = Argument(
    "beta",
    (),
    Numbers((0.1, 0.5, 1.0, 2.0), usual=(0.1, 0.05, 0.2, 0.3, 0.5, 1.0, 0.01, 2.0)),
    "β > 0, the weight of KL(π‖π_ref)",
    synonyms=("kl_coef", "kl_coefficient", "beta_dpo", "dpo_beta", "kl_beta", "temperature"),
)
SMOOTHING = Argument(
    "label_smoothing",
    (),
    Numbers((0.1, 0.25, 0.4, 0.05), usual=(0.1, 0.05, 0.2, 0.3, 0.25, 0.01)),
    "ε in [0, ½), the share of flipped labels",
    synonyms=("epsilon", "eps", "smoothing", "label_smooth", "noise", "noise_rate", "flip_rate", "flip_prob"),
)


def margin(case: Case) -> Tensor:
    """h of each pair, in nats: [B]."""
    chosen = case["chosen_logp"] - case["ref_chosen_logp"]
    return chosen - (case["rejected_logp"] - case["ref_rejected_logp"])


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = -log σ(-x), stable and smooth."""
    return torch.logaddexp(x, torch.zeros_like(x))


def swapped(case: Case) -> Case:
    """Chosen and rejected exchanged, in everything that has two sides."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    other = {name: "_".join(sides.get(part, part) for part in name.split("_")) for name in case}
    return {name: case[other[name]] for name in case}


def shifted(case: Case, amount: float | Tensor, *names: str) -> Case:
    """The same amount added to the tensors named."""
    return {**case, **{name: case[name] + amount for name in names}}


def at_reference(case: Case) -> Case:
    """The policy is the reference."""
    return {**case, "chosen_logp": case["ref_chosen_logp"], "rejected_logp": case["ref_rejected_logp"]}


def moved(case: Case, amount: float | Tensor, lengths: tuple[Tensor, Tensor] | None = None) -> Case:
    """The margin (per token, if lengths are given) greater by the amount: one side lowered, none raised."""
    ours, theirs = lengths or (torch.ones(()), torch.ones(()))
    up = torch.as_tensor(amount, dtype=torch.float64).expand_as(case["chosen_logp"])
    lower = shifted(case, up.clamp(max=0) * ours, "chosen_logp")
    return shifted(lower, -up.clamp(min=0) * theirs, "rejected_logp")


def averages(case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs per token of both responses."""
    return case["chosen_logp"] / case["chosen_length"], case["rejected_logp"] / case["rejected_length"]


def token_pair(chosen: float, rejected: float, **numbers: float) -> Case:
    """One pair of responses of one token each, without a reference."""
    one = torch.ones(1, dtype=torch.int64)
    return {"chosen_logp": column(chosen), "rejected_logp": column(rejected), "chosen_length": one,
            "rejected_length": one, **numbers}  # fmt: skip


def pair_case(h: float, **numbers: float) -> Case:
    """One pair with this margin."""
    return {
        "chosen_logp": column(-1.0 + min(h, 0.0)),
        "rejected_logp": column(-1.0 - max(h, 0.0)),
        "ref_chosen_logp": column(-2.0),
        "ref_rejected_logp": column(-2.0),
        **numbers,
    }


def real_averages(**numbers: float) -> list[Case]:
    """Log-probs and lengths as whole responses have them, one pair a tie."""
    return [{"chosen_logp": column(-254.3, -87.1, -60.0), "rejected_logp": column(-301.7, -80.2, -30.0),
             "chosen_length": torch.tensor([161, 60, 20]), "rejected_length": torch.tensor([170, 38, 10]),
             **numbers}]  # fmt: skip


def entropy(p: float) -> float:
    """H(p, 1 - p) in nats."""
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def logit(p: float) -> float:
    """log p / (1 - p)."""
    return math.log(p) - math.log1p(-p)


EXTREME = (1e4, -1e4, 800.0, -800.0)
"""Margins at which unstable forms overflow."""
GOLDEN_PAIR: Case = {
    "chosen_logp": column(-10.0),
    "rejected_logp": column(-12.0),
    "ref_chosen_logp": column(-15.0),
    "ref_rejected_logp": column(-11.0),
}
"""The pair of oracles 5.2: h = 6."""


def real_pairs(**numbers: float) -> list[Case]:
    """Log-probs as whole responses have them, with a tie in the margin and a policy that has not moved."""
    chosen, rejected = column(-254.3, -87.1, -60.5, -33.0), column(-301.7, -80.2, -60.5, -41.5)
    ref_chosen, ref_rejected = column(-251.9, -95.6, -62.0, -33.0), column(-298.8, -81.3, -62.0, -41.5)
    names = [argument.name for argument in PAIR]
    pair = dict(zip(names, (chosen, rejected, ref_chosen, ref_rejected), strict=True))
    return [{**pair, **numbers}]


def extreme_pairs(**numbers: float) -> list[Case]:
    """Margins of ±10,000 and ±800, made by policy or reference, and a small one of far log-probs."""
    policy = [pair_case(h, **numbers) for h in EXTREME]
    far = [shifted(pair_case(3.0, **numbers), -1e4, *(a.name for a in PAIR))]
    return [*policy, *(_exchanged(case) for case in policy), *far]


def _exchanged(case: Case) -> Case:
    """Policy and reference."""
    names = {"chosen_logp": "ref_chosen_logp", "rejected_logp": "ref_rejected_logp"}
    return case | {a: case[b] for a, b in names.items()} | {b: case[a] for a, b in names.items()}


def far_slopes(ask: Ask) -> tuple[float, float, float]:
    """The loss of a tie, and what it gains per nat far below and far above, at β = 1 and ε = .1 where the
    subject takes them."""

    def at(h: float) -> float:
        return ask(pair_case(h, beta=1.0, label_smoothing=0.1))

    return at(0.0), (at(-2e5) - at(-1e5)) / 1e5, (at(2e5) - at(1e5)) / 1e5


def measured_beta(tie: float) -> Callable[[Ask], float | None]:
    """Reads β off a subject that has it built in; tie: the loss at h = 0, in the unit of the kind."""

    def measure(ask: Ask) -> float | None:
        zero, below, above = far_slopes(ask)
        beta = (below + above) * tie / zero
        return beta if beta > 0 else None

    return measure


REWARDS = column(1.0, 0.0, -0.7)
REFERENCE = column(0.5, 0.3, 0.2).log()
DRAWN = column(0.5, 0.2, 0.3)
PAIRS = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j])


def pair_weights() -> Tensor:
    """Probability of each ordered pair as (chosen, rejected), pairs drawn unequally, labels Bradley-Terry."""
    w, loser = PAIRS.T
    return DRAWN[w] * DRAWN[loser] * torch.sigmoid(REWARDS[w] - REWARDS[loser])


def win_rate() -> Tensor:
    """p(y ≻ μ): the probability that each response beats one that is drawn."""
    return (torch.sigmoid(REWARDS[:, None] - REWARDS) * DRAWN).sum(dim=1)


def tilted(beta: float) -> Tensor:
    """log π* for π* ∝ π_ref e^(r/β)."""
    return torch.log_softmax(REFERENCE + REWARDS / beta, dim=0)


def labelled_pairs(optimum: Tensor, **values: float | Tensor) -> Case:
    """All ordered pairs of three responses under a policy; values [3] are taken for the pairs' two sides."""
    w, loser = PAIRS.T
    pair: Case = {"chosen_logp": optimum[w], "rejected_logp": optimum[loser]}
    for name, value in values.items():
        if isinstance(value, Tensor):
            before, after = name.split("side")
            pair |= {f"{before}chosen{after}": value[w], f"{before}rejected{after}": value[loser]}
        else:
            pair[name] = value
    return pair
