"""The verdict on a subject: a rich table for people, a dict for programs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from minirlhf.verify.fit import FP32, Variant
from minirlhf.verify.kinds import Claim, Dialect, Law
from minirlhf.verify.probe import Probe
from minirlhf.verify.script import counter_example
from minirlhf.verify.subject import Binding
from minirlhf.verify.target import importing
from minirlhf.verify.zoo import Nearest

HOLDS, BROKEN, ABSENT = "holds", "broken", "absent"


class Finding(NamedTuple):
    """What came of one law: it holds, it is broken (a defect), or the subject lacks what it is about."""

    law: Law
    status: str
    claim: Claim | None = None
    lacks: str | None = None


@dataclass(frozen=True)
class Report:
    """What `certify` found. Truth value: certified.

    findings: one per law; absent: features that the subject lacks; nearest: the known bug it resembles most.
    """

    subject: str
    binding: Binding
    variant: Variant
    findings: tuple[Finding, ...]
    absent: tuple[str, ...]
    nearest: Nearest | None
    seconds: float

    def __bool__(self) -> bool:
        return not self.broken

    @property
    def kind(self) -> str:
        return self.binding.kind.name

    @property
    def verdict(self) -> str:
        """ "certified" or "defective"."""
        return "certified" if self else "defective"

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The laws that do not hold, in the order of the kind: the most telling first."""
        return tuple(finding for finding in self.findings if finding.status == BROKEN)

    @property
    def held(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == HOLDS)

    @property
    def conventions(self) -> dict[str, str]:
        """Each convention of the subject, in words; "not determined" where no legitimate variant fits it."""
        variant, kind = self.variant, self.binding.kind
        if variant.matched == 0:
            return {"variant": "no legitimate variant agrees with it on any probe; ours is taken"}
        found: dict[str, str] = {}
        if kind.signed:
            found["sign"] = "loss, to minimise" if variant.sign > 0 else "objective, to maximise"
        if kind.reducible:
            note = f" ({variant.reduction.note})" if variant.reduction.note else ""
            found["aggregation"] = variant.reduction.name + note
        if len(kind.factors) > 1:
            found["factor"] = kind.factors[variant.factor]
        for convention in kind.conventions:
            found[convention.name] = convention.values[variant.options[convention.name]]
        for way in (self.binding.dialect, self.binding.layout):
            if way is not None:
                found[way.argument if isinstance(way, Dialect) else "layout"] = way.note
        for name, value in variant.built_in.items():
            found[name] = f"{value:g}, built in"
        if variant.tolerance >= FP32:
            found["precision"] = "single, whatever the input"
        return found

    def counter_example(self, finding: Finding) -> str:
        """The claim that failed, as a script to run."""
        assert finding.claim is not None, "only a law that failed has a counter-example"
        probe = Probe(self.binding, self.variant, frozenset(self.absent))
        return counter_example(finding.claim, probe, importing=importing(self.binding.fn))

    def explained(self, finding: Finding) -> str:
        """A broken law in words: statement, source, counter-example, nearest known bug."""
        near = (
            f"\nnearest known bug: {self.nearest.bug.name} ({self.nearest.bug.seen})" if self.nearest else ""
        )
        law = finding.law
        return f"{law.statement} ({law.source})\n\n{self.counter_example(finding)}\n{near}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "verdict": self.verdict,
            "laws": [self._law_dict(finding) for finding in self.findings],
            "conventions": self.conventions,
            "absent_features": list(self.absent),
            "nearest_known_bug": self._nearest_dict(),
            "arguments": dict(self.binding.names),
            "seconds": round(self.seconds, 3),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def __str__(self) -> str:
        console = Console(width=110, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(Group(*self._parts()))
        return capture.get()

    def _parts(self) -> Iterator[Any]:
        yield self._laws_table()
        if self.conventions or self.absent:
            yield self._conventions_table()
        if self.broken:
            first = next((f for f in self.broken if f.claim is not None), self.broken[0])
            yield Rule(f"smallest counter-example to {first.law.name}", align="left", style="dim")
            # Without a frame, and wrapped nowhere: it is to be copied.
            yield Syntax(self.counter_example(first), "python", theme="ansi_dark", background_color="default")
            yield Rule(style="dim")
        yield self._verdict_line()

    def _laws_table(self) -> Table:
        title = escape(f"{self.subject} as {self.kind}: {self.binding.kind.title}")
        table = Table(title=title, title_justify="left", show_lines=False)
        table.add_column("law")
        table.add_column("", justify="center")
        table.add_column("statement", overflow="fold")
        marks = {HOLDS: "[green]✓[/]", BROKEN: "[bold red]✗[/]", ABSENT: "[dim]–[/]"}
        for finding in self.findings:
            statement = escape(finding.law.statement)
            if finding.status == BROKEN:
                statement += f" [dim]({escape(finding.law.source)})[/]"
            if finding.status == ABSENT:
                statement = f"[dim]lacks {finding.lacks}[/]"
            table.add_row(finding.law.name, marks[finding.status], statement)
        return table

    def _conventions_table(self) -> Table:
        table = Table(show_header=False, box=None, padding=(0, 1))
        for name, value in self.conventions.items():
            table.add_row(Text("convention", style="cyan"), Text(name), Text(value))
        for name in self.absent:
            table.add_row(Text("absent feature", style="yellow"), Text(name), "")
        return table

    def _verdict_line(self) -> Text:
        held, broken = len(self.held), len(self.broken)
        if not broken:
            return Text(
                f"CERTIFIED: {held} laws hold, {len(self.absent)} features absent", style="bold green"
            )
        text = Text(f"DEFECTIVE: {broken} of {held + broken} laws broken", style="bold red")
        if self.nearest:
            bug = self.nearest.bug
            text.append(f"\nnearest known bug: {bug.name}", style="bold")
            text.append(f" ({bug.seen}; it does the same on {self.nearest.share:.0%} of the probes)")
            text.append(f"\n    right: {bug.right}\n    wrong: {bug.wrong}", style="dim")
        return text

    def _law_dict(self, finding: Finding) -> dict[str, Any]:
        law = finding.law
        entry = {"name": law.name, "family": law.family, "statement": law.statement, "status": finding.status}
        if finding.status == BROKEN:
            entry |= {"source": law.source, "counter_example": self.counter_example(finding)}
        if finding.lacks:
            entry["lacks"] = finding.lacks
        return entry

    def _nearest_dict(self) -> dict[str, Any] | None:
        if self.nearest is None:
            return None
        bug = self.nearest.bug
        return {
            "name": bug.name,
            "seen": bug.seen,
            "right": bug.right,
            "wrong": bug.wrong,
            "share": self.nearest.share,
        }
