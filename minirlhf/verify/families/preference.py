"""DPO and the hinge, functions of β h, and the implicit reward that β h is a difference of.

s = log π - log π_ref summed over the response, h = s(y⁺) - s(y⁻).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import (
    antisymmetry,
    calibrated,
    falls,
    least_at_a_tie,
    margin_laws,
    never_negative,
    stationary,
    value_at_reference,
)
from minirlhf.verify.families.pairs import (
    BETA,
    BOTH,
    FACTORS,
    GOLDEN_PAIR,
    LOGP,
    PAIR,
    REFERENCE,
    at_reference,
    extreme_pairs,
    labelled_pairs,
    margin,
    measured_beta,
    pair_case,
    real_pairs,
    shifted,
    softplus,
    spellings,
    tilted,
)
from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Options, Probed
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
)

RAFAILOV = "Rafailov et al. 2023, Eq. 7 (arXiv:2305.18290)"
ZHAO = "Zhao et al. 2023, SLiC-HF (arXiv:2305.10425)"
IMPLICIT = "Rafailov et al. 2023, Eq. 5 (arXiv:2305.18290)"
DIFFERENTIABLE = "gradient to the policy"


def _m(case: Case) -> Tensor:
    """β h."""
    return case["beta"] * margin(case)


def _dpo(case: Case, options: Options) -> Tensor:
    return softplus(-_m(case))


DPO = Kind(
    name="dpo",
    title="Direct Preference Optimization, -log σ(β h)",
    arguments=(*PAIR, BETA),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_dpo,
    differentiable=BOTH,
    reducible=True,
    factors=FACTORS,
    measure={"beta": measured_beta(math.log(2))},
    extra_cases=lambda: real_pairs(beta=0.1),
    laws=(
        formula("the loss of each pair is -log σ(β h)", RAFAILOV),
        golden("golden_pair", GOLDEN_PAIR | {"beta": 0.1}, [0.437488],
               "log-probs (-10, -12), reference (-15, -11), β = .1: .437488",
               "oracles 5.2; confirmed by ms-swift #10167"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = -β σ(-β h)", "oracles D6"),
        gradient("rejected_logp", "∂L/∂log π(y⁻) = +β σ(-β h)", "oracles D6"),
        value_at_reference(lambda c: math.log(2), "log 2 where the policy is the reference", "oracles D2"),
        antisymmetry(lambda c, f: _m(c), "L(y⁻, y⁺) - L(y⁺, y⁻) = β h", "oracles D5, BT4"),
        never_negative(),
        falls(source="P18; Liger #484"),
        least_at_a_tie(lambda c, f: column(math.log(2)), "oracles BT6"),
        calibrated(lambda c, f: torch.sigmoid(_m(c)),
                   "a label that is right with probability σ(β h) moves nothing", "oracles D1, D8"),
        stationary("population_optimum", PAIR,
                   lambda: labelled_pairs(tilted(0.5), ref_side_logp=REFERENCE, beta=0.5),
                   "on all pairs the optimum is π ∝ π_ref e^(r/β), whoever drew the pairs", "oracles D8"),
        finite_at("stable", "at β h = ±10,000 the loss is 0 or 10,000, and its gradient right",
                  "tinker-cookbook #188: log(sigmoid) overflows",
                  lambda: extreme_pairs(beta=1.0), gradients=BOTH),
        *margin_laws(*PAIR, BETA),
    ),
)  # fmt: skip


def _hinge(case: Case, options: Options) -> Tensor:
    return torch.where(_m(case) < 1, 1 - _m(case), 0.0 * margin(case))


def _off_the_kink(case: Case) -> Case:
    """β h away from ±1, where the hinge has no gradient and right implementations differ."""
    m = _m(case)
    return shifted(case, torch.where((m.abs() - 1).abs() < 1e-2, -0.0625 / case["beta"], 0.0), "chosen_logp")


def _hinge_sides() -> list[Case]:
    """Just before and just behind β h = 1, and far on both sides."""
    return [pair_case(m / beta, beta=beta) for beta in (0.1, 2.0) for m in (0.99, 1.01, -1.01, 12.0, -12.0)]


HINGE = Kind(
    name="hinge",
    title="Hinge on implicit rewards, max(0, 1 - β h)",
    arguments=(*PAIR, BETA),
    returns="[B] losses",
    shape=("B",),
    oracle=_hinge,
    differentiable=BOTH,
    reducible=True,
    arrange=_off_the_kink,
    measure={"beta": measured_beta(1.0)},
    anchor=at_reference,
    extra_cases=lambda: real_pairs(beta=0.1),
    laws=(
        formula("the loss of each pair is max(0, 1 - β h)", ZHAO),
        golden("golden_pair", GOLDEN_PAIR | {"beta": 0.1}, [0.4],
               "log-probs (-10, -12), reference (-15, -11), β = .1: .4", "oracles 5.2; ms-swift #10167"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = -β where β h < 1, else 0", "oracles H1"),
        gradient("rejected_logp", "∂L/∂log π(y⁻) = β where β h < 1, else 0", "oracles H1"),
        finite_at("kink", "the margin that is asked for is β h = 1: there the gradient ends", "oracles H1",
                  _hinge_sides, gradients=BOTH),
        value_at_reference(lambda c: 1.0, "1 where the policy is the reference", ZHAO),
        antisymmetry(lambda c, f: _m(c) + _m(c).clamp(-1, 1),
                     "L(y⁻, y⁺) - L(y⁺, y⁻) = 2 β h up to |β h| = 1, then β h ± 1", ZHAO),
        bounded("at_least_the_line", "limit", "the loss is at least 1 - β h", ZHAO, ">=",
                lambda c, f: f.reduced(1 - _m(c), c)),
        never_negative(),
        falls(source="P18"),
        least_at_a_tie(lambda c, f: column(1.0), "convex in β h"),
        calibrated(lambda c, f: torch.where(_m(c).abs() < 1, 0.5, (_m(c) > 1).double()),
                   "inside the margin only a coin's labels move nothing, beyond it only certain ones", ZHAO),
        finite_at("stable", "at β h = ±10,000 the loss is 0 or 10,001, and its gradient right", "P21",
                  lambda: extreme_pairs(beta=1.0), gradients=BOTH),
        *margin_laws(*PAIR, BETA),
    ),
)  # fmt: skip


def _implicit(case: Case, options: Options) -> Tensor:
    return case["beta"] * (case["logp"] - case["ref_logp"])


def _exchanged(case: Case) -> Case:
    return {**case, "logp": case["ref_logp"], "ref_logp": case["logp"]}


def _differentiable() -> Law:
    """The same as a law of gradients; a reward that is only logged may be detached."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        slope = torch.full_like(case["logp"], case["beta"])
        yield Claim(case, f.grad(case, "logp"), "==", slope, "∂r̂/∂log π = β", wrt="logp")

    return Law("gradient_of_logp", "gradient", "∂r̂/∂log π = β", IMPLICIT, check, proves=DIFFERENTIABLE)


