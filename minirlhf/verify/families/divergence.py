"""How far the policy is from its reference, estimated from sampled tokens: k1, k2, k3.

s = log π - log π_ref of a token that was drawn from π, and the KL is KL(π‖π_ref). For an estimate of the
other direction, from tokens of π_ref, the arguments are named the other way round (logp="ref_logp", ...).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.one_step import (
    TOKENS,
    close,
    each_value,
    kl,
    law_cases,
    laws_of,
    one_token,
    rounded,
    weighed,
    wide_log_ratios,
)
from minirlhf.verify.kinds import Case, Claim, Convention, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    finite_at,
    formula,
    invariance,
    mask_laws,
    numeric_laws,
    relation,
    table,
)

SCHULMAN = "Schulman 2020, Approximating KL Divergence (joschu.net/blog/kl-approx.html)"
ESTIMATORS = {
    "k1": "k1 = s",
    "k2": "k2 = ½ s²; its value is biased",
    "k3": "k3 = e⁻ˢ - 1 + s",
    "abs": "|s|; a distance, no estimate of a KL",
    "k3 swapped": "k3 of the other direction, eˢ - 1 - s; beware: it estimates KL(π_ref‖π), "
    "and only from tokens drawn from π_ref",
}
CLAMPS = {
    "none": "none",
    "value 10": "the estimate is held within ±10, without gradient beyond",
    "value 20": "the estimate is held within ±20, without gradient beyond",
    "ratio 10": "the log-ratio is held within ±10, without gradient beyond",
    "ratio 20": "the log-ratio is held within ±20, without gradient beyond",
}
LEVELS = {
    "token": "each token by itself",
    "sequence": "log-probs are summed over the sequence first",
}
PRECISE = "precise near zero"
OWN_GRADIENT = "gradient of the estimator"
NO_DEAD_GRADIENT = "gradient far from the reference"
LN2 = math.log(2)


def log_ratio(case: Case, options: Options) -> Tensor:
    """s of each token, or of its row, under the clamp of the options; 0 where nothing counts: [B, T]."""
    s = torch.where(case["mask"], case["logp"], 0.0) - torch.where(case["mask"], case["ref_logp"], 0.0)
    if options.get("level") == "sequence":
        s = torch.where(case["mask"], s.sum(dim=-1, keepdim=True), 0.0)
    limit = {"ratio 10": 10.0, "ratio 20": 20.0}.get(options["clamp"], math.inf)
    return s.clamp(-limit, limit)


def held(value: Tensor, options: Options) -> Tensor:
    """The estimate under the clamp of the options."""
    limit = {"value 10": 10.0, "value 20": 20.0}.get(options["clamp"], math.inf)
    return value.clamp(-limit, limit)


def shared(value: Tensor, case: Case, options: Options) -> Tensor:
    """What is one number for each row, in equal parts on its tokens, so that they add up to it."""
    if options.get("level") != "sequence":
        return value
    return value / case["mask"].sum(dim=-1, keepdim=True).clamp(min=1)


def estimate(s: Tensor, estimator: str) -> Tensor:
    """One of `ESTIMATORS`."""
    if estimator == "k1":
        return s
    if estimator == "k2":
        return 0.5 * s * s
    if estimator == "abs":
        return s.abs()
    return torch.expm1(-s) + s if estimator == "k3" else torch.expm1(s) - s


def _estimator(case: Case, options: Options) -> Tensor:
    return shared(held(estimate(log_ratio(case, options), options["estimator"]), options), case, options)


def _golden(name: str, s: float, statement: str) -> Law:
    k3, other = (0.193147, 0.306853) if s > 0 else (0.306853, 0.193147)
    values = {"k1": s, "k2": 0.240227, "k3": k3, "abs": LN2, "k3 swapped": other}

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        want = torch.full_like(f.value(case), values[f.options["estimator"]], dtype=torch.float64)
        yield Claim(case, f.value(case), "==", want, statement, loose=1e3)

    return Law(name, "value", statement, "oracles 5.3", check, cases=lambda: [one_token(-1.0, -1.0 - s)])


def _in_expectation() -> Law:
    """KL1: over all tokens of a law, weighted by it."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, ref = laws_of(case)
        s, estimator = (policy / ref).log(), f.options["estimator"]
        drawn = ref if estimator == "k3 swapped" else policy
        biased = {
            "k2": (policy * s * s / 2).sum(),
            "abs": (policy * s.abs()).sum(),
            "k3 swapped": kl(ref, policy),
        }
        each, want = each_value(f, case), biased.get(estimator, kl(policy, ref))
        mean, exact = rounded((drawn * each).sum())[0], rounded(kl(policy, ref))[0]
        why = f"its mean over all tokens is {mean}, and KL(π‖π_ref) {exact}"
        yield weighed(f, case, drawn[None], each, want[None], why)

    return Law(
        "expectation",
        "value",
        "summed over all tokens of a law, with its probabilities, k1 and k3 give the KL",
        "oracles KL1; verl #6058",
        check,
        cases=law_cases,
    )


