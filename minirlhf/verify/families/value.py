"""Losses of the critic: half the squared error to the return, plain, and clipped around the old value."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import MASK_NAMES, NEAR, STRATA
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Kind, Law, Mask, Numbers, Options, Probed, Reals
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
    relation,
    table,
)
from minirlhf.verify.token_laws import counted, micro_batches, nan_not_passed_on, token_order, weights

SCHULMAN = "Schulman et al. 2017, Eq. 9 (arXiv:1707.06347)"
ENGSTROM = "Engstrom et al. 2020, section 3 (arXiv:2005.12729)"
VALUE = Argument("value", ("B", "T"), Reals(-1.5, 1.5, special=(0.0, *STRATA[:6])), "V before each token",
                 synonyms=("vpred", "vpreds", "vf_preds", "v", "new_value", "new_values", "newvalue",
                           "newvalues", "predicted_values", "value_preds", "state_values", "phi_values",
                           "critic_values",
                           "pred", "preds", "prediction", "predictions", "current_values", "v_pred",
                           "values"))  # fmt: skip
OLD_VALUE = Argument("old_value", ("B", "T"), Reals(-2.0, 2.0),
                     "V of the same tokens when the rollout was collected",
                     synonyms=("old_values", "values_old", "value_old", "v_old", "old_v", "mb_values",
                               "b_values",
                               "rollout_values", "phi_old_values", "prev_values", "old_vpreds", "old_preds",
                               "old_value_preds", "values", "value_preds_batch"))  # fmt: skip
RETURN = Argument("ret", ("B", "T"), Reals(-2.0, 2.0), "the return that V should predict",
                  synonyms=("returns", "return_", "target", "targets", "mb_returns", "b_returns",
                            "value_targets",
                            "value_target", "td_targets", "r", "rets", "return_batch",
                            "v_target"))  # fmt: skip
MASK = Argument("mask", ("B", "T"), Mask(), "True = counts",
                synonyms=(*MASK_NAMES, "value_mask", "value_padding_masks", "value_masks"),
                neutral=lambda case: torch.ones_like(case["value"], dtype=torch.bool))  # fmt: skip
CLIP = Argument("clip", (), Numbers((0.2, 0.3, 0.55), usual=(0.2, 0.5, 0.1)), "ε > 0, in reward units",
                synonyms=("cliprange_value", "clip_range_vf", "clip_range_value", "value_clip",
                          "value_clip_range",
                          "value_cliprange", "clip_value", "clip_eps", "vf_clip", "vf_clip_param",
                          "value_clip_eps",
                          "clip_coef", "cliprange", "clip_range", "eps", "epsilon", "clip_epsilon",
                          "eps_clip",
                          "value_eps_clip", "clip_param", "vf_clip_coef"))  # fmt: skip
PLAIN = (VALUE, RETURN, MASK)
CLIPPED = (VALUE, OLD_VALUE, RETURN, MASK)
FACTORS = {1.0: "half the squared error", 2.0: "the squared error", 0.5: "a quarter of the squared error"}


def _squared(case: Case, options: Options) -> Tensor:
    return 0.5 * counted(case["value"] - case["ret"], case) ** 2


def _clipped(case: Case, options: Options) -> Tensor:
    old, ret = counted(case["old_value"], case), counted(case["ret"], case)
    value = counted(case["value"], case)
    near = torch.minimum(torch.maximum(value, old - case["clip"]), old + case["clip"])
    return 0.5 * torch.maximum((value - ret) ** 2, (near - ret) ** 2)


def _arranged(case: Case) -> Case:
    """V and R relative to the old value; codes of V are just inside and outside of the clip, and far off.

    The factors keep V, R and the clip from meeting where the gradient has a kink and right losses differ.
    """
    clip = case.get("clip", 0.2)
    offset = 0.9 * case["value"]
    near = (clip + NEAR, clip - NEAR, -clip - NEAR, -clip + NEAR, 2.7, -2.7)
    for code, distance in zip(STRATA, near, strict=False):
        offset = torch.where(case["value"] == code, distance, offset)
    if "old_value" not in case:
        return {**case, "value": offset}
    old = case["old_value"]
    return {**case, "value": old + offset, "ret": old + 0.93 * case["ret"]}


def _shifted(case: Case) -> Case:
    return case | {name: case[name] + 1.75 for name in ("value", "old_value", "ret") if name in case}


def _scaled(case: Case, factor: float) -> Case:
    changed = case | {name: factor * case[name] for name in ("value", "old_value", "ret") if name in case}
    return changed | ({"clip": abs(factor) * case["clip"]} if "clip" in case else {})


def _at_target(f: Probed, case: Case) -> Iterator[Claim]:
    there = case | {"ret": case["value"].clone()}
    if "old_value" in case:
        there["old_value"] = case["value"].clone()
    zero = torch.zeros_like(f.value(there))
    yield Claim(there, f.value(there), "==", zero, "V = R: no loss")
    none = torch.zeros_like(case["value"])
    yield Claim(there, f.grad(there, "value"), "==", none, "V = R: no gradient", wrt="value")


def _numbers_scale(f: Probed, case: Case) -> Iterator[Claim]:
    for factor in (2.0, -3.0):
        changed = _scaled(case, factor)
        if f.able(changed):
            why = f"in a unit {factor:g} times as large the loss is {factor**2:g} times as large"
            yield Claim(changed, f.value(changed), "==", factor**2 * f.value(case), why)


def _common_laws(arguments: tuple[Argument, ...]) -> tuple[Law, ...]:
    reals = [a.name for a in arguments if isinstance(a.domain, Reals)]
    return (
        bounded("not_negative", "limit", "an error is never negative", "a square", ">=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        Law("nothing_at_the_target", "limit", "where V = R (= V_old) neither loss nor gradient", "oracles V1",
            _at_target),
        invariance("translation", "symmetry",
                   "the same constant added to all values and returns changes nothing",
                   "oracles V4", _shifted, gradients=("value",)),
        Law("units", "symmetry", "values, returns (and clip) times c: the loss times c²", "oracles V5",
            _numbers_scale),
        token_order(arguments, gradients=("value",)),
        micro_batches(arguments),
        *batch_laws(arguments),
        *mask_laws(arguments, differentiable=("value",)),
        nan_not_passed_on(arguments),
        empty_row_law(arguments),
        *numeric_laws(reals),
    )  # fmt: skip


def _exchanged(case: Case) -> Case:
    return {**case, "value": case["ret"], "ret": case["value"]}


def _convex(f: Probed, case: Case) -> Iterator[Claim]:
    other = {**case, "value": case["value"].flip(-1) + 0.5}
    middle = {**case, "value": (case["value"] + other["value"]) / 2}
    mean = (f.value(case) + f.value(other)) / 2
    yield Claim(middle, f.value(middle), "<=", mean, "midway at most the mean of both losses")


def _quadratic(f: Probed, case: Case) -> Iterator[Claim]:
    """Second differences of ½ (V - R)² are 1, whatever V and R."""
    up, down = ({**case, "value": case["value"] + step} for step in (0.5, -0.5))
    curvature = f.value(up) + f.value(down) - 2 * f.value(case)
    ones = counted(torch.ones_like(case["value"]), case)
    want = f.reduced(0.25 * ones, case) + 2 * f.value(case) - f.value(down)
    yield Claim(
        up, curvature + 2 * f.value(case) - f.value(down), "==", want, "second difference 1: a parabola in V"
    )


_POINT: Case = {"mask": torch.ones(3, 1, dtype=torch.bool), "value": table([0.5], [0.5], [-1.0]),
                "ret": table([1.0], [-1.0], [-1.0])}  # fmt: skip

VALUE_LOSS = Kind(
    name="value_loss",
    title="the critic's loss, ½ (V - R)²",
    arguments=PLAIN,
    returns="[B, T] losses in squared reward units",
    shape=("B", "T"),
    oracle=_squared,
    differentiable=("value",),
    arrange=_arranged,
    reducible=True,
    factors=FACTORS,
    mask="mask",
    laws=(
        formula("the loss of each token is ½ (V - R)²", SCHULMAN),
        gradient("value", "∂L/∂V = V - R", SCHULMAN),
        golden("golden_points", _POINT, table([0.125], [1.125], [0.0]), "V = .5, .5, -1 and R = 1, -1, -1",
               "oracles 1.2: half-MSE of (.5, 1) is .125"),
        relation("symmetric", "symmetry", "V and R exchanged: the same", "a squared difference", _exchanged,
                 lambda v, c, f: v),
        Law("parabola", "limit", "its second difference in V is that of ½ V²", "a squared difference",
            _quadratic),
        Law("convex", "limit", "convex in V", "a squared difference", _convex),
        *_common_laws(PLAIN),
    ),
)  # fmt: skip


def _stratified(case: Case) -> Case:
    """V - V_old on both sides of the clip and R on both sides of both, with the case's clip."""
    clip = case["clip"]
    steps = [2.5 * clip, -2.5 * clip, 0.95 * clip, -0.95 * clip, 0.05 * clip, clip + NEAR, -clip - NEAR]
    step, ret = (x.reshape(-1, 1) for x in torch.meshgrid(
        torch.tensor(steps, dtype=torch.float64),
        torch.tensor([5 * clip, -5 * clip, 1.5 * clip, -1.5 * clip], dtype=torch.float64),
        indexing="ij"))  # fmt: skip
    old = torch.full_like(step, 0.25)
    mask = torch.ones_like(step, dtype=torch.bool)
    return {"value": old + step, "old_value": old, "ret": old + ret, "mask": mask, "clip": clip}


