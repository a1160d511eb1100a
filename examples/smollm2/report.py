"""What the run found, as a page to read: OUT/report.md, beside each goal's own evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf.evaluation.compare import SFT, Answers, Comparison, Row
from minirlhf.evaluation.statistics import Estimate, mean_difference, win_rate
from minirlhf.runs import write_text_atomic

_SHOWN = 4


class Aligned(NamedTuple):
    """One goal's outcome: how it was trained, the comparison on held-out prompts, seconds by part."""

    goal: str
    means: str
    method: str
    comparison: Comparison
    seconds: dict[str, float]


class Rewarded(NamedTuple):
    """The reward model's outcome: the stage's metrics, most tokens of a pair's side, seconds by part."""

    metrics: dict[str, float]
    longest: int
    seconds: dict[str, float]


def met(answers: Answers) -> Estimate:
    """Share of responses that meet the goal, as won against ½: so 0 and P of P have an interval too."""
    passed = (answers.judged == 1).double()
    return win_rate(passed, torch.full_like(passed, 0.5))


def gain(aligned: Answers, untouched: Answers) -> Estimate:
    """How much larger that share has become, paired by prompt."""
    return mean_difference((aligned.judged == 1).double(), (untouched.judged == 1).double())


def tell(found: Aligned) -> list[str]:
    """The outcome of one goal in a few lines; the judge is named, and so is what it means."""
    table = found.comparison
    row = _row(table)
    before, after = table.opponent, table.answers[row.policy]
    shown = "above 50 %" if row.win_rate.low > 0.5 else "not above 50 %"
    return [
        f"## {found.goal}: {found.means}",
        "",
        f"{found.method}; {len(table.prompts)} held-out prompts, {table.config.samples} responses each. "
        f"More in {found.goal}/evaluation/report.md, where the untouched model is called {SFT}.",
        "",
        "| | untouched | aligned |",
        "|---|--:|--:|",
        f"| win rate over untouched, % [95 %] | {table.rows[0].win_rate.text(1, scale=100)} (itself) "
        f"| **{row.win_rate.text(1, scale=100)}**: {shown} |",
        f"| meets the goal, % [95 %] | {met(before).text(1, scale=100)} | {met(after).text(1, scale=100)} |",
        f"| gain in that, points [95 %] | | {gain(after, before).text(1, scale=100)} |",
        f"| mean score | {table.rows[0].judge_score.text(3)} | {row.judge_score.text(3)} |",
        f"| KL to untouched, nats per response | 0 | {row.kl.text(2)} |",
        f"| tokens, words | {table.rows[0].tokens:.1f}, {table.rows[0].words:.1f} "
        f"| {row.tokens:.1f}, {row.words:.1f} |",
        f"| ended by itself, % | {100 * table.rows[0].eos_rate:.0f} | {100 * row.eos_rate:.0f} |",
        f"| different 2-grams, repeated 3-grams | {table.rows[0].distinct_2:.2f}, "
        f"{table.rows[0].repetition:.2f} | {row.distinct_2:.2f}, {row.repetition:.2f} |",
        "",
        f"The first {_SHOWN} held-out prompts, the first response of each, its score in brackets:",
        "",
        *_samples(table, before, after),
    ]


def tell_reward(found: Rewarded) -> list[str]:
    """The reward model beside what it must beat; nothing is rounded in its favour."""
    m = found.metrics
    return [
        "## reward model",
        "",
        f"Bradley-Terry, from SmolLM2, on real pairs of at most {found.longest} tokens: accuracy on "
        f"{m['test/pairs']:.0f} held-out pairs {100 * m['test/accuracy']:.1f} %, "
        f"length alone {100 * m['test/length_only_accuracy']:.1f} %, bag of words "
        f"{100 * m['test/bag_of_words_accuracy']:.1f} %. The standard error of each is about "
        f"{50 / m['test/pairs'] ** 0.5:.1f} points.",
        "",
    ]


def write(out: Path, title: str, parts: Sequence[Aligned | Rewarded], notes: Sequence[str]) -> None:
    """The page. `notes` are what was left out, and why."""
    lines = [
        f"# {title}",
        "",
        "The judge of each goal is its rule (smollm2/rules.py) on prompts that no stage has trained on: an "
        "answer that meets the goal beats one that does not, of two that do not the nearer one wins, a tie "
        "counts one half. It checks form and says nothing about truth. Intervals are 95 %, over prompts.",
        "",
    ]
    for part in parts:
        lines += tell_reward(part) if isinstance(part, Rewarded) else tell(part)
    lines += ["## time", "", "| part | seconds |", "|---|--:|"]
    lines += [f"| {name} | {spent:.0f} |" for part in parts for name, spent in part.seconds.items()]
    lines += ["", *(f"- {note}" for note in notes), ""]
    write_text_atomic(out / "report.md", "\n".join(lines))


def _row(table: Comparison) -> Row:
    (row,) = (row for row in table.rows if row.policy != SFT)
    return row


def _samples(table: Comparison, before: Answers, after: Answers) -> list[str]:
    lines = ["| prompt | untouched | aligned |", "|---|---|---|"]
    for i in range(min(_SHOWN, len(table.prompts))):
        asked = table.prompts[i].split("Human:", 1)[-1].split("\n\nAssistant:", 1)[0].strip()
        cells = [f"{_cell(a.texts[i][0])} ({float(a.judged[i, 0]):.2f})" for a in (before, after)]
        lines.append(f"| {_cell(asked)} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
