"""Bradley-Terry: the loss of a reward model on one comparison, with margin and label smoothing.

g = r⁺ - r⁻; most laws are about the bare loss, -log σ(g).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import (
    antisymmetry,
    calibrated,
    falls,
    least_at_a_tie,
    never_negative,
    opposite_gradients,
    stationary,
)
from minirlhf.verify.families.pairs import (
    CHOSEN,
    EXTREME,
    FACTORS,
    PAIRS,
    REJECTED,
    REWARDS,
    SMOOTHING,
    entropy,
    logit,
    shifted,
    softplus,
    spellings,
    swapped,
)
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Convention, Kind, Law, Options, Probed, Reals
from minirlhf.verify.laws import (
    batch_laws,
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

OUYANG = "Bradley & Terry 1952; Ouyang et al. 2022, Eq. 1 (arXiv:2203.02155)"
TOUVRON = "Touvron et al. 2023, Eq. 2 (arXiv:2307.09288)"
SIDES = ("chosen_reward", "rejected_reward")
EXTRAS = ("margin", "label_smoothing")
_SCORE = ("rewards", "reward", "scores", "score", "logits", "values", "value", "r", "")
KEPT, FLIPPED = "kept", "flipped"
SMOOTHED_MARGIN = Convention(
    "smoothed margin",
    {
        KEPT: "a flipped pair keeps its margin: ε on -log σ(-g - m)",
        FLIPPED: "the margin flips with the label: ε on -log σ(-(g - m))",
    },
)
_ARGUMENTS = (
    Argument("chosen_reward", ("B",), Reals(), "r⁺ = r(x, y⁺); differences are log-odds",
             synonyms=spellings(("",), CHOSEN, _SCORE)),
    Argument("rejected_reward", ("B",), Reals(), "r⁻ = r(x, y⁻)",
             synonyms=spellings(("",), REJECTED, _SCORE)),
    Argument("margin", ("B",), Reals(0.0, 2.0), "m, how much better y⁺ must be", optional=True,
             synonyms=("margins", "m", "rating_gap", "preference_margin")),
    SMOOTHING._replace(optional=True),
)  # fmt: skip


def _gap(case: Case) -> Tensor:
    """g."""
    return case["chosen_reward"] - case["rejected_reward"]


def _bradley_terry(case: Case, options: Options) -> Tensor:
    gap, asked, eps = _gap(case), case.get("margin", 0.0), case.get("label_smoothing", 0.0)
    flipped = softplus(gap + asked if options[SMOOTHED_MARGIN.name] == KEPT else gap - asked)
    return (1 - eps) * softplus(asked - gap) + eps * flipped


def _plain(law: Law) -> Law:
    """The law, of the loss without margin and smoothing; a subject that has them built in cannot show it."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if all(f.has(name) or name not in case for name in EXTRAS):
            yield from law.check(f, {name: value for name, value in case.items() if name not in EXTRAS})

    return law._replace(check=check)


def _batch(*gaps: float, **extras: float | Tensor) -> Case:
    return {
        "chosen_reward": column(*gaps),
        "rejected_reward": torch.zeros(len(gaps), dtype=torch.float64),
        **extras,
    }


def _row_constant(case: Case) -> Case:
    """Another constant for each prompt."""
    return shifted(case, 1.25 * torch.arange(1, len(case["chosen_reward"]) + 1).double() - 4, *SIDES)


def _probabilities() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for row in range(len(case["chosen_reward"])):
            single = rows_of(_ARGUMENTS, case, torch.tensor([row]))
            other = swapped(single)
            want = -torch.log1p(-(-f.value(other)).exp())
            why = "P(y⁺ ≻ y⁻) + P(y⁻ ≻ y⁺) = 1 with P = e^-L"
            if bool((want < 15).all()):  # beyond, 1 - P has no digits left
                yield Claim(single, f.value(single), "==", want, why)

    return Law("probabilities", "identity", "e^-L(y⁺, y⁻) + e^-L(y⁻, y⁺) = 1", "oracles BT3", check)


