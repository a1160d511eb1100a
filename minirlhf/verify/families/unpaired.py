"""Kahneman-Tversky Optimization: single responses, desirable or not, measured from a reference point.

s = log π - log π_ref summed over the response; z₀, one number for the batch, is an estimate of KL(π‖π_ref).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pairs import BETA, shifted, softplus
from minirlhf.verify.families.preference import RESPONSE
from minirlhf.verify.kinds import (
    Argument,
    Ask,
    Case,
    Claim,
    Flags,
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

ETHAYARAJH = "Ethayarajh et al. 2024, Eq. 8 (arXiv:2402.01306)"
_WEIGHTS = ("desirable_weight", "undesirable_weight")
_WEIGHT = Numbers((1.0, 0.5, 1.5, 2.0))
_ARGUMENTS = (
    *RESPONSE,
    Argument("desirable", ("B",), Flags(), "True for a desirable response",
             synonyms=("labels", "label", "is_desirable", "chosen", "is_chosen", "good", "is_good",
                       "thumbs_up")),
    Argument("kl", (), Reals(0.0, 2.0, (0.0,)), "z₀ in nats, the reference point of the batch; detached",
             synonyms=("z0", "z_0", "z_ref", "kl_estimate", "ref_point", "reference_point", "baseline",
                       "kl_mean")),
    BETA,
    Argument("desirable_weight", (), _WEIGHT, "w_d >= 0", optional=True,
             synonyms=("weight_desirable", "w_d", "lambda_d", "lambda_desirable", "desirable_coef",
                       "chosen_weight")),
    Argument("undesirable_weight", (), _WEIGHT, "w_u >= 0", optional=True,
             synonyms=("weight_undesirable", "w_u", "lambda_u", "lambda_undesirable", "undesirable_coef",
                       "rejected_weight")),
)  # fmt: skip


def _weight(case: Case) -> Tensor:
    """w of each response."""
    w_d, w_u = (torch.tensor(case.get(name, 1.0), dtype=torch.float64) for name in _WEIGHTS)
    return torch.where(case["desirable"], w_d, w_u)


def _distance(case: Case) -> Tensor:
    """β (s - z₀), and its opposite for an undesirable response: what the response gains."""
    above = case["beta"] * (case["logp"] - case["ref_logp"] - case["kl"].detach())
    return torch.where(case["desirable"], above, -above)


def _kto(case: Case, options: Options) -> Tensor:
    return _weight(case) * torch.exp(-softplus(_distance(case)))  # 1 - σ(x) = e^-log(1 + e^x)


def _at_the_point(case: Case) -> Case:
    """s = z₀."""
    return case | {"logp": case["ref_logp"] + case["kl"]}


def _each(case: Case) -> Iterator[Case]:
    """Each response alone: then a mean, a sum and the elements are one number."""
    return (rows_of(_ARGUMENTS, case, torch.tensor([row])) for row in range(len(case["logp"])))


def _opposites() -> Law:
    """The two labels of one response, each in units of its weight."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for single in _each(case):
            other = single | {"desirable": ~single["desirable"]}
            want = _weight(other) * (1 - f.value(single) / _weight(single))
            yield Claim(
                other, f.value(other), "==", want.reshape(f.value(other).shape), "L_d/w_d + L_u/w_u = 1"
            )
            mirrored = other | {"logp": 2 * (single["ref_logp"] + single["kl"]) - single["logp"]}
            want = _weight(other) * f.value(single) / _weight(single)
            why = "as far on the other side of z₀ the other label has the same loss, in units of its weight"
            yield Claim(mirrored, f.value(mirrored), "==", want.reshape(f.value(mirrored).shape), why)

    return Law("labels_are_opposites", "symmetry",
               "L_d/w_d + L_u/w_u = 1, and they mirror each other about z₀", "oracles K3", check)  # fmt: skip


DETACHED = "detached reference point"