def _dead_zone(f: Probed, case: Case) -> Iterator[Claim]:
    there = _stratified(case)
    value, old, ret, clip = (there[name] for name in ("value", "old_value", "ret", "clip"))
    near = old + (value - old).clamp(-clip, clip)
    dead = ((value - old).abs() > clip) & ((near - ret).abs() > (value - ret).abs())
    want = torch.where(dead, 0.0, value - ret) * weights(f, there)
    why = "V - R, but 0 where V left the clip towards R: there the clipped error is larger, and flat"
    yield Claim(there, f.grad(there, "value"), "==", want, why, wrt="value")


def _both_branches(f: Probed, case: Case) -> Iterator[Claim]:
    there = _stratified(case)
    value, old, ret, clip = (there[name] for name in ("value", "old_value", "ret", "clip"))
    near = old + (value - old).clamp(-clip, clip)
    want = f.reduced(0.5 * torch.maximum((value - ret).abs(), (near - ret).abs()) ** 2, there)
    yield Claim(
        there, f.value(there), "==", want, "½ of the larger squared error, of V and of V kept within the clip"
    )


def _within(case: Case) -> Case:
    step = (case["value"] - case["old_value"]).clamp(-0.97 * case["clip"], 0.97 * case["clip"])
    return {**case, "value": case["old_value"] + step}


