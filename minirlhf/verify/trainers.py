"""Does a trainer find the optimum? It is run in an enumerable world, where the optimum is known exactly.

    begin(world) -> state,   update(state) -> state,   policy(state) -> logits [X, K, V]

Nothing else is asked of a trainer: what its state is, whether it samples, and how it learns are its own.
Gradient ascent on the exact objective, as a subject:

>>> import torch
>>> from minirlhf.verify.goals import kl_regularised
>>> from minirlhf.verify.world import objective, small_world
>>> goal = kl_regularised(small_world())
>>> def update(logits):
...     return logits + 2 * torch.func.grad(objective)(logits, goal.world, beta=1.0)
>>> report = certify_trainer(update, goal, begin=lambda w: w.ref_logits, policy=lambda logits: logits)
>>> report.outcome, report.statistic <= 0.005
('reached', True)
"""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from minirlhf.verify.goals import Goal
from minirlhf.verify.world import World, kl_of_laws, response_logp

State = TypeVar("State")
Outcome = Literal["reached", "stalled", "unfinished", "not finite", "raised"]

HELD_SHARE = 0.25
"""A trainer must stay at the goal for this share of the updates it took to get there. One that forgets the KL
moves along the same path and passes the optimum: within 7 % of its way on either side of it, the regret
fraction is below .005. What no rule can see is a schedule whose rate falls to 0 just there: leave a subject a
rate to go on with."""
STALLED = 0.8
"""No longer improving: the best of the last checks is not below this share of the best before them."""

NEAR = 1 / 3
"""A mistake is named where its end is nearer than this share of the distance to the optimum."""


class Check(NamedTuple):
    """The policy after some updates: the goal's statistic, and KL(optimum‖policy) in nats."""

    update: int
    statistic: float
    divergence: float


class Neighbour(NamedTuple):
    """A known wrong objective, and the Jensen-Shannon divergence of the policy from its optimum, in nats."""

    name: str
    mistake: str
    distance: float


