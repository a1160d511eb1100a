"""Simple Preference Optimization: no reference, log-probs averaged per token, a margin that is asked for.

ℓ = log π(y)/|y|, z = β (ℓ⁺ - ℓ⁻); a subject without lengths is given averages.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import (
    calibrated,
    falls,
    golden_by,
    least_at_a_tie,
    never_negative,
    opposite_gradients,
    per_token_constant,
    repeated_tokens,
)
from minirlhf.verify.families.pairs import (
    BETA,
    BOTH,
    EXTREME,
    FACTORS,
    LENGTH_PAIR,
    POLICY_PAIR,
    averages,
    logit,
    moved,
    real_averages,
    softplus,
    swapped,
    token_pair,
)
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Convention, Kind, Law, Numbers, Options, Probed
from minirlhf.verify.laws import batch_laws, column, finite_at, formula, gradient, numeric_laws

MENG = "Meng et al. 2024, SimPO, Eq. 6 (arXiv:2405.14734)"


def _lengths(case: Case, f: Probed) -> tuple[Tensor, Tensor]:
    return case["chosen_length"].double(), case["rejected_length"].double()


REWARD, RATIO = "reward", "ratio"
TARGET = Convention(
    "gamma",
    {
        REWARD: "in reward units: β (ℓ⁺ - ℓ⁻) - γ",
        RATIO: "in nats per token, γ/β of the paper: β (ℓ⁺ - ℓ⁻ - γ)",
    },
)
_SIMPO_BETA = BETA._replace(
    domain=Numbers((2.0, 0.5, 1.0, 2.5), usual=(2.0, 2.5, 1.0, 0.1, 0.5, 10.0)),
    meaning="β > 0, reward units per nat per token",
    synonyms=(*BETA.synonyms, "simpo_beta", "scale"),
)
_GAMMA = Argument(
    "gamma",
    (),
    Numbers((0.5, 1.0, 1.5, 0.25), usual=(0.5, 1.0, 1.4, 1.6, 0.3, 0.25, 0.0, 1.5)),
    "γ >= 0, the margin that is asked for",
    synonyms=("simpo_gamma", "gamma_beta_ratio", "target_margin", "target_reward_margin", "margin"),
)


def _z(case: Case) -> Tensor:
    """The difference of the rewards, β (ℓ⁺ - ℓ⁻)."""
    chosen, rejected = averages(case)
    return case["beta"] * (chosen - rejected)


def _asked(case: Case, options: Options) -> float:
    """The margin that is asked for, in reward units."""
    return case["gamma"] * (1.0 if options[TARGET.name] == REWARD else case["beta"])


def _simpo(case: Case, options: Options) -> Tensor:
    return softplus(_asked(case, options) - _z(case))


def _reward_moved(case: Case, amount: Tensor | float) -> Case:
    """z greater by the amount."""
    return moved(case, amount / case["beta"], (case["chosen_length"], case["rejected_length"]))


def _at_the_target() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        there = _reward_moved(case, _asked(case, f.options) - _z(case))
        want = f.reduced(torch.full_like(case["chosen_logp"], math.log(2)), case)
        why = "log 2 where the rewards differ by the margin asked for"
        yield Claim(there, f.value(there), "==", want, why)

    return Law("log2_at_the_target", "limit", "log 2 where β (ℓ⁺ - ℓ⁻) is the margin asked for", MENG, check)


def _reflected() -> Law:
    """The symmetry of a logistic loss, about the target rather than about a tie."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        beyond = _z(case) - _asked(case, f.options)
        mirrored = _reward_moved(case, -2 * beyond)
        want = f.value(case) + f.reduced(beyond, case)
        why = "reflected about the target: greater by the distance to it"
        yield Claim(mirrored, f.value(mirrored), "==", want, why)

    statement = "L(γ - x) - L(γ + x) = x, about the margin asked for"
    return Law("antisymmetry", "symmetry", statement, "oracles BT4, S1", check)


def _margin_as_shift() -> Law:
    """γ is the same as a worse chosen response."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        none = _reward_moved(case, -_asked(case, f.options)) | {"gamma": 0.0}
        why = "the margin taken from the chosen reward, and γ = 0"
        yield Claim(none, f.value(none), "==", f.value(case), why)

    return Law("margin_is_a_handicap", "identity",
               "γ is the same as a chosen reward that is lower by the margin", "oracles S1, BT9", check,
               ("gamma",))  # fmt: skip


def _without_margin() -> Law:
    """Bradley-Terry on averages."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        plain = case | {"gamma": 0.0}
        other = swapped(plain)
        want = f.value(plain) + f.reduced(_z(plain), plain)
        yield Claim(other, f.value(other), "==", want, "at γ = 0: L(y⁻, y⁺) - L(y⁺, y⁻) = β (ℓ⁺ - ℓ⁻)")

    return Law("bradley_terry_without_margin", "identity",
               "at γ = 0 it is Bradley-Terry of averaged log-probs", "oracles, section 2.17", check,
               ("gamma",))  # fmt: skip