def _concatenated() -> Law:
    """Summed log-probs of a first and a second half."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        half = {**case, "logp": 0.25 * case["logp"], "ref_logp": 0.375 * case["ref_logp"]}
        rest = {**case, "logp": 0.75 * case["logp"], "ref_logp": 0.625 * case["ref_logp"]}
        why = "the reward of a response is the sum of what its two parts earn"
        yield Claim(case, f.value(case), "==", f.value(half) + f.value(rest), why)

    return Law(
        "adds_over_concatenation", "identity", "r̂(y₁ y₂) = r̂(y₁) + r̂(y₂ | y₁)", "P19, oracles SL3", check
    )


def _recovers_the_policy() -> Law:
    """The identity that DPO rests on."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        told = (case["ref_logp"] + f.value(case) / case["beta"]).exp() / case["logp"].exp()
        yield Claim(case, (told - 1).abs() < 1e-4, "holds", None, f"π_ref e^(r̂/β) is {told.tolist()} times π")

    return Law("recovers_the_policy", "identity", "π_ref e^(r̂/β) is the policy", IMPLICIT, check)


_WHAT = ("logps", "logp", "log_probs", "log_prob", "logprobs", "logprob", "lp")
RESPONSE = (
    Argument("logp", ("B",), LOGP, "log π(y|x) in nats, summed over the response",
             synonyms=spellings(("policy", "pi", "model", "actor", "completion", ""), ("",), _WHAT)),
    Argument("ref_logp", ("B",), LOGP, "log π_ref(y|x), likewise",
             synonyms=spellings(("ref", "reference", "pi_ref", "sft", "base"), ("",), _WHAT)),
)  # fmt: skip
IMPLICIT_REWARD = Kind(
    name="implicit_reward",
    title="Implicit reward, β [log π - log π_ref]",
    arguments=(*RESPONSE, BETA),
    returns="[B] rewards",
    shape=("B",),
    oracle=_implicit,
    measure={"beta": lambda ask: ask({"logp": column(-1.0), "ref_logp": column(-2.0), "beta": 1.0})},
    laws=(
        formula("the reward of each response is β [log π(y|x) - log π_ref(y|x)]", IMPLICIT),
        golden("golden_pair", {"logp": column(-10.0, -12.0), "ref_logp": column(-15.0, -11.0), "beta": 0.1},
               [0.5, -0.1], "log-probs (-10, -12), reference (-15, -11), β = .1: +.5, -.1", "oracles 5.2"),
        _differentiable(),
        relation("zero_at_reference", "limit", "0 where the policy is the reference", IMPLICIT,
                 lambda c: {**c, "logp": c["ref_logp"]}, lambda v, c, f: torch.zeros_like(v)),
        relation("antisymmetry", "symmetry", "policy and reference exchanged: the opposite", IMPLICIT,
                 _exchanged, lambda v, c, f: -v),
        invariance("shifted_with_reference", "symmetry", "policy and reference shifted alike change nothing",
                   "Liger #405: reference ignored", lambda c: shifted(c, -1.25, "logp", "ref_logp")),
        relation("proportional_to_beta", "symmetry", "β twice: the reward twice",
                 "tinker-cookbook #172: β applied twice", lambda c: {**c, "beta": 2 * c["beta"]},
                 lambda v, c, f: 2 * v, needs=("beta",)),
        _concatenated(),
        _recovers_the_policy(),
        finite_at("stable", "log-probs of -10,000 and ratios of ±10,000 are nothing special",
                  "P21: numeric range",
                  lambda: [{"logp": column(-1e4, -1.0, -1e4), "ref_logp": column(-1.0, -1e4, -1e4 + 1),
                            "beta": 0.5}]),
        *batch_laws((*RESPONSE, BETA)),
        *numeric_laws(("logp", "ref_logp")),
    ),
)  # fmt: skip

KINDS = (DPO, HINGE, IMPLICIT_REWARD)
