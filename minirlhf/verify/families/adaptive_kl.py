"""The adaptive KL coefficient: proportional control, clipped, in log space to first order."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Numbers, Options, Probed, Reals
from minirlhf.verify.laws import bounded, formula, golden, invariance, numeric_laws, relation

ZIEGLER = "Ziegler et al. 2019, section 2.2 (arXiv:1909.08593)"

ARGUMENTS = (
    Argument("coefficient", (), Reals(0.125, 4.0), "β > 0, the current coefficient",
             synonyms=("value", "kl_coef", "beta", "coef", "kl_ctl", "kl_coefficient", "old_coef",
                       "current_beta")),
    Argument("kl", (), Reals(0.25, 2.0, special=(0.0, 0.5, 1.0, 4.0)), "the measured KL(π‖π_ref) in nats",
             synonyms=("current", "current_kl", "kl_value", "mean_kl", "kl_mean", "measured_kl",
                       "observed_kl")),
    Argument("target", (), Numbers((6.0, 0.125, 1.0, 10.0), usual=(6.0, 0.1, 1.0, 0.01)),
             "the KL to hold, in nats",
             synonyms=("target_kl", "kl_target", "target_value")),
    Argument("horizon", (), Numbers((1000.0, 100.0, 50.0, 10000.0), usual=(10000.0, 10.0, 1000.0)),
             "the episodes in which β can change by about 20 %",
             synonyms=("kl_horizon", "kl_adapt_horizon")),
    Argument("n_steps", (), Numbers((64.0, 16.0, 8.0, 1.0), usual=(1.0, 256.0, 64.0)),
             "the episodes since last time",
             synonyms=("steps", "n", "batch_size", "nsteps", "num_steps", "n_episodes")),
)  # fmt: skip


def _arranged(case: Case) -> Case:
    """KL in units of its target: on both sides of it, within and beyond the limits."""
    return {**case, "kl": case["kl"] * case["target"]}


def _oracle(case: Case, options: Options) -> Tensor:
    error = min(max(float(case["kl"]) / case["target"] - 1, -0.2), 0.2)
    return case["coefficient"] * (1 + error * case["n_steps"] / case["horizon"])


def _at(case: Case, share: float) -> Case:
    """KL at this share of its target."""
    return {**case, "kl": torch.tensor(share * case["target"], dtype=torch.float64)}


def _limit(case: Case) -> Tensor:
    """The largest change in one step: []."""
    return 0.2 * case["coefficient"] * case["n_steps"] / case["horizon"]


def _golden(name: str, kl: float, want: float) -> Law:
    case = {"coefficient": torch.tensor(0.2).double(), "kl": torch.tensor(kl).double(), "target": 6.0,
            "horizon": 10000.0, "n_steps": 256.0}  # fmt: skip
    statement = f"β = .2, target 6, KL {kl:g}, 256 of 10,000 episodes: {want:.6f}"
    return golden(name, case, torch.tensor(want).double(), statement, "oracles A1", loose=10)


def _at_share(name: str, share: float, relation_: str, statement: str, source: str) -> Law:
    """At this share of the target the coefficient rises, falls or stays."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        given = _at(case, share)
        got = f.value(given)
        if relation_ == "==":
            yield Claim(given, got, "==", case["coefficient"], statement)
            return
        right = got > case["coefficient"] if relation_ == ">" else got < case["coefficient"]
        yield Claim(given, right, "holds", None, f"{statement}; it went from {float(case['coefficient'])}")

    return Law(name, "limit", statement, source, check)


def _changes(name: str, family: str, statement: str, source: str, one: Callable[[Case], Case],
             other: Callable[[Case], Case], factor: float, *,
             needs: tuple[str, ...] = ()) -> Law:  # fmt: skip
    """The change of the coefficient on the other case is a multiple of that on the one."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        first, second = one(case), other(case)
        want = second["coefficient"] + factor * (f.value(first) - first["coefficient"])
        yield Claim(second, f.value(second), "==", want, statement)

    return Law(name, family, statement, source, check, needs)


def _closed_loop() -> Law:
    """A policy whose KL is target · β*/β, which falls as β rises: β goes to β*."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        goal = case["coefficient"]
        beta = 1.5 * goal
        for _ in range(5):
            given = {**_at(case, float(goal / beta)), "coefficient": beta}
            after = f.value(given)
            why = f"the KL falls as β rises, and is at its target where β = {float(goal):g}: β comes closer"
            yield Claim(given, (after - goal).abs() < (beta - goal).abs(), "holds", None, why)
            beta = after

    return Law("closed_loop", "limit",
               "in a loop with a policy the coefficient goes to where the KL is its target",
               "oracles A2: the wrong sign runs away", check)  # fmt: skip


