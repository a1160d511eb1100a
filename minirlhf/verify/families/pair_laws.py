"""Laws of a preference pair that hold for most of its losses, each made for one kind by what differs."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from minirlhf.verify.families.pairs import (
    BOTH,
    LENGTHS,
    PAIR,
    PAIRS,
    at_reference,
    pair_weights,
    shifted,
    swapped,
)
from minirlhf.verify.kinds import Argument, Case, Claim, Law, Probed
from minirlhf.verify.laws import batch_laws, bounded, invariance, numeric_laws, relation, rows_of

Lengths = Callable[[Case, Probed], tuple[Tensor, Tensor]]
"""What the two sides are divided by."""


def unit_lengths(case: Case, f: Probed) -> tuple[Tensor, Tensor]:
    """Log-probs that stay summed."""
    return torch.ones(()), torch.ones(())


def same_shift_laws() -> tuple[Law, ...]:
    """Only the ratio to the reference counts, on each side."""
    return tuple(
        invariance(
            f"{side}_shifted_with_reference",
            "symmetry",
            f"policy and reference shifted alike on the {side} side change nothing: the reference counts",
            "oracles D3; Liger #405: reference ignored",
            lambda c, side=side: shifted(c, -1.25, f"{side}_logp", f"ref_{side}_logp"),
            gradients=BOTH,
        )
        for side in ("chosen", "rejected")
    )


def constant_laws() -> tuple[Law, ...]:
    """What belongs to the prompt cancels."""
    return (
        invariance("prompt_constant", "symmetry",
                   "a constant added to both log-probs of the policy changes nothing",
                   "oracles D3: the prompt's log-prob cancels", lambda c: shifted(c, -0.75, *BOTH),
                   gradients=BOTH),
        invariance("reference_constant", "symmetry",
                   "a constant added to both log-probs of the reference does not", "oracles D3",
                   lambda c: shifted(c, -1.5, "ref_chosen_logp", "ref_rejected_logp"), gradients=BOTH),
    )  # fmt: skip


def opposite_gradients(chosen: str = "chosen_logp", rejected: str = "rejected_logp", *,
                       lengths: Lengths = unit_lengths) -> Law:  # fmt: skip
    """The difference alone counts: what one side gains the other loses, per token where h is."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        up, down = f.grad(case, chosen), f.grad(case, rejected)
        ours, theirs = lengths(case, f)
        why = "opposite gradients, where log-probs are averaged times their lengths"
        yield Claim(case, down, "==", -up * ours / theirs, why, wrt=rejected)

    return Law("gradients_cancel", "gradient", "the gradients of chosen and rejected are opposite",
               "oracles D6, BT5", check)  # fmt: skip


def per_token_constant(lengths: Lengths) -> Law:
    """Of averages, a constant for each token cancels, not one for each response."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = case
        for name, length in zip(BOTH, lengths(case, f), strict=True):
            changed = shifted(changed, -0.25 * length, name)
        yield Claim(changed, f.value(changed), "==", f.value(case), "log-probs - .25 for each token")

    statement = "a constant added to the log-prob of each token of both responses changes nothing"
    return Law("per_token_constant", "symmetry", statement, "P19, oracles D3", check)


def repeated_tokens(logps: Sequence[str], *, averaged: Callable[[Probed], bool] = lambda f: True) -> Law:
    """The test of a length normalisation: every per-token log-prob twice."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        twice = case | {name: 2 * case[name] for name in LENGTHS}
        if averaged(f):
            twice |= {name: 2 * case[name] for name in logps}
        yield Claim(twice, f.value(twice), "==", f.value(case), "an average stays, and a sum knows no length")

    return Law("repeated_tokens", "invariance", "every per-token log-prob twice leaves averages as they were",
               "P19; TRL #1265, torchtune #1291, HALOs d8fd14f", check, LENGTHS)  # fmt: skip


def scaled_margin() -> Law:
    """Depends on β h only."""

    def twice(case: Case) -> Case:
        halved = {n: case[n] / 2 for n in case if n.endswith("logp")}
        return {**case, **halved, "beta": 2 * case["beta"]}

    return invariance("beta_times_margin", "symmetry",
                      "β twice and every log-prob half: the same; only β·h counts", "oracles D4", twice,
                      needs=("beta",))  # fmt: skip


def value_at_reference(value: Callable[[Case], float], statement: str, source: str) -> Law:
    """A policy that has not moved has the same loss on every pair."""
    return relation("value_at_reference", "limit", statement, source, at_reference,
                    lambda v, c, f: f.reduced(torch.full_like(c["chosen_logp"], value(c)), c))  # fmt: skip


