"""The policy gradient, as it is (REINFORCE) and as PPO bounds it (the clipped surrogate)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import (
    ADVANTAGE,
    CLIP_HIGH,
    CLIP_LOW,
    LOGP,
    MASK,
    NEAR,
    OLD,
    PER_SEQUENCE,
    additive_at_old,
    arranged,
    at_old,
    grid,
    limits,
    measured_limit,
    near_limits,
    policy_gradient_at_old,
    ratio,
    scaled_advantage,
)
from minirlhf.verify.kinds import (
    Argument,
    Case,
    Claim,
    Convention,
    Kind,
    Law,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    empty_row_law,
    formula,
    golden,
    gradient,
    invariance,
    mask_laws,
    numeric_laws,
    table,
)
from minirlhf.verify.token_laws import counted, micro_batches, nan_not_passed_on, token_order, weights

SCHULMAN = "Schulman et al. 2017, Eq. 7 (arXiv:1707.06347)"
YE = "Ye et al. 2020, dual-clip PPO (arXiv:1912.09729)"
WILLIAMS = "Williams 1992, REINFORCE; Sutton et al. 2000, the policy gradient theorem"
DUAL_CLIP = Argument("dual_clip", (), Numbers((3.0, 2.0, 5.0)), "c > 1: ρ is cut at c where A < 0",
                     optional=True,
                     neutral=lambda case: 1e12,
                     synonyms=("clip_ratio_c", "dual_clip_c", "dual_clip_coef", "dual_clip_ratio",
                               "dual_clip_eps",
                               "delta", "clip_c", "dual_clip_loss_ratio"))  # fmt: skip
TOKENS = (LOGP, OLD, ADVANTAGE, MASK)
LARGE = "log ratios of ±800"


def _surrogate(case: Case, options: Options) -> Tensor:
    rho = (counted(case["logp"], case) - counted(case["old_logp"], case)).exp()
    advantage = counted(case["advantage"], case)
    low, high, dual = limits(case)
    surrogate = torch.minimum(rho * advantage, rho.clamp(low, high) * advantage)
    bounded_below = torch.maximum(surrogate, dual * advantage)
    return -counted(torch.where(advantage < 0, bounded_below, surrogate), case)


def _dead_zone(f: Probed, case: Case) -> Iterator[Claim]:
    there = grid(case, near_limits(case), (-2.0, -0.5, 0.5, 2.0))
    low, high, dual = limits(case)
    rho, advantage = ratio(there), there["advantage"]
    dead = ((advantage > 0) & (rho > high)) | ((advantage < 0) & ((rho < low) | (rho > dual)))
    want = torch.where(dead, 0.0, -advantage * rho) * weights(f, there)
    why = "0 if A > 0 and ρ > 1 + ε_high, or A < 0 and ρ < 1 - ε_low (or ρ > c), else -A ρ"
    yield Claim(there, f.grad(there, "logp"), "==", want, why, wrt="logp")


def _flat(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, _ = limits(case)
    for advantage, near, far in ((1.5, high + NEAR, 30.0), (-1.5, low - NEAR, 0.01)):
        there, further = grid(case, [near], [advantage]), grid(case, [far], [advantage])
        why = "beyond the limit the loss no longer changes: it is -A times the limit"
        yield Claim(further, f.value(further), "==", f.value(there), why)
        limit = high if advantage > 0 else low
        yield Claim(
            there, f.value(there), "==", f.reduced(-advantage * limit * weights_of(there), there), why
        )


def weights_of(case: Case) -> Tensor:
    """Ones [B, T] where the mask is True."""
    return counted(torch.ones_like(case["logp"]), case)


def _unclipped(case: Case, f: Probed) -> Tensor:
    """-ρ A, and where a dual clip bounds it no more than c |A|."""
    dual, advantage = limits(case)[2], counted(case["advantage"], case)
    plain = -counted(ratio(case), case) * advantage
    return f.reduced(torch.where(advantage < 0, torch.minimum(plain, -dual * advantage), plain), case)


def _two_signs(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, dual = limits(case)
    rho, advantage = counted(ratio(case), case), counted(case["advantage"], case)
    negated = {**case, "advantage": -case["advantage"]}
    kept = rho.clamp(min=low, max=dual) - rho.clamp(max=high)
    want = f.reduced(advantage.abs() * kept, case) - f.value(case)
    why = "L(A) + L(-A) = |A| times how far ρ lies outside of the limits: not an odd function"
    yield Claim(negated, f.value(negated), "==", want, why)


def _one_sided(side: str, sign: float) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        signed = {**case, "advantage": sign * case["advantage"].abs()}
        changed = signed | {side: case[side] / 2}
        if f.able(changed):
            why = f"{side} does not concern advantages of this sign"
            yield Claim(changed, f.value(changed), "==", f.value(signed), why)
            yield Claim(changed, f.grad(changed, "logp"), "==", f.grad(signed, "logp"), why, wrt="logp")

    which = "negative" if sign > 0 else "positive"
    return Law(f"{side}_is_for_{which}_advantages", "symmetry", f"{side} acts on {which} advantages only",
               "Yu et al. 2025, DAPO (arXiv:2503.14476); oracles P16", check, (side,))  # fmt: skip


def _within(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, _ = limits(case)
    margin = 0.05 * (high - low)
    near = ratio(case).clamp(low + margin, high - margin)
    inside = {**case, "logp": case["old_logp"] + near.log()}
    why = "every ratio within the limits: -ρ A, the importance-weighted loss"
    yield Claim(inside, f.value(inside), "==", f.reduced(-counted(near * case["advantage"], case), case), why)


def _convex(f: Probed, case: Case) -> Iterator[Claim]:
    if "dual_clip" in case:
        return
    other = {**case, "logp": case["old_logp"] + (case["logp"] - case["old_logp"]).flip(-1)}
    middle = {**case, "logp": case["old_logp"] + ((ratio(case) + ratio(other)) / 2).log()}
    want = (f.value(case) + f.value(other)) / 2
    yield Claim(
        middle, f.value(middle), "<=", want, "midway between two ratios at most the mean of both losses"
    )


def _dual(f: Probed, case: Case) -> Iterator[Claim]:
    cap = case["dual_clip"] if "dual_clip" in case else 2.5
    negative = {**case, "advantage": -case["advantage"].abs(), "dual_clip": cap}
    most = f.reduced(cap * counted(case["advantage"].abs(), case), case)
    yield Claim(negative, f.value(negative), "<=", most, "never more than c |A|")
    positive = {**case, "advantage": case["advantage"].abs(), "dual_clip": cap}
    plain = {name: value for name, value in positive.items() if name != "dual_clip"}
    yield Claim(positive, f.value(positive), "==", f.value(plain), "where A >= 0 dual clip changes nothing")


def _far(case: Case, log_ratio: float, advantages: tuple[float, ...]) -> Case:
    there = grid(case, [1.0], advantages)
    return {**there, "logp": there["old_logp"] + log_ratio}


def _stable(f: Probed, case: Case) -> Iterator[Claim]:
    for log_ratio in (19.0, -19.0):
        there = _far(case, log_ratio, (-1.5, 0.75))
        why = "at log ratios of ±19 value and gradient are the formula's"
        yield Claim(there, f.value(there), "==", f.expected(there), why)
        yield Claim(there, f.grad(there, "logp"), "==", f.expected_grad(there, "logp"), why, wrt="logp")


def _overflow(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, _ = limits(case)
    for log_ratio, advantage, limit in ((800.0, 0.75, high), (-800.0, -1.5, low), (-800.0, 0.75, 0.0)):
        there = _far(case, log_ratio, (advantage,))
        want = f.reduced(-advantage * limit * weights_of(there), there)
        yield Claim(there, f.value(there), "==", want, "-A times the limit, however far the ratio is")
        flat = torch.zeros_like(there["logp"])
        yield Claim(there, f.grad(there, "logp"), "==", flat, "and no gradient, not 0 · inf", wrt="logp")


_GOLDEN: Case = {
    "logp": table([1.5], [1.5], [0.5], [0.5], [1.1]).log(),
    "old_logp": torch.zeros(5, 1, dtype=torch.float64),
    "advantage": table([1.0], [-1.0], [1.0], [-1.0], [2.0]),
    "mask": torch.ones(5, 1, dtype=torch.bool),
    "clip_low": 0.2,
    "clip_high": 0.2,
}
_GOLDEN_DUAL: Case = _GOLDEN | {
    "logp": table([5.0], [2.0], [5.0], [0.5], [2.9]).log(),
    "advantage": table([-1.0], [-1.0], [1.0], [-1.0], [-2.0]),
    "dual_clip": 3.0,
}

CLIPPED_SURROGATE = Kind(
    name="clipped_surrogate",
    title="PPO's clipped surrogate, -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)",
    arguments=(*TOKENS, CLIP_LOW, CLIP_HIGH, DUAL_CLIP),
    returns="[B, T] losses in units of the advantage",
    shape=("B", "T"),
    oracle=_surrogate,
    differentiable=("logp",),
    arrange=arranged,
    reducible=True,
    signed=True,
    mask="mask",
    measure={
        "clip_low": measured_limit(-1.0, -4.0, 1.0, -1.0),
        "clip_high": measured_limit(1.0, 4.0, -1.0, 1.0),
        "dual_clip": measured_limit(-1.0, 5.0, 0.0, 1.0),
    },
    dialects=(PER_SEQUENCE,),
    anchor=at_old,
    laws=(
        formula("the loss of each token is -min(ρ A, clip(ρ) A)", SCHULMAN),
        gradient("logp", "∂L/∂log π = -ρ A, and 0 in the dead zone", "oracles P3"),
        golden("golden_points", _GOLDEN, table([-1.2], [1.5], [-0.5], [0.8], [-2.2]),
               "(ρ, A) = (1.5, 1), (1.5, -1), (.5, 1), (.5, -1), (1.1, 2) at ε = .2",
               "oracles 5.3; bugs G03"),
        golden("golden_dual_clip", _GOLDEN_DUAL, table([3.0], [2.0], [-1.2], [0.8], [5.8]),
               "c = 3: (5, -1) -> 3, (2, -1) -> 2", "oracles 5.3"),
        Law("dead_zone", "gradient", "no gradient exactly where a step would lead further out of the limits",
            "oracles P3, P10; bugs P10: clip truth table", _dead_zone),
        Law("flat_beyond_the_limit", "limit", "beyond the limit the loss is -A times the limit", "oracles P3",
            _flat),
        *policy_gradient_at_old(),
        additive_at_old(),
        *scaled_advantage(),
        Law("two_signs", "symmetry", "L(A) + L(-A) = |A| · (distance of ρ from the limits)",
            "oracles P6: not odd; bugs G03: clipped before multiplying", _two_signs),
        bounded("pessimistic", "limit", "never below the importance-weighted loss -ρ A",
                "oracles P4; bugs Z03: min and max swapped", ">=", lambda c, f: _unclipped(c, f)),
        Law("within_the_limits", "limit", "where no ratio reaches a limit it is -ρ A", "oracles P5", _within),
        _one_sided("clip_low", 1.0),
        _one_sided("clip_high", -1.0),
        invariance("shift_of_both", "symmetry", "a constant added to log π and log π_old changes nothing",
                   "oracles P9", lambda c: {**c, "logp": c["logp"] + 0.75, "old_logp": c["old_logp"] + 0.75},
                   gradients=("logp",)),
        Law("convex_in_the_ratio", "limit", "convex in ρ, since the surrogate is concave", "oracles P8",
            _convex),
        Law("dual_clip_bounds", "limit", "with dual clip c: at most c |A| where A < 0, unchanged elsewhere",
            f"oracles P15; {YE}", _dual, ("dual_clip",)),
        Law("stable", "numeric", "value and gradient are right at log ratios of ±19", "bugs P21, E14",
            _stable),
        Law("no_overflow", "numeric", "value and gradient are right at log ratios of ±800",
            "bugs E14: exp overflows",
            _overflow, proves=LARGE),
        token_order(TOKENS, gradients=("logp",)),
        micro_batches(TOKENS),
        *batch_laws(TOKENS),
        *mask_laws(TOKENS, differentiable=("logp",)),
        nan_not_passed_on(TOKENS),
        empty_row_law(TOKENS),
        *numeric_laws(("logp", "old_logp", "advantage")),
    ),
)  # fmt: skip

_ON_POLICY = (LOGP._replace(domain=Reals(-6.0, 0.0)), ADVANTAGE, MASK)


def _reinforce(case: Case, options: Options) -> Tensor:
    logp = counted(case["logp"], case)
    weight = logp if options["value"] == "logp" else (logp - logp.detach()).exp()
    return -counted(counted(case["advantage"], case) * weight, case)


def _negated(f: Probed, case: Case) -> Iterator[Claim]:
    changed = {**case, "advantage": -case["advantage"]}
    yield Claim(changed, f.value(changed), "==", -f.value(case), "the opposite advantages: the opposite loss")


def _baseline(f: Probed, case: Case) -> Iterator[Claim]:
    """One row per action of a policy with these logits: the expected gradient, exactly."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    policy = torch.log_softmax(logits, 0)
    for reward, why in ((torch.ones(3), "a constant advantage has no expected gradient"),
                        (torch.tensor([1.0, -0.5, 2.0]),
                         "the expected gradient is that of -E[A]")):  # fmt: skip
        there = {**case, "logp": policy.detach()[:, None], "advantage": reward.double()[:, None]}
        score = f.grad(there, "logp") / weights(f, there)
        (got,) = torch.autograd.grad(
            (policy.exp().detach() * score[:, 0] * policy).sum(), logits, retain_graph=True
        )
        (want,) = torch.autograd.grad(-(policy.exp() * reward).sum(), logits, retain_graph=True)
        yield Claim(there, (got - want).abs() < 1e-6, "holds", None, why)


