"""A comparison as people and programs read it: one table, samples side by side, Markdown, JSON.

    RUN/evaluation/{report.md, report.json, samples.jsonl, learning_curves.png}

samples.jsonl holds every response with its scores, so that each number of the report can be computed again.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from minirlhf.evaluation.compare import SFT, Answers, Comparison, Row
from minirlhf.evaluation.learning_curves import write_learning_curves
from minirlhf.runs import atomic_directory, read_metrics, write_json_atomic, write_text_atomic

WIDTH = 100
_CUT = " […]"
_STYLES = {"improved": "bold green", "hacked": "bold red", "worse": "bold red", "undecided": "yellow"}


class Column(NamedTuple):
    """One column of the table: its head, how its cell is made, and what it means."""

    head: str
    cell: Callable[[Row], str]
    meaning: str


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the table; the judge's components are those that the rows have."""
    parts = [
        Column(part, lambda row, part=part: f"{row.components[part]:.2f}", "")
        for part in (rows[0].components if rows else {})
    ]
    if parts:
        meaning = f"{', '.join(part.head for part in parts)}: means of the parts of the judge's score"
        parts[0] = parts[0]._replace(meaning=meaning)
    score = Column(
        "score",
        lambda row: "" if row.score is None else f"{row.score.mean:+.2f}",
        "score: by the reward that was trained against; a reward model of ours gives SFT responses mean 0, "
        "deviation 1",
    )
    return [
        Column("policy", lambda row: row.policy, ""),
        *([score] if rows and rows[0].score is not None else []),
        Column(
            "win %",
            lambda row: row.win_rate.text(1, scale=100),
            "win %: share of comparisons with SFT that the judge gives to the policy, ties one half; in "
            "brackets the 95 % interval over prompts",
        ),
        Column(
            "KL",
            lambda row: f"{row.kl.mean:.{2 if row.kl.mean < 100 else 1}f}",
            "KL: to SFT, nats per sequence, at temperature 1",
        ),
        Column("tokens", lambda row: f"{row.tokens:.1f}", "tokens: mean length of a response"),
        Column(
            "dist-2",
            lambda row: f"{row.distinct_2:.3f}",
            "dist-2: different pairs of words among all pairs of neighbouring words",
        ),
        Column("eos %", lambda row: f"{100 * row.eos_rate:.0f}", "eos %: share that ended by itself"),
        *parts,
        Column("verdict", lambda row: row.verdict.finding, ""),
    ]


def table(comparison: Comparison, *, width: int = WIDTH) -> RenderableType:
    """The one table, and below it what it rests on and what its columns mean.

    Where it does not fit the width, the parts of the judge's score stand in a second table below.
    """
    shown = columns(comparison.rows)
    parts = list(comparison.rows[0].components)
    grids = [_grid(comparison, shown)]
    if parts and _natural_width(comparison.rows, shown) > width:
        grids = [
            _grid(comparison, [column for column in shown if column.head not in parts]),
            _grid(comparison, [column for column in shown if column.head in ("policy", *parts)]),
        ]
    notes = [basis(comparison), *(f"{row.policy}: {row.verdict.reason}." for row in _judged(comparison))]
    meanings = [column.meaning for column in shown if column.meaning]
    spaced = [line for grid in grids for line in (Text(), grid)]
    return Group(
        *spaced, Text(), *(Text(note) for note in notes), *(Text(note, style="dim") for note in meanings)
    )