def antisymmetry(difference: Callable[[Case, Probed], Tensor], statement: str, source: str) -> Law:
    """What exchanging the two responses adds to the loss, exactly."""
    return relation("antisymmetry", "symmetry", statement, source, swapped,
                    lambda v, c, f: v + f.reduced(difference(c, f), c))  # fmt: skip


def least_at_a_tie(tie: Callable[[Case, Probed], Tensor], source: str, *, like: str = "chosen_logp") -> Law:
    """Convex in the margin: the mean over both labels is least at a margin of 0, where the loss is `tie`."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        there = swapped(case)
        want = 2 * f.reduced(tie(case, f).expand_as(case[like]), case) - f.value(case)
        yield Claim(
            there, f.value(there), ">=", want, "both labels together: at least twice the loss of a tie"
        )

    return Law("least_at_a_tie", "limit",
               "over both labels the loss is at least that of a margin of 0 (convex)",
               source, check)  # fmt: skip


def golden_by(
    name: str, case: Case, convention: str, wants: Mapping[str, float], statement: str, source: str
) -> Law:
    """A published number of one pair, for each value of a convention."""

    def check(f: Probed, given: Case) -> Iterator[Claim]:
        want = torch.tensor([wants[f.options[convention]]], dtype=torch.float64)
        yield Claim(given, f.value(given), "==", f.reduced(want, given), statement, loose=1e3)

    return Law(name, "value", statement, source, check, cases=lambda: [case])


def falls(
    rewarded: str = "chosen_logp", source: str = "P18: preference losses", *, name: str = "falls"
) -> Law:
    """The loss never rises with what it rewards."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        worse = shifted(case, -0.5, rewarded)
        yield Claim(worse, f.value(worse), ">=", f.value(case), f"{rewarded} lower by .5: no smaller loss")

    return Law(name, "limit", f"the loss does not rise with {rewarded}", source, check)


def never_negative() -> Law:
    """A negative log-likelihood, a distance or a square."""
    return bounded("positive", "limit", "the loss is never negative", "Liger #484: DPO double-negated", ">=",
                   lambda c, f: torch.zeros((), dtype=torch.float64))  # fmt: skip


def calibrated(
    agreement: Callable[[Case, Probed], Tensor],
    statement: str,
    source: str,
    *,
    change: Callable[[Case], Case] = lambda case: case,
    needs: tuple[str, ...] = (),
    name: str = "calibrated",
    side: str = "logp",
) -> Law:
    """Where y⁺ wins with a probability p that fits the margin, the expected gradient is 0.

    agreement: p [B], the probability of the label for which the margins of the case are optimal.
    """

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        given = change(case)
        p = agreement(given, f)
        won, lost = f.grad(given, f"chosen_{side}"), f.grad(swapped(given), f"rejected_{side}")
        why = f"p·∂L(y⁺, y⁻) + (1 - p)·∂L(y⁻, y⁺) = 0 in y⁺ at p = {[round(x, 6) for x in p.tolist()]}"
        yield Claim(given, won, "==", (1 - p) * (won - lost), why, wrt=f"chosen_{side}")

    return Law(name, "limit", statement, source, check, needs)


def stationary(
    name: str,
    arguments: Sequence[Argument],
    case: Callable[[], Case],
    statement: str,
    source: str,
    *,
    sides: tuple[str, str] = BOTH,
    needs: tuple[str, ...] = (),
) -> Law:
    """On all pairs of three responses, labels Bradley-Terry, the expected gradient is 0 at the optimum."""

    def check(f: Probed, given: Case) -> Iterator[Claim]:
        total = torch.zeros(3, dtype=torch.float64)
        for row, weight in enumerate(pair_weights()):
            single = rows_of(arguments, given, torch.tensor([row]))
            for side, place in zip(sides, (0, 1), strict=True):
                total[PAIRS[row, place]] += weight * f.grad(single, side)[0]
        why = f"{statement}; the expected gradient there is {[round(g, 6) for g in total.tolist()]}"
        yield Claim(given, total.abs() < 1e-6, "holds", None, why)

    return Law(name, "limit", statement, source, check, needs, cases=lambda: [case()])


def margin_laws(*arguments: Argument) -> tuple[Law, ...]:
    """The laws of every function of β h alone."""
    return (
        *constant_laws(),
        *same_shift_laws(),
        opposite_gradients(),
        scaled_margin(),
        *batch_laws(arguments),
        *numeric_laws([a.name for a in PAIR]),
    )
