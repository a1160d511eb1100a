"""What the gate prints: one table by module, the classes that let survivors through, the survivors."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mutation.allowed import Allowed, allowance
from mutation.gate import LOST, Verdict


class Result(NamedTuple):
    """The verdicts sorted: all, what survived by which class, what survived without one, stale classes."""

    verdicts: list[Verdict]
    allowed: list[tuple[Verdict, Allowed]]
    survivors: list[Verdict]
    stale: list[Allowed]

    @property
    def passed(self) -> bool:
        return not self.survivors and not self.stale


def sorted_out(verdicts: Sequence[Verdict], classes: tuple[Allowed, ...], *, whole: bool) -> Result:
    """Sorts verdicts. whole: every module was tried, so that a class without a survivor is stale."""
    alive = [verdict for verdict in verdicts if verdict.killer is None]
    pairs = [(verdict, allowance(verdict.mutant, classes)) for verdict in alive]
    allowed = [(verdict, each) for verdict, each in pairs if each is not None]
    used = {each.name for _, each in allowed}
    stale = [each for each in classes if each.name not in used] if whole else []
    return Result(list(verdicts), allowed, [verdict for verdict, each in pairs if each is None], stale)


def show(result: Result, console: Console) -> None:
    """Prints the table, the classes and the survivors."""
    console.print(_table(result))
    for each, count in Counter(each for _, each in result.allowed).items():
        console.print(f"allowed {count:3d}  [bold]{escape(each.name)}[/bold]: {escape(each.reason)}")
    lost = sum(verdict.killer == LOST for verdict in result.verdicts)
    if lost:
        console.print(f"{lost} killed by ending a process that hung or crashed")
    for verdict in sorted(result.survivors, key=lambda v: (v.mutant.module, v.mutant.line)):
        mutant = verdict.mutant
        seen = f"{verdict.tried} tests pass" if verdict.tried else "no test runs this line"
        place = f"{mutant.place} {mutant.function} [{mutant.operator}], {seen}"
        console.print(f"[red]survived[/red] {escape(place)}", highlight=False, soft_wrap=True)
        console.print(
            f"  - {mutant.before}\n  + {mutant.after}", markup=False, highlight=False, soft_wrap=True
        )
    for each in result.stale:
        console.print(
            f"[red]stale[/red] the class {each.name!r} lets nothing through: delete it", highlight=False
        )


def _table(result: Result) -> Table:
    table = Table("module", title_justify="left")
    for name in ("mutants", "killed", "allowed", "survived"):
        table.add_column(name, justify="right")
    modules = sorted({verdict.mutant.module for verdict in result.verdicts})
    totals = [0, 0, 0, 0]
    for module in modules:
        mine = [verdict for verdict in result.verdicts if verdict.mutant.module == module]
        allowed = sum(verdict.mutant.module == module for verdict, _ in result.allowed)
        survived = sum(verdict.mutant.module == module for verdict in result.survivors)
        row = [len(mine), len(mine) - allowed - survived, allowed, survived]
        totals = [total + number for total, number in zip(totals, row, strict=True)]
        table.add_row(module, *map(str, row), style="red" if survived else "")
    table.add_section()
    table.add_row("together", *map(str, totals))
    return table
