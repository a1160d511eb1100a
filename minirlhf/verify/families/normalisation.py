"""Whitening of one number per token over the whole batch: to mean 0, or with the mean kept.

Right implementations divide by one of two standard deviations and put ε in one of two places; that ε is small
is all they agree on. What they have in common is said by laws that hold for each of them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.kinds import (
    Argument,
    Case,
    Claim,
    Convention,
    Kind,
    Law,
    Mask,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import (
    Change,
    empty_row_law,
    formula,
    loosened,
    mask_laws,
    numeric_laws,
    relation,
    rows_of,
)

HUANG = "Huang et al. 2024 (arXiv:2403.17031); Ziegler et al. 2019, in its code"
CONSTANT = "constant input"
SINGLE = "a single token"
FAR = "numbers far from 0"

ARGUMENTS = (
    Argument("x", ("B", "T"), Reals(-4.0, 4.0), "one number per token",
             synonyms=("values", "value", "xs", "tensor", "input", "advantages", "advantage", "adv", "advs",
                       "rewards",
                       "reward", "scores", "data", "token_level_scores", "unnormalized")),
    Argument("mask", ("B", "T"), Mask(), "True = the token counts",
             neutral=lambda c: torch.ones_like(c["x"]).bool(),
             synonyms=("masks", "response_mask", "action_mask", "loss_mask", "attention_mask",
                       "completion_mask",
                       "valid_mask", "token_mask")),
    Argument("epsilon", (),
             Numbers((1e-8, 1e-4, 0.25, 1e-2), usual=(1e-8, 1e-5, 1e-6, 1e-4, 1e-7, 0.0, 1e-9)),
             "ε >= 0, which keeps constant input finite",
             synonyms=("eps", "variance_epsilon", "var_eps", "epsilon_std", "std_eps")),
)  # fmt: skip
CONVENTIONS = (
    Convention("standard deviation", {"unbiased": "unbiased, n - 1", "biased": "biased, n"}),
    Convention(
        "place of epsilon",
        {
            "inside": "added to the variance, in the root",
            "outside": "added to the deviation",
            "least": "the least variance",
        },
    ),
)


def _arranged(case: Case) -> Case:
    """Never constant; some batches of a small spread, and some of a tiny one, where ε shows."""
    tokens = case["x"][case["mask"]]
    if float(tokens.max() - tokens.min()) < 0.5:
        case = {**case, "x": case["x"] + _spread_out(case["x"])}
    first = float(case["x"][0, 0])
    return {**case, "x": case["x"] * (2.0**-10 if first > 1 else 2.0**-20 if first < -2 else 1.0)}


def _spread_out(x: Tensor) -> Tensor:
    """Row b, column t: b + (t mod 3)/2."""
    rows, columns = torch.arange(len(x)), torch.arange(x.shape[1]) % 3
    return (rows[:, None] + columns[None, :] / 2).to(x.dtype)


def _deviation(case: Case, options: Options) -> Tensor:
    """The divisor, ε included: []."""
    tokens = case["x"][case["mask"]]
    n = len(tokens) - (options["standard deviation"] == "unbiased")
    variance = (tokens - tokens.mean()).square().sum() / n
    return _divisor(variance, case["epsilon"], options["place of epsilon"])


def _divisor(variance: Tensor, epsilon: float, place: str) -> Tensor:
    if place == "outside":
        return variance.sqrt() + epsilon
    return (variance + epsilon if place == "inside" else variance.clamp(min=epsilon)).sqrt()


def _mean(case: Case) -> Tensor:
    return case["x"][case["mask"]].mean()


def _whiten(case: Case, options: Options) -> Tensor:
    return torch.where(case["mask"], (case["x"] - _mean(case)) / _deviation(case, options), 0.0)


def _scale_only(case: Case, options: Options) -> Tensor:
    scaled = (case["x"] - _mean(case)) / _deviation(case, options)
    return torch.where(case["mask"], scaled + _mean(case), 0.0)


def _rescaled(case: Case, factor: float, options: Options) -> Case:
    """x times a factor, and ε in its unit times it too."""
    power = 1 if options["place of epsilon"] == "outside" else 2
    return {**case, "x": factor * case["x"], "epsilon": abs(factor) ** power * case["epsilon"]}


def _shift(case: Case) -> Tensor:
    """A constant in the unit of x: []."""
    return 2.5 * case["x"][case["mask"]].abs().max()


def _moved(case: Case) -> Case:
    return {**case, "x": case["x"] + _shift(case)}


def _negated(case: Case) -> Case:
    return {**case, "x": -case["x"]}


def _in_one_row(case: Case) -> Case:
    return {**case, "x": case["x"].reshape(1, -1), "mask": case["mask"].reshape(1, -1)}


def _in_one_column(case: Case) -> Case:
    return {**case, "x": case["x"].reshape(-1, 1), "mask": case["mask"].reshape(-1, 1)}


def _rolled(case: Case) -> Case:
    """The elements of the batch, each moved to the next place."""
    return {**case, "x": _next(case["x"]), "mask": _next(case["mask"])}


def _next(x: Tensor) -> Tensor:
    return x.flatten().roll(1).reshape(x.shape)


def _at(name: str, family: str, statement: str, source: str, rows: list[list[float]],
        want: Callable[[Case, Options], Tensor], *, proves: str | None = None,
        shown: str = "") -> Law:  # fmt: skip
    """On these numbers the value is known, with the ε of every case; shown: what is first subtracted."""
    x = torch.tensor(rows, dtype=torch.float64)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        given = {**case, "x": x, "mask": torch.ones_like(x).bool()}
        got, target = f.value(given), want(given, f.options)
        shift = float(shown or 0.0)
        yield Claim(
            given, got - shift, "==", target - shift, statement, loose=1e2, take=shown and f" - {shown}"
        )

    return Law(name, family, statement, source, check, proves=proves)


def _unit(case: Case, options: Options, rows: list[list[float]]) -> Tensor:
    """Deviations of an x of variance 1 (biased), whitened as the subject does."""
    n = case["x"].numel()
    variance = n / (n - 1) if options["standard deviation"] == "unbiased" else 1.0
    divisor = _divisor(torch.tensor(variance).double(), case["epsilon"], options["place of epsilon"])
    return torch.tensor(rows, dtype=torch.float64) / divisor


def _ordered() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        keep = case["mask"]
        x, got = case["x"][keep], f.value(case)[keep]
        above, rise = x[:, None] > x[None, :], got[:, None] - got[None, :]
        right = torch.where(above, rise > 0, True) & torch.where(
            x[:, None] == x[None, :], rise.abs() < 1e-4, True
        )
        yield Claim(case, right, "holds", None, "of two tokens the larger stays the larger")

    return Law("strictly_increasing", "symmetry", "the order of the tokens is kept",
               "oracles W4: a flipped sign passes nine other laws", check)  # fmt: skip


def _variance(result: Callable[[Case, Tensor], Tensor]) -> Law:
    """result: from the case and a whitened x to what the subject gives."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        keep, got = case["mask"], f.value(case)
        tokens = got[keep] - got[keep].mean()
        n = len(tokens) - (f.options["standard deviation"] == "unbiased")
        spread = (tokens.square().sum() / n).sqrt()
        # 1, but for ε: σ over what is divided by.
        target = _deviation({**case, "epsilon": 0.0}, f.options) / _deviation(case, f.options)
        unit = torch.where(keep, (got - got[keep].mean()) / spread * target, 0.0)
        yield Claim(
            case, got, "==", result(case, unit), "the same numbers, brought to variance 1 (less for ε)"
        )

    return Law("variance_one", "identity", "the variance over the tokens that count is 1, but for ε",
               "oracles W1, W6",
               check)  # fmt: skip