def _published_optimum() -> Law:
    """Where SimPO leaves a pair whose chosen response wins with probability p: not at the log-odds."""
    wins = {0.5: (0.6, 0.5332), 1.0: (0.75, 1.7820), 1.5: (0.9, 3.5864)}

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        p, z = wins[case["gamma"]]
        won, lost = f.grad(case, "chosen_logp"), f.grad(swapped(case), "rejected_logp")
        why = f"p = {p}, γ = {case['gamma']}: optimal margin {z}, not logit p = {logit(p):.4f}"
        yield Claim(case, (p * won + (1 - p) * lost).abs() < 1e-4, "holds", None, why)

    cases = [token_pair(-1.0, -1.0 - z, beta=1.0, gamma=gamma) for gamma, (_, z) in wins.items()]
    return Law("published_optimum", "limit",
               "for p = .6, .75, .9 and γ = .5, 1, 1.5 the best margin is .5332, 1.7820, 3.5864",
               "oracles S2", check, cases=lambda: cases)  # fmt: skip


def _scaled() -> Law:
    """Only β ℓ counts; a margin in nats shrinks with ℓ."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        halved = {n: case[n] / 2 for n in BOTH}
        gamma = case["gamma"] if f.options[TARGET.name] == REWARD else case["gamma"] / 2
        changed = case | halved | {"beta": 2 * case["beta"], "gamma": gamma}
        yield Claim(changed, f.value(changed), "==", f.value(case), statement)

    statement = "β twice and every log-prob half: the same"
    return Law("beta_times_average", "symmetry", statement, MENG, check, ("beta", "gamma"))


def _simpo_balance(case: Case, f: Probed) -> Tensor:
    z, asked = _z(case), _asked(case, f.options)
    up, down = torch.sigmoid(asked - z), torch.sigmoid(asked + z)
    return down / (up + down)


def _measured_beta(ask: Ask) -> float | None:
    """Reads β off a subject that has it built in: what the loss gains per nat, far below the target."""
    beta = ask(_distant(-2000.0, beta=1.0, gamma=1.0)) - ask(_distant(-1000.0, beta=1.0, gamma=1.0))
    return beta / 1000 if beta > 0 else None


def _measured_gamma(ask: Ask) -> float | None:
    """Reads γ off, in reward units: twice the loss, less the loss twice as far below."""
    gamma = 2 * ask(_distant(-1000.0, beta=1.0, gamma=1.0)) - ask(_distant(-2000.0, beta=1.0, gamma=1.0))
    return round(gamma, 6) if gamma > -1e-6 else None


def _distant(z: float, **numbers: float) -> Case:
    return token_pair(-1.0 + min(z, 0.0), -1.0 - max(z, 0.0), **numbers)


def _extreme() -> list[Case]:
    """Far margins, and a small one of far log-probs."""
    far = token_pair(-1e4, -1e4 - 1.5, beta=1.0, gamma=0.5)
    return [*(_distant(z, beta=1.0, gamma=0.5) for z in EXTREME), far, swapped(far)]


SIMPO = Kind(
    name="simpo",
    title="Simple Preference Optimization, -log σ(β (ℓ⁺ - ℓ⁻) - γ)",
    arguments=(*POLICY_PAIR, *LENGTH_PAIR, _SIMPO_BETA, _GAMMA),
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_simpo,
    differentiable=BOTH,
    conventions=(TARGET,),
    reducible=True,
    factors=FACTORS,
    measure={"beta": _measured_beta, "gamma": _measured_gamma},
    extra_cases=lambda: real_averages(beta=2.0, gamma=0.5),
    laws=(
        formula("the loss of each pair is -log σ(β log π(y⁺)/|y⁺| - β log π(y⁻)/|y⁻| - γ)", MENG),
        golden_by("golden_pair", token_pair(-0.8, -1.0, beta=2.0, gamma=1.0), TARGET.name,
                  {REWARD: 1.037488, RATIO: 1.783900},
                  "averages (-.8, -1), β = 2, γ = 1: log(1 + e^.6) = 1.037488", "oracles 5.3"),
        gradient("chosen_logp", "∂L/∂log π(y⁺) = -β/|y⁺| σ(γ - z)", MENG),
        gradient("rejected_logp", "∂L/∂log π(y⁻) = β/|y⁻| σ(γ - z)", MENG),
        _at_the_target(),
        _reflected(),
        _margin_as_shift(),
        _without_margin(),
        _scaled(),
        _published_optimum(),
        calibrated(_simpo_balance, "the expected gradient is 0 at p = σ(γ + z) / (σ(γ - z) + σ(γ + z))",
                   "oracles S2"),
        per_token_constant(_lengths),
        repeated_tokens(BOTH),
        opposite_gradients(lengths=_lengths),
        never_negative(),
        falls(),
        least_at_a_tie(lambda c, f: softplus(column(_asked(c, f.options))), "convex in the margin"),
        finite_at("stable", "at margins of ±10,000 the loss is 0 or 10,000, and its gradient right",
                  "P21: numeric range", _extreme,
                  gradients=BOTH),
        *batch_laws((*POLICY_PAIR, *LENGTH_PAIR)),
        *numeric_laws(BOTH),
    ),
)  # fmt: skip

KINDS = (SIMPO,)
