"""GSPO: PPO's clipped surrogate with one ratio per sequence."""

import math
from collections.abc import Callable, Iterator

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
    STRATA,
    additive_at_old,
    at_old,
    edges,
    grid,
    limits,
    log_ratios,
    measured_limit,
    near_limits,
    policy_gradient_at_old,
    ratio,
    scaled_advantage,
)
from minirlhf.verify.kinds import Ask, Case, Claim, Dialect, Kind, Law, Layout, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    formula,
    golden,
    gradient,
    invariance,
    mask_laws,
    numeric_laws,
    table,
)
from minirlhf.verify.token_laws import (
    counted,
    micro_batches,
    per_row,
    token_order,
    token_repeated,
    weights,
    without,
)

ZHENG = "Zheng et al. 2025, GSPO, Eq. 5-7 (arXiv:2507.18071)"
SEQUENCES = (LOGP, OLD, ADVANTAGE._replace(shape=("B",), meaning="A of each sequence"), MASK)


def _lengths(case: Case) -> Tensor:
    return case["mask"].sum(-1).clamp(min=1)


def _shares(case: Case) -> Tensor:
    """What part of its sequence each token is: [B, T]."""
    return counted(torch.ones_like(case["logp"]), case) / _lengths(case)[:, None]


def _mean_log_ratio(case: Case) -> Tensor:
    """log s of each sequence: [B]."""
    return counted(case["logp"] - case["old_logp"], case).sum(-1) / _lengths(case)


def _gspo(case: Case, options: Options) -> Tensor:
    low, high, _ = limits(case)
    losses = []
    for logp, old, advantage, mask in zip(*(case[a.name] for a in SEQUENCES), strict=True):
        s = (logp[mask] - old[mask]).mean().exp() if bool(mask.any()) else logp.new_ones(())
        loss = -torch.minimum(s * advantage, s.clamp(low, high) * advantage)
        losses.append(loss if bool(mask.any()) else 0.0 * loss)
    return torch.stack(losses)


def _arranged_rows(case: Case) -> Case:
    """A code in the first column moves the whole row, so that its geometric mean is the ratio meant."""
    codes, ratios = case["logp"], edges(case)
    log_rho = torch.where(codes >= STRATA[0], 0.125 * (codes - 13), codes)
    moved = {**case, "logp": case["old_logp"] + log_rho}
    meant = log_ratios(codes[:, 0], ratios)
    shift = torch.where(codes[:, 0] >= STRATA[0], meant - _mean_log_ratio(moved), 0.0)
    return {**moved, "logp": moved["logp"] + shift[:, None]}


def _row_grid(case: Case) -> Case:
    """Two tokens per row: the ratios of `grid`, reached unevenly."""
    flat = grid(case, near_limits(case), (-2.0, -0.5, 0.5, 2.0))
    old, uneven = flat["old_logp"].repeat(1, 2), torch.tensor([0.4, -0.4], dtype=torch.float64)
    numbers = {"clip_low": case["clip_low"], "clip_high": case["clip_high"]}
    mask = torch.ones_like(old, dtype=torch.bool)
    return {"logp": flat["logp"] + uneven, "old_logp": old, "advantage": flat["advantage"][:, 0],
            "mask": mask, **numbers}  # fmt: skip


def _row_dead_zone(f: Probed, case: Case) -> Iterator[Claim]:
    there = _row_grid(case)
    low, high, _ = limits(case)
    s, advantage = _mean_log_ratio(there).exp(), there["advantage"]
    dead = ((advantage > 0) & (s > high)) | ((advantage < 0) & (s < low))
    per_sequence = torch.where(dead, 0.0, -advantage * s) * weights(f, there, per_row)
    want = per_sequence[:, None].expand(-1, 2) / 2
    why = "-s A/|y| on every token, or 0 on all where s is beyond the limit that a step would lead away from"
    yield Claim(there, f.grad(there, "logp"), "==", want, why, wrt="logp")


def _constant_within(f: Probed, case: Case) -> Iterator[Claim]:
    got = f.grad(case, "logp")
    want = counted((counted(got, case).sum(-1) / _lengths(case))[:, None].expand_as(got), case)
    yield Claim(case, got, "==", want, "the same gradient on every token of a sequence", wrt="logp")


def _one_token(f: Probed, case: Case) -> Iterator[Claim]:
    first = torch.nn.functional.one_hot(case["mask"].int().argmax(-1), case["mask"].shape[-1]).bool()
    single = {**case, "mask": first}
    if not f.able(single):
        return
    low, high, _ = limits(case)
    rho, advantage = ratio(case)[first], case["advantage"]
    want = f.reduced(-torch.minimum(rho * advantage, rho.clamp(low, high) * advantage), single)
    yield Claim(single, f.value(single), "==", want, "one token per sequence: PPO's clipped surrogate")


def _redistributed(case: Case) -> Case:
    shift = torch.arange(case["logp"].numel(), dtype=torch.float64).reshape(case["logp"].shape).sin()
    shift = counted(shift - (counted(shift, case).sum(-1) / _lengths(case))[:, None], case)
    return {**case, "logp": case["logp"] + shift}