def _bounded_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for row in range(len(case["chosen_reward"])):
            single = rows_of(_ARGUMENTS, case, torch.tensor([row]))
            slope = f.grad(single, "chosen_reward")
            within = (slope <= 1e-6) & (slope >= -1 - 1e-6)
            yield Claim(single, within, "holds", None, f"-1 <= ∂L/∂r⁺ <= 0, and it is {slope.tolist()}")

    return Law(
        "bounded_gradient", "gradient", "-1 <= ∂L/∂r⁺ <= 0: no pair pulls harder than 1", "oracles BT5", check
    )


def _with_margin() -> Law:
    """m is the same as a chosen reward that is lower by it."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        asked = column(*(0.5 * n for n in range(1, len(case["chosen_reward"]) + 1)))
        given, handicapped = case | {"margin": asked}, shifted(case, -asked, "chosen_reward")
        yield Claim(given, f.value(given), "==", f.value(handicapped), "L(r⁺, r⁻, m) = L(r⁺ - m, r⁻)")

    return Law("margin_is_a_handicap", "identity", "L(r⁺, r⁻, m) = L(r⁺ - m, r⁻)", "oracles BT9; " + TOUVRON,
               check, ("margin",))  # fmt: skip


def _mixture() -> Law:
    """Smoothing is a share of flipped labels."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        smooth = case | {"label_smoothing": 0.25}
        want = 0.75 * f.value(case) + 0.25 * f.value(swapped(case))
        yield Claim(smooth, f.value(smooth), "==", want, "ε = ¼: ¾ L(r⁺, r⁻) + ¼ L(r⁻, r⁺)")
        floor = f.reduced(torch.full_like(case["chosen_reward"], entropy(0.25)), case)
        yield Claim(smooth, f.value(smooth), ">=", floor, "at least the entropy of (¼, ¾)")

    return Law("mixture_of_labels", "identity",
               "L_ε(r⁺, r⁻) = (1 - ε) L(r⁺, r⁻) + ε L(r⁻, r⁺), at least H(ε)", "oracles BT10", check,
               ("label_smoothing",))  # fmt: skip


def _smoothed_optimum() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        there = shifted(case, logit(0.9) - _gap(case), "chosen_reward") | {"label_smoothing": 0.1}
        want = f.reduced(torch.full_like(case["chosen_reward"], entropy(0.1)), case)
        yield Claim(there, f.value(there), "==", want, "H(.1) at g = logit .9")
        still = torch.zeros_like(case["chosen_reward"])
        yield Claim(
            there, f.grad(there, "chosen_reward"), "==", still, "and no gradient", wrt="chosen_reward"
        )

    return Law("optimum_of_a_pair", "limit", "smoothed, it is least at g = logit(1 - ε), where it is H(ε)",
               "oracles BT10", check, ("label_smoothing",))  # fmt: skip


def _equal(case: Case) -> Case:
    """Both responses as good."""
    return case | {"rejected_reward": case["chosen_reward"]}


def _measured_smoothing(ask: Ask) -> float | None:
    """Reads ε off: the loss of a large gap, in units of what both labels lose; None where it is 0."""
    won, lost = ask(_batch(1e4)), ask(_batch(-1e4))
    share = won / (won + lost)
    return share if 1e-6 < share < 0.5 else None


def _balance_of_margins(case: Case, f: Probed) -> Tensor:
    up, down = torch.sigmoid(case["margin"] - _gap(case)), torch.sigmoid(case["margin"] + _gap(case))
    return down / (up + down)


def _extreme() -> list[Case]:
    """Far gaps, made by either side, and small ones of far rewards."""
    far = shifted(_batch(1.5, -2.0), column(1e4, -1e4), *SIDES)
    return [_batch(*EXTREME), swapped(_batch(*EXTREME)), far]


