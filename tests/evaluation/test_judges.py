"""Any source judges: a rule, an endpoint, a second reward model; a table without a proxy says less."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from minirlhf import cli, recipes
from minirlhf.evaluation.compare import Comparison, EvaluationConfig
from minirlhf.evaluation.report import markdown, table
from minirlhf.evaluation.stage import evaluate
from minirlhf.evaluation.statistics import Estimate, win_rate
from minirlhf.evaluation.verdict import judged_verdict
from minirlhf.runs import InputError, dump_config
from minirlhf.training import stages
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.reward_sources import Reward, open_reward
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, Setting, ShapeConfig
from tests.miniature import write_files
from tests.test_cli import tiny

SHAPE = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
CONFIG = EvaluationConfig(prompts=6, samples=3, max_response=8, examples=1)
RULE = """
import torch

def vowels(prompts, responses, facts):
    return torch.tensor([sum(c in "aeiou" for c in text) for text in responses])
"""


def quiet(said: list[object] | None = None) -> Setting:
    show = (lambda line: None) if said is None else said.append
    return Setting(0, "cpu", ReadingConfig(), show=show)


def vowels(text: str) -> float:
    return float(sum(c in "aeiou" for c in text))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, sft/, other/ (the policy), reward/ and rules.py."""
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    stages.new_model(root / "data/tokenizer.json", root / "sft", shape=SHAPE, seed=0)
    stages.new_model(root / "data/tokenizer.json", root / "other", shape=SHAPE, seed=1)
    stages.reward(
        root / "sft",
        root / "data/preferences.jsonl",
        root / "reward",
        config=RewardConfig(batch_size=8, micro_batch_size=8, max_steps=2),
        normalise=NormaliseConfig(rollouts=16, max_response=8, temperature=1.0),
        setting=quiet(),
    )
    (root / "rules.py").write_text(RULE)
    return root


def compared(
    made: Path, out: Path, proxy: str | None, judge: str | None, said: list[object] | None = None
) -> Comparison:
    def opened(source: str | None) -> Reward | None:
        return None if source is None else open_reward(source, quiet())

    return evaluate(
        {"other": made / "other"},
        made / "sft",
        opened(proxy),
        made / "data/prompts.jsonl",
        out,
        judge=opened(judge),
        config=CONFIG,
        setting=quiet(said),
    )


def test_a_rule_judges_with_its_own_numbers_and_an_interval(made: Path, tmp_path: Path) -> None:
    found = compared(made, tmp_path / "out", str(made / "reward"), f"{made}/rules.py:vowels")
    assert found.judge == f"the reward {made}/rules.py:vowels"
    ours, sft = (
        torch.tensor([[vowels(text) for text in of_prompt] for of_prompt in answers.texts])
        for answers in (found.answers["other"], found.opponent)
    )
    row = found.rows[1]
    assert row.win_rate == win_rate(ours, sft) and row.win_rate.low < row.win_rate.mean < row.win_rate.high
    assert row.judge_score.mean == pytest.approx(float(ours.mean()))
    assert row.components == {} and row.score is not None and row.score_gain is not None
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert all(line["judged"] == vowels(line["response"]) for line in lines)
    assert len({line["proxy"] for line in lines}) > 3


def test_any_source_is_a_proxy_and_a_second_reward_model_keeps_its_name(made: Path, tmp_path: Path) -> None:
    found = compared(made, tmp_path / "out", f"{made}/rules.py:vowels", str(made / "reward"))
    assert found.judge == "second reward model (reward)"
    given = found.answers["other"]
    assert given.proxy is not None
    assert given.proxy.tolist() == [[vowels(text) for text in of_prompt] for of_prompt in given.texts]


def test_without_a_reward_the_table_has_no_score_and_no_word_on_hacking(made: Path, tmp_path: Path) -> None:
    said: list[object] = []
    rule = f"{made}/rules.py:vowels"
    with_reward = compared(made, tmp_path / "with", str(made / "reward"), rule)
    found = compared(made, tmp_path / "out", None, rule, said)
    assert any("no reward is named: the table has no score column" in str(line) for line in said)
    for one, other in zip(found.rows, with_reward.rows, strict=True):
        assert one.score is None and one.score_gain is None
        assert (one.win_rate, one.kl, one.judge_score) == (other.win_rate, other.kl, other.judge_score)
    console = Console(width=100, color_system=None, force_terminal=True, _environ={})
    with console.capture() as capture:
        console.print(table(found))
    shown = capture.get() + markdown(found)
    heads = next(line for line in shown.splitlines() if line.startswith("policy"))
    assert "score" not in heads and "win %" in heads and "trained against" not in shown
    assert "the reward model's score changed" not in shown
    assert found.rows[1].verdict.finding in ("improved", "worse", "undecided")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["score"] for row in report["rows"]] == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {line["proxy"] for line in lines} == {None}