def _stop_gradient() -> Law:
    """The paper's stop-gradient: the reference point is measured, not learned. Where it is an argument, a
    caller may have seen to it."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        zero = torch.zeros_like(case["kl"])
        yield Claim(case, f.grad(case, "kl"), "==", zero, "z₀ gets no gradient: detach it", wrt="kl")

    return Law("no_gradient_to_the_reference_point", "gradient", "z₀ gets no gradient",
               "oracles K2; " + ETHAYARAJH, check, proves=DETACHED)  # fmt: skip


def _one_class() -> Law:
    """Batches without a desirable, or without an undesirable response."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for label in (True, False):
            given = case | {"desirable": torch.full_like(case["desirable"], label)}
            why = f"every response {'desirable' if label else 'undesirable'}: as good a batch as any"
            yield Claim(given, f.value(given), "==", f.expected(given), why)
            yield Claim(given, f.grad(given, "logp"), "==", f.expected_grad(given, "logp"), why, wrt="logp")

    statement = "a batch of one class alone is right and finite"
    return Law("one_class", "batch", statement, "oracles K5; TRL #1380, #1402", check)


def _weights_apart() -> Law:
    """Each weight acts on its own class, one response at a time."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for single in _each(case):
            light = single | dict.fromkeys(_WEIGHTS, 1.0)
            heavy = single | {"desirable_weight": 3.0, "undesirable_weight": 0.5}
            want = f.value(light) * (3.0 if bool(single["desirable"]) else 0.5)
            why = "w_d = 3 multiplies a desirable response, w_u = .5 an undesirable one"
            yield Claim(heavy, f.value(heavy), "==", want, why)

    return Law("weights_apart", "symmetry", "w_d multiplies the desirable, w_u the undesirable responses",
               "oracles K4", check, _WEIGHTS)  # fmt: skip


def _slope_at_the_point() -> Law:
    """Where the pull is strongest."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for single in _each(case):
            most = _weight(single) * case["beta"] / 4
            sign = torch.where(single["desirable"], -1.0, 1.0)
            there = _at_the_point(single)
            yield Claim(there, f.grad(there, "logp"), "==", sign * most, "w β/4, at s = z₀", wrt="logp")
            yield Claim(single, sign * f.grad(single, "logp"), "<=", most, "nowhere more than w β/4")

    return Law("steepest_at_the_reference_point", "gradient",
               "the gradient is w β/4 at s = z₀, and nowhere more", "oracles K1", check)  # fmt: skip


def _pulls() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for single in _each(case):
            rarer = shifted(single, -0.5, "logp")
            relation, what = (">=", "desirable") if bool(single["desirable"]) else ("<=", "undesirable")
            why = f"{what}, and less likely: no {'smaller' if relation == '>=' else 'larger'} loss"
            yield Claim(rarer, f.value(rarer), relation, f.value(single), why)

    return Law("pulls_both_ways", "limit",
               "the loss falls with a desirable and rises with an undesirable response",
               "P18: preference losses", check)  # fmt: skip


def _scaled(case: Case) -> Case:
    halved = {name: case[name] / 2 for name in ("logp", "ref_logp", "kl")}
    return case | halved | {"beta": 2 * case["beta"]}


def _extreme() -> list[Case]:
    flags = torch.tensor([True, True, False, False])
    rows = {"logp": column(-1.0, -1e4, -1.0, -1e4), "ref_logp": column(-1e4, -1.0, -1e4, -1.0)}
    return [rows | {"desirable": flags, "kl": torch.tensor(0.5, dtype=torch.float64), "beta": 1.0}]


def _real() -> list[Case]:
    """Log-probs as whole responses have them, of one class and of both; a policy that is far from its
    reference, where clamps would show."""
    rows = {"logp": column(-254.3, -87.1, -60.5), "ref_logp": column(-251.9, -95.6, -60.5), "beta": 0.1,
            "kl": torch.tensor(1.5, dtype=torch.float64)}  # fmt: skip
    cases = [
        rows | {"desirable": torch.tensor(flags)} for flags in ([True, False, True], [True] * 3, [False] * 3)
    ]
    far = {"logp": column(-410.0, -80.0, -150.0), "ref_logp": column(-250.0, -240.0, -270.0), "beta": 0.02}
    return [*cases, cases[0] | far | {"kl": torch.tensor(95.0, dtype=torch.float64)}]


