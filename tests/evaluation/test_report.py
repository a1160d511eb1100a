"""The report fits its page, repeats the numbers of the rows, and its samples suffice to make them again."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from minirlhf.evaluation.compare import Comparison
from minirlhf.evaluation.learning_curves import stage_curves, write_learning_curves
from minirlhf.evaluation.report import (
    WIDTH,
    as_json,
    markdown,
    sample_lines,
    samples,
    show_report,
    table,
    write_report,
)
from minirlhf.evaluation.statistics import mean_difference, mean_over_prompts, win_rate
from minirlhf.runs import InputError
from tests.evaluation import world


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return world.comparison()


def rendered(what: RenderableType, width: int = WIDTH) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_the_table_fits_one_hundred_columns_with_four_components() -> None:
    comparison = world.comparison()
    rows = []
    for row in comparison.rows:
        vars(row)["components"] = dict.fromkeys(("facts", "intent", "manners", "ending"), -1.25)
        vars(row)["policy"] = row.policy.replace("ppo", "ppo-no-kl")
        vars(row)["win_rate"] = row.win_rate._replace(mean=1.0, low=0.99, high=1.0)
        vars(row)["kl"] = row.kl._replace(mean=123.456)
        rows.append(row)
    lines = rendered(table(comparison._replace(rows=rows))).splitlines()
    assert max(map(len, lines)) <= WIDTH
    heads = next(line for line in lines if line.startswith("policy"))
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == [row.policy]]
        assert line.split()[-1] == row.verdict.finding and line.count("-1.25") == 4, "a row is one line"
        assert "100.0 [99.0, 100.0] 123.5" in line
    assert all(head in heads for head in ("policy", "score", "win %", "KL", "tokens", "dist-2", "eos %"))
    assert all(head in heads for head in ("facts", "intent", "manners", "ending", "verdict"))


def test_table_and_markdown_show_the_numbers_of_the_rows(comparison: Comparison) -> None:
    shown, written = rendered(table(comparison)), markdown(comparison)
    for row in comparison.rows:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [row.policy])
        mean, low, high = (f"{100 * value:.1f}" for value in row.win_rate)
        assert row.score is not None
        wanted = [
            f"{row.score.mean:+.2f}",
            f"{mean} [{low}, {high}]",
            f"{row.kl.mean:.2f}",
            f"{row.tokens:.1f}",
            f"{row.distinct_2:.3f}",
            f"{100 * row.eos_rate:.0f}",
            f"{row.components['thanks']:.2f}",
            f"{row.components['rest']:.2f}",
        ]
        assert line.split() == [row.policy, *" ".join(wanted).split(), *row.verdict.finding.split()]
        cells = [row.policy, *wanted, row.verdict.finding]
        assert "| " + " | ".join(re.sub(r"([\[\]])", r"\\\1", cell) for cell in cells) + " |" in written
    for row in comparison.rows[1:]:
        assert row.verdict.reason in re.sub(r"\s+", " ", shown)
        assert f"- **{row.policy}: {row.verdict.finding}**: {row.verdict.reason}." in written
    for text in (re.sub(r"\s+", " ", shown), written):
        assert "3 held-out prompts" in text and "judge: word counter" in text
        assert "2 responses of each policy against 2 of SFT (4 comparisons per prompt)" in text


def test_samples_stand_side_by_side_and_cannot_steer_the_terminal(comparison: Comparison) -> None:
    shown = rendered(samples(comparison))
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "\x1b[2J" not in shown and "a \\x1b[2J" in shown
    assert "prompt: where is the [red] lamp" in shown, "brackets are text, not markup"
    first = next(line for line in shown.splitlines() if "thank you so very much" in line)
    assert re.match(r" *is +thank you so very much +a \\x1b\[2J \[…\]", first)
    assert "judged +1.00" in shown and "judged +5.00" in shown
    assert shown.count("prompt: ") == 3


def test_markdown_cells_stay_in_their_cells_and_hold_no_markup(comparison: Comparison) -> None:
    written = markdown(comparison)
    assert "Prompt: a \\| b" in written and "a \\| b c" in written
    assert "\x1b" not in written and "a<br>b" in written
    tables = [line for line in written.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert widths == {len(tables[0].split(" | ")) + 1, 4}
    assert "<b>" not in written and "\\<b\\> \\*a\\*" in written


def test_every_number_is_made_again_from_the_written_samples(comparison: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    write_report(out, comparison, metrics=None, say=pytest.fail)
    report = json.loads((out / "report.json").read_text())
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines == sample_lines(comparison) and len(lines) == 4 * 3 * 2

    def of(policy: str, value: Any) -> torch.Tensor:
        mine = [line for line in lines if line["policy"] == policy]
        assert [(line["prompt_index"], line["sample"]) for line in mine] == [
            (p, i) for p in range(3) for i in (0, 1)
        ]
        return torch.tensor([float(value(line)) for line in mine]).view(3, 2)

    def judged(line: Any) -> float:
        return line["judged"]

    def proxy(line: Any) -> float:
        return line["proxy"]

    assert [row["policy"] for row in report["rows"]] == ["sft", "ppo", "dpo"]
    for row in report["rows"]:
        name = row["policy"]
        won = win_rate(of(name, judged), of("opponent", judged))
        assert row["win_rate"] == pytest.approx(won._asdict())
        assert row["score_gain"] == pytest.approx(
            mean_difference(of(name, proxy), of("opponent", proxy))._asdict()
        )
        assert row["eos_rate"] == of(name, lambda line: line["ended"]).mean()
        assert row["tokens"] == pytest.approx(float(of(name, lambda line: len(line["tokens"])).mean()))
        for part, value in row["components"].items():
            again = of(name, lambda line, part=part: line["components"][part])
            assert value == pytest.approx(float(again.mean()))
        kl = [line["kl"] for line in lines if line["policy"] == name and line["sample"] == 0]
        assert row["kl"] == pytest.approx(mean_over_prompts(torch.tensor(kl))._asdict())
    assert report["rows"][1]["verdict"] == comparison.rows[1].verdict._asdict()
    assert report["prompts"] == 3 and report["judge"] == "word counter"


def test_an_interval_that_the_data_do_not_allow_is_null_in_json(comparison: Comparison) -> None:
    still = comparison.rows[0]
    assert still.score is not None
    vars(still)["score"] = still.score._replace(low=float("-inf"), high=float("inf"))
    written = as_json(comparison._replace(rows=[still]))["rows"][0]["score"]
    assert written == {"mean": still.score.mean, "low": None, "high": None}


METRICS = [
    *({"step": s, "stage": "sft", "loss": 3 / s, "grad_norm": 1.0} for s in range(1, 9)),
    *({"step": s, "stage": "sft", "eval_loss": 3 / s + 0.1} for s in (1, 8)),
    *({"step": s, "stage": "reward", "accuracy": 0.5 + s / 40, "loss": 0.7} for s in range(1, 9)),
    *({"step": s, "stage": "ppo", "objective/scores": s / 5, "objective/kl": s / 2} for s in range(1, 9)),
    *(
        {"step": s, "stage": "dpo", "rewards/accuracies": 0.6, "loss": 0.6, "eval_loss": 0.5}
        for s in range(1, 9)
    ),
    {"step": 1, "stage": "strange", "speed": 5.0},
]


def test_each_stage_has_its_panel_with_its_own_metrics() -> None:
    stages = stage_curves(METRICS)
    assert {name: set(curves) for name, (_, curves) in stages.items()} == {
        "sft": {"loss", "eval_loss"},
        "reward": {"accuracy"},
        "ppo": {"objective/scores", "objective/kl"},
        "dpo": {"rewards/accuracies"},
    }
    assert stages["sft"][1]["eval_loss"] == [(1, 3.1), (8, 3 / 8 + 0.1)]
    assert list(stages) == ["sft", "reward", "ppo", "dpo"], "in the order of the run"


def test_the_report_directory_holds_the_picture_and_is_whole_or_absent(
    comparison: Comparison, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    write_report(tmp_path / "evaluation", comparison, metrics=metrics, say=pytest.fail)
    names = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    assert names == ["learning_curves.png", "report.json", "report.md", "samples.jsonl"]
    assert (tmp_path / "evaluation" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be read"):
        write_report(tmp_path / "other", comparison, metrics=tmp_path / "absent.jsonl", say=pytest.fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "metrics.jsonl"]


def test_the_same_metrics_draw_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        assert write_learning_curves(METRICS, tmp_path / f"{name}.png", say=pytest.fail)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_command_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert not write_learning_curves(METRICS[-1:], tmp_path / "a.png", say=said.append) and len(said) == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not write_learning_curves(METRICS, tmp_path / "a.png", say=said.append)
    assert said[-1] == "a.png was not drawn: it needs matplotlib; pip install 'minirlhf[plot]'"
    assert not (tmp_path / "a.png").exists()


def test_the_printed_report_ends_with_the_table(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show_report(comparison, Console(width=300))
    shown = capsys.readouterr().out
    assert shown.index("prompt: ") < shown.index("policy ")
    assert max(map(len, shown.splitlines())) <= WIDTH
    show_report(comparison)
    assert capsys.readouterr().out == shown, "a pipe gets the same"


def test_a_narrow_terminal_gets_the_components_in_a_table_of_their_own(comparison: Comparison) -> None:
    shown = rendered(table(comparison, width=75), width=75).splitlines()
    assert max(map(len, shown)) <= 75
    heads = [line.split() for line in shown if line.split()[:1] == ["policy"]]
    assert [head[-1] for head in heads] == ["verdict", "rest"] and heads[1] == ["policy", "thanks", "rest"]
    for row in comparison.rows:
        lines = [line.split() for line in shown if line.split()[:1] == [row.policy]]
        assert lines[0][-1] == row.verdict.finding and lines[1][1] == f"{row.components['thanks']:.2f}"
