"""Losses of a pair against a reference: DPO and its relatives.

s = log π - log π_ref summed over the response, h = s(y⁺) - s(y⁻).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Numbers, Options, Probed, Reals
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    column,
    finite_at,
    formula,
    golden,
    gradient,
    invariance,
    numeric_laws,
    relation,
    rows_of,
)

LOGP = Reals(-8.0, 0.0)
BETA = Argument(
    "beta",
    (),
    Numbers((0.1, 0.5, 1.0, 2.0), usual=(0.1, 0.05, 0.2, 0.3, 0.5, 1.0, 0.01, 2.0)),
    "β > 0, the weight of KL(π‖π_ref)",
    synonyms=("kl_coef", "kl_coefficient", "beta_dpo"),
)
PAIR = (
    Argument("chosen_logp", ("B",), LOGP, "log π(y⁺|x) in nats, summed over the response",
             synonyms=("policy_chosen_logps", "policy_chosen_logp", "chosen_logps", "pi_chosen", "logp_chosen",
                       "policy_chosen", "chosen_log_probs", "pi_w", "logp_w", "chosen")),
    Argument("rejected_logp", ("B",), LOGP, "log π(y⁻|x), likewise",
             synonyms=("policy_rejected_logps", "policy_rejected_logp", "rejected_logps", "pi_rejected",
                       "logp_rejected", "policy_rejected", "rejected_log_probs", "pi_l", "logp_l", "rejected")),
    Argument("ref_chosen_logp", ("B",), LOGP, "log π_ref(y⁺|x), likewise",
             synonyms=("reference_chosen_logps", "reference_chosen_logp", "ref_chosen_logps", "ref_chosen",
                       "reference_chosen", "ref_w", "ref_logp_w", "ref_logp_chosen", "ref_chosen_log_probs")),
    Argument("ref_rejected_logp", ("B",), LOGP, "log π_ref(y⁻|x), likewise",
             synonyms=("reference_rejected_logps", "reference_rejected_logp", "ref_rejected_logps", "ref_rejected",
                       "reference_rejected", "ref_l", "ref_logp_l", "ref_logp_rejected", "ref_rejected_log_probs")),
)  # fmt: skip
RAFAILOV = "Rafailov et al. 2023, Eq. 7 (arXiv:2305.18290)"
FACTORS = {1.0: "nats", 1 / math.log(2): "bits (logarithms to base 2)"}


def margin(case: Case) -> Tensor:
    """h of each pair, in nats: [B]."""
    chosen = case["chosen_logp"] - case["ref_chosen_logp"]
    return chosen - (case["rejected_logp"] - case["ref_rejected_logp"])


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = -log σ(-x), stable and smooth."""
    return torch.logaddexp(x, torch.zeros_like(x))


def swapped(case: Case) -> Case:
    """Chosen and rejected exchanged."""
    return {
        **case,
        "chosen_logp": case["rejected_logp"],
        "rejected_logp": case["chosen_logp"],
        "ref_chosen_logp": case["ref_rejected_logp"],
        "ref_rejected_logp": case["ref_chosen_logp"],
    }


def shifted(case: Case, amount: float, *names: str) -> Case:
    """The same amount added to the tensors named."""
    return {**case, **{name: case[name] + amount for name in names}}


def at_reference(case: Case) -> Case:
    """The policy is the reference."""
    return {**case, "chosen_logp": case["ref_chosen_logp"], "rejected_logp": case["ref_rejected_logp"]}


def pair_case(h: float, **numbers: float) -> Case:
    """One pair with this margin."""
    return {
        "chosen_logp": column(-1.0),
        "rejected_logp": column(-1.0 - h),
        "ref_chosen_logp": column(-2.0),
        "ref_rejected_logp": column(-2.0),
        **numbers,
    }


def reference_laws() -> tuple[Law, ...]:
    """What only h, the difference of two differences, brings with it."""
    both = ("chosen_logp", "rejected_logp")
    return (
        invariance("prompt_constant", "symmetry", "a constant added to both log-probs of the policy changes nothing",
                   "oracles D3: the prompt's log-prob cancels", lambda c: shifted(c, 0.75, *both), gradients=both),
        invariance("reference_constant", "symmetry", "a constant added to both log-probs of the reference does not",
                   "oracles D3", lambda c: shifted(c, -1.5, "ref_chosen_logp", "ref_rejected_logp"), gradients=both),
        invariance("chosen_shifted_with_reference", "symmetry",
                   "policy and reference shifted alike on the chosen side change nothing: the reference counts",
                   "oracles D3; Liger #405: reference ignored",
                   lambda c: shifted(c, 1.25, "chosen_logp", "ref_chosen_logp"), gradients=both),
        invariance("rejected_shifted_with_reference", "symmetry",
                   "policy and reference shifted alike on the rejected side change nothing", "oracles D3",
                   lambda c: shifted(c, 1.25, "rejected_logp", "ref_rejected_logp"), gradients=both),
    )  # fmt: skip


