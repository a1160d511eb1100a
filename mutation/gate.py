"""The gate itself: the green baseline, then each mutant against the tests that run its line."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mutation.mutants import Mutant
from mutation.patch import planted
from mutation.suite import Line, Outcome, Test
from mutation.workers import Pulse, run_all

PATIENCE = 3.0
"""Seconds of processor time that any test may take on a mutant, however fast it is on the right code."""

LOST = "the process that ran it was lost"


class Baseline(NamedTuple):
    """How the tests do on the unchanged code: outcome of each, and the tests that ran each line, by index."""

    outcomes: list[Outcome]
    covering: dict[Line, frozenset[int]]

    def failures(self, tests: Sequence[Test]) -> list[tuple[str, str]]:
        """(test, message) of those that fail."""
        pairs = zip(tests, self.outcomes, strict=True)
        return [(test.name, outcome.message) for test, outcome in pairs if not outcome.passed]


class Verdict(NamedTuple):
    """killer: the test that refused the mutant, None where it survived; tried: how many tests ran on it."""

    mutant: Mutant
    killer: str | None
    tried: int


Tick = Callable[[int], None]
"""Called with the number of tasks done since the last call."""


def baseline(tests: Sequence[Test], files: frozenset[str], *, workers: int, tick: Tick) -> Baseline:
    """Runs every test once on the unchanged code, recording which lines of the files it runs."""

    def record(unit: Sequence[int], pulse: Pulse) -> Iterator[Outcome]:
        for index in unit:
            yield tests[index].run_recorded(files, limit=300.0)

    outcomes: dict[int, Outcome] = {}
    size = 40  # tests of one file together: what they import and compile is shared
    units = [range(start, min(start + size, len(tests))) for start in range(0, len(tests), size)]
    for done in run_all(units, record, workers):
        outcomes[done.task] = Outcome(False, False, 0.0, LOST) if done.lost else done.result
        tick(1)
    covering: defaultdict[Line, set[int]] = defaultdict(set)
    for index, outcome in outcomes.items():
        for line in outcome.lines if outcome.passed and not outcome.skipped else ():
            covering[line].add(index)
    ordered = [outcomes[index] for index in range(len(tests))]
    return Baseline(ordered, {line: frozenset(found) for line, found in covering.items()})


def verdicts(
    mutants: Sequence[Mutant],
    tests: Sequence[Test],
    green: Baseline,
    *,
    workers: int,
    tick: Tick,
) -> Iterator[Verdict]:
    """Tries every mutant. One function is one unit of work: its tests learn which of them kill there.

    Raises:
        RuntimeError: a test that killed a mutant fails on the unchanged code afterwards, so that no verdict
            of that worker means anything.
    """
    after = len(mutants)  # the last task of every unit: what killed must pass again without a mutant

    def attempt(unit: Sequence[int], pulse: Pulse) -> Iterator[tuple[str | None, int] | list[str]]:
        history = _History(tests, green, pulse)
        for index in unit:
            if index == after:
                yield [name for name, passed in history.killers_again() if not passed]
            else:
                yield history.killer(mutants[index])

    functions: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, mutant in enumerate(mutants):
        functions[mutant.module, mutant.function].append(index)
    units = [[*unit, after] for unit in sorted(functions.values(), key=len, reverse=True)]
    for done in run_all(units, attempt, workers):
        if done.task != after:
            killer, tried = (LOST, 0) if done.lost else done.result
            yield Verdict(mutants[done.task], killer, tried)
            tick(1)
        elif done.lost or done.result:
            raise RuntimeError(f"a mutant has left its traces; red without any: {done.result or LOST}")


class _History:
    """Which tests have killed mutants of one function, and so which to try first."""

    def __init__(self, tests: Sequence[Test], green: Baseline, pulse: Pulse) -> None:
        self._tests, self._green, self._pulse = tests, green, pulse
        self._runs: Counter[int] = Counter()
        self._kills: Counter[int] = Counter()

    def killer(self, mutant: Mutant) -> tuple[str | None, int]:
        """Runs the tests on the mutant until one fails: its name, and how many were run."""
        with planted(mutant):
            for tried, index in enumerate(self._ordered(candidates(mutant, self._green)), start=1):
                self._pulse()
                self._runs[index] += 1
                seconds = self._green.outcomes[index].seconds
                if not self._tests[index].run(limit=max(PATIENCE, 10 * seconds)).passed:
                    self._kills[index] += 1
                    return self._tests[index].name, tried
        return None, len(candidates(mutant, self._green))

    def killers_again(self) -> Iterator[tuple[str, bool]]:
        """Runs what killed, on whatever the module is now."""
        for index in self._kills:
            self._pulse()
            yield self._tests[index].name, self._tests[index].run(limit=300.0).passed

    def _ordered(self, indices: frozenset[int]) -> list[int]:
        """By chance of a kill per second: the chance so far, at first by how little else a test runs."""

        def worth(index: int) -> float:
            outcome = self._green.outcomes[index]
            prior = 10.0 / (10.0 + len(outcome.lines))
            chance = (self._kills[index] + prior) / (self._runs[index] + 1.0)
            return chance / (outcome.seconds + 0.002)

        return sorted(indices, key=worth, reverse=True)


def candidates(mutant: Mutant, green: Baseline) -> frozenset[int]:
    """The tests that run the line of a mutant; for a constant of the module, all that run the module."""
    path = mutant.code.co_filename
    if mutant.function == "<module>":
        lines = [line for line in green.covering if line[0] == path]
    else:
        lines = [(path, number) for number in range(mutant.lines[0], mutant.lines[1] + 1)]
    return frozenset().union(*(green.covering.get(line, frozenset()) for line in lines))


def covered_files(mutants: Sequence[Mutant]) -> frozenset[str]:
    """The files that mutants stand in, as their code names them."""
    return frozenset(str(Path(mutant.code.co_filename)) for mutant in mutants)