def _uniform(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, _ = limits(case)
    for rho in (1.07, high + NEAR, low - NEAR):
        there = {**case, "logp": case["old_logp"] + math.log(rho)}
        advantage = case["advantage"]
        want = f.reduced(-torch.minimum(rho * advantage, min(max(rho, low), high) * advantage), there)
        why = "every token has the same ratio: so has the sequence, however long it is"
        yield Claim(there, f.value(there), "==", want, why)


def _within(f: Probed, case: Case) -> Iterator[Claim]:
    low, high, _ = limits(case)
    mean = _mean_log_ratio(case)
    margin = 0.05 * (high - low)
    near = mean.exp().clamp(low + margin, high - margin)
    inside = {**case, "logp": case["logp"] + (near.log() - mean)[:, None]}
    why = "every sequence within the limits: -s A"
    yield Claim(inside, f.value(inside), "==", f.reduced(-near * case["advantage"], case), why)


def _sequence_pessimism(f: Probed, case: Case) -> Iterator[Claim]:
    got = f.value(case)
    plain = f.reduced(-_mean_log_ratio(case).exp() * case["advantage"], case)
    yield Claim(case, got, ">=", plain, "never below -s A")


def _far_apart(f: Probed, case: Case) -> Iterator[Claim]:
    for log_ratio in (9.0, -9.0):  # the log ratio of a whole sequence is cut at 10 by some, to no harm
        there = {**case, "logp": case["old_logp"] + log_ratio}
        why = "at log ratios of ±9 value and gradient are the formula's"
        yield Claim(there, f.value(there), "==", f.expected(there), why)
        yield Claim(there, f.grad(there, "logp"), "==", f.expected_grad(there, "logp"), why, wrt="logp")


def _by_rows(case: Case) -> Case:
    """A point of `ratios.point` with one advantage per sequence."""
    return case | {"advantage": case["advantage"][:, 0]}


def _row_limit(advantage: float, far: float, shift: float, sign: float) -> Callable[[Ask], float | None]:
    read = measured_limit(advantage, far, shift, sign)
    return lambda ask: read(lambda case: ask(_by_rows(case)))


_GSPO_GOLDEN: Case = {
    "logp": table([1.5, 1.5], [1.5, 9.0], [4.0, 0.25], [0.5, 0.5]).log(),
    "old_logp": torch.zeros(4, 2, dtype=torch.float64),
    "advantage": torch.tensor([1.0, -1.0, 2.0, -1.0], dtype=torch.float64),
    "mask": torch.tensor([[True, True], [True, False], [True, True], [True, True]]),
    "clip_low": 0.2,
    "clip_high": 0.2,
}
_SHIFT = invariance("shift_of_both", "symmetry", "a constant added to log π and log π_old changes nothing",
                    "oracles P9", lambda c: {**c, "logp": c["logp"] + 0.75, "old_logp": c["old_logp"] + 0.75},
                    gradients=("logp",))  # fmt: skip

GSPO = Kind(
    name="gspo",
    title="GSPO, -min(s A, clip(s) A) with one ratio s per sequence",
    arguments=(*SEQUENCES, CLIP_LOW, CLIP_HIGH),
    returns="[B] losses in units of the advantage",
    shape=("B",),
    oracle=_gspo,
    differentiable=("logp",),
    arrange=_arranged_rows,
    reducible=True,
    signed=True,
    mask="mask",
    measure={"clip_low": _row_limit(-1.0, -4.0, 1.0, -1.0), "clip_high": _row_limit(1.0, 4.0, -1.0, 1.0)},
    dialects=(Dialect("advantage", "one per token, the same along the sequence, [B, T]",
                      say=lambda c: c["advantage"][:, None].expand_as(c["logp"]).clone()),),
    layouts=(Layout("[B, 1]", fits=lambda result, case: result.shape == (len(case["advantage"]), 1),
                    canonical=lambda result: result[:, 0], code="got = got[:, 0]"),),
    anchor=at_old,
    laws=(
        formula("the loss of each sequence is -min(s A, clip(s) A), s = exp(mean log ρ)", ZHENG),
        gradient("logp", "∂L/∂log πₜ = -s A/|y|, and 0 where the clip is active", ZHENG),
        golden("golden_rows", _GSPO_GOLDEN, [-1.2, 1.5, -2.0, 0.8],
               "ratios (1.5, 1.5), (1.5), (4, .25), (.5, .5) with A = 1, -1, 2, -1 at ε = .2", ZHENG),
        Law("dead_zone", "gradient",
            "no token of a sequence gets a gradient exactly where its clip is active",
            "oracles P3, P20", _row_dead_zone),
        Law("constant_within", "gradient", "every token of a sequence gets the same gradient", "oracles P20",
            _constant_within),
        Law("one_token_is_ppo", "identity", "on sequences of one token it is PPO's clipped surrogate",
            "oracles P20, 2.17: GSPO(len 1) = PPO", _one_token, ("mask",)),
        token_repeated(SEQUENCES, lambda v: v, "every token twice: the same ratio, the same weight",
                       "bugs P19, G02: long responses dominate"),
        invariance("redistributed", "symmetry", "only the mean of log ρ counts, not which token has which",
                   "oracles P20", _redistributed, gradients=("logp",)),
        Law("uniform_ratio", "limit", "where every token has ratio ρ, s = ρ at any length",
            "the geometric mean; a product would be ρ^|y|", _uniform),
        *policy_gradient_at_old(per_row, _shares),
        additive_at_old(),
        *scaled_advantage(),
        Law("pessimistic", "limit", "never below -s A", "oracles P4", _sequence_pessimism),
        Law("within_the_limits", "limit", "where no sequence reaches a limit it is -s A", "oracles P5",
            _within),
        _SHIFT,
        Law("stable", "numeric", "value and gradient are right at log ratios of ±9", "bugs P21, E14",
            _far_apart),
        token_order(SEQUENCES, gradients=("logp",)),
        micro_batches(SEQUENCES, per_row),
        *batch_laws(SEQUENCES),
        *without(mask_laws(SEQUENCES, differentiable=("logp",)), "zero_under_mask"),
        empty_row_law(SEQUENCES),
        *numeric_laws(("logp", "old_logp", "advantage")),
    ),
)  # fmt: skip

KINDS = (GSPO,)
