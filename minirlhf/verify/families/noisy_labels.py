"""DPO where a share ε of the labels is flipped: conservative (assumed) and robust (taken out).

h as in `preference`; both are mixtures of the loss of a label and that of its flip.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import (
    antisymmetry,
    calibrated,
    falls,
    least_at_a_tie,
    margin_laws,
    value_at_reference,
)
from minirlhf.verify.families.pairs import (
    BETA,
    BOTH,
    FACTORS,
    GOLDEN_PAIR,
    PAIR,
    SMOOTHING,
    entropy,
    extreme_pairs,
    far_slopes,
    logit,
    margin,
    measured_beta,
    moved,
    real_pairs,
    softplus,
    swapped,
)
from minirlhf.verify.kinds import Ask, Case, Claim, Kind, Law, Options, Probed
from minirlhf.verify.laws import bounded, column, finite_at, formula, golden, gradient, relation

MITCHELL = "Mitchell 2023, cDPO (ericmitchell.ai/cdpo.pdf)"
CHOWDHURY = "Ray Chowdhury et al. 2024 (arXiv:2403.00409)"


def _m(case: Case) -> Tensor:
    """β h."""
    return case["beta"] * margin(case)


def _conservative(case: Case, options: Options) -> Tensor:
    eps = case["label_smoothing"]
    return (1 - eps) * softplus(-_m(case)) + eps * softplus(_m(case))


def _unsmoothed() -> Law:
    return relation("dpo_without_smoothing", "identity", "at ε = 0 it is DPO",
                    "oracles, section 2.17: cDPO(0) = DPO", lambda c: c | {"label_smoothing": 0.0},
                    lambda v, c, f: f.reduced(softplus(-_m(c)), c), needs=("label_smoothing",))  # fmt: skip


def _mixture() -> Law:
    """Affine in ε, between the loss of the label and that of the flipped label."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        clean, eps = case | {"label_smoothing": 0.0}, case["label_smoothing"]
        want = (1 - eps) * f.value(clean) + eps * f.value(swapped(clean))
        yield Claim(
            case, f.value(case), "==", want, "(1 - ε) L₀(y⁺, y⁻) + ε L₀(y⁻, y⁺), L₀ the loss at ε = 0"
        )

    return Law("mixture_of_labels", "identity", "L = (1 - ε) L₀(y⁺, y⁻) + ε L₀(y⁻, y⁺)", "oracles C1, BT10",
               check, ("label_smoothing",))  # fmt: skip


