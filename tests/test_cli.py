"""The command line on a miniature world: every stage alone, the whole run, and every mistake in one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minirlhf import cli, pipeline, recipes
from minirlhf.commands import COMMANDS
from minirlhf.data.readers import read_prompts
from minirlhf.data.splits import split_by_prompt
from minirlhf.data.world_files import WorldConfig
from minirlhf.evaluation import stage as evaluation_stage
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.recipes import RunConfig
from minirlhf.runs import InputError, RunLayout, dump_config, load_config, read_metrics
from minirlhf.training import sft as sft_page
from minirlhf.training.setting import NormaliseConfig, ShapeConfig
from tests.miniature import write_files, write_rows

ROOT = Path(__file__).resolve().parents[1]


def tiny() -> RunConfig:
    """The demo, so small that it takes seconds."""
    demo, replace = recipes.demo(), dataclasses.replace
    steps: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 3, "evaluate_every": 3}
    return replace(
        demo,
        world=WorldConfig(
            drills=40,
            recitals=2,
            checks=2,
            texts=60,
            demonstrations=60,
            preferences=80,
            prompts=60,
            probe=6,
            vocab_size=400,
        ),
        shape=ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=128),
        drills=replace(demo.drills, **steps),
        base=replace(demo.base, **steps),
        sft=replace(demo.sft, **steps),
        reward=replace(demo.reward, **steps),
        dpo=replace(demo.dpo, **steps),
        ipo=replace(demo.ipo, **steps),
        normalise=NormaliseConfig(rollouts=16, max_response=8, temperature=1.0),
        ppo=replace(demo.ppo, iterations=2, batch_size=8, epochs=1, minibatches=1, max_response=8),
        group=replace(
            demo.group,
            iterations=2,
            prompts_per_batch=2,
            samples_per_prompt=4,
            epochs=1,
            minibatches=1,
            max_response=8,
        ),
        evaluation=EvaluationConfig(prompts=6, samples=2, max_response=8),
    )


POLICIES = ("ppo", "ppo-no-kl", "dpo", "ipo", "group", "group-normalised")


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `minirlhf run` on the tiny world, with all six policies."""
    root = tmp_path_factory.mktemp("world")
    (root / "tiny.toml").write_text(dump_config(tiny()))
    done = cli.main(
        ["run", "--config", str(root / "tiny.toml"), "--out", str(root / "run"), "--policies", *POLICIES]
    )
    assert done == 0
    return root / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/, sft/ and reward/, each made by its own command."""
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    shape = ("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--n-positions", "48")
    assert command("model", root / "model", "--tokenizer", root / "data/tokenizer.json", *shape) == 0
    assert command("sft", root / "sft", *arguments("sft", root)) == 0
    assert command("reward", root / "reward", *arguments("reward", root)) == 0
    return root


def command(name: str, out: Path, *rest: object) -> int:
    return cli.main([name, "--out", str(out), *map(str, rest)])


FAST = ("--max-steps", 2, "--batch-size", 8, "--micro-batch-size", 8)


def arguments(name: str, root: Path) -> list[object]:
    """What a stage takes besides --out."""
    data = root / "data"
    response = ("--max-response", 8, "--temperature", 1.0)
    return {
        "pretrain": ["--policy", root / "model", "--data", data / "plain.jsonl", *FAST],
        "sft": ["--policy", root / "model", "--data", data / "demonstrations.jsonl", *FAST],
        "reward": [
            *("--policy", root / "sft", "--data", data / "preferences.jsonl", *FAST, *response),
            *("--rollouts", 16, "--probe", data / "probe.jsonl"),
        ],
        "ppo": [
            *("--policy", root / "sft", "--reward-model", root / "reward", "--data", data / "prompts.jsonl"),
            *("--max-steps", 1, "--batch-size", 8, "--epochs", 1, *response),
        ],
        "group": [
            *("--policy", root / "sft", "--reward-model", root / "reward", "--data", data / "prompts.jsonl"),
            *("--max-steps", 1, "--prompts-per-batch", 2, "--samples-per-prompt", 4, *response),
        ],
        "dpo": ["--policy", root / "sft", "--data", data / "preferences.jsonl", *FAST, "--beta", 0.2],
        "ipo": ["--policy", root / "sft", "--data", data / "preferences.jsonl", *FAST, "--tau", 0.2],
        "evaluate": [
            *(
                "--policy",
                f"me={root / 'model'}",
                "--reference",
                root / "sft",
                "--data",
                data / "prompts.jsonl",
            ),
            *("--reward-model", root / "reward", "--judge", root / "reward", "--samples", 2, *response),
        ],
    }[name]


STAGES = ("pretrain", "sft", "reward", "ppo", "group", "dpo", "ipo")


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_alone_takes_the_formers_directory(made: Path, tmp_path: Path, name: str) -> None:
    assert command(name, tmp_path / "out", *arguments(name, made)) == 0
    assert (tmp_path / "out/model.safetensors").exists()
    assert read_metrics(tmp_path / "out/metrics.jsonl")


@pytest.mark.parametrize("subject", ["--reward-model", "--policy"])
def test_influence_ranks_every_training_pair(
    made: Path, tmp_path: Path, subject: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made / ("reward" if subject == "--reward-model" else "sft")
    rest = [subject, model, "--data", made / "data/preferences.jsonl"]
    assert command("influence", tmp_path / "out", *rest, "--top", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/influence.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert sorted(each["pair"] for each in lines) == list(range(summary["training_pairs"]))
    assert all(each["chosen"] and each["rejected"] and each["prompt"] for each in lines)
    values = [each["influence"] for each in lines]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    shown = capsys.readouterr().out
    assert "gradient noise scale" in shown and f"{values[0]:.3g}" in shown and f"{values[-1]:.3g}" in shown


def test_influence_asks_whose_loss_is_meant(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, models = ("--data", made / "data/preferences.jsonl"), ("--policy", made / "sft")
    both = (*models, "--reward-model", made / "reward")
    for rest, said in (
        ((), "either --reward-model or --policy"),
        (both, "either --reward-model or --policy"),
        (("--reward-model", made / "reward", "--reference", made / "sft"), "--reference belongs to --policy"),
        ((*models, "--top", 0), "top must be at least 1"),
    ):
        assert command("influence", tmp_path / "out", *data, *rest) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_evaluate_names_rows_and_judge(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", tmp_path / "out", *arguments("evaluate", made)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["policy"] for row in report["rows"]] == ["sft", "me"]
    assert "second reward model (reward)" in report["judge"]
    assert "second reward model (reward)" in " ".join(capsys.readouterr().out.split())


def test_flags_reach_the_stage(made: Path, tmp_path: Path) -> None:
    command("dpo", tmp_path / "dpo", *arguments("dpo", made), "--seed", 7, "--learning-rate", 0.125)
    stage = (tmp_path / "dpo/stage.toml").read_text()
    assert "beta = 0.2\n" in stage and "learning_rate = 0.125\n" in stage and "max_steps = 2\n" in stage
    assert json.loads((tmp_path / "dpo/manifest.json").read_text())["seed"] == 7


def test_group_is_rewarded_by_a_rule_of_the_working_directory(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ("import torch", "def here(p, r, f):", "    return torch.tensor([float('e' in x) for x in r])")
    (tmp_path / "rule_of_the_cli.py").write_text("\n".join(lines))
    rest = _without(arguments("group", made), "--reward-model")
    assert command("group", tmp_path / "out", *rest, "--reward", "rule_of_the_cli:here") == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["stage"] == "rloo" and "reward rule_of_the_cli:here" in manifest["data"]
    assert {row["stage"] for row in read_metrics(tmp_path / "out/metrics.jsonl")} == {"rloo"}


def test_pairs_of_a_policys_own_responses_train_dpo(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wordy.py").write_text(
        "import torch\ndef length(prompts, responses, facts):\n"
        "    return torch.tensor([float(len(set(text))) for text in responses])\n"
    )
    monkeypatch.chdir(tmp_path)
    pairs, prompts = tmp_path / "pairs.jsonl", made / "data/prompts.jsonl"
    sampling = ("--max-response", 12, "--samples", 40, "--margin", 1.0, "--temperature", 1.0)
    assert command("pairs", pairs, "--policy", made / "sft", "--data", prompts, "--reward", "wordy:length",
                   *sampling) == 0  # fmt: skip
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert rows and all(len(set(row["chosen"])) > len(set(row["rejected"])) for row in rows)
    asked = {json.loads(line)["prompt"] for line in prompts.read_text().splitlines()}
    assert {row["prompt"] for row in rows} <= asked
    advice = re.search(r"--max-length \d+ --overlong truncate", said)
    reading = advice[0].split() if advice else []
    shares = ("--validation", 0.3, "--test", 0.3)  # few pairs: every part must get some
    assert command("dpo", tmp_path / "dpo", "--policy", made / "sft", "--data", pairs, *FAST, *reading,
                   *shares) == 0  # fmt: skip
    again = command("pairs", pairs, "--policy", made / "sft", "--data", prompts, "--reward", "wordy:length")
    assert again == 2 and "exists already" in capsys.readouterr().err


def test_group_takes_either_estimator_and_says_which(made: Path, tmp_path: Path) -> None:
    given = ("--estimator", "group-normalised", "--kl-coefficient", 0.25)
    assert command("group", tmp_path / "out", *arguments("group", made), *given) == 0
    stage = (tmp_path / "out/stage.toml").read_text()
    assert "kl_coefficient = 0.25\n" in stage and "samples_per_prompt = 4\n" in stage
    assert "iterations = 1\n" in stage
    assert json.loads((tmp_path / "out/manifest.json").read_text())["stage"] == "group-normalised"


def test_config_gives_defaults_and_flags_override_them(made: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(), seed=5, dpo=dataclasses.replace(tiny().dpo, beta=0.7, max_steps=2))
    (tmp_path / "run.toml").write_text(dump_config(config))
    rest = ["--policy", made / "sft", "--data", made / "data/preferences.jsonl"]
    for name, extra in (("a", []), ("b", ["--beta", 0.3])):
        file = tmp_path / "run.toml"
        assert command("dpo", tmp_path / name, *rest, f"--config={file}", *extra) == 0
    a, b = ((tmp_path / name / "stage.toml").read_text() for name in "ab")
    assert "beta = 0.7\n" in a and "beta = 0.3\n" in b
    assert a.replace("beta = 0.7", "beta = 0.3") == b
    assert json.loads((tmp_path / "a/manifest.json").read_text())["seed"] == 5


def test_stage_defaults_are_published_ones_and_the_demos_only_for_the_demo() -> None:
    sft = cli.parse(["sft", "--policy", "p", "--data", "d", "--out", "o"])
    run = cli.parse(["run"])
    real = cli.parse(["run", "--model", "m", "--preferences", "p"])
    assert getattr(sft, "sft") == sft_page.SFTConfig()  # noqa: B009
    assert getattr(run, "recipe") == recipes.demo()  # noqa: B009
    assert getattr(real, "recipe") == recipes.real()  # noqa: B009


def test_the_world_is_written_the_same_twice_and_another_with_another_seed(tmp_path: Path) -> None:
    sizes = (
        "--drills",
        20,
        "--texts",
        20,
        "--demonstrations",
        5,
        "--preferences",
        5,
        "--prompts",
        5,
        "--probe",
        2,
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command("world", tmp_path / name, *sizes, "--vocab-size", 300, "--seed", seed) == 0
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert all(files["a"][file] != files["c"][file] for file in files["a"] if file.endswith(".jsonl"))


def test_run_leaves_the_whole_run_directory(world_run: Path) -> None:
    run = RunLayout(world_run)
    names = ("drilled", "base", "sft", "reward", *POLICIES)
    assert all((run.model(name) / "model.safetensors").exists() for name in names)
    assert {
        "drills.jsonl",
        "texts.jsonl",
        "demonstrations.jsonl",
        "preferences.jsonl",
        "prompts.jsonl",
        "probe.jsonl",
    } <= {path.name for path in run.data.iterdir()}
    assert {"report.md", "report.json", "samples.jsonl"} <= {path.name for path in run.evaluation.iterdir()}
    config = load_config(run.config, RunConfig)
    assert config == dataclasses.replace(tiny(), policies=POLICIES)
    manifest = json.loads(run.manifest.read_text())
    assert manifest["weights"].keys() == set(names) and manifest["seconds"] > 0
    stages = ("drills", "pretrain", "sft", "reward", *POLICIES)
    assert {row["stage"] for row in read_metrics(run.metrics)} == set(stages)


def test_ppo_without_kl_has_no_kl_in_its_reward_and_ppo_has(world_run: Path) -> None:
    for stage, coefficient in (("ppo-no-kl", 0.0), ("ppo", tiny().ppo.kl_coefficient)):
        rows = [row for row in read_metrics(world_run / "metrics.jsonl") if row["stage"] == stage]
        used = [row["objective/kl_coefficient"] for row in rows if "objective/kl_coefficient" in row]
        assert used and used == pytest.approx([coefficient] * len(used))


def test_report_has_a_row_per_policy_with_the_gold_judges_components(world_run: Path) -> None:
    report = json.loads((world_run / "evaluation/report.json").read_text())
    assert [row["policy"] for row in report["rows"]] == ["sft", *POLICIES]
    assert report["rows"][1]["components"].keys() == {"facts", "intent", "manners", "ending"}


def test_evaluation_prompts_are_in_no_training_split(world_run: Path) -> None:
    lines = (world_run / "evaluation/samples.jsonl").read_text().splitlines()
    evaluated = {json.loads(line)["prompt"] for line in lines}
    rows = read_prompts(world_run / "data/prompts.jsonl").rows
    reading = tiny().reading
    splits = split_by_prompt(rows, fractions=reading.fractions, seed=reading.split_seed)
    assert evaluated and evaluated <= {row.prompt for row in splits.test}
    assert not evaluated & {row.prompt for row in (*splits.train, *splits.validation)}


def test_every_evaluated_prompt_is_judged_by_its_own_text(
    world_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def compare(
        model: Any, sft: Any, policies: Any, ids: Any, texts: Any, *, tokenizer: Any, **rest: Any
    ) -> None:
        seen.extend((tokenizer.decode(row), text) for row, text in zip(ids, texts, strict=True))
        raise InputError("seen")

    monkeypatch.setattr(evaluation_stage, "compare", compare)
    data = world_run / "data/prompts.jsonl"
    models = ("--reference", world_run / "sft", "--reward-model", world_run / "reward")
    rest = (*models, "--data", data, "--prompts", 4, "--max-response", 8)
    assert command("evaluate", tmp_path / "out", "--policy", world_run / "dpo", *rest) == 2
    assert len(seen) == 4 and len(set(seen)) == 4
    assert all(decoded == text for decoded, text in seen)


def test_the_same_command_twice_gives_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(dump_config(tiny()))
    tables = []
    for name in ("a", "b"):
        done = cli.main(["run", "--config", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / name)])
        assert done == 0
        shown = capsys.readouterr().out.replace(str(tmp_path / name), "RUN")
        tables.append(re.sub(r"done in .* minutes", "", shown))
    assert "win %" in tables[0]
    assert tables[0] == tables[1]
    a, b = ((tmp_path / name / "evaluation/report.json").read_bytes() for name in "ab")
    assert a == b
    assert [row["policy"] for row in json.loads(a)["rows"]] == ["sft", "ppo", "dpo", "ipo"]
    models = ("drilled", "base", "sft", "reward", "ppo", "dpo", "ipo")
    files = ("config.toml", "data", "evaluation", "manifest.json", "metrics.jsonl")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted((*models, *files))


def test_real_preferences_run_all_stages_judged_by_a_second_reward_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preferences = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in (made / "data/preferences.jsonl").read_text().splitlines()]
    rows[3]["chosen"] = "word " * 100
    rows[5]["prompt"] = "word " * 100
    rows[7]["chosen"] = rows[7]["rejected"]
    write_rows(preferences, rows)
    config = dataclasses.replace(
        tiny(), reading=recipes.real().reading, policies=("dpo", "ppo"), shape=ShapeConfig()
    )
    (tmp_path / "run.toml").write_text(dump_config(config))
    done = cli.main(
        [
            *("run", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")),
            *("--model", str(made / "model"), "--preferences", str(preferences), "--max-steps", "1"),
        ]
    )
    said = capsys.readouterr().out
    assert done == 0
    assert "dropped 1 of 40: chosen and rejected are the same text (line 8)" in said
    assert re.search(r"dropped \d of \d+: longer than \d+ tokens", said)
    assert "judge: second reward model (judge)" in " ".join(said.split())
    run = RunLayout(tmp_path / "run")
    ours, judges = (
        {json.loads(line)["prompt"] for line in (run.data / name).read_text().splitlines()}
        for name in ("preferences.jsonl", "judge_preferences.jsonl")
    )
    assert ours and judges and not ours & judges
    assert len(ours) + len(judges) == 39
    assert load_config(run.config, RunConfig).sft.max_steps == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_what_each_command_does_with_units_and_defaults(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr()
    assert (COMMANDS[name].__doc__ or "").split(".")[0].split(":")[0] in " ".join(shown.out.split())
    assert "--out" in shown.out and "default:" in shown.out
    assert shown.err == ""


def test_help_of_ppo_gives_units(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["ppo", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "score units per nat of log π/π_ref" in text
    assert "(default: 0.05)" in text


def test_no_arguments_and_help_list_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("minirlhf 0.")


def _replace(items: list[object], flag: str, value: object) -> list[object]:
    position = items.index(flag)
    return [*items[: position + 1], value, *items[position + 2 :]]


def _mistakes(made: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Name of a mistake -> (arguments, what its line must say)."""
    sft, dpo, ppo, group = (arguments(name, made) for name in ("sft", "dpo", "ppo", "group"))
    by_rule = _without(group, "--reward-model")
    write_rows(folder / "columns.jsonl", [{"question": "a", "answer": "b"}])
    write_rows(folder / "wrong_type.jsonl", [{"prompt": "a", "completion": 3}])
    write_rows(folder / "long.jsonl", [{"prompt": f"{i} " * 99, "completion": "b"} for i in range(20)])
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (folder / "bad.toml").write_text("[dpo]\nbeat = 0.1\n")
    (folder / "wrong.toml").write_text('[dpo]\nbeta = "high"\n')
    wide = ("--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--n-positions", 48)
    tokenizer = made / "data/tokenizer.json"
    assert command("model", folder / "wide", "--tokenizer", tokenizer, *wide) == 0
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("mine")
    return {
        "a stage's flag, of the run": (
            ["run", "--adapter-rank", "8"],
            r"unknown flag --adapter-rank \(did you mean --\w+\.adapter-rank\?\)",
        ),
        "unknown command": (["stf"], r"unknown command 'stf' \(did you mean sft\?\)"),
        "unknown flag": (
            ["sft", *sft, "--lerning-rate", 1],
            r"unknown flag --lerning-rate .*--learning-rate",
        ),
        "missing flag": (["sft", *sft[2:]], "--policy"),
        "bad number": (["sft", *sft, "--learning-rate", "fast"], "--learning-rate.*fast"),
        "bad choice": (["sft", *sft, "--device", "tpu"], "tpu"),
        "refused value": (["dpo", *dpo, "--learning-rate", -1], "learning_rate must be positive, got -1"),
        "missing file": (["sft", *_replace(sft, "--data", folder / "no.jsonl")], "no.jsonl: no such file"),
        "missing model": (["sft", *_replace(sft, "--policy", folder / "no")], "no: no such model directory"),
        "wrong column": (
            ["sft", *_replace(sft, "--data", folder / "columns.jsonl")],
            "columns.jsonl:1: .*question",
        ),
        "wrong type": (
            ["sft", *_replace(sft, "--data", folder / "wrong_type.jsonl")],
            "wrong_type.jsonl:1: ",
        ),
        "broken line": (["sft", *_replace(sft, "--data", folder / "broken.jsonl")], "broken.jsonl:2: "),
        "empty data": (["sft", *_replace(sft, "--data", folder / "empty.jsonl")], "empty.jsonl: .*empty"),
        "other shape": (["dpo", *dpo, "--reference", folder / "wide"], "n_embd 32 and 16"),
        "reward model as policy": (
            ["dpo", *_replace(dpo, "--policy", made / "reward")],
            "expected a language",
        ),
        "policy as reward model": (
            ["ppo", *_replace(ppo, "--reward-model", made / "sft")],
            "expected a reward",
        ),
        "no reward": (["group", *by_rule], "or --reward-model DIR, got neither"),
        "two rewards": (["group", *group, "--reward", "minirlhf.data.gold:gold_score"], "got both"),
        "no such rule": (
            ["group", *by_rule, "--reward", "minirlhf.data.gold:gold_scor"],
            "did you mean gold_score",
        ),
        "a rule without facts": (
            ["group", *by_rule, "--reward", "minirlhf.data.gold:gold_score"],
            "gold_score raised ValueError: the gold judge needs the facts",
        ),
        "one sample": (
            ["group", *_replace(group, "--samples-per-prompt", 1)],
            "samples_per_prompt must be at least 2",
        ),
        "long prompt": (["sft", *_replace(sft, "--data", folder / "long.jsonl")], "48|longer"),
        "no room": (["ppo", *_replace(ppo, "--max-response", 48)], "max_response of 48 .* context of 48"),
        "unknown key": (["dpo", *dpo, "--config", folder / "bad.toml"], "unknown key dpo.beat; .*dpo.beta"),
        "wrong value": (["dpo", *dpo, "--config", folder / "wrong.toml"], "dpo.beta: expected a number"),
        "missing config": (["dpo", *dpo, "--config", folder / "no.toml"], "no.toml: cannot be read"),
        "run half real": (["run", "--model", made / "model"], "--model and --preferences go together"),
        "zero steps": (["run", "--max-steps", 0], "max_steps must be at least 1, got 0"),
        "same policy twice": (["run", "--policies", "dpo", "dpo"], "policies: .*different"),
        "no facts": (["evaluate", *_without(arguments("evaluate", made), "--judge")], "facts.*--judge"),
        "no tokenizer": (["model", "--tokenizer", folder / "no.json"], "no.json: no such file"),
        "odd heads": (
            ["model", "--tokenizer", tokenizer, "--n-head", 3],
            "n_embd must be a multiple of n_head",
        ),
    }