def sequences() -> list[Case]:
    """All responses of up to two tokens, of which the first may be the last: [EOS], [a, EOS], [a, a]."""
    logp = table([0.3, 1.0], [0.7, 0.8], [0.7, 0.2]).log()
    ref_logp = table([0.6, 1.0], [0.4, 0.5], [0.4, 0.5]).log()
    return [
        {
            "logp": logp,
            "ref_logp": ref_logp,
            "mask": torch.tensor([[True, False], [True, True], [True, True]]),
        }
    ]


def _in_expectation_of_sequences() -> Law:
    """KL5: token estimates of all sequences of up to two tokens add up to the KL of sequences."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["estimator"] not in ("k1", "k3"):
            return  # the others are not estimates of this KL, as `expectation` says
        p, q = case["logp"].sum(-1).exp(), case["ref_logp"].sum(-1).exp()
        got = torch.zeros((), dtype=torch.float64)
        for row, t in case["mask"].nonzero().tolist():
            token = one_token(case["logp"][row, t].item(), case["ref_logp"][row, t].item())
            got = got + p[row] * f.value(token).reshape(())
        why = f"E Σ over tokens is {rounded(got)[0]}, the KL of sequences {rounded(kl(p, q))[0]}"
        yield Claim(case, close(got, kl(p, q)), "holds", None, why)

    return Law(
        "expectation_of_sequences",
        "value",
        "the estimates of a sequence's tokens add up to the KL of sequences",
        "oracles KL5: the tower rule",
        check,
        cases=sequences,
    )


def _whose_gradient(f: Probed) -> str:
    """Whether the gradient is the estimator's own, none, or s, put under the value (straight-through)."""
    for s in (1.0, -2.0):  # where these differ
        case = one_token(-1.0, -1.0 - s)
        slope, own = f.grad(case, "logp").item(), f.expected_grad(case, "logp").item()
        if abs(slope - own) > 1e-4:
            return "none" if slope == 0.0 else "k2"
    return "own"