BRADLEY_TERRY = Kind(
    name="bradley_terry",
    title="Bradley-Terry, -log σ(r⁺ - r⁻ - m), labels smoothed by ε",
    arguments=_ARGUMENTS,
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_bradley_terry,
    differentiable=SIDES,
    conventions=(SMOOTHED_MARGIN,),
    reducible=True,
    factors=FACTORS,
    measure={"label_smoothing": _measured_smoothing},
    extra_cases=lambda: [_batch(0.0, 2.0, -5.0), _batch(35.0, -35.0, 12.0, -12.0)],
    laws=(
        formula("the loss of each pair is (1 - ε) · -log σ(g - m) + ε · -log σ(-g - m)", OUYANG),
        golden("golden_gaps", _batch(4.0, -4.0, 2.0, 1.3, 1.0, 0.0), [0.018150, 4.018150, 0.126928, 0.241008,
                                                                      0.313262, 0.693147],
               "gaps 4, -4, 2, 1.3, 1, 0: .018150, 4.018150, .126928, .241008, .313262, .693147",
               "oracles 5.1"),
        golden("golden_margin", _batch(4.0, margin=column(1.0)), [0.048587], "gap 4, margin 1: .048587",
               "oracles 5.1", needs=("margin",)),
        golden("golden_smoothing", _batch(4.0, label_smoothing=0.1), [0.418150], "gap 4, ε = .1: .418150",
               "oracles 5.1", needs=("label_smoothing",)),
        gradient("chosen_reward", "∂L/∂r⁺ = -σ(-g), where there is no margin and no smoothing",
                 "oracles BT5"),
        gradient("rejected_reward", "∂L/∂r⁻ = σ(-g)", "oracles BT5"),
        _plain(relation("log2_at_equality", "limit", "log 2 where both rewards are equal", "oracles BT1",
                        _equal,
                        lambda v, c, f: f.reduced(torch.full_like(c["chosen_reward"], math.log(2)), c))),
        invariance("prompt_constant", "symmetry",
                   "a constant of each prompt added to both rewards changes nothing", "oracles BT2",
                   _row_constant, gradients=SIDES),
        opposite_gradients(*SIDES),
        _plain(antisymmetry(lambda c, f: _gap(c), "L(r⁻, r⁺) - L(r⁺, r⁻) = r⁺ - r⁻", "oracles BT4")),
        _plain(_probabilities()),
        _plain(_bounded_gradient()),
        _plain(least_at_a_tie(lambda c, f: column(math.log(2)), "oracles BT6", like="chosen_reward")),
        _plain(falls("chosen_reward", "oracles BT7")),
        _plain(calibrated(lambda c, f: torch.sigmoid(_gap(c)),
                          "a label that is right with probability σ(g) moves nothing", "oracles BT12",
                          side="reward")),
        stationary("population_optimum", _ARGUMENTS,
                   lambda: {"chosen_reward": REWARDS[PAIRS[:, 0]], "rejected_reward": REWARDS[PAIRS[:, 1]]},
                   "on all pairs the maximum-likelihood rewards are the true ones", "oracles BT12",
                   sides=SIDES),
        never_negative(),
        _plain(_with_margin()),
        _plain(calibrated(_balance_of_margins,
                          "with a margin the expected gradient is 0 at p = σ(m + g)/(σ(m - g) + σ(m + g))",
                          "oracles S2", change=lambda c: c | {"margin": torch.full_like(_gap(c), 0.75)},
                          needs=("margin",), name="calibrated_with_margin", side="reward")),
        _plain(_mixture()),
        _plain(_smoothed_optimum()),
        finite_at("stable", "at gaps of ±10,000 the loss is 0 or 10,000, and its gradient right",
                  "oracles BT8", _extreme, gradients=SIDES),
        finite_at("stable_when_smoothed", "at gaps of ±10,000 the loss is ε or 1 - ε times that",
                  "oracles BT8, BT10", lambda: [case | {"label_smoothing": 0.1} for case in _extreme()],
                  gradients=SIDES, needs=("label_smoothing",)),
        *batch_laws(_ARGUMENTS),
        *numeric_laws(("chosen_reward", "rejected_reward", "margin")),
    ),
)  # fmt: skip

KINDS = (BRADLEY_TERRY,)
