"""Odds Ratio Preference Optimization: no reference, the likelihood of one answer and the odds of both.

ℓ = log π(y)/|y|, z = log odds(ℓ⁺) - log odds(ℓ⁻); a subject without lengths is given averages.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import antisymmetry, falls, golden_by, repeated_tokens
from minirlhf.verify.families.pairs import (
    BOTH,
    LENGTH_PAIR,
    LENGTHS,
    POLICY_PAIR,
    averages,
    real_averages,
    softplus,
    swapped,
    token_pair,
)
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Convention, Kind, Law, Numbers, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    column,
    finite_at,
    formula,
    gradient,
    numeric_laws,
    rows_of,
)

HONG = "Hong et al. 2024, ORPO, Eq. 6-7 (arXiv:2403.07691)"
_ARGUMENTS = (*POLICY_PAIR, *LENGTH_PAIR)
WITH, WITHOUT = "with", "without"
CERTAIN = "responses of probability 1"
LIKELIHOOD = Convention(
    "likelihood",
    {
        WITH: "the loss holds -ℓ⁺",
        WITHOUT: "the odds ratio alone: -ℓ⁺ is added by the caller",
    },
)
_WEIGHT = Argument(
    "weight",
    (),
    Numbers((0.1, 0.5, 1.0, 0.25), usual=(0.1, 0.5, 1.0, 0.2, 0.25, 0.05)),
    "λ >= 0, of the odds ratio",
    synonyms=("beta", "lambda", "lam", "lambda_or", "orpo_lambda", "orpo_beta", "orpo_alpha", "alpha",
              "or_weight", "odds_weight", "odds_ratio_weight", "coef"),
)  # fmt: skip


def _log_odds(average: Tensor) -> Tensor:
    """log p/(1 - p)."""
    return average - torch.log(-torch.expm1(average))


def _odds_ratio(case: Case) -> Tensor:
    """z = log odds(ℓ⁺) - log odds(ℓ⁻)."""
    chosen, rejected = averages(case)
    return _log_odds(chosen) - _log_odds(rejected)


def _nll(case: Case, options: Options) -> Tensor:
    return -averages(case)[0] if options[LIKELIHOOD.name] == WITH else torch.zeros_like(case["chosen_logp"])


def _orpo(case: Case, options: Options) -> Tensor:
    return _nll(case, options) + case["weight"] * softplus(-_odds_ratio(case))


def _equal(case: Case) -> Case:
    """Both responses the same."""
    return case | {"rejected_logp": case["chosen_logp"], "rejected_length": case["chosen_length"]}


def _measured_weight(ask: Ask) -> float | None:
    """Reads λ off: λ log 2 for equal responses, beside the likelihood where that is part of the loss."""
    once, twice = ask(token_pair(-1.0, -1.0, weight=1.0)), ask(token_pair(-2.0, -2.0, weight=1.0))
    weight = (2 * once - twice) / math.log(2)
    return weight if weight >= 0 else None


def _equal_answers() -> Law:
    """A pair of equals teaches the likelihood only."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        equal = _equal(case)
        want = f.reduced(_nll(equal, f.options) + case["weight"] * math.log(2), case)
        yield Claim(equal, f.value(equal), "==", want, "-ℓ + λ log 2 where both responses are equally likely")

    return Law("equal_answers", "limit", "-ℓ + λ log 2 where ℓ⁺ = ℓ⁻ = ℓ", "oracles O1", check, LENGTHS)


def _exchange(case: Case, f: Probed) -> Tensor:
    """What exchanging the responses adds."""
    likelihood = _nll(swapped(case), f.options) - _nll(case, f.options)
    return likelihood + case["weight"] * _odds_ratio(case)