def _order_of_rows() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        order = torch.arange(len(case["x"])).flip(0)
        changed = rows_of(ARGUMENTS, case, order)
        yield Claim(changed, f.value(changed), "==", f.value(case)[order], "the same rows in reverse order")

    return Law("row_order", "batch", "reordering the rows reorders the result", "oracles W8", check)


def _whole_batch(name: str, statement: str, source: str, change: Change) -> Law:
    """The elements, laid out otherwise, give the same."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        got = f.value(changed)
        want = change({**case, "x": f.value(case)})["x"]
        yield Claim(changed, got, "==", want, statement)

    return Law(name, "invariance", statement, source, check)


def shared_laws(moves: bool) -> tuple[Law, ...]:
    """What both have in common; moves: the result follows a shift of x."""

    def constant(case: Case, options: Options) -> Tensor:
        return case["x"] if moves else torch.zeros_like(case["x"])

    def follows(v: Tensor, case: Case, f: Probed) -> Tensor:
        return torch.where(case["mask"], v + _shift(case), 0.0) if moves else v

    moved = "x plus a constant: the result plus it" if moves else "x plus a constant: the same"
    return (
        relation("shift", "symmetry", moved, "oracles W2", _moved, follows),
        relation("negation", "symmetry", "-x gives minus the result", "oracles W3", _negated, lambda v, c,
                 f: -v),
        _ordered(),
        _whole_batch("one_row", "the batch written as one row gives the same: one mean, one deviation",
                     "oracles W8: over the batch, not per row", _in_one_row),
        _whole_batch("one_column", "the batch written as one column gives the same",
                     "bugs B22: OpenRLHF #1250",
                     _in_one_column),
        _whole_batch("places", "which place of the batch a token has does not matter", "oracles W8", _rolled),
        _order_of_rows(),
        _at("constant_input", "limit", "constant input gives no infinity: " + ("itself" if moves else "0"),
            "oracles W7", [[1.5] * 4, [1.5] * 4], constant, proves=CONSTANT),
        _at("single_token", "limit", "a single token gives " + ("itself" if moves else "0"),
            "oracles W9; TRL's masked_var raises", [[2.0]], constant, proves=SINGLE),
        _at("far_from_zero", "numeric", "numbers around 10⁸ keep their differences",
            "E[x²] - E[x]² cancels", [[1e8, 1e8 + 2], [1e8 + 2, 1e8]],
            lambda c, o: _unit(c, o, [[-1.0, 1.0], [1.0, -1.0]]) + (1e8 + 1 if moves else 0.0), proves=FAR,
            shown="1e8" if moves else ""),
        *mask_laws(ARGUMENTS, differentiable=()),
        empty_row_law(ARGUMENTS),
        *numeric_laws(["x"]),
    )  # fmt: skip


def _recentred(case: Case, got: Tensor, mean: Tensor) -> Tensor:
    keep = case["mask"]
    return torch.where(keep, got - got[keep].mean() + mean, 0.0)


def _mean_law(name: str, statement: str, source: str, mean: Callable[[Case], Tensor]) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.value(case)
        yield Claim(case, got, "==", _recentred(case, got, mean(case)), statement)

    return Law(name, "identity", statement, source, check)


def _idempotent() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        white = f.value({**case, "epsilon": 0.0})
        again = {**case, "x": white, "epsilon": 0.0}
        yield Claim(again, f.value(again), "==", white, "with ε = 0, what is white already stays as it is")

    return Law("idempotent", "identity", "with ε = 0, a second time changes nothing", "oracles W1, W6", check,
               ("epsilon",))  # fmt: skip


def _seven_digits(*laws: Law) -> tuple[Law, ...]:
    """Many subjects add 1e-8 to the count of tokens."""
    return tuple(loosened(law, 30.0) for law in laws)


def _scaling(moves: bool) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = _rescaled(case, 4.0, f.options)
        shift = 3.0 * _mean(case) if moves else 0.0
        want = torch.where(case["mask"], f.value(case) + shift, 0.0)
        yield Claim(
            changed, f.value(changed), "==", want, "x and ε in another unit: the deviations are the same"
        )

    return Law(
        "unit", "symmetry", "the result, about its mean, has no unit", "oracles W2", check, ("epsilon",)
    )


_RAMP = [[-(1.5**0.5), 0.0, 1.5**0.5]]

WHITEN = Kind(
    name="whiten",
    title="whitening: mean 0 and variance 1 over the batch",
    arguments=ARGUMENTS,
    returns="[B, T] without unit",
    shape=("B", "T"),
    oracle=_whiten,
    arrange=_arranged,
    conventions=CONVENTIONS,
    mask="mask",
    sizes={"B": (2, 3)},
    laws=_seven_digits(
        formula("(x - μ)/σ over all tokens of the batch that count", HUANG),
        _at("golden_ramp", "value", "an even ramp of three: -1, 0, 1 (unbiased) or ∓1.224745 (biased)",
            "closed form", _RAMP, lambda c, o: _unit(c, o, _RAMP)),
        _at("rows_are_compared", "value", "rows (1, 1) and (3, 3): one below the mean, the other above",
            "oracles W8: statistics per row give 0", [[1.0, 1.0], [3.0, 3.0]],
            lambda c, o: _unit(c, o, [[-1.0, -1.0], [1.0, 1.0]])),
        _mean_law("mean_zero", "the mean over the tokens that count is 0",
                  "oracles W1; bugs F11: pytorch-cpp-rl #14",
                  lambda c: torch.zeros((), dtype=c["x"].dtype)),
        _variance(lambda case, unit: unit),
        _scaling(False),
        _idempotent(),
        *shared_laws(moves=False),
    ),
)  # fmt: skip

SCALE_ONLY = Kind(
    name="whiten_scale_only",
    title="whitening with the mean kept: variance 1 over the batch",
    arguments=ARGUMENTS,
    returns="[B, T]",
    shape=("B", "T"),
    oracle=_scale_only,
    arrange=_arranged,
    conventions=CONVENTIONS,
    mask="mask",
    sizes={"B": (2, 3)},
    laws=_seven_digits(
        formula("μ + (x - μ)/σ over all tokens of the batch that count", HUANG),
        _at("golden_ramp", "value", "an even ramp around 6: 5, 6, 7 (unbiased) or 6 ∓ 1.224745",
            "closed form",
            [[6 + x for x in _RAMP[0]]], lambda c, o: 6 + _unit(c, o, _RAMP)),
        _at("rows_are_compared", "value", "rows (2, 2) and (4, 4): the mean stays 3, the rows stay apart",
            "oracles W8: statistics per row change nothing", [[2.0, 2.0], [4.0, 4.0]],
            lambda c, o: 3 + _unit(c, o, [[-1.0, -1.0], [1.0, 1.0]])),
        _mean_law("mean_kept", "the mean over the tokens that count is that of x",
                  "oracles W6; bugs F14: TRL #887, rewards whitened with their mean", _mean),
        _variance(lambda case, unit: torch.where(case["mask"], unit + _mean(case), 0.0)),
        _scaling(True),
        _idempotent(),
        *shared_laws(moves=True),
    ),
)  # fmt: skip

KINDS = (WHITEN, SCALE_ONLY)
