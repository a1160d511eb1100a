"""The entropy from the log-probs of sampled tokens, as a loss and as a reward. What counts is the gradient.

-log π(y) of y ~ π has the entropy as its mean, but as a loss its gradient is -∇log π(y), whose mean is 0.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.divergence import LEVELS, shared
from minirlhf.verify.families.kl_reward import DETACHED
from minirlhf.verify.families.one_step import (
    BETA,
    LOGP,
    MASK,
    PAIRS,
    all_tokens,
    beta_of,
    each_slope,
    each_value,
    measured_factor,
    moved,
    one_token,
    rounded,
    score_gradient,
    score_matrix,
    slope_linear_in_beta,
    slope_token_order,
    weighed,
)
from minirlhf.verify.kinds import Ask, Case, Claim, Convention, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    finite_at,
    formula,
    gradient,
    mask_laws,
    numeric_laws,
    relation,
)

WILLIAMS = "Williams & Peng 1991, Function Optimization Using Connectionist Reinforcement Learning Algorithms"
FORMS = {
    "log": "∂loss/∂log π = log π, as sg(log π) · log π has it",
    "log + 1": "∂loss/∂log π = log π + 1, as ρ log π has it: the same in expectation",
}
ARGUMENTS = (LOGP, MASK, BETA)


def _counted(case: Case) -> Tensor:
    return torch.where(case["mask"], case["logp"], 0.0)


def _loss(case: Case, options: Options) -> Tensor:
    logp = _counted(case)
    if options["level"] == "sequence":
        logp = torch.where(case["mask"], logp.sum(dim=-1, keepdim=True), 0.0)
    ratio = torch.exp(logp - logp.detach())
    loss = 0.5 * logp * logp if options["gradient"] == "log" else ratio * logp
    return beta_of(case) * shared(loss, case, options)


def _reward(case: Case, options: Options) -> Tensor:
    return -beta_of(case) * _counted(case)


def _law_cases() -> list[Case]:
    return [all_tokens(law) for pair in PAIRS for law in pair][1:]


def _policy(case: Case) -> Tensor:
    return case["logp"][:, 0].exp()


def _entropy(law: Tensor) -> Tensor:
    return -(law * law.log()).sum()


def _entropy_gradient(law: Tensor) -> Tensor:
    """∇_θ H: [V]."""
    return -score_gradient(law.log(), law)


def _expected_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, slopes = _policy(case), each_slope(f, case)
        got, want = score_gradient(slopes, law), -beta_of(case) * _entropy_gradient(law)
        nothing = ": as a loss it does nothing" if not bool(got.abs().max() > 1e-9) else ""
        why = f"over all tokens the gradient is {rounded(got)}{nothing}; that of -H is {rounded(want)}"
        yield weighed(f, case, score_matrix(law), slopes, want, why, wrt="logp")

    return Law(
        "expected_gradient",
        "gradient",
        "over all tokens, with their probabilities, the gradient is that of -H",
        "oracles H1, 0.3: log π as a loss has the expected gradient 0",
        check,
        cases=_law_cases,
    )


def _raises(name: str, statement: str, source: str, *, reward: bool) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law = _policy(case)
        step = (
            score_gradient(each_value(f, case), law) if reward else -score_gradient(each_slope(f, case), law)
        )
        after = _entropy(moved(law, step))
        why = f"one step takes the entropy from {rounded(_entropy(law))[0]} to {rounded(after)[0]}"
        yield Claim(case, after > _entropy(law) + 1e-9, "holds", None, why, wrt=None if reward else "logp")

    return Law(name, "gradient", statement, source, check, cases=_law_cases)


def _flat_at_uniform(*, reward: bool) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, wrt = _policy(case), None if reward else "logp"
        each = each_value(f, case) if reward else each_slope(f, case)
        why = "over all tokens of the uniform law the gradient is 0"
        yield weighed(f, case, score_matrix(law), each, torch.zeros_like(law), why, wrt=wrt)

    return Law(
        "flat_at_uniform",
        "gradient",
        "the uniform law is stationary",
        "oracles H1",
        check,
        cases=lambda: [all_tokens(torch.full((n,), 1 / n, dtype=torch.float64)) for n in (2, 3, 5)],
    )


def _golden_slope() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        extra = 1.0 if f.options["gradient"] == "log + 1" else 0.0
        want = beta_of(case) * (case["logp"] + extra)
        yield Claim(
            case, f.grad(case, "logp"), "==", want, "∂loss/∂log π = β log π (or β (log π + 1))", wrt="logp"
        )

    return Law(
        "golden_slope",
        "gradient",
        "∂loss/∂log π at -.5, -2 and -30 is that, in nats (or 1 more)",
        WILLIAMS,
        check,
        cases=lambda: [one_token(z) for z in (-0.5, -2.0, -30.0)],
    )


def _squares_beta(ask: Ask) -> float | None:
    """β of a built-in β c (log π)², c = ½ or 1: the forms whose values show it."""
    ones = [ask(one_token(z)) / (z * z) for z in (-0.5, -1.0, -3.0)]
    if ones[0] <= 0 or not all(math.isclose(x, ones[0], rel_tol=1e-4) for x in ones):
        return None
    return (
        None
        if math.isclose(ones[0], 1.0, rel_tol=1e-4) or math.isclose(ones[0], 0.5, rel_tol=1e-4)
        else ones[0]
    )


SAMPLED_ENTROPY_LOSS = Kind(
    name="sampled_entropy_loss",
    title="an entropy bonus from sampled log-probs, as a loss that is differentiated",
    arguments=ARGUMENTS,
    returns="[B, T]; only its gradient counts",
    shape=("B", "T"),
    oracle=_loss,
    differentiable=("logp",),
    conventions=(Convention("gradient", FORMS), Convention("level", LEVELS)),
    reducible=True,
    mask="mask",
    measure={"beta": _squares_beta},
    fit_by="logp",
    laws=(
        gradient("logp", "∂loss/∂log π is β log π, or β (log π + 1)", WILLIAMS),
        _expected_gradient(),
        _raises("raises_entropy", "a step of descent raises the entropy", "bugs P12, F10", reward=False),
        _flat_at_uniform(reward=False),
        _golden_slope(),
        slope_token_order(),
        slope_linear_in_beta(),
        *mask_laws(ARGUMENTS, differentiable=("logp",)),
        empty_row_law(ARGUMENTS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(["logp"]),
    ),
)


def _expected_policy_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, values = _policy(case), each_value(f, case)
        got, want = score_gradient(values, law), beta_of(case) * _entropy_gradient(law)
        why = f"over all tokens E[reward ∇log π] is {rounded(got)}, ∇H is {rounded(want)}"
        yield weighed(f, case, score_matrix(law), values, want, why)

    return Law(
        "expected_policy_gradient",
        "gradient",
        "over all tokens E[reward · ∇log π] = β ∇H",
        WILLIAMS,
        check,
        cases=_law_cases,
    )


def _adds_up() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        want = _reward(case, {}).sum()
        yield Claim(case, f.value(case).sum(), "==", want, "over all rows: -β Σ log π(y)", take=".sum()")

    return Law(
        "adds_up",
        "value",
        "the rewards of a row add up to -β log π(y), however long it is",
        "oracles H1: the tower rule",
        check,
    )


def _mean_is_entropy() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, values = _policy(case), each_value(f, case)
        want = beta_of(case) * _entropy(law)
        why = (
            f"its mean over all tokens is {rounded((law * values).sum())[0]}, the entropy {rounded(want)[0]}"
        )
        yield weighed(f, case, law[None], values, want[None], why)

    return Law(
        "expectation",
        "value",
        "its mean over all tokens is the entropy",
        "Shannon 1948",
        check,
        cases=_law_cases,
    )


def _detached() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.grad(case, "logp")
        yield Claim(case, got, "==", torch.zeros_like(got), "a reward is a constant", wrt="logp")

    return Law(
        "detached", "gradient", "no gradient goes through the reward", "oracles P19", check, proves=DETACHED
    )


ENTROPY_REWARD = Kind(
    name="entropy_reward",
    title="an entropy bonus in the reward of each token: -β log π",
    arguments=ARGUMENTS,
    returns="[B, T] in reward units",
    shape=("B", "T"),
    oracle=_reward,
    reducible=True,
    mask="mask",
    measure={"beta": measured_factor((0.5, 2.5, 1.2))},
    laws=(
        formula("the reward of each token is -β log π", WILLIAMS),
        _expected_policy_gradient(),
        _raises(
            "raises_entropy",
            "a step of policy gradient on this reward alone raises the entropy",
            "bugs P12",
            reward=True,
        ),
        _mean_is_entropy(),
        _flat_at_uniform(reward=True),
        _adds_up(),
        relation(
            "linear_in_log_prob",
            "symmetry",
            "twice the log-prob, twice the reward",
            "-log π is what it is",
            lambda c: {**c, "logp": 2 * c["logp"]},
            lambda v, c, f: 2 * v,
        ),
        relation(
            "linear_in_beta",
            "symmetry",
            "three times β, three times the reward",
            "it is a coefficient",
            lambda c: {**c, "beta": 3 * c["beta"]} if "beta" in c else c,
            lambda v, c, f: 3 * v if "beta" in c else v,
            needs=("beta",),
        ),
        relation(
            "certain_token",
            "limit",
            "a certain token is paid nothing",
            "oracles H1",
            lambda c: {**c, "logp": torch.zeros_like(c["logp"])},
            lambda v, c, f: torch.zeros_like(v),
        ),
        _detached(),
        finite_at(
            "rare_tokens",
            "at log-probs of -50 and -1,000 the reward is right",
            "bugs P21",
            lambda: [one_token(z) for z in (-50.0, -1e3)],
        ),
        *mask_laws(ARGUMENTS, differentiable=()),
        empty_row_law(ARGUMENTS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(["logp"]),
    ),
)

KINDS = (SAMPLED_ENTROPY_LOSS, ENTROPY_REWARD)
