"""The stages on directories: what they write, what they refuse, what is left when they stop early."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.models.checkpoint import load_language_model, load_scalar_model
from minirlhf.runs import InputError, load_config, read_metrics
from minirlhf.training import ppo as ppo_page
from minirlhf.training import sft as sft_page
from minirlhf.training import stages
from minirlhf.training.inputs import read_pairs, read_plain, read_prompt_rows
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.reward_sources import of_reward_model
from minirlhf.training.rewards import reward_model_scorer
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, Setting, ShapeConfig, seed_for
from minirlhf.training.sft import SFTConfig
from minirlhf.training.stages.around import prompts_of
from minirlhf.training.stages.reward import respond
from minirlhf.training.update import NonFiniteError
from minirlhf.training.workspace import load_policy
from tests.miniature import write_files, write_rows

SHAPE = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
SFT = SFTConfig(batch_size=8, micro_batch_size=8, max_steps=4, learning_rate=1e-2, evaluate_every=2)
REWARD = RewardConfig(batch_size=8, micro_batch_size=8, max_steps=4, learning_rate=1e-2)
NORMALISE = NormaliseConfig(rollouts=16, max_response=8, temperature=1.0)
PPO = PPOConfig(
    iterations=2,
    batch_size=8,
    epochs=1,
    max_response=8,
    temperature=1.0,
    learning_rate=1e-3,
    evaluate_every=1,
)
DPO = DPOConfig(batch_size=8, micro_batch_size=8, max_steps=3, learning_rate=1e-3)
IPO = IPOConfig(batch_size=8, micro_batch_size=8, max_steps=3, learning_rate=1e-3)


def quiet(seed: int = 0, **reading: Any) -> Setting:
    return Setting(seed, "cpu", ReadingConfig(**reading), show=lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ and model/, sft/, reward/ made from it once."""
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    stages.new_model(root / "data/tokenizer.json", root / "model", shape=SHAPE, seed=0)
    stages.sft(root / "model", root / "data/demonstrations.jsonl", root / "sft", config=SFT, setting=quiet())
    stages.reward(
        root / "sft",
        root / "data/preferences.jsonl",
        root / "reward",
        config=REWARD,
        normalise=NORMALISE,
        setting=quiet(),
        probe=root / "data/probe.jsonl",
    )
    return root


