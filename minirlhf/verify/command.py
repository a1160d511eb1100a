"""`minirlhf verify`: the suite on the command line."""

import ast
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minirlhf.verify.catalogue import KINDS, bugs_of, kind_named, laws_of
from minirlhf.verify.certify import certify
from minirlhf.verify.goals import GOALS
from minirlhf.verify.kinds import Kind
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.target import load, named
from minirlhf.verify.trainers import certify_trainer

CERTIFIED, DEFECTIVE = 0, 1
_SHOWN = 8


@dataclass(frozen=True)
class Verify:
    """Certifies a function of yours: laws held and broken, a counter-example, conventions, the nearest bug.

    Exit code 0: certified; 1: defective; 2: it could not be tried.
    """

    subject: Annotated[str, tyro.conf.Positional] = ""
    """The function, as module:function or path/to/file.py:function."""
    kind: str = ""
    """What it is: dpo, gae, clipped_surrogate, ...; --list shows all kinds with their signatures."""
    rename: tuple[str, ...] = ()
    """Your names for the canonical arguments, CANONICAL=YOURS each; a number says that it is built in."""
    fix: tuple[str, ...] = ()
    """Values of parameters of yours that the kind does not know, YOURS=VALUE each (Python literals)."""
    order: tuple[str, ...] = ()
    """Canonical names in the order of your positional parameters."""
    output: str = ""
    """Which part of what you return is the result: an index, a key or an attribute."""
    without: tuple[str, ...] = ()
    """Features to be treated as absent."""
    require: tuple[str, ...] = ()
    """Features whose absence is to be a defect; "all" for all of them."""
    max_updates: int = 1000
    """Of a trainer, after which it has not reached its goal."""
    list: bool = False
    """Show the kinds with their signatures; with --kind also its arguments, laws, conventions and bugs."""
    table: bool = False
    """Print how many laws of each family each kind has, in Markdown."""
    json: bool = False
    """Print the report as JSON instead of tables."""

    def run(self) -> int:
        """Prints the report; returns the exit code."""
        console = Console(highlight=False, file=sys.stdout)
        if self.table:
            print(markdown_table())
        elif self.list:
            console.print(_described(kind_named(self.kind)) if self.kind else _all_kinds())
        else:
            with contextlib.redirect_stdout(sys.stderr):  # what a subject prints is not part of the report
                return self._certify(console)
        return CERTIFIED

    def _certify(self, console: Console) -> int:
        if not self.subject or not self.kind:
            raise SubjectError(
                "expected a subject and its kind: minirlhf verify module:function --kind dpo; "
                "minirlhf verify --list shows the kinds"
            )
        if self.kind in GOALS:
            return self._certify_trainer(console)
        kind = kind_named(self.kind)  # before the subject's file is executed
        adapter: dict[str, Any] = {n: _renamed(text) for n, text in _pairs("rename", self.rename)}
        known = [argument.name for argument in kind.arguments]
        if unknown := [name for name in adapter if name not in known]:
            raise SubjectError(
                f"--rename: {self.kind} has no argument {unknown[0]!r}; it has {', '.join(known)}"
            )
        report = certify(
            load(self.subject),
            self.kind,
            order=self.order or None,
            fixed={name: _value(text) for name, text in _pairs("fix", self.fix)},
            output=_index(self.output),
            without=self.without,
            require=self.require,
            **adapter,
        )
        if self.json:
            _print_json(console, report.as_dict())
        else:
            console.print(report)
        return CERTIFIED if report else DEFECTIVE

    def _certify_trainer(self, console: Console) -> int:
        trainer = named(self.subject)
        parts = ("begin", "update", "policy")
        missing = [part for part in parts if not callable(getattr(trainer, part, None))]
        if missing:
            raise SubjectError(
                f"{self.subject}: a trainer is an object with begin(world), update(state) and policy(state); "
                f"this {type(trainer).__name__} lacks {', '.join(missing)}"
            )
        report = certify_trainer(
            trainer.update,
            GOALS[self.kind](),
            begin=trainer.begin,
            policy=trainer.policy,
            max_updates=self.max_updates,
            console=None if self.json else Console(stderr=True),
        )
        if self.json:
            _print_json(console, report.as_dict())
        else:
            console.print(report)
        return CERTIFIED if report.reached else DEFECTIVE


def _print_json(console: Console, report: dict[str, Any]) -> None:
    console.file.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def markdown_table() -> str:
    """Law families × kinds, with counts: the table of the README."""
    families = list(dict.fromkeys(law.family for kind in KINDS.values() for law in laws_of(kind)))
    counts = {
        name: [sum(law.family == family for law in laws_of(kind)) for family in families]
        for name, kind in KINDS.items()
    }
    bugs = {name: len(bugs_of(name)) for name in KINDS}
    rows = [["kind", *families, "laws", "known bugs"], ["---", *["--:"] * (len(families) + 2)]]
    for name, row in counts.items():
        rows.append([f"`{name}`", *(str(n or "") for n in row), str(sum(row)), str(bugs[name])])
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows.append(["all", *map(str, totals), str(sum(totals)), str(sum(bugs.values()))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _all_kinds() -> Table:
    table = Table(title="kinds of subject: minirlhf verify module:function --kind KIND", title_justify="left")
    for column in ("kind", "what it is, and its canonical signature", "laws", "known bugs"):
        table.add_column(column, justify="right" if column in ("laws", "known bugs") else "left")
    for name, kind in KINDS.items():
        what = f"{escape(kind.title)}\n[dim]{escape(kind.signature)}[/]"
        table.add_row(name, what, str(len(laws_of(kind))), str(len(bugs_of(name))))
    table.add_section()
    for name, goal in GOALS.items():
        table.add_row(name, f"a trainer, run in an enumerable world: {goal().claim}", "", "")
    return table


def _described(kind: Kind) -> Table:
    table = Table(title=f"{kind.name}: {escape(kind.title)}\n{escape(kind.signature)}", title_justify="left")
    for column in ("", "name", "what it says", "source or other names"):
        table.add_column(column, overflow="fold")
    for argument in kind.arguments:
        optional = ", optional" if argument.optional or argument.neutral else ""
        meaning = f"{argument.type_name}{optional}: {argument.meaning}"
        table.add_row("argument", argument.name, escape(meaning), _some(argument.synonyms))
    table.add_section()
    for law in laws_of(kind):
        table.add_row("law", law.name, escape(law.statement), escape(law.source))
    table.add_section()
    for convention in kind.conventions:
        table.add_row("convention", convention.name, escape(" | ".join(convention.values.values())), "")
    for name in kind.behaviours:
        table.add_row("feature", name, "reported if absent; --require makes its absence a defect", "")
    table.add_section()
    for bug in bugs_of(kind.name):
        table.add_row("known bug", bug.name, f"{escape(bug.right)} → {escape(bug.wrong)}", escape(bug.seen))
    return table


def _some(names: Sequence[str]) -> str:
    """The likeliest names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _pairs(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise SubjectError(f"--{flag}: expected NAME=VALUE, got {text!r}")
        pairs.append((name, value))
    return pairs


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _renamed(text: str) -> str | float:
    value = _value(text)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else text


def _index(text: str) -> int | str | None:
    return int(text) if text.lstrip("-").isdigit() else text or None