def _plain(case: Case, f: Probed) -> Tensor:
    return f.reduced(0.5 * counted(case["value"] - case["ret"], case) ** 2, case)


def _mirrored(f: Probed, case: Case) -> Iterator[Claim]:
    changed = _scaled(case, -1.0)
    yield Claim(
        changed,
        f.value(changed),
        "==",
        f.value(case),
        "all signs flipped: the same, so both sides are clipped",
    )


def _measured_clip(ask: Ask) -> float | None:
    """From the loss far above the old value, with a return further up: ½ (R - ε)² against ½ R²."""

    def at(value: float) -> float:
        one = torch.ones(1, 1, dtype=torch.float64)
        return ask({"value": one * value, "old_value": 0 * one, "ret": 10 * one, "mask": one.bool()})

    near, far, further = at(0.0), at(8.0), at(9.0)
    return 10 * (1 - math.sqrt(far / near)) if abs(far - further) < 1e-6 * near else None


_CLIP_POINT: Case = {"mask": torch.ones(4, 1, dtype=torch.bool), "value": table([0.5], [0.5], [-0.5], [0.1]),
                     "old_value": table([0.0], [0.0], [0.0], [0.0]),
                     "ret": table([1.0], [-1.0], [-1.0], [1.0]),
                     "clip": 0.2}  # fmt: skip

CLIPPED_VALUE_LOSS = Kind(
    name="clipped_value_loss",
    title="the critic's clipped loss, ½ max[(V - R)², (clip(V, V_old ± ε) - R)²]",
    arguments=(*CLIPPED, CLIP),
    returns="[B, T] losses in squared reward units",
    shape=("B", "T"),
    oracle=_clipped,
    differentiable=("value",),
    arrange=_arranged,
    reducible=True,
    factors=FACTORS,
    mask="mask",
    measure={"clip": _measured_clip},
    anchor=lambda case: {**case, "value": case["old_value"].clone()},
    laws=(
        formula("the loss of each token is ½ max[(V - R)², (V_clip - R)²]", ENGSTROM),
        gradient("value", "∂L/∂V = V - R, and 0 where the clipped error is the larger one", "oracles V3"),
        golden("golden_points", _CLIP_POINT, table([0.32], [1.125], [0.32], [0.405]),
               "V = .5, .5, -.5, .1 against R = 1, -1, -1, 1 at ε = .2 around 0", "oracles 5.3, V7"),
        Law("dead_zone", "gradient", "no gradient exactly where V left the clip towards the return",
            "oracles V3; RLlib #22171: no gradient anywhere", _dead_zone),
        Law("larger_of_both", "value", "the larger of both errors, on a grid on both sides of every limit",
            "oracles V3; bugs P10: clip truth table", _both_branches),
        relation("plain_at_the_old_value", "limit", "where V = V_old: half the squared error", "oracles V1",
                 lambda c: {**c, "old_value": c["value"].clone()}, lambda v, c, f: _plain(c, f)),
        relation("plain_within_the_clip", "limit", "where V is within the clip: half the squared error",
                 "oracles V1", _within, lambda v, c, f: _plain(_within(c), f)),
        bounded("pessimistic", "limit", "never below the unclipped loss",
                "oracles V2; bugs F02: RLlib #2233, cleanrl d6fd21b4: min for max", ">=", _plain),
        Law("mirrored", "symmetry", "all signs flipped: the same", "a one-sided clip survives random data",
            _mirrored),
        *_common_laws(CLIPPED),
    ),
)  # fmt: skip

KINDS = (VALUE_LOSS, CLIPPED_VALUE_LOSS)
