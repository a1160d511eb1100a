"""Identity Preference Optimization, on log-probs averaged per token and on summed ones.

h = s(y⁺)/n⁺ - s(y⁻)/n⁻ with s = log π - log π_ref summed over the response; n is its length, or 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import (
    antisymmetry,
    calibrated,
    constant_laws,
    golden_by,
    least_at_a_tie,
    never_negative,
    opposite_gradients,
    per_token_constant,
    repeated_tokens,
    same_shift_laws,
    stationary,
    value_at_reference,
)
from minirlhf.verify.families.pairs import (
    BOTH,
    GOLDEN_PAIR,
    LENGTH_PAIR,
    LENGTHS,
    PAIR,
    REFERENCE,
    extreme_pairs,
    labelled_pairs,
    moved,
    pair_case,
    real_pairs,
    win_rate,
)
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Convention, Kind, Law, Numbers, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    column,
    finite_at,
    formula,
    golden,
    gradient,
    numeric_laws,
    relation,
)

AZAR = "Azar et al. 2023, Eq. 17 (arXiv:2310.12036)"
TAU = Argument(
    "tau",
    (),
    Numbers((0.1, 0.5, 1.0, 0.25), usual=(0.1, 0.5, 1.0, 0.2, 0.05, 0.01, 0.25)),
    "τ > 0, the weight of KL(π‖π_ref); the margin asked for is 1/(2τ)",
    synonyms=("beta", "ipo_tau", "tau_ipo", "ipo_beta", "kl_coef", "temperature"),
)
AVERAGED, SUMMED = "averaged", "summed"
NORMALISATION = Convention(
    "normalisation",
    {
        AVERAGED: "averaged per token (a subject without lengths: of what it is given)",
        SUMMED: "summed over the response: the lengths are not used",
    },
)
_FACTORS = {1.0: "squared error", 0.5: "half the squared error"}


def _lengths(case: Case, options: Options) -> tuple[Tensor, Tensor]:
    """What the two sides are divided by."""
    if options.get(NORMALISATION.name) == AVERAGED:
        return case["chosen_length"].double(), case["rejected_length"].double()
    ones = torch.ones(len(case["chosen_logp"]), dtype=torch.float64)
    return ones, ones


def _margin(case: Case, options: Options) -> Tensor:
    """h."""
    chosen, rejected = _lengths(case, options)
    gain = (case["chosen_logp"] - case["ref_chosen_logp"]) / chosen
    return gain - (case["rejected_logp"] - case["ref_rejected_logp"]) / rejected


def _ipo(case: Case, options: Options) -> Tensor:
    return (_margin(case, options) - 1 / (2 * case["tau"])) ** 2


def _divisors(case: Case, f: Probed) -> tuple[Tensor, Tensor]:
    return _lengths(case, f.options)


def _moved(case: Case, f: Probed, amount: float | Tensor) -> Case:
    """h greater by the amount."""
    return moved(case, amount, _lengths(case, f.options))


def _zero_at_the_target() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        there = _moved(case, f, 1 / (2 * case["tau"]) - _margin(case, f.options))
        zero = torch.zeros_like(case["chosen_logp"])
        yield Claim(there, f.value(there), "==", f.reduced(zero, case), "0 at h = 1/(2τ)")
        yield Claim(there, f.grad(there, "chosen_logp"), "==", zero, "and flat", wrt="chosen_logp")

    statement = "0, with no gradient, where h = 1/(2τ)"
    return Law("zero_at_the_target", "limit", statement, "oracles I1; TRL #1615", check)


def _curvature() -> Law:
    """A parabola of second difference 2, wherever it is measured."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        less, more = _moved(case, f, -1.0), _moved(case, f, 1.0)
        two = f.reduced(torch.full_like(case["chosen_logp"], 2.0), case)
        want = two + 2 * f.value(case) - f.value(less)
        yield Claim(more, f.value(more), "==", want, "L(h + 1) - 2 L(h) + L(h - 1) = 2")

    return Law("curvature", "limit", "L(h + 1) - 2 L(h) + L(h - 1) = 2 for every h", "oracles I1", check)