def _single(s: float, desirable: bool) -> Case:
    """One response at this log-ratio, z₀ = 0."""
    return {"logp": column(-1.0 + min(s, 0.0)), "ref_logp": column(-1.0 - max(s, 0.0)),
            "desirable": torch.tensor([desirable]), "kl": torch.tensor(0.0, dtype=torch.float64),
            "beta": 1.0}  # fmt: skip


def _measured_beta(ask: Ask) -> float | None:
    """Reads β off a subject that has it built in, from one loss in units of the largest."""
    share = ask(_single(1.0, True)) / ask(_single(-1e6, True))
    beta = math.log(1 - share) - math.log(share)
    return beta if beta > 0 else None


def _measured_weight(desirable: bool) -> Callable[[Ask], float | None]:
    """Reads a weight off, the largest loss; None where it is 1, as without the feature."""

    def measure(ask: Ask) -> float | None:
        weight = ask(_single(-1e6 if desirable else 1e6, desirable))
        return weight if weight > 0 and abs(weight - 1) > 1e-6 else None

    return measure


_GOLDEN: Case = {"logp": column(-10.0, -10.0), "ref_logp": column(-15.0, -15.0),
                 "desirable": torch.tensor([True, False]), "kl": torch.tensor(0.2, dtype=torch.float64),
                 "beta": 0.1}  # fmt: skip
KTO = Kind(
    name="kto",
    title="Kahneman-Tversky Optimization, w [1 - σ(±β (s - z₀))]",
    arguments=_ARGUMENTS,
    returns="[B] losses",
    shape=("B",),
    oracle=_kto,
    differentiable=("logp",),
    measure={"beta": _measured_beta, "desirable_weight": _measured_weight(True),
             "undesirable_weight": _measured_weight(False)},
    anchor=_at_the_point,
    reducible=True,
    extra_cases=_real,
    laws=(
        formula("the loss of each response is w_d [1 - σ(β (s - z₀))] or w_u [1 - σ(β (z₀ - s))]",
                ETHAYARAJH),
        golden("golden_pair", _GOLDEN, [0.382252, 0.617748],
               "s = 5, z₀ = .2, β = .1: .382252 desirable, .617748 not", "oracles 5.3"),
        gradient("logp", "∂L/∂log π = -w_d β σ(1 - σ) if desirable, else w_u β σ(1 - σ)", "oracles K1"),
        _stop_gradient(),
        relation("half_at_the_reference_point", "limit", "w/2 where s = z₀", "oracles K1", _at_the_point,
                 lambda v, c, f: f.reduced(_weight(c) / 2, c)),
        _opposites(),
        invariance("shifted_with_reference", "symmetry", "policy and reference shifted alike change nothing",
                   "Liger #405: reference ignored", lambda c: shifted(c, -1.25, "logp", "ref_logp"),
                   gradients=("logp",)),
        invariance("shifted_with_the_point", "symmetry", "s and z₀ greater alike change nothing",
                   "oracles K2", lambda c: shifted(shifted(c, -0.75, "ref_logp"), 0.75, "kl"),
                   gradients=("logp",)),
        invariance("beta_times_distance", "symmetry", "β twice, s and z₀ half: the same", "oracles D4",
                   _scaled, needs=("beta",)),
        _weights_apart(),
        bounded("positive", "limit", "the loss is never negative", ETHAYARAJH, ">=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        bounded("at_most_the_weight", "limit", "the loss is at most w", "oracles K1", "<=",
                lambda c, f: f.reduced(_weight(c), c)),
        _slope_at_the_point(),
        _pulls(),
        _one_class(),
        finite_at("stable", "at s = ±10,000 the loss is 0 or w, and its gradient 0", "oracles K5; P21",
                  _extreme, gradients=("logp",)),
        *batch_laws(_ARGUMENTS),
        *numeric_laws(("logp", "ref_logp", "kl")),
    ),
)  # fmt: skip

KINDS = (KTO,)