_THREE_ACTIONS: Case = {
    "logp": table([-1.0], [-1.0], [-1.0]),
    "advantage": table([1.0], [1.0], [1.0]),
    "mask": torch.ones(3, 1, dtype=torch.bool),
}

POLICY_GRADIENT = Kind(
    name="policy_gradient",
    title="REINFORCE, -A log π",
    arguments=_ON_POLICY,
    returns="[B, T] losses",
    shape=("B", "T"),
    oracle=_reinforce,
    differentiable=("logp",),
    reducible=True,
    signed=True,
    mask="mask",
    conventions=(Convention("value", {"logp": "-A log π", "ratio": "-A π/sg(π), the gradient's value is -A"}),
                 ),
    dialects=(PER_SEQUENCE,),
    laws=(
        formula("the loss of each token is -A log π", WILLIAMS),
        gradient("logp", "∂L/∂log π = -A", WILLIAMS),
        Law("gradient_without_logp", "gradient", "the gradient is -A, whatever log π is",
            "oracles 2.17: PPO(ρ=1)",
            lambda f, c: iter([Claim(c, f.grad(c, "logp"), "==", -c["advantage"] * weights(f, c), "-A",
                                     wrt="logp")])),
        Law("expected_gradient", "identity",
            "over all actions the gradient of -E[A]; 0 for a constant advantage",
            "the score function identity; bugs: mlx-lm-lora #49", _baseline, cases=lambda: [_THREE_ACTIONS]),
        Law("odd_in_advantage", "symmetry", "the opposite advantages: the opposite loss", WILLIAMS, _negated),
        Law("additive_in_advantage", "symmetry", "L(A + A') = L(A) + L(A')", "bugs B10, P17",
            additive_at_old().check),
        *scaled_advantage(),
        token_order(_ON_POLICY, gradients=("logp",)),
        micro_batches(_ON_POLICY),
        *batch_laws(_ON_POLICY),
        *mask_laws(_ON_POLICY, differentiable=("logp",)),
        nan_not_passed_on(_ON_POLICY),
        empty_row_law(_ON_POLICY),
        *numeric_laws(("logp", "advantage")),
    ),
)  # fmt: skip

KINDS = (CLIPPED_SURROGATE, POLICY_GRADIENT)