def _smoothed_optimum() -> Law:
    """The margin at which smoothing holds a pair."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        eps, h = case["label_smoothing"], margin(case)
        there = moved(case, logit(1 - eps) / case["beta"] - h)
        want = f.reduced(torch.full_like(h, entropy(eps)), case)
        yield Claim(there, f.value(there), "==", want, "H(ε) at β h = logit(1 - ε)")
        still = torch.zeros_like(h)
        yield Claim(there, f.grad(there, "chosen_logp"), "==", still, "and no gradient", wrt="chosen_logp")

    return Law("optimum_of_a_pair", "limit",
               "least at β h = logit(1 - ε), where it is the entropy of (ε, 1 - ε)",
               "oracles C1", check)  # fmt: skip


def _clean_share(case: Case, f: Probed) -> Tensor:
    """The p for which (1 - ε) p + ε (1 - p) = σ(β h)."""
    return (torch.sigmoid(_m(case)) - case["label_smoothing"]) / (1 - 2 * case["label_smoothing"])


def _noisy_share(case: Case, f: Probed) -> Tensor:
    """(1 - ε) p + ε (1 - p) for p = σ(β h)."""
    return case["label_smoothing"] + (1 - 2 * case["label_smoothing"]) * torch.sigmoid(_m(case))


def _share(of_rise: Callable[[float], float]) -> Callable[[Ask], float | None]:
    """Reads ε off a subject that has it built in; of_rise: from its slope far above a tie, over β."""

    def measure(ask: Ask) -> float | None:
        _, below, above = far_slopes(ask)
        share = of_rise(above / (below + above))
        return share if 0 <= share < 0.5 else None

    return measure


CONSERVATIVE_DPO = Kind(
    name="conservative_dpo",
    title="Conservative DPO, -(1 - ε) log σ(β h) - ε log σ(-β h)",
    arguments=(*PAIR, BETA, SMOOTHING),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_conservative,
    differentiable=BOTH,
    reducible=True,
    factors=FACTORS,
    measure={"beta": measured_beta(math.log(2)), "label_smoothing": _share(lambda rise: rise)},
    extra_cases=lambda: real_pairs(beta=0.1, label_smoothing=0.1),
    laws=(
        formula("the loss of each pair is -(1 - ε) log σ(β h) - ε log σ(-β h)", MITCHELL),
        golden("golden_pair", GOLDEN_PAIR | {"beta": 0.1, "label_smoothing": 0.1}, [0.497488],
               "log-probs (-10, -12), reference (-15, -11), β = ε = .1: .497488", "oracles 5.2"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = β [σ(β h) - (1 - ε)]", MITCHELL),
        gradient("rejected_logp", "∂L/∂log π(y⁻) is its opposite", MITCHELL),
        _unsmoothed(),
        _mixture(),
        value_at_reference(lambda c: math.log(2), "log 2 where the policy is the reference, at any ε",
                           "oracles D2"),
        antisymmetry(lambda c, f: (1 - 2 * c["label_smoothing"]) * _m(c),
                     "L(y⁻, y⁺) - L(y⁺, y⁻) = (1 - 2ε) β h", "bugs Z06: weights swapped"),
        _smoothed_optimum(),
        bounded("at_least_the_entropy", "limit", "the loss is at least the entropy of (ε, 1 - ε)",
                "oracles C1", ">=",
                lambda c, f: f.reduced(torch.full_like(margin(c), entropy(c["label_smoothing"])), c)),
        least_at_a_tie(lambda c, f: column(math.log(2)), "oracles BT6"),
        calibrated(_clean_share,
                   "the expected gradient is 0 where σ(β h) = (1 - ε) p + ε (1 - p)", "oracles C2"),
        finite_at("stable", "at β h = ±10,000 the loss is ε or 1 - ε times that, and its gradient right",
                  "tinker-cookbook #188: log(sigmoid) overflows",
                  lambda: extreme_pairs(beta=1.0, label_smoothing=0.1), gradients=BOTH),
        *margin_laws(*PAIR, BETA, SMOOTHING),
    ),
)  # fmt: skip


def _robust(case: Case, options: Options) -> Tensor:
    eps = case["label_smoothing"]
    return ((1 - eps) * softplus(-_m(case)) - eps * softplus(_m(case))) / (1 - 2 * eps)


def _unbiased() -> Law:
    """What the loss is made for: the mean over flipped labels is the loss of the clean ones."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        eps = case["label_smoothing"]
        clean = f.reduced(softplus(-_m(case)), case)
        want = (clean - eps * f.value(swapped(case))) / (1 - eps)
        why = "(1 - ε) L(y⁺, y⁻) + ε L(y⁻, y⁺) is the DPO loss of the clean label"
        yield Claim(case, f.value(case), "==", want, why)

    return Law("unbiased_under_flips", "identity",
               "averaged over labels flipped with probability ε it is the clean " "DPO loss",
               "oracles C3; " + CHOWDHURY, check)  # fmt: skip


ROBUST_DPO = Kind(
    name="robust_dpo",
    title="Robust DPO, [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε)",
    arguments=(*PAIR, BETA, SMOOTHING),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_robust,
    differentiable=BOTH,
    reducible=True,
    factors=FACTORS,
    measure={"beta": measured_beta(math.log(2)),
             "label_smoothing": _share(lambda rise: rise / (2 * rise - 1))},
    extra_cases=lambda: real_pairs(beta=0.1, label_smoothing=0.1),
    laws=(
        formula("the loss of each pair is [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε)", CHOWDHURY),
        golden("golden_pair", GOLDEN_PAIR | {"beta": 0.1, "label_smoothing": 0.1}, [0.362488],
               "log-probs (-10, -12), reference (-15, -11), β = ε = .1: .362488", "oracles 5.2"),
        golden("golden_negative", GOLDEN_PAIR | {"beta": 0.5, "label_smoothing": 0.1}, [-0.326413],
               "the same pair at β = .5: -.326413, below 0", "oracles C3"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = -β [(1 - ε) σ(-β h) + ε σ(β h)] / (1 - 2ε)", CHOWDHURY),
        gradient("rejected_logp", "∂L/∂log π(y⁻) is its opposite", CHOWDHURY),
        _unsmoothed(),
        _unbiased(),
        value_at_reference(lambda c: math.log(2), "log 2 where the policy is the reference, at any ε",
                           "oracles D2"),
        antisymmetry(lambda c, f: _m(c) / (1 - 2 * c["label_smoothing"]),
                     "L(y⁻, y⁺) - L(y⁺, y⁻) = β h / (1 - 2ε)", "oracles C3, BT4"),
        falls(),
        least_at_a_tie(lambda c, f: column(math.log(2)), "convex, as its second derivative is DPO's"),
        calibrated(_noisy_share, "labels right with probability σ(β h) before an ε of them was flipped move "
                   "nothing", "oracles C3"),
        finite_at("stable", "at β h = ±10,000 the loss is finite and right, and its gradient too",
                  "tinker-cookbook #188: log(sigmoid) overflows",
                  lambda: extreme_pairs(beta=1.0, label_smoothing=0.1), gradients=BOTH),
        *margin_laws(*PAIR, BETA, SMOOTHING),
    ),
)  # fmt: skip

KINDS = (CONSERVATIVE_DPO, ROBUST_DPO)
