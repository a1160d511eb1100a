"""CISPO: REINFORCE under a clipped, constant importance weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import (
    ADVANTAGE,
    CLIP_HIGH,
    CLIP_LOW,
    LOGP,
    MASK,
    OLD,
    PER_SEQUENCE,
    arranged,
    at_old,
    grid,
    limits,
    measured_limit,
    near_limits,
    point,
    saturation,
    scaled_advantage,
)
from minirlhf.verify.kinds import Ask, Case, Claim, Convention, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    formula,
    gradient,
    mask_laws,
    numeric_laws,
    table,
)
from minirlhf.verify.token_laws import (
    counted,
    micro_batches,
    nan_not_passed_on,
    no_gradient,
    token_order,
    weights,
)

MINIMAX = "MiniMax 2025, MiniMax-M1, Eq. 4-5 (arXiv:2506.13585)"
TOKENS = (LOGP, OLD, ADVANTAGE, MASK)


def _weight(case: Case, options: Options) -> Tensor:
    """The weight of each token, as the convention has it."""
    low, high, _ = limits(case)
    rho = counted(case["logp"] - case["old_logp"], case).exp().detach()
    if options["band"] == "both":
        return rho.clamp(low, high)
    return rho.clamp(max=high if options["band"] == "upper" else case["clip_high"])


def _cispo(case: Case, options: Options) -> Tensor:
    return -counted(
        _weight(case, options) * counted(case["advantage"], case) * counted(case["logp"], case), case
    )


def _never_silent(f: Probed, case: Case) -> Iterator[Claim]:
    there = grid(case, near_limits(case), (-2.0, -0.5, 0.5, 2.0))
    want = -_weight(there, f.options) * there["advantage"] * weights(f, there)
    why = "-A times the clipped ratio on every token, also beyond the limits"
    yield Claim(there, f.grad(there, "logp"), "==", want, why, wrt="logp")


def _linear_in_logp(f: Probed, case: Case) -> Iterator[Claim]:
    product = f.grad(case, "logp") * counted(case["logp"], case)
    value = f.value(case)
    want = product if f.per_element else product.sum(-1) if f.by_row else product.sum()
    yield Claim(
        case, value, "==", want, "with its weight held fixed the loss is linear in log π: L = log π ∂L/∂log π"
    )


def _bounded_gradient(f: Probed, case: Case) -> Iterator[Claim]:
    _, high, _ = limits(case)
    most = case["clip_high"] if f.options["band"] == "cap" else high
    got = f.grad(case, "logp").abs()
    want = most * counted(case["advantage"].abs(), case) * weights(f, case)
    yield Claim(case, got, "<=", want, "no token pulls harder than the upper limit times |A|", wrt="logp")


def _opposite(f: Probed, case: Case) -> Iterator[Claim]:
    changed = {**case, "advantage": -case["advantage"]}
    yield Claim(changed, f.value(changed), "==", -f.value(case), "the opposite advantages: the opposite loss")


def _additive(f: Probed, case: Case) -> Iterator[Claim]:
    other = {**case, "advantage": case["advantage"].square() - 0.5}
    both = {**case, "advantage": case["advantage"] + other["advantage"]}
    yield Claim(both, f.value(both), "==", f.value(case) + f.value(other), "L(A + A') = L(A) + L(A')")


def _reinforce(f: Probed, case: Case) -> Iterator[Claim]:
    start = at_old(case)
    weight = case["clip_high"] if f.options["band"] == "cap" and case["clip_high"] < 1 else 1.0
    elements = -weight * counted(start["advantage"] * start["logp"], start)
    yield Claim(
        start, f.value(start), "==", f.reduced(elements, start), "at ratio 1 it is REINFORCE, -A log π"
    )
    want = -weight * counted(start["advantage"], start) * weights(f, start)
    yield Claim(start, f.grad(start, "logp"), "==", want, "and its gradient -A", wrt="logp")


def _gradient_shift(f: Probed, case: Case) -> Iterator[Claim]:
    changed = {**case, "logp": case["logp"] + 0.75, "old_logp": case["old_logp"] + 0.75}
    want, why = f.grad(case, "logp"), "a constant added to both log-probs leaves the gradient"
    yield Claim(changed, f.grad(changed, "logp"), "==", want, why, wrt="logp")


def _token_stable(f: Probed, case: Case) -> Iterator[Claim]:
    for log_ratio in (19.0, -19.0, 800.0, -800.0):
        there = {**case, "old_logp": case["logp"] - log_ratio}
        why = "a weight never overflows: it is cut"
        yield Claim(there, f.value(there), "==", f.expected(there), why)
        yield Claim(there, f.grad(there, "logp"), "==", f.expected_grad(there, "logp"), why, wrt="logp")


def _measured_low(ask: Ask) -> float | None:
    """1 - the lower limit; 1, which cuts nothing, where the weight goes on falling."""
    limit = saturation(lambda x: point(x, 1.0), ask, -4.0)
    return 1.0 if limit is None else 1 - limit


_CISPO_GOLDEN: Case = {
    "logp": table([-1.0], [-2.0], [-1.0], [-0.5]),
    "old_logp": table([-10.0], [-2.0], [0.0], [-0.5 - 0.0953101798043249]),
    "advantage": table([2.0], [-1.0], [1.0], [1.0]),
    "mask": torch.ones(4, 1, dtype=torch.bool),
    "clip_low": 0.2,
    "clip_high": 0.2,
}


def _golden_tokens(f: Probed, case: Case) -> Iterator[Claim]:
    lowest = 0.8 if f.options["band"] == "both" else 0.36787944117
    if f.options["band"] == "cap":  # its clip_high is the limit itself, and .2 would be below 1
        return
    want = f.reduced(table([2.4], [-2.0], [lowest], [0.55]), case)
    why = "ratios e⁹, 1, e⁻¹, 1.1 with A = 2, -1, 1, 1 and log π = -1, -2, -1, -.5"
    yield Claim(case, f.value(case), "==", want, why, loose=1e3)


CISPO = Kind(
    name="cispo",
    title="CISPO, -sg(clip(ρ)) A log π",
    arguments=(*TOKENS, CLIP_LOW, CLIP_HIGH),
    returns="[B, T] losses",
    shape=("B", "T"),
    oracle=_cispo,
    differentiable=("logp",),
    arrange=arranged,
    reducible=True,
    signed=True,
    mask="mask",
    measure={"clip_low": _measured_low, "clip_high": measured_limit(1.0, 4.0, -1.0, 1.0)},
    conventions=(
        Convention("band", {"both": "the weight is cut at 1 - clip_low and at 1 + clip_high",
                            "upper": "the weight is cut at 1 + clip_high only",
                            "cap": "the weight is cut at clip_high itself only"}),
    ),
    dialects=(PER_SEQUENCE,),
    anchor=at_old,
    laws=(
        formula("the loss of each token is -sg(clip(ρ)) A log π", MINIMAX),
        gradient("logp", "∂L/∂log π = -clip(ρ) A, for every token", "oracles P21; open-instruct #1269"),
        Law("golden_tokens", "value", "four tokens at ε = .2: 2.4, -2, .8, .55", MINIMAX, _golden_tokens,
            cases=lambda: [_CISPO_GOLDEN]),
        Law("never_silent", "gradient", "a clipped token keeps the gradient of the limit",
            "oracles P21; bugs G01",
            _never_silent),
        Law("linear_in_logp", "identity", "L = log π · ∂L/∂log π: the weight is a constant", "bugs G01",
            _linear_in_logp),
        Law("bounded_gradient", "gradient", "|∂L/∂log π| <= upper limit · |A|", MINIMAX, _bounded_gradient),
        no_gradient("old_logp", "the stop-gradient of the weight", proves="detached old_logp"),
        Law("reinforce_at_ratio_1", "limit", "at ratio 1 it is REINFORCE",
            "oracles 2.17: PPO(ρ=1) = REINFORCE",
            _reinforce),
        Law("odd_in_advantage", "symmetry", "the opposite advantages: the opposite loss, unlike PPO", MINIMAX,
            _opposite),
        Law("additive_in_advantage", "symmetry", "L(A + A') = L(A) + L(A') at any ratio", "bugs B10, P17",
            _additive),
        *scaled_advantage(),
        Law("gradient_of_shifted", "symmetry", "a constant added to log π and log π_old leaves the gradient",
            "oracles P9", _gradient_shift),
        Law("stable", "numeric", "value and gradient are right at log ratios of ±19 and ±800",
            "bugs P21, E14",
            _token_stable),
        token_order(TOKENS, gradients=("logp",)),
        micro_batches(TOKENS),
        *batch_laws(TOKENS),
        *mask_laws(TOKENS, differentiable=("logp",)),
        nan_not_passed_on(TOKENS),
        empty_row_law(TOKENS),
        *numeric_laws(("logp", "old_logp", "advantage")),
    ),
)  # fmt: skip

KINDS = (CISPO,)