def opposite_gradients() -> Law:
    """h alone: what one side gains the other loses."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        chosen, rejected = f.grad(case, "chosen_logp"), f.grad(case, "rejected_logp")
        yield Claim(case, rejected, "==", -chosen, "∂L/∂log π(y⁻) = -∂L/∂log π(y⁺)", wrt="rejected_logp")

    return Law("gradients_cancel", "gradient", "the gradients of chosen and rejected are opposite",
               "oracles D6", check)  # fmt: skip


def scaled_margin() -> Law:
    """Depends on β h only."""

    def twice(case: Case) -> Case:
        halved = {n: case[n] / 2 for n in case if n.endswith("logp")}
        return {**case, **halved, "beta": 2 * case["beta"]}

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = twice(case)
        yield Claim(changed, f.value(changed), "==", f.value(case), "β twice, every log-prob half: the same")

    return Law("beta_times_margin", "symmetry", "only the product β·h counts", "oracles D4", check, ("beta",))


def population_optimum(optimum: Tensor, statement: str, source: str, **numbers: float) -> Law:
    """On all pairs of three responses, labelled by Bradley-Terry, the gradient vanishes at the exact optimum.

    optimum: [3] log π of the paper's optimum for the rewards and reference below.
    """

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        total = torch.zeros(3, dtype=torch.float64)
        for row, weight in enumerate(pair_weights()):
            single = rows_of(PAIR, case, torch.tensor([row]))
            for name, place in (("chosen_logp", 0), ("rejected_logp", 1)):
                total[PAIRS[row, place]] += weight * f.grad(single, name)[0]
        # Stationary over normalised policies: the gradient is proportional to π, and here it sums to 0.
        why = f"{statement}; the expected gradient there is {[round(g, 6) for g in total.tolist()]}"
        yield Claim(case, total.abs() < 1e-6, "holds", None, why)

    def cases() -> list[Case]:
        w, loser = PAIRS.T
        return [{"chosen_logp": optimum[w], "rejected_logp": optimum[loser],
                 "ref_chosen_logp": REFERENCE[w], "ref_rejected_logp": REFERENCE[loser], **numbers}]  # fmt: skip

    return Law("population_optimum", "limit", statement, source, check, cases=cases)


REWARDS = torch.tensor([1.0, 0.0, -0.7], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
PAIRS = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j])


def pair_weights() -> Tensor:
    """Probability of each ordered pair as (chosen, rejected), pairs drawn unequally, labels Bradley-Terry."""
    drawn = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    w, loser = PAIRS.T
    return drawn[w] * drawn[loser] * torch.sigmoid(REWARDS[w] - REWARDS[loser])


def tilted(beta: float) -> Tensor:
    """log π* for π* ∝ π_ref e^(r/β)."""
    return torch.log_softmax(REFERENCE + REWARDS / beta, dim=0)


GOLDEN_PAIR: Case = {
    "chosen_logp": column(-10.0),
    "rejected_logp": column(-12.0),
    "ref_chosen_logp": column(-15.0),
    "ref_rejected_logp": column(-11.0),
    "beta": 0.1,
}


def _dpo(case: Case, options: Options) -> Tensor:
    return softplus(-case["beta"] * margin(case))


DPO = Kind(
    name="dpo",
    title="Direct Preference Optimization, -log σ(β h)",
    arguments=(*PAIR, BETA),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_dpo,
    differentiable=("chosen_logp", "rejected_logp"),
    reducible=True,
    factors=FACTORS,
    laws=(
        formula("the loss of each pair is -log σ(β h)", RAFAILOV),
        golden("golden_pair", GOLDEN_PAIR, [0.437488], "log-probs (-10, -12), reference (-15, -11), β = .1: .437488",
               "oracles 5.2; confirmed by ms-swift #10167"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = -β σ(-β h)", "oracles D6"),
        gradient("rejected_logp", "∂L/∂log π(y⁻) = +β σ(-β h)", "oracles D6"),
        relation("log2_at_reference", "limit", "log 2 where the policy is the reference", "oracles D2", at_reference,
                 lambda v, c, f: f.reduced(torch.full_like(c["chosen_logp"], math.log(2)), c)),
        *reference_laws(),
        opposite_gradients(),
        scaled_margin(),
        relation("antisymmetry", "symmetry", "L(y⁻, y⁺) - L(y⁺, y⁻) = β h", "oracles D5, BT4", swapped,
                 lambda v, c, f: v + f.reduced(c["beta"] * margin(c), c)),
        bounded("positive", "limit", "a negative log-likelihood is never negative", "Liger #484: DPO double-negated",
                ">=", lambda c, f: torch.zeros((), dtype=torch.float64)),
        population_optimum(tilted(0.5), "on all pairs the optimum is π ∝ π_ref e^(r/β), whoever drew the pairs",
                           "oracles D8", beta=0.5),
        finite_at("stable", "at β h = ±10,000 the loss is 0 or 10,000, and its gradient right",
                  "tinker-cookbook #188: log(sigmoid) overflows",
                  lambda: [pair_case(h, beta=1.0) for h in (1e4, -1e4, 800.0, -800.0)],
                  gradients=("chosen_logp", "rejected_logp")),
        *batch_laws((*PAIR, BETA)),
        *numeric_laws([a.name for a in PAIR]),
    ),
)  # fmt: skip

KINDS = (DPO,)