def _restoring() -> Law:
    """IPO comes back from beyond its target, where DPO would go on."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for side in (-3.0, 3.0):
            there = _moved(case, f, 1 / (2 * case["tau"]) + side - _margin(case, f.options))
            slope = f.grad(there, "chosen_logp") * side
            why = f"{abs(side)} {'below' if side < 0 else 'above'} the target the gradient points back to it"
            yield Claim(there, slope > 0, "holds", None, why)

    return Law("restoring", "gradient", "the gradient points to h = 1/(2τ) from both sides",
               "oracles I1, X5: DPO overfits, IPO does not", check)  # fmt: skip


def _optimum(tau: float, lengths: Tensor) -> Tensor:
    """log π = log π_ref + |y| (p(y ≻ μ)/τ + c), for any c."""
    return REFERENCE + lengths * (win_rate() / tau - 2.0)


def _optimum_of_averages() -> Law:
    """With lengths the optimum weighs each response with its own; the theory is of one token each."""
    arguments, lengths = (*PAIR, *LENGTH_PAIR, TAU), torch.tensor([2, 5, 3])
    law = stationary("population_optimum_of_averages", arguments,
                     lambda: labelled_pairs(REFERENCE, ref_side_logp=REFERENCE, side_length=lengths, tau=0.5),
                     "on all pairs the optimum of averages is π ∝ π_ref e^(|y| (p(y ≻ μ)/τ + c))",
                     "oracles 2.9", needs=LENGTHS)  # fmt: skip

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        averaged = f.options[NORMALISATION.name] == AVERAGED
        optimum = _optimum(0.5, lengths if averaged else torch.ones(3))
        yield from law.check(f, case | labelled_pairs(optimum))

    return law._replace(check=check)


def _ipo_laws(*arguments: Argument) -> tuple[Law, ...]:
    """The laws of a parabola in h, whatever h is divided by."""
    lengths = [a.name for a in arguments if a.name in LENGTHS]
    ones = {name: torch.ones(1, dtype=torch.int64) for name in lengths}
    unit = {"side_length": torch.ones(3, dtype=torch.int64)} if lengths else {}
    return (
        formula("the loss of each pair is (h - 1/(2τ))²", AZAR),
        golden("golden_pair", GOLDEN_PAIR | ones | {"tau": 0.1}, [1.0],
               "log-probs (-10, -12), reference (-15, -11), one token each, τ = .1: 1",
               "oracles 5.2; ms-swift #10167"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = 2 (h - 1/(2τ)) / n⁺", "oracles I1"),
        gradient("rejected_logp", "∂L/∂log π(y⁻) = -2 (h - 1/(2τ)) / n⁻", "oracles I1"),
        _zero_at_the_target(),
        _curvature(),
        _restoring(),
        value_at_reference(lambda c: 1 / (2 * c["tau"]) ** 2, "1/(4τ²) where the policy is the reference",
                           AZAR),
        antisymmetry(lambda c, f: 2 * _margin(c, f.options) / c["tau"], "L(y⁻, y⁺) - L(y⁺, y⁻) = 2 h / τ",
                     "oracles I1"),
        never_negative(),
        least_at_a_tie(lambda c, f: column(1 / (2 * c["tau"]) ** 2), "convex in h"),
        calibrated(lambda c, f: 0.5 + c["tau"] * _margin(c, f.options),
                   "the expected gradient is 0 at h = (p - ½)/τ", "oracles I2"),
        stationary("population_optimum", arguments,
                   lambda: labelled_pairs(_optimum(0.5, torch.ones(3)), ref_side_logp=REFERENCE, tau=0.5,
                                          **unit),
                   "on all pairs y, y' ~ μ the optimum is π ∝ π_ref e^(p(y ≻ μ)/τ)", "oracles I3"),
        relation("scale", "symmetry", "every log-prob twice and τ half: four times the loss", AZAR,
                 lambda c: c | {a.name: 2 * c[a.name] for a in PAIR} | {"tau": c["tau"] / 2},
                 lambda v, c, f: 4 * v, needs=("tau",)),
        *same_shift_laws(),
        finite_at("stable", "margins of ±10,000 are squared, not clipped", "P21: numeric range",
                  lambda: [case | ones for case in extreme_pairs(tau=0.5)], gradients=BOTH),
        *batch_laws(arguments),
        *numeric_laws([a.name for a in PAIR]),
    )  # fmt: skip


def _measured_tau(ask: Ask) -> float | None:
    """Reads τ off a subject that has it built in: 1/(4τ²) at h = 0, in units of half the curvature."""
    ones = {name: torch.ones(1, dtype=torch.int64) for name in LENGTHS}
    less, tie, more = (ask(pair_case(h, tau=1.0) | ones) for h in (-1.0, 0.0, 1.0))
    return ((less + more - 2 * tie) / (8 * tie)) ** 0.5 if less + more > 2 * tie > 0 else None


def _real(case: Case) -> Case:
    return case | {
        "chosen_length": torch.tensor([61, 20, 14, 9]),
        "rejected_length": torch.tensor([70, 18, 14, 11]),
    }


_GOLDEN_LENGTHS = GOLDEN_PAIR | {
    "chosen_length": torch.tensor([5]),
    "rejected_length": torch.tensor([1]),
    "tau": 0.5,
}
IPO = Kind(
    name="ipo",
    title="Identity Preference Optimization, (h - 1/(2τ))², h per token",
    arguments=(*PAIR, *LENGTH_PAIR, TAU),
    returns="[B] losses",
    shape=("B",),
    oracle=_ipo,
    differentiable=BOTH,
    conventions=(NORMALISATION,),
    reducible=True,
    factors=_FACTORS,
    measure={"tau": _measured_tau},
    extra_cases=lambda: [_real(case) for case in real_pairs(tau=0.5)],
    laws=(
        *_ipo_laws(*PAIR, *LENGTH_PAIR, TAU),
        golden_by("golden_lengths", _GOLDEN_LENGTHS, NORMALISATION.name, {AVERAGED: 1.0, SUMMED: 25.0},
                  "the same pair, 5 and 1 tokens long, τ = .5: 5/5 + 1/1 - 1 squared averaged, 25 summed",
                  "oracles I5"),
        per_token_constant(_divisors),
        opposite_gradients(lengths=_divisors),
        repeated_tokens([a.name for a in PAIR], averaged=lambda f: f.options[NORMALISATION.name] == AVERAGED),
        _optimum_of_averages(),
    ),
)  # fmt: skip

IPO_SUMMED = Kind(
    name="ipo_summed",
    title="Identity Preference Optimization as in its theory, (h - 1/(2τ))², h summed",
    arguments=(*PAIR, TAU),
    returns="[B] losses in squared nats",
    shape=("B",),
    oracle=_ipo,
    differentiable=BOTH,
    reducible=True,
    factors=_FACTORS,
    measure={"tau": _measured_tau},
    extra_cases=lambda: real_pairs(tau=0.5),
    laws=(*_ipo_laws(*PAIR, TAU), *constant_laws(), opposite_gradients()),
)

KINDS = (IPO, IPO_SUMMED)