def _gradient_laws() -> tuple[Law, Law]:
    """KL3: 1, s, 1 - e⁻ˢ."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        x = case["logp"].detach().clone().requires_grad_()
        s = log_ratio({**case, "logp": x}, {**f.options, "clamp": "none"})
        whose = _whose_gradient(f)
        if whose == "own":
            want = f.expected_grad(case, "logp")
        else:
            k2 = shared(0.5 * s * s, case, f.options)
            total = f.reduced(k2, case).sum() if whose == "k2" else 0.0 * x.sum()
            (want,) = torch.autograd.grad(total, x)
        why = "∂k/∂log π: 1 of k1, s of k2, 1 - e⁻ˢ of k3; or s of any (straight-through); or none at all"
        yield Claim(case, f.grad(case, "logp"), "==", want, why, wrt="logp")

    def proper(f: Probed, case: Case) -> Iterator[Claim]:
        want = f.expected_grad(case, "logp")
        yield Claim(case, f.grad(case, "logp"), "==", want, "∂k/∂log π of the estimator itself", wrt="logp")

    return (
        Law(
            "gradient_of_logp",
            "gradient",
            "∂k/∂log π is 1 of k1, s of k2, 1 - e⁻ˢ of k3; or s (straight-through); or there is none",
            "oracles KL3, 1.4: a detached log-prob inside k3",
            check,
        ),
        Law(
            "own_gradient",
            "gradient",
            "the gradient is that of the estimator itself",
            "oracles KL3",
            proper,
            proves=OWN_GRADIENT,
            cases=lambda: [one_token(-1.0, -1.0 - s) for s in (1.0, -1.0, 2.0)],
        ),
    )


def _swapped(case: Case) -> Case:
    return {**case, "logp": case["ref_logp"], "ref_logp": case["logp"]}


def _sign() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.value(case)
        if f.options["estimator"] == "k1":
            swapped = _swapped(case)
            yield Claim(swapped, f.value(swapped), "==", -got, "k1 changes its sign with the direction")
        else:
            yield Claim(case, got, ">=", torch.zeros_like(got), "all but k1 are at least 0")

    return Law(
        "sign",
        "limit",
        "k2, k3 and |s| are at least 0 at every token, k1 is antisymmetric",
        "oracles KL2; bugs E13: k3 of the ratio is negative",
        check,
    )


def _both_directions() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        swapped, estimator = _swapped(case), f.options["estimator"]
        s = log_ratio(case, f.options)
        total = {"k1": 0 * s, "k2": s * s, "abs": 2 * s.abs()}.get(estimator, 4 * torch.sinh(s / 2) ** 2)
        if f.options["clamp"].startswith("value") and bool((total.abs() >= 10).any()):
            return  # the clamp acts on one of the two only
        got, want = f.value(swapped), f.reduced(shared(total, case, f.options), case) - f.value(case)
        yield Claim(swapped, got, "==", want, "both directions together: 0, s², 2|s|, or eˢ + e⁻ˢ - 2")

    return Law(
        "both_directions",
        "symmetry",
        "an estimate and that of the other direction add up to 0 (k1), s² (k2), 2|s|, or eˢ + e⁻ˢ - 2 (k3)",
        "oracles KL2",
        check,
    )


def _second_order() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        s = (case["logp"] - case["ref_logp"]).reshape(())
        small = {"k1": s, "abs": s.abs()}.get(f.options["estimator"], s * s / 2)
        got = f.value(case).double().reshape(())
        why = f"at s = {s.item():.2f} it is {got.item():.6f}, to leading order {small.item():.6f}"
        yield Claim(case, (got - small).abs() <= 0.02 * small.abs(), "holds", None, why)

    return Law(
        "near_the_reference",
        "limit",
        "near the reference k2 and k3 are both ½ s²",
        "oracles KL2: k3/k2 → 1",
        check,
        cases=lambda: [one_token(-1.0, -1.0 - s) for s in (0.05, -0.05)],
    )


def _precise() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        single = {**case, "logp": case["logp"].float(), "ref_logp": case["ref_logp"].float()}
        exact = {**single, "logp": single["logp"].double(), "ref_logp": single["ref_logp"].double()}
        got, want = f.value(single).double(), f.expected(exact)
        why = f"in fp32 it is {got.sum().item():.3e}, exactly {want.sum().item():.3e}"
        yield Claim(single, (got - want).abs() <= 0.02 * want.abs(), "holds", None, why)

    return Law(
        "small_log_ratios",
        "numeric",
        "in fp32, at |s| = 1e-3, the estimate is right to 2 %",
        "oracles 1.7: exp(x) - 1 - x is negative for 8 % of tokens",
        check,
        proves=PRECISE,
        cases=lambda: [one_token(-0.5, -0.5 - s) for s in (1e-3, -1e-3, 3e-4, -7e-4)],
    )


def _no_dead_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        why = "at |s| = 12 and 25 the estimate still has a gradient"
        yield Claim(case, f.grad(case, "logp").abs() > 1e-9, "holds", None, why, wrt="logp")

    return Law(
        "no_dead_gradient",
        "gradient",
        "far from the reference the estimate still has a gradient",
        "oracles KL10",
        check,
        proves=NO_DEAD_GRADIENT,
        cases=lambda: [one_token(-1.0, -1.0 - s) for s in (12.0, -12.0, 25.0, -25.0)],
    )


KL_ESTIMATOR = Kind(
    name="kl_estimator",
    title="estimates of KL(π‖π_ref) from the log-probs of sampled tokens",
    arguments=TOKENS,
    returns="[B, T] in nats",
    shape=("B", "T"),
    oracle=_estimator,
    differentiable=("logp",),
    arrange=wide_log_ratios,
    conventions=(
        Convention("estimator", ESTIMATORS),
        Convention("level", LEVELS),
        Convention("clamp", CLAMPS),
    ),
    reducible=True,
    mask="mask",
    laws=(
        formula("the estimate of each token is k1, k2, k3 or |s| of its log-ratio", SCHULMAN),
        _golden("golden_ln2", LN2, "at s = ln 2: k1 .693147, k2 .240227, k3 .193147"),
        _golden("golden_minus_ln2", -LN2, "at s = -ln 2: k1 -.693147, k2 .240227, k3 .306853"),
        _in_expectation(),
        _in_expectation_of_sequences(),
        *_gradient_laws(),
        relation(
            "zero_at_reference",
            "limit",
            "0 where policy and reference agree",
            "bugs E12, P9: KL 0 on policy",
            lambda c: {**c, "ref_logp": c["logp"]},
            lambda v, c, f: torch.zeros_like(v),
        ),
        _sign(),
        _both_directions(),
        invariance(
            "common_shift",
            "symmetry",
            "only the difference of the log-probs counts",
            "s = log π - log π_ref",
            lambda c: {**c, "logp": c["logp"] - 1.5, "ref_logp": c["ref_logp"] - 1.5},
            loose=10.0,
        ),
        _second_order(),
        _precise(),
        finite_at(
            "large_log_ratios",
            "at log-ratios of ±20 and ±40 the estimate is right",
            "bugs E14, P21",
            lambda: [one_token(-1.0, -1.0 - s) for s in (20.5, -20.5, 40.0, -40.0)],
        ),
        _no_dead_gradient(),
        *mask_laws(TOKENS, differentiable=("logp",)),
        empty_row_law(TOKENS),
        *batch_laws(TOKENS),
        *numeric_laws(["logp", "ref_logp"]),
    ),
)

KINDS = (KL_ESTIMATOR,)
