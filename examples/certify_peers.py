"""Certifies other libraries' functions, as those libraries call them, and prints one table.

    python examples/certify_peers.py                           (about two minutes with ten libraries)
    python examples/certify_peers.py --only trl verl           only these; minirlhf is the control
    python examples/certify_peers.py --show "torchtune whiten" one report in full, with its counter-example
    python examples/certify_peers.py --json peers.json         everything, counter-examples included
    python examples/certify_peers.py --markdown                the summary that the README shows

It needs none of them: what is not installed, or does not import, is a row that says so. The adapters are in
`examples/peers/`, one page for each library: they rename, and pass what the library itself passes. A verdict
is about the function in that release, called so, and nothing else of the library. What differs without being
wrong (how a loss is averaged, which estimator, an ε) is a convention: the table shows those that differ from
ours. What a subject lacks is not held against it. Exit code 1: one of our own functions is defective.
"""

import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from peers import (
    areal,
    liger_kernel,
    llamafactory,
    openrlhf,
    ours,
    skyrl,
    tinker_cookbook,
    torchrl,
    torchtune,
    trl,
    trl_before_1,
    verl,
)
from peers.frame import NOT_INSTALLED, OTHER_RELEASE, Subject, Unavailable, found
from rich.console import Console
from rich.progress import track
from rich.table import Table

from minirlhf.verify import Report, SubjectError, certify
from minirlhf.verify.report import Finding

PAGES = (
    ours, trl, trl_before_1, verl, openrlhf, skyrl, areal, liger_kernel, torchrl, torchtune, llamafactory,
    tinker_cookbook,
)  # fmt: skip
_WIDTH = 170


@dataclass(frozen=True)
class Options:
    """Certifies other libraries' functions."""

    only: tuple[str, ...] = ()
    """Libraries to certify, by the name they are installed under."""
    show: str = ""
    """Print the whole report of each subject whose name contains this: "LIBRARY FUNCTION"."""
    json: Path | None = None
    """Write everything to this file."""
    markdown: bool = False
    """Print a summary in Markdown instead of the table."""


class Row(NamedTuple):
    """What came of one subject: a report, or why there is none."""

    subject: Subject
    version: str
    report: Report | None
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.subject.library} {self.subject.function}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        head = {"library": self.subject.library, "version": self.version, "function": self.subject.function}
        report = self.report.as_dict() if self.report is not None else {"verdict": self.why}
        return head | {"kind": self.subject.kind} | report


def certified(subject: Subject) -> Row:
    """The row of one subject; whatever is wrong with it, it is a row."""
    version = version_of(subject.library)
    try:
        return Row(subject, version, certify(found(subject), subject.kind, **subject.adapter))
    except (Unavailable, SubjectError) as error:
        return Row(subject, version, None, str(error))


def version_of(library: str) -> str:
    """The installed version, "" where there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def broken(report: Report) -> list[str]:
    """The laws that do not hold; those that only met an exception are counted under it."""
    raising: dict[str, int] = {}
    names = []
    for finding in report.broken:
        error = finding.claim.got if finding.claim else None
        if isinstance(error, BaseException):
            text = f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raising[text] = raising.get(text, 0) + 1
        else:
            names.append(finding.law.name)
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return [*shown, *(f"{text} (in {count} laws)" for text, count in raising.items())]


def differing(report: Report) -> list[str]:
    """The conventions that are not ours."""
    kind, found_ones = report.binding.kind, report.conventions
    usual = {"loss, to minimise", "one value per element", next(iter(kind.factors.values()))}
    usual |= {next(iter(convention.values.values())) for convention in kind.conventions}
    return [
        f"{name}: {value}" for name, value in found_ones.items() if value not in usual and name != "variant"
    ]


def table(rows: Sequence[Row]) -> Table:
    """One line for each subject, under its library; one for all that cannot be had for one reason."""
    result = Table(title="what other libraries compute", title_justify="left")
    for column in ("function", "kind", "verdict", "laws", "broken", "conventions that are not ours", "lacks"):
        result.add_column(column, overflow="fold")
    library = ""
    for row in rows:
        if row.subject.library != library:
            library = row.subject.library
            result.add_section()
            result.add_row(f"[bold]{library} {row.version}[/]")
        if row.report is not None:
            result.add_row(*_cells(row.subject, row.report))
    result.add_section()
    for (name, why), functions in missing(rows).items():
        listed = f"{len(functions)} functions: {', '.join(dict.fromkeys(map(_owner, functions)))}"
        result.add_row(f"[bold]{name}[/]", "", f"[dim]{_escaped(why)}[/]", "", "", "", _escaped(listed))
    return result


def _cells(subject: Subject, report: Report) -> list[str]:
    verdict = "[green]certified[/]" if report else "[bold red]DEFECTIVE[/]"
    near = [f"nearest known bug: {report.nearest.bug.name}"] if report.nearest else []
    laws = f"{len(report.held)}/{len(report.findings)}"
    texts = ("; ".join(broken(report) + near), "; ".join(differing(report)), ", ".join(report.absent))
    return [_escaped(subject.function), subject.kind, verdict, laws, *map(_escaped, texts)]


def missing(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """(library, reason) → functions that could not be certified."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.report is None:
            groups.setdefault((row.subject.library, row.why), []).append(row.subject.function)
    return groups