@dataclass(frozen=True)
class TrainerReport:
    """What became of a trainer.

    outcome: "reached"; "stalled": no longer improving; "unfinished": max_updates were too few; "not finite":
        NaN in the policy; "raised": the trainer stopped with an error.
    reason: the same as a sentence.
    checks: the statistic over the updates, the start first.
    logits: [X, K, V] the last policy that was looked at.
    distance: Jensen-Shannon divergence of its law from the optimum, nats.
    neighbours: the known wrong optima, the nearest first; empty where the goal was reached or the policy is
        not finite.
    """

    goal: Goal
    outcome: Outcome
    reason: str
    checks: tuple[Check, ...]
    logits: Tensor
    distance: float
    neighbours: tuple[Neighbour, ...]

    @property
    def reached(self) -> bool:
        """Whether the trainer is certified."""
        return self.outcome == "reached"

    @property
    def statistic(self) -> float:
        """The goal's statistic at the last policy."""
        return self.checks[-1].statistic

    @property
    def diagnosis(self) -> str:
        """The nearest known mistake, or that none is near."""
        if not self.neighbours:
            return "no mistake" if self.reached else "no known mistake: the policy is not finite"
        first = self.neighbours[0]
        distances = f"{first.distance:.2g} nats (Jensen-Shannon) away, the optimum {self.distance:.2g}"
        if first.distance <= NEAR * self.distance:
            return f"nearest known mistake: {first.name}: {first.mistake} (where it ends is {distances})"
        return (
            f"no known mistake: the nearest, {first.name}, ends {distances}. Steps may be too few, too large "
            f"or too noisy, or some tokens may not be trained."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON; what is not finite is None."""
        return {
            "goal": self.goal.name,
            "claim": self.goal.claim,
            "source": self.goal.source,
            "outcome": self.outcome,
            "reached": self.reached,
            "reason": self.reason,
            "measure": self.goal.measure,
            "threshold": self.goal.threshold,
            "checks": [
                {"update": c.update, "statistic": _json(c.statistic), "kl_to_optimum": _json(c.divergence)}
                for c in self.checks
            ],
            "distance": _json(self.distance),
            "diagnosis": self.diagnosis,
            "neighbours": [n._replace(distance=round(n.distance, 6))._asdict() for n in self.neighbours],
        }

    def table(self) -> Table:
        """The statistic against its threshold over the updates."""
        table = Table(title=self.goal.name, caption=self.goal.claim, caption_justify="left")
        for name in ("update", self.goal.measure, "threshold", "KL(optimum‖policy)"):
            table.add_column(name, justify="right")
        for check in _spread(self.checks):
            met = check.statistic <= self.goal.threshold
            shown = Text(f"{check.statistic:.3g}", style="green" if met else "red")
            threshold = f"{self.goal.threshold:g}"
            table.add_row(str(check.update), shown, threshold, f"{check.divergence:.3g}")
        return table

    def __rich__(self) -> Group:
        verdict = Text(f"{self.outcome}: {self.reason}", style="bold green" if self.reached else "bold red")
        lines: list[Table | Text] = [self.table(), verdict]
        return Group(*lines) if self.reached else Group(*lines, Text(self.diagnosis))

    def __str__(self) -> str:
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def certify_trainer(
    update: Callable[[State], State],
    goal: Goal,
    *,
    begin: Callable[[World], State],
    policy: Callable[[State], Tensor],
    max_updates: int = 1000,
    check_every: int = 1,
    hold: int = 10,
    patience: int = 50,
    console: Console | None = None,
) -> TrainerReport:
    """Runs a trainer until it has reached the goal and stays there, or plainly will not.

    Args:
        update: one step, or one iteration, of training.
        goal: from `goals`.
        begin: the state before the first update, given the goal's world; usually the policy starts at the
            reference.
        policy: the logits [X, K, V] of the policy in force; a tempered trainer's are divided by its
            temperature, and so are the world's ref_logits.
        max_updates: after which the verdict is "unfinished".
        check_every: updates between two looks at the policy.
        hold: looks in a row that the goal must be met in, and for at least a quarter of the updates that it
            took to get there.
        patience: looks without a marked improvement after which a trainer has stalled; more than any phase
            in which the policy rests.
        console: where progress is shown; None shows nothing.

    Returns:
        The report; a trainer that diverges or raises is a verdict, too.

    Raises:
        ValueError: a count is not positive, or `policy` does not return logits [X, K, V].
    """
    counts = {"max_updates": max_updates, "check_every": check_every, "hold": hold, "patience": patience}
    for name, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    state = begin(goal.world)
    logits = _logits_of(policy, state, goal.world)
    checks = [_look(logits, goal, 0)]
    outcome, reason = _judge(checks, goal, hold=hold, patience=patience)
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task(goal.name, total=max_updates)
        while outcome == "unfinished" and checks[-1].update < max_updates:
            number = min(checks[-1].update + check_every, max_updates)
            try:
                for _ in range(checks[-1].update, number):
                    state = update(state)
            except Exception as error:
                outcome, reason = "raised", _described(error, checks[-1].update)
                break
            logits = _logits_of(policy, state, goal.world)
            checks.append(_look(logits, goal, number))
            outcome, reason = _judge(checks, goal, hold=hold, patience=patience)
            shown = f"{goal.name}: {goal.measure} {checks[-1].statistic:.3g}"
            progress.update(task, completed=number, description=shown)
    distance, neighbours = nearest(logits, goal)
    return TrainerReport(
        goal, outcome, reason, tuple(checks), logits, distance, () if outcome == "reached" else neighbours
    )


def nearest(logits: Tensor, goal: Goal) -> tuple[float, tuple[Neighbour, ...]]:
    """The Jensen-Shannon divergence of a policy from the optimum, and the known wrong optima, nearest first.

    Of a policy that is not finite: infinity, and none.
    """
    law = response_logp(logits, goal.world)
    if bool(law.isnan().any()):
        return math.inf, ()
    found = [
        Neighbour(wrong.name, wrong.mistake, jensen_shannon(law, wrong.law(law))) for wrong in goal.wrong
    ]
    return jensen_shannon(law, goal.optimum), tuple(sorted(found, key=lambda n: n.distance))


def jensen_shannon(law: Tensor, other: Tensor) -> float:
    """½ KL(p‖m) + ½ KL(q‖m), m the mean of both, of log-probs [X, N], in nats: from 0 to log 2, symmetric."""
    middle = torch.logaddexp(law, other) - math.log(2)
    return float((kl_of_laws(law, middle) + kl_of_laws(other, middle)) / 2)


def _judge(checks: Sequence[Check], goal: Goal, *, hold: int, patience: int) -> tuple[Outcome, str]:
    """The verdict on what was seen so far; "unfinished" while there is none."""
    last, threshold = checks[-1], goal.threshold
    shown = f"{goal.measure} {last.statistic:.3g} after {last.update} updates, threshold {threshold:g}"
    if math.isnan(last.statistic):
        return "not finite", f"the policy is not finite after {last.update} updates"
    values = [check.statistic for check in checks]
    met = len(values)
    while met and values[met - 1] <= threshold:
        met -= 1
    if met < len(values):
        entered = checks[met].update
        held = len(values) - met >= hold and last.update - entered >= HELD_SHARE * entered
        if held:
            return "reached", f"{shown}, met since update {entered}"
        return "unfinished", f"{shown}, met since update {entered} but not yet held: allow more updates"
    if len(values) > patience and min(values[-patience:]) > STALLED * min(values[:-patience]):
        best = f"best {min(values):.3g}" + (
            ", met at times, but not held" if min(values) <= threshold else ""
        )
        return "stalled", f"{shown}, not improving for {patience} looks ({best})"
    return "unfinished", shown


def _look(logits: Tensor, goal: Goal, number: int) -> Check:
    law = response_logp(logits, goal.world)
    return Check(number, float(goal.statistic(logits)), float(kl_of_laws(goal.optimum, law)))


def _logits_of(policy: Callable[[State], Tensor], state: State, w: World) -> Tensor:
    """A copy in fp64: a trainer may go on writing into its own."""
    logits = policy(state)
    expected = f"policy must return logits of shape [X, K, V] = {list(w.ref_logits.shape)}"
    if not isinstance(logits, Tensor):
        raise ValueError(f"{expected}, got {type(logits).__name__}")
    if logits.shape != w.ref_logits.shape:
        raise ValueError(f"{expected}, got {list(logits.shape)}")
    return logits.detach().to("cpu", torch.float64, copy=True)


def _described(error: Exception, before: int) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"after update {before}, {type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def _spread(checks: Sequence[Check]) -> list[Check]:
    """At most a dozen of them, the first and the last among them."""
    count = min(len(checks), 12)
    steps = max(count - 1, 1)
    return [checks[round(i * (len(checks) - 1) / steps)] for i in range(count)]


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