Run = Callable[[Path, Path, Setting], Any]
RUNS: dict[str, Run] = {
    "pretrain": lambda root, out, s: stages.pretrain(
        root / "model", root / "data/plain.jsonl", out, config=SFT, setting=s
    ),
    "sft": lambda root, out, s: stages.sft(
        root / "model", root / "data/demonstrations.jsonl", out, config=SFT, setting=s
    ),
    "reward": lambda root, out, s: stages.reward(
        root / "sft", root / "data/preferences.jsonl", out, config=REWARD, normalise=NORMALISE, setting=s
    ),
    "ppo": lambda root, out, s: stages.ppo(
        root / "sft",
        root / "sft",
        of_reward_model(root / "reward", s),
        root / "data/prompts.jsonl",
        out,
        config=PPO,
        setting=s,
    ),
    "dpo": lambda root, out, s: stages.dpo(
        root / "sft", root / "sft", root / "data/preferences.jsonl", out, config=DPO, setting=s
    ),
    "ipo": lambda root, out, s: stages.ipo(
        root / "sft", root / "sft", root / "data/preferences.jsonl", out, config=IPO, setting=s
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_writes_a_model_directory_with_its_metrics_config_and_manifest(
    made: Path, tmp_path: Path, name: str
) -> None:
    RUNS[name](made, tmp_path / "out", quiet())
    out = tmp_path / "out"
    load = load_scalar_model if name == "reward" else load_language_model
    assert load(out)[0].config == load_language_model(made / "model")[0].config
    assert (out / "tokenizer.json").read_bytes() == (made / "data/tokenizer.json").read_bytes()
    assert {row["stage"] for row in read_metrics(out / "metrics.jsonl")} == {name}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == name and manifest["ended"] == "completed" and manifest["seed"] == 0
    assert all(len(entry["sha256"]) == 64 for entry in (manifest["data"] | manifest["weights"]).values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "best").exists()


@pytest.mark.parametrize("name", RUNS)
def test_the_same_stage_twice_writes_the_same_weights_and_another_seed_others(
    made: Path, tmp_path: Path, name: str
) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        RUNS[name](made, tmp_path / folder, quiet(seed))
    a, b, c = (load_file(tmp_path / folder / "model.safetensors") for folder in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    if name != "ppo":  # its best policy may be the one it started from
        assert any(not torch.equal(a[key], c[key]) for key in a)


def test_stage_toml_reads_back_as_the_config_that_ran(made: Path) -> None:
    assert load_config(made / "sft/stage.toml", SFTConfig) == SFT
    assert load_config(made / "reward/stage.toml", RewardConfig) == REWARD


def test_the_run_log_gets_what_the_stage_log_gets(made: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    setting = quiet()._replace(log=lambda step, stage, m: seen.append({"step": step, "stage": stage, **m}))
    RUNS["sft"](made, tmp_path / "out", setting)
    assert seen == read_metrics(tmp_path / "out/metrics.jsonl")
    assert {"loss", "eval_loss"} <= {key for row in seen for key in row}


def test_training_changes_the_policy_and_leaves_its_inputs_alone(made: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    RUNS["dpo"](made, tmp_path / "out", quiet())
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
    start, end = load_file(made / "sft/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert any(not torch.equal(start[key], end[key]) for key in start)


def test_dpo_and_ipo_train_by_different_losses(made: Path, tmp_path: Path) -> None:
    for name in ("dpo", "ipo"):
        RUNS[name](made, tmp_path / name, quiet())
    first = [
        next(row["eval_loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["step"] == 0)
        for name in ("dpo", "ipo")
    ]
    assert first[0] == pytest.approx(0.6931, abs=1e-3)  # log 2
    assert first[1] == pytest.approx(1.0, abs=1e-3)  # (0 - 1/(2 · 0.5))²


def test_reward_model_is_normalised_on_the_sft_models_own_responses(made: Path) -> None:
    model, params, normalisation = load_scalar_model(made / "reward")
    start = load_policy(made / "sft", quiet())
    pairs = read_pairs(start, made / "data/preferences.jsonl", quiet())
    rollout = respond(start, prompts_of(pairs.validation), NORMALISE, quiet())
    scores = reward_model_scorer(model, params, normalisation)(rollout, torch.zeros(16))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    used = Counter(
        tuple(row[:length].tolist())
        for row, length in zip(rollout.tokens, rollout.prompt_lengths, strict=True)
    )
    assert used.keys() == {tuple(ids) for ids in prompts_of(pairs.validation)}
    assert max(used.values()) - min(used.values()) <= 1
    assert len(rollout.tokens) == 16 and int((rollout.lengths - rollout.prompt_lengths).max()) <= 8


def test_reward_stage_reports_baselines_and_probe_beside_its_accuracy(made: Path) -> None:
    reported = {key for row in read_metrics(made / "reward/metrics.jsonl") for key in row}
    assert {
        "test/accuracy",
        "test/length_only_accuracy",
        "test/bag_of_words_accuracy",
        "probe/accuracy",
        "eval_accuracy",
    } <= reported


def test_ppo_from_another_reference_measures_kl_to_it(made: Path, tmp_path: Path) -> None:
    stages.ppo(
        made / "sft",
        made / "model",
        of_reward_model(made / "reward", quiet()),
        made / "data/prompts.jsonl",
        tmp_path / "out",
        config=PPO,
        setting=quiet(),
    )
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert rows[0]["step"] == 0 and rows[0]["validation/kl"] > 0.01
    assert abs(rows[1]["objective/kl"]) > 1e-3  # 0 before the first update, were the policy its own reference


def test_dpo_from_another_reference_measures_margins_to_it(made: Path, tmp_path: Path) -> None:
    data = made / "data/preferences.jsonl"
    config = replace(DPO, start_at_reference=False)
    stages.dpo(made / "sft", made / "model", data, tmp_path / "out", config=config, setting=quiet())
    first = read_metrics(tmp_path / "out/metrics.jsonl")[0]
    assert first["step"] == 0 and abs(first["eval_rewards/chosen"]) > 1e-3


def test_samples_are_written_at_every_evaluation(made: Path, tmp_path: Path) -> None:
    RUNS["sft"](made, tmp_path / "out", quiet())
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    evaluations = [row for row in read_metrics(tmp_path / "out/metrics.jsonl") if "eval_loss" in row]
    assert len({row["when"] for row in rows}) == len(evaluations) == 3
    assert {"prompt", "response"} <= rows[0].keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_directory_with_files_in_it_is_refused_and_untouched(made: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty directory, found a directory with files"):
        RUNS[name](made, out, quiet())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_directory_is_filled(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    RUNS["sft"](made, tmp_path / "out", quiet())
    assert (tmp_path / "out/model.safetensors").exists()


def test_overlong_rows_stop_by_default_and_are_dropped_and_counted_when_asked(
    made: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"I want a red lamp {i}.\n", "completion": "Here."} for i in range(30)]
    rows[7]["completion"] = "word " * 200
    data = tmp_path / "long.jsonl"
    write_rows(data, rows)
    with pytest.raises(InputError, match="long.jsonl|line 8|too long|48"):
        stages.sft(made / "model", data, tmp_path / "out", config=SFT, setting=quiet())
    assert not (tmp_path / "out").exists()
    said: list[object] = []
    setting = quiet(overlong="drop")._replace(show=said.append)
    stages.sft(made / "model", data, tmp_path / "out", config=SFT, setting=setting)
    assert any("dropped 1 of" in str(line) and "(line 8)" in str(line) for line in said)


def test_another_shape_and_another_tokenizer_are_refused(made: Path, tmp_path: Path) -> None:
    wide = replace(SHAPE, n_embd=32)
    stages.new_model(made / "data/tokenizer.json", tmp_path / "wide", shape=wide, seed=0)
    data = made / "data/preferences.jsonl"
    wrong = "wide to have the shape of .*sft, got n_embd 32 and 16"
    with pytest.raises(InputError, match=wrong):
        stages.dpo(made / "sft", tmp_path / "wide", data, tmp_path / "out", config=DPO, setting=quiet())
    with pytest.raises(InputError, match=wrong):
        stages.ppo(
            made / "sft",
            tmp_path / "wide",
            of_reward_model(made / "reward", quiet()),
            made / "data/prompts.jsonl",
            tmp_path / "out",
            config=PPO,
            setting=quiet(),
        )
    other = tmp_path / "other"
    stages.new_model(made / "data/tokenizer.json", other, shape=SHAPE, seed=0)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocab = vocabulary["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="expected .*other to have the tokenizer of .*sft"):
        stages.dpo(made / "sft", other, data, tmp_path / "out", config=DPO, setting=quiet())
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    stages.new_model(made / "data/tokenizer.json", out, shape=SHAPE, seed=0)
    content = json.loads((out / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzzz"] = max(content["model"]["vocab"].values()) + 1
    (out / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="its tokenizer has .* ids, its model a vocabulary of only"):
        load_policy(out, quiet())


def _interrupting(error: BaseException, page: Any) -> Callable[..., Any]:
    """The page's own train, whose log raises after the second line."""
    original, calls = page.train, 0

    def train(*args: Any, log: Callable[..., None], **kwargs: Any) -> Any:
        def breaking(step: int, metrics: dict[str, float]) -> None:
            nonlocal calls
            log(step, metrics)
            calls += 1
            if calls == 3:
                raise error

        return original(*args, log=breaking, **kwargs)

    return train


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt, "interrupted"),
        (partial(NonFiniteError, 3, "loss = nan"), str(NonFiniteError(3, "loss = nan"))),
    ],
)
@pytest.mark.parametrize(("name", "page"), [("sft", sft_page), ("ppo", ppo_page)])
def test_what_stops_a_stage_leaves_the_best_checkpoint_and_says_so(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
    reason: str,
    name: str,
    page: Any,
) -> None:
    failure = error()
    monkeypatch.setattr(page, "train", _interrupting(failure, page))
    out = tmp_path / "out"
    with pytest.raises(type(failure), match="the best checkpoint until then is in"):
        RUNS[name](made, out, quiet())
    load_language_model(out)
    assert json.loads((out / "manifest.json").read_text())["ended"] == f"stopped early: {reason}"
    assert read_metrics(out / "metrics.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_stops_a_stage_before_a_checkpoint_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_page, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        RUNS["sft"](made, tmp_path / "deep/out", quiet())
    assert os.listdir(tmp_path) == []


def test_no_two_purposes_and_no_two_seeds_share_a_stream() -> None:
    purposes = ("sft", "reward", "ppo", "ppo validation", "dpo", "ipo", "reward normalisation", "model")
    seeds = {seed_for(quiet(seed), purpose) for seed in (0, 1, 2) for purpose in purposes}
    assert len(seeds) == 3 * len(purposes)
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_plain_text_is_cut_into_disjoint_training_and_validation(made: Path) -> None:
    start = load_policy(made / "model", quiet())
    train, validation = read_plain(start, made / "data/plain.jsonl", quiet())
    assert len(train) == 36 and len(validation) == 4
    assert not {tuple(e.ids) for e in train} & {tuple(e.ids) for e in validation}


def test_a_prompt_without_room_for_the_response_is_dropped_with_its_line_or_refused(
    made: Path, tmp_path: Path
) -> None:
    start = load_policy(made / "model", quiet())
    longest = len(start.tokenizer.encode("red " * 20)) + 2
    rows = [{"prompt": f"I want {i}.\n"} for i in range(30)] + [{"prompt": "red " * 20 + "\n"}]
    write_rows(tmp_path / "prompts.jsonl", rows)
    said: list[object] = []
    dropping = quiet(overlong="drop")._replace(show=said.append)
    parts = read_prompt_rows(start, tmp_path / "prompts.jsonl", 48 - longest + 5, dropping)
    assert sum(map(len, parts)) == 30
    assert any("dropped 1 of" in str(line) and "line 31" in str(line) for line in said)
    with pytest.raises(InputError, match="prompts.jsonl|31"):
        read_prompt_rows(start, tmp_path / "prompts.jsonl", 48 - longest + 5, quiet())
    assert sum(map(len, read_prompt_rows(start, tmp_path / "prompts.jsonl", 2, quiet()))) == 31