def _odds_alone() -> Law:
    """Both log-odds moved alike."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = dict(case)
        for name, length, average in zip(BOTH, LENGTHS, averages(case), strict=True):
            changed[name] = -softplus(-(_log_odds(average) - 0.5)) * case[length]
        fewer = f.reduced(_nll(changed, f.options) - _nll(case, f.options), case)
        why = "both log-odds lower by .5: only the likelihood term changes"
        yield Claim(changed, f.value(changed), "==", f.value(case) + fewer, why)

    statement = "log-odds moved alike leave the odds ratio as it was"
    return Law("only_odds_count", "symmetry", statement, HONG, check)


def _affine_in_weight() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        none, twice = case | {"weight": 0.0}, case | {"weight": 2 * case["weight"]}
        likelihood = f.reduced(_nll(case, f.options), case)
        yield Claim(none, f.value(none), "==", likelihood, "λ = 0: the likelihood of the chosen response")
        want = 2 * f.value(case) - likelihood
        yield Claim(twice, f.value(twice), "==", want, "λ twice: the odds ratio twice, the likelihood once")

    return Law("weight_of_the_odds", "symmetry", "λ multiplies the odds ratio, and not the likelihood", HONG,
               check, ("weight",))  # fmt: skip


def _pushes() -> Law:
    """Signs and least size of both gradients, one pair at a time."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for row in range(len(case["chosen_logp"])):
            single = rows_of((*_ARGUMENTS, _WEIGHT), case, torch.tensor([row]))
            least = -1.0 / single["chosen_length"] if f.options[LIKELIHOOD.name] == WITH else column(0.0)
            why = "the likelihood alone pulls with 1/|y⁺|, the odds ratio in the same direction"
            yield Claim(single, f.grad(single, "chosen_logp"), "<=", least.double(), why, wrt="chosen_logp")
            why = "the rejected response is pushed down"
            yield Claim(single, f.grad(single, "rejected_logp"), ">=", column(0.0), why, wrt="rejected_logp")

    return Law("both_terms_pull", "gradient", "likelihood and odds ratio both raise the chosen response",
               "LLaMA-Factory be0a807e8: un-trains the chosen answer", check)  # fmt: skip


def _certain() -> Law:
    """What a memorised response brings in single precision: ℓ that rounds to 0."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(case, f.value(case), "finite", None, "a response that is certain is legal")
        for name in BOTH:
            yield Claim(case, f.grad(case, name), "finite", None, "and so is its gradient", wrt=name)

    def cases() -> list[Case]:
        pairs = ((-1e-8, -2.0), (0.0, -1.0), (-2.0, -1e-8), (0.0, 0.0))
        single = [token_pair(*pair, weight=0.1) for pair in pairs]
        return [c | {name: c[name].float() for name in BOTH} for c in single]

    return Law("certain_response", "numeric", "finite, gradients too, where a log-prob has rounded to 0",
               "oracles O1: expm1; P21", check, proves=CERTAIN, cases=cases)  # fmt: skip


def _unlikely() -> list[Case]:
    """Far below and near certainty, as far as naive log(1 - p) in fp32 goes."""
    pairs = ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-1e-4, -2.0), (-2.0, -1e-4), (-1e-3, -2e-3))
    return [token_pair(*pair, weight=0.5) for pair in pairs]


ORPO = Kind(
    name="orpo",
    title="Odds Ratio Preference Optimization, -ℓ⁺ - λ log σ(log odds(ℓ⁺) - log odds(ℓ⁻))",
    arguments=(*_ARGUMENTS, _WEIGHT),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_orpo,
    differentiable=BOTH,
    conventions=(LIKELIHOOD,),
    reducible=True,
    measure={"weight": _measured_weight},
    anchor=_equal,
    extra_cases=lambda: real_averages(weight=0.1),
    laws=(
        formula("the loss of each pair is -ℓ⁺ - λ log σ(log odds(ℓ⁺) - log odds(ℓ⁻))", HONG),
        golden_by("golden_pair", token_pair(-0.7, -1.1, weight=0.1), LIKELIHOOD.name,
                  {WITH: 0.740934, WITHOUT: 0.040934},
                  "averages (-.7, -1.1), λ = .1: .740934, of which .040934 are the odds ratio",
                  "oracles 5.3"),
        gradient("chosen_logp", "∂L/∂ℓ⁺ = -1 - λ σ(-z)/(1 - e^ℓ⁺), over |y⁺|", "oracles O1"),
        gradient("rejected_logp", "∂L/∂ℓ⁻ = λ σ(-z)/(1 - e^ℓ⁻), over |y⁻|", "oracles O1"),
        _equal_answers(),
        antisymmetry(_exchange,
                     "L(y⁻, y⁺) - L(y⁺, y⁻) = λ z, and the likelihoods' difference", "oracles O1, BT4"),
        _odds_alone(),
        _affine_in_weight(),
        _pushes(),
        falls(source="P18; LLaMA-Factory be0a807e8"),
        bounded("at_least_the_likelihood", "limit", "the odds ratio only adds", HONG, ">=",
                lambda c, f: f.reduced(_nll(c, f.options), c)),
        repeated_tokens(BOTH),
        finite_at("stable", "for log-probs from -10,000 to -.0001 per token value and gradient are right",
                  "P21: numeric range", _unlikely, gradients=BOTH),
        _certain(),
        *batch_laws(_ARGUMENTS),
        *numeric_laws(BOTH),
    ),
)  # fmt: skip

KINDS = (ORPO,)