def test_a_judge_that_was_trained_on_is_told_to_see_no_hacking(made: Path, tmp_path: Path) -> None:
    said: list[object] = []
    compared(made, tmp_path / "out", str(made / "reward"), str(made / "reward"), said)
    assert any("which the policies were trained on: hacking cannot be seen" in str(line) for line in said)


@pytest.mark.parametrize(
    ("low", "high", "finding"),
    [(0.51, 0.7, "improved"), (0.5, 0.7, "undecided"), (0.3, 0.5, "undecided"), (0.3, 0.49, "worse")],
)
def test_the_verdict_of_the_judge_alone(low: float, high: float, finding: str) -> None:
    given = judged_verdict(Estimate((low + high) / 2, low, high), detectable=0.1)
    assert given.finding == finding and "reward model's" not in given.reason
    assert ("60.0 % four times in five" in given.reason) == (finding == "undecided")


def test_the_gold_judge_needs_facts_and_names_what_else_there_is(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='needs prompts with "facts", found none; name another judge'):
        compared(made, tmp_path / "out", str(made / "reward"), None)


def test_the_commands_take_any_source(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule, data = f"{made}/rules.py:vowels", str(made / "data/prompts.jsonl")
    given = ("--policy", str(made / "other"), "--reference", str(made / "sft"), "--data", data)
    few = ("--prompts", "4", "--samples", "2", "--max-response", "4")
    assert cli.main(["evaluate", "--out", str(tmp_path / "a"), *given, *few, "--judge", rule]) == 0
    assert "no reward is named" in capsys.readouterr().out
    rest = ("--reward", rule, "--judge", str(made / "reward"), *few)
    assert cli.main(["evaluate", "--out", str(tmp_path / "b"), *given, *rest]) == 0
    twice = ("--reward", rule, "--reward-model", str(made / "reward"))
    assert cli.main(["evaluate", "--out", str(tmp_path / "c"), *given, *twice, *few]) == 2
    assert "expected one reward" in capsys.readouterr().err
    ppo = ("ppo", "--out", str(tmp_path / "d"), "--policy", str(made / "sft"), "--data", data)
    assert cli.main([*ppo]) == 2
    assert "got neither" in capsys.readouterr().err
    small = ("--max-steps", "1", "--batch-size", "4", "--minibatches", "1", "--max-response", "4")
    assert cli.main([*ppo, *small, "--reward", rule, "--reward-timeout", "5"]) == 0
    assert "critic: the policy's backbone with a fresh head" in capsys.readouterr().out


def test_a_run_with_reward_and_judge_of_its_own_trains_no_reward_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        tiny(), reading=recipes.real().reading, policies=("group",), shape=ShapeConfig()
    )
    (tmp_path / "run.toml").write_text(dump_config(config))
    (tmp_path / "rules.py").write_text(RULE)
    real: list[Any] = ["--model", made / "sft", "--preferences", made / "data/preferences.jsonl"]
    named: list[Any] = ["--reward", f"{tmp_path}/rules.py:vowels", "--judge", made / "reward"]
    run = ["run", "--config", tmp_path / "run.toml", "--out", tmp_path / "run", "--max-steps", "1"]
    assert cli.main(list(map(str, [*run, *real, *named]))) == 0
    out = capsys.readouterr().out
    assert "judge: second reward model (reward)" in " ".join(out.split())
    assert "40 pairs to learn from, 0 of other prompts for the judge" in out
    made_here = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"sft", "group", "evaluation"} <= made_here and not {"reward", "judge"} & made_here
    assert cli.main(["run", "--out", str(tmp_path / "world"), "--reward", "a:b"]) == 2
    assert "--reward and --judge go with --model" in capsys.readouterr().err