def markdown(rows: Sequence[Row]) -> str:
    """Two tables: what was certified of each library, and every defect."""
    lines = [f"Printed on {date.today():%d %B %Y}, torch {torch.__version__}, by "
             "`python examples/certify_peers.py --markdown`:", "",
             "| library | functions | certified | defective | laws that hold |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    for library in dict.fromkeys(row.subject.library for row in rows):
        theirs = [row.report for row in rows if row.subject.library == library]
        reports = [report for report in theirs if report is not None]
        if reports:
            good, held = sum(map(bool, reports)), sum(len(report.held) for report in reports)
            counts = f"{len(reports)} | {good} | {len(reports) - good} | {held}"
            lines.append(f"| {f'{library} {version_of(library)}'.strip()} | {counts} |")
        elif (library, NOT_INSTALLED) in missing(rows):
            lines.append(f"| {library} | {NOT_INSTALLED} | | | |")
    lines += ["", "| defective | as | broken | the first of them |", "|---|---|---|---|"]
    lines += [_defect(row, row.report) for row in rows if row.report is not None and not row.report]
    other = [f"{name}: {', '.join(dict.fromkeys(map(_owner, functions)))} ({why})"
             for (name, why), functions in missing(rows).items()
             if why not in (NOT_INSTALLED, OTHER_RELEASE)]  # fmt: skip
    return "\n".join([*lines, *(["", "Not certified: " + "; ".join(other) + "."] if other else [])])


def _defect(row: Row, report: Report) -> str:
    """One line of the table of defects."""
    near = f"; nearest known bug: {report.nearest.bug.name}" if report.nearest else ""
    name = f"{row.subject.library} {row.version} `{row.subject.function}`"
    cells = [name, f"`{row.subject.kind}`", "; ".join(broken(report)) + near, _first(report.broken[0])]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _first(finding: Finding) -> str:
    """What a broken law says; of an exception, the numbers that were given."""
    if finding.claim is None or not isinstance(finding.claim.got, BaseException):
        return f"{finding.law.name}: {finding.law.statement}"
    numbers = [
        f"{name} = {value:g}" for name, value in finding.claim.case.items() if isinstance(value, float)
    ]
    return f"it raises on an input that it has to take{', with ' if numbers else ''}{', '.join(numbers)}"


def _owner(function: str) -> str:
    """The class or function without its mode: "PPOTrainer"."""
    return re.split("[ ,.]", function)[0]


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table, or what was asked for; returns the exit code."""
    options = tyro.cli(Options, args=args)
    subjects = [subject for page in PAGES for subject in page.SUBJECTS]
    chosen = [s for s in subjects if not options.only or s.library in options.only]
    if options.show:
        chosen = [s for s in chosen if options.show in f"{s.library} {s.function}"]
    quiet = Console(stderr=True)
    rows = [certified(s) for s in track(chosen, "certifying", console=quiet, transient=True)]
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    if options.json:
        options.json.write_text(
            json.dumps([row.as_dict() for row in rows], indent=2, ensure_ascii=False) + "\n"
        )
    if options.show:
        for row in rows:
            console.rule(f"{_escaped(row.name)} {row.version}", align="left")
            console.print(row.why if row.report is None else row.report)
    elif options.markdown:
        print(markdown(rows))
    else:
        console.print(table(rows))
    defective = [row.name for row in rows if row.report is not None and not row.report]
    return int(any(name.startswith("minirlhf ") for name in defective))


if __name__ == "__main__":
    sys.exit(main())