def _without(items: list[object], flag: str) -> list[object]:
    position = items.index(flag)
    return [*items[:position], *items[position + 2 :]]


def test_every_mistake_is_one_line_on_stderr_exit_code_2_and_leaves_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[str] = []
    folder = tmp_path / "files"
    folder.mkdir()
    mistakes = _mistakes(made, folder)
    before = {path for path in made.rglob("*")}
    for name, (argv, expected) in mistakes.items():
        capsys.readouterr()
        out = tmp_path / "out" / "here"
        code = cli.main([*map(str, argv), *(() if name == "unknown command" else ("--out", str(out)))])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line.strip()]
        if code != 2 or len(lines) != 1 or not re.search(expected, lines[0]):
            wrong.append(f"{name}: exit code {code}, {lines}")
        if (tmp_path / "out").exists():
            wrong.append(f"{name}: left {list(tmp_path.glob('out/**/*'))}")
    assert not wrong, "\n".join(wrong)
    assert {path for path in made.rglob("*")} == before


def test_an_existing_directory_is_refused_by_every_command_and_kept(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    tokenizer = ["--tokenizer", made / "data/tokenizer.json"]
    argv = {name: arguments(name, made) for name in (*STAGES, "evaluate")}
    for name, rest in (argv | {"model": tokenizer, "world": [], "run": []}).items():
        capsys.readouterr()
        assert command(name, out, *rest) == 2, name
        assert "expected a new or empty directory" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*")] == ["mine", "mine.txt"]


def test_a_run_that_fails_before_a_model_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise InputError("no")

    monkeypatch.setattr(pipeline.stages, "new_model", refuse)
    (tmp_path / "tiny.toml").write_text(dump_config(tiny()))
    assert command("run", tmp_path / "deep/run", "--config", tmp_path / "tiny.toml") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "tiny.toml"]
    assert not list((tmp_path / "deep").iterdir())


def test_an_interruption_is_exit_code_130_and_says_what_was_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = sft_page.train

    def interrupted(*args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_page, "train", interrupted)
    assert command("sft", tmp_path / "out", *arguments("sft", made)) == 130
    assert "interrupted; the best checkpoint until then is in" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").exists()


def test_python_m_minirlhf_is_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "minirlhf", "sft", "--polcy", "x"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("minirlhf: ") and "--policy" in done.stderr
    assert not list(tmp_path.iterdir())
