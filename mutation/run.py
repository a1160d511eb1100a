"""`make mutants`: every module of the mathematics, mutated, against the tests that concern it.

    python -m mutation                          all modules
    python -m mutation objectives/value.py      some, by a part of the path
    python -m mutation --list kernels           shows the mutants and runs nothing

Exit code 0: every mutant was killed or is allowed. 1: one survived, or a class of the allow-list is stale.
2: the baseline is not green, so that no mutant was tried.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mutation.allowed import ALLOWED, Allowed
from mutation.gate import Baseline, Tick, baseline, covered_files, verdicts
from mutation.mutants import Mutant, mutants_of
from mutation.report import show, sorted_out
from mutation.suite import Test, with_tests

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("minirlhf/objectives",)
# Of the kernels the mathematics: a statement of `fused` that is run again would register its operators anew,
# and the work of `cpu` and `memory` is done in C++ and by the system.
PAGES = (
    "minirlhf/kernels/passes.py",
    "minirlhf/kernels/logprob.py",
    "minirlhf/rollout/draw.py",
)
TESTS = (
    "tests/objectives",
    "tests/kernels",
    "tests/rollout/test_draw.py",
    "tests/rollout/test_draw_edges.py",
    *ROOMS,
    *PAGES,
)
EXAMPLES = 20
WORKERS = 2


def modules(wanted: Sequence[str] = ()) -> list[str]:
    """The names of the modules to mutate; those whose path has one of the wanted parts."""
    pages = [page for room in ROOMS for page in sorted((ROOT / room).rglob("*.py"))]
    pages += [ROOT / page for page in PAGES]
    paths = [str(page.relative_to(ROOT).with_suffix("")) for page in pages if page.name != "__init__.py"]
    parts = [part.removesuffix(".py").replace(".", "/") for part in wanted]
    return [path.replace("/", ".") for path in paths if not parts or any(part in path for part in parts)]


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mutation", description="The mutation gate.")
    parser.add_argument("part", nargs="*", help="parts of paths; without any, every module is mutated")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes (default: %(default)s)")
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, help="Hypothesis examples a test (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    names = modules(chosen.part)
    if not names:
        parser.error(
            f"no module's path has a part {' or '.join(chosen.part)}; there are {', '.join(modules())}"
        )
    console = Console(file=sys.stdout)
    mutants = [mutant for name in names for mutant in mutants_of(name)]
    if chosen.list:
        for mutant in mutants:
            console.print(f"{mutant.place} [{mutant.operator}] {mutant.after}", markup=False, soft_wrap=True)
        return 0
    return gate(
        mutants,
        [ROOT / path for path in TESTS],
        console,
        classes=ALLOWED,
        whole=not chosen.part,
        workers=chosen.workers,
        examples=chosen.examples,
    )


def gate(
    mutants: Sequence[Mutant],
    paths: Sequence[Path],
    console: Console,
    *,
    classes: tuple[Allowed, ...],
    whole: bool,
    workers: int = WORKERS,
    examples: int = EXAMPLES,
) -> int:
    """Tries the mutants against the tests in the paths and prints what came of it; returns the exit code."""
    if not mutants:
        console.print("no mutants: nothing was tried")
        return 2
    torch.set_num_threads(1)
    start = time.perf_counter()

    def body(tests: Sequence[Test]) -> int:
        gc.freeze()  # what the parent has stays shared with its children
        with _progress(console) as progress:
            tick = _ticker(progress, "baseline", len(tests))
            green = baseline(tests, covered_files(mutants), workers=workers, tick=tick)
            if _red(green, tests, console):
                return 2
            tick = _ticker(progress, "mutants", len(mutants))
            found = list(verdicts(mutants, tests, green, workers=workers, tick=tick))
        result = sorted_out(found, classes, whole=whole)
        show(result, console)
        killed = sum(verdict.killer is not None for verdict in found)
        runs = sum(verdict.tried for verdict in found)
        console.print(
            f"{killed} of {len(found)} mutants killed ({killed / max(len(found), 1):.1%}) in {runs} runs of "
            f"{len(tests)} tests, {time.perf_counter() - start:.0f} s"
        )
        return 0 if result.passed else 1

    code = with_tests(paths, body, examples=examples)
    if code is None:
        console.print("[red]the tests could not be collected: nothing was tried[/red]")
        return 2
    return code


def _red(green: Baseline, tests: Sequence[Test], console: Console) -> bool:
    """Whether a test fails without a mutant; says which."""
    failures = green.failures(tests)
    for name, message in failures:
        console.print(f"[red]red without a mutant[/red] {name}: {message}", highlight=False)
    if failures:
        console.print(f"{len(failures)} of {len(tests)} tests fail on the unchanged code: nothing was tried")
    return bool(failures)


class _Rate(ProgressColumn):
    """Tasks per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # a thread that refreshes might hold a lock while a worker is forked
    )


def _ticker(progress: Progress, name: str, total: int) -> Tick:
    """Shows a new task and returns what moves it on; drawn at most four times a second."""
    task = progress.add_task(name, total=total)
    drawn = 0.0

    def tick(done: int) -> None:
        nonlocal drawn
        progress.advance(task, done)
        if time.monotonic() - drawn > 0.25 or progress.finished:
            drawn = time.monotonic()
            progress.refresh()

    return tick