def _monotone() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        above = _at(case, float(case["kl"]) / case["target"] + 0.05)
        yield Claim(above, f.value(above), ">=", f.value(case), "more KL, no smaller coefficient")

    return Law("monotone", "symmetry", "more KL never gives a smaller coefficient", ZIEGLER, check)


ADAPTIVE = Kind(
    name="adaptive_kl",
    title="the adaptive KL coefficient",
    arguments=ARGUMENTS,
    returns="[] the next coefficient",
    shape=(),
    oracle=_oracle,
    arrange=_arranged,
    laws=(
        formula("β (1 + clip(KL/target - 1, -.2, .2) n/horizon)", ZIEGLER),
        _golden("golden_far_above", 12.0, 0.201024),
        _golden("golden_just_above", 6.3, 0.200256),
        _golden("golden_far_below", 1.0, 0.198976),
        _at_share("fixed_point", 1.0, "==", "at the target the coefficient stays", "oracles A1"),
        _at_share("rises_above_target", 1.1, ">", "above the target the coefficient rises", "oracles A1, A2"),
        _at_share("falls_below_target", 0.9, "<", "below the target the coefficient falls", "oracles A1, A2"),
        bounded("most", "limit", "one step raises the coefficient by at most 20 % · n/horizon", "oracles A1",
                "<=",
                lambda c, f: c["coefficient"] + _limit(c)),
        bounded("least", "limit", "one step lowers it by at most 20 % · n/horizon", "oracles A1", ">=",
                lambda c, f: c["coefficient"] - _limit(c)),
        _changes("saturates_above", "limit", "from 20 % above the target on, more KL changes nothing more",
                 "oracles A1", lambda c: _at(c, 1.3), lambda c: _at(c, 40.0), 1.0),
        _changes("saturates_below", "limit", "from 20 % below the target on, less KL changes nothing more",
                 "oracles A1", lambda c: _at(c, 0.7), lambda c: _at(c, 0.0), 1.0),
        _changes("proportional", "symmetry", "twice the error: twice the change", ZIEGLER,
                 lambda c: _at(c, 1.05),
                 lambda c: _at(c, 1.1), 2.0),
        _changes("odd", "symmetry", "as far below the target as above: the opposite change", ZIEGLER,
                 lambda c: _at(c, 1.15), lambda c: _at(c, 0.85), -1.0),
        relation("homogeneous", "symmetry", "the step is a share of the coefficient", ZIEGLER,
                 lambda c: {**c, "coefficient": 3 * c["coefficient"]}, lambda v, c, f: 3 * v),
        invariance("ratio_to_target", "symmetry", "only the ratio of KL to its target counts", ZIEGLER,
                   lambda c: {**c, "kl": 2 * c["kl"], "target": 2 * c["target"]}, needs=("target",)),
        invariance("share_of_horizon", "symmetry", "only the share n/horizon counts", ZIEGLER,
                   lambda c: {**c, "n_steps": 2 * c["n_steps"], "horizon": 2 * c["horizon"]},
                   needs=("n_steps", "horizon")),
        _changes("twice_the_steps", "symmetry", "twice the episodes: twice the change", ZIEGLER, lambda c: c,
                 lambda c: {**c, "n_steps": 2 * c["n_steps"]}, 2.0, needs=("n_steps",)),
        _changes("twice_the_horizon", "symmetry", "twice the horizon: half the change", ZIEGLER, lambda c: c,
                 lambda c: {**c, "horizon": 2 * c["horizon"]}, 0.5, needs=("horizon",)),
        _monotone(),
        _closed_loop(),
        *(law for law in numeric_laws(["coefficient", "kl"]) if law.name != "bfloat16"),
    ),
)  # fmt: skip

KINDS = (ADAPTIVE,)