def _grid(comparison: Comparison, shown: Sequence[Column]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # the box puts one space between columns
    for column in shown:
        left = column.head in ("policy", "verdict")
        grid.add_column(column.head, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in comparison.rows:
        style = _STYLES.get(row.verdict.finding, "")
        cells = [
            Text(printable(column.cell(row)), style=style if column.head == "verdict" else "")
            for column in shown
        ]
        grid.add_row(*cells)
    return grid


def _natural_width(rows: Sequence[Row], shown: Sequence[Column]) -> int:
    """Characters of the widest line when nothing is folded: cells, and a space between them."""
    cells = [max(cell_len(c.head), *(cell_len(printable(c.cell(row))) for row in rows)) for c in shown]
    return sum(cells) + len(cells) - 1


def basis(comparison: Comparison) -> str:
    """What the numbers rest on: prompts, samples, judge."""
    n = comparison.config.samples
    return (
        f"{len(comparison.prompts)} held-out prompts, {n} responses of each policy against {n} of SFT "
        f"({n * n} comparisons per prompt), temperature {comparison.config.temperature:g}; "
        f"judge: {comparison.judge}."
    )


def samples(comparison: Comparison) -> RenderableType:
    """The first response to the first few prompts, policies side by side, with the judge's score."""
    blocks: list[RenderableType] = []
    names = list(comparison.answers)
    for p in range(min(comparison.config.examples, len(comparison.prompts))):
        grid = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
        for name in names:
            grid.add_column(Text(printable(name)), ratio=1, overflow="fold")
        grid.add_row(*(Text(printable(_first(comparison.answers[name], p))) for name in names))
        scores = (float(comparison.answers[name].judged[p, 0]) for name in names)
        grid.add_row(*(Text(f"judged {score:+.2f}", style="dim") for score in scores))
        blocks += [Text(f"prompt: {printable(comparison.prompts[p])}", style="bold"), grid]
    if blocks:
        blocks.append(Text(f"{_CUT.strip()}: stopped by the length limit", style="dim"))
    return Group(*blocks)


def markdown(comparison: Comparison) -> str:
    """report.md: the table, what it means, the reasons, the samples."""
    shown = columns(comparison.rows)
    lines = ["# Evaluation", "", basis(comparison), ""]
    lines += _markdown_table([c.head for c in shown], [[c.cell(r) for c in shown] for r in comparison.rows])
    lines += ["", *(f"- {column.meaning}" for column in shown if column.meaning), "", "## Verdicts", ""]
    lines += [
        f"- **{_markdown_cell(r.policy)}: {r.verdict.finding}**: {r.verdict.reason}."
        for r in _judged(comparison)
    ]
    names = list(comparison.answers)
    lines += ["", "## Samples", ""]
    for p in range(min(comparison.config.examples, len(comparison.prompts))):
        lines += [f"Prompt: {_markdown_cell(comparison.prompts[p])}", ""]
        lines += _markdown_table(names, [[_first(comparison.answers[name], p) for name in names]])
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """report.json: every number of every row, unrounded; an interval that the data do not allow is null."""
    rows = [{name: _plain(value) for name, value in vars(row).items()} for row in comparison.rows]
    return {
        "judge": comparison.judge,
        "prompts": len(comparison.prompts),
        "config": vars(comparison.config),
        "rows": rows,
    }


def sample_lines(comparison: Comparison) -> list[dict[str, Any]]:
    """samples.jsonl: one object per response; "opponent" are the SFT responses that all are compared with."""
    sides = {**comparison.answers, "opponent": comparison.opponent}
    return [
        {
            "policy": name,
            "prompt_index": p,
            "sample": i,
            "prompt": comparison.prompts[p],
            "response": answers.texts[p][i],
            "tokens": answers.ids[p][i],
            "ended": bool(answers.ended[p, i]),
            "proxy": None if answers.proxy is None else float(answers.proxy[p, i]),
            "judged": float(answers.judged[p, i]),
            "components": {part: float(value[p, i]) for part, value in answers.components.items()},
            "kl": [float(kl) for kl in answers.kl[p]] if i == 0 else [],
        }
        for name, answers in sides.items()
        for p in range(len(comparison.prompts))
        for i in range(len(answers.texts[p]))
    ]


def write_report(
    out: Path, comparison: Comparison, *, metrics: Path | None, say: Callable[[str], None]
) -> None:
    """Writes the evaluation directory, whole or not at all.

    Args:
        out: RUN/evaluation, or any directory.
        metrics: the run's metrics.jsonl, for the learning curves; None where there is none.
        say: told why there is no picture, where there is none.
    """
    with atomic_directory(out) as folder:
        write_text_atomic(folder / "report.md", markdown(comparison))
        write_json_atomic(folder / "report.json", as_json(comparison))
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in sample_lines(comparison))
        write_text_atomic(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
        if metrics is not None:
            write_learning_curves(read_metrics(metrics), folder / "learning_curves.png", say=say)


def show_report(comparison: Comparison, console: Console | None = None) -> None:
    """Prints samples, then the table, in at most 100 columns; in 100 where a file or a pipe is written to."""
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
    width = min(WIDTH, console.width)
    console.print(samples(comparison), width=width)
    console.print(table(comparison, width=width), width=width)


def printable(text: str) -> str:
    """A model's text without what would steer a terminal: control characters become their escapes.

    >>> printable("two\\nlines and \\x1b[2J")
    'two\\nlines and \\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _judged(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.policy != SFT]


def _first(answers: Answers, p: int) -> str:
    return answers.texts[p][0] + ("" if answers.ended[p, 0] else _CUT)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines]


def _markdown_cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))
    return escaped.replace("\n", "<br>")
