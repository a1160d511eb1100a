"""Training by groups on directories: rewarded by a reward model or by a rule that the user names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minirlhf.models.checkpoint import load_language_model
from minirlhf.rollout.sampler import generate
from minirlhf.runs import InputError, load_config, read_metrics
from minirlhf.training import ppo_sampling, stages
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.reward_sources import Reward, load_rule, of_reward_model, of_rule, the_one_reward
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, Setting, ShapeConfig
from tests.miniature import write_files, write_rows

CONFIG = GroupConfig(
    iterations=2,
    prompts_per_batch=2,
    samples_per_prompt=4,
    epochs=1,
    minibatches=1,
    max_response=8,
    temperature=1.0,
    learning_rate=1e-3,
    evaluate_every=1,
)
RULE = '''
import torch

seen = []


def answer(prompts, responses, facts):
    """1 where the answer is in the response."""
    seen.extend(zip(prompts, responses, facts))
    return torch.tensor([1 if fact["answer"] in text else 0 for text, fact in zip(responses, facts)])


def as_list(prompts, responses, facts):
    return [0.0] * len(responses)


def too_few(prompts, responses, facts):
    return torch.zeros(1)


def raising(prompts, responses, facts):
    return torch.tensor([fact["colour"] for fact in facts])


def not_a_number(prompts, responses, facts):
    return torch.full((len(responses),), float("nan"))


threshold = 3
'''


def quiet(seed: int = 0) -> Setting:
    return Setting(seed, "cpu", ReadingConfig(), show=lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with facts beside the prompts, and model/, reward/."""
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    rows = [json.loads(line) for line in (root / "data/prompts.jsonl").read_text().splitlines()]
    write_rows(root / "data/prompts.jsonl", [row | {"facts": {"answer": "e"}} for row in rows])
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
    stages.new_model(root / "data/tokenizer.json", root / "model", shape=shape, seed=0)
    stages.reward(
        root / "model",
        root / "data/preferences.jsonl",
        root / "reward",
        config=RewardConfig(batch_size=8, micro_batch_size=8, max_steps=2),
        normalise=NormaliseConfig(rollouts=16, max_response=8, temperature=1.0),
        setting=quiet(),
    )
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of rules, whose name no other test has imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"rules_{tmp_path.name}.py").write_text(RULE)
    return tmp_path


def place(here: Path, name: str) -> str:
    return f"rules_{here.name}:{name}"


def run(made: Path, out: Path, reward: Reward, *, seed: int = 0, **named: Any) -> dict[str, float]:
    named = {"config": CONFIG, "objective": RLOO, "name": "group", "setting": quiet(seed)} | named
    policy = made / "model"
    return stages.group(policy, policy, reward, made / "data/prompts.jsonl", out, **named)


def test_the_stage_writes_a_model_directory_with_its_metrics_config_and_manifest(
    made: Path, tmp_path: Path
) -> None:
    run(made, tmp_path / "out", of_reward_model(made / "reward", quiet()))
    out = tmp_path / "out"
    assert load_language_model(out)[0].config == load_language_model(made / "model")[0].config
    assert load_config(out / "stage.toml", GroupConfig) == CONFIG
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and {row["stage"] for row in rows} == {"group"}
    assert {"group/no_spread", "objective/kl", "validation/objective"} <= rows[1].keys()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["ended"] == "completed"
    assert manifest["data"].keys() == {"prompts"}
    assert manifest["weights"].keys() == {"policy", "reference", "reward_model"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len({row["when"] for row in samples}) == 2 and "score" in samples[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_seed_writes_the_same_weights_and_another_estimator_others(
    made: Path, tmp_path: Path
) -> None:
    reward = of_reward_model(made / "reward", quiet())
    found = []
    for name, objective in (("a", RLOO), ("b", RLOO), ("c", GROUP_NORMALISED)):
        run(made, tmp_path / name, reward, objective=objective)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        found.append([row["policy/grad_norm_avg"] for row in rows if row["step"]])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert found[0] == found[1] != found[2]


def test_a_rule_of_the_working_directory_is_the_reward_and_stands_in_the_manifest(
    made: Path, here: Path
) -> None:
    config = replace(CONFIG, missing_eos_penalty=0.0)
    run(made, here / "out", of_rule(place(here, "answer")), config=config)
    rule, file = load_rule(place(here, "answer"))
    seen = rule.__globals__["seen"]  # type: ignore[attr-defined]
    known = {json.loads(line)["prompt"] for line in (made / "data/prompts.jsonl").read_text().splitlines()}
    # a probe each, then two iterations, and three evaluations of five validation prompts
    probes, seen = seen[:2], seen[2:]
    assert [text for _, text, _ in probes] == ["", ""] and probes[0] != probes[1]
    assert len(seen) == 2 * 8 + 3 * 5
    assert {prompt for prompt, _, _ in seen} <= known
    assert all(fact == {"answer": "e"} for _, _, fact in seen)
    scores = [float("e" in text) for _, text, _ in seen]
    rows = read_metrics(here / "out/metrics.jsonl")
    assert rows[0]["validation/score"] == pytest.approx(sum(scores[:5]) / 5)
    assert rows[1]["objective/scores"] == pytest.approx(sum(scores[5:13]) / 8)
    data = json.loads((here / "out/manifest.json").read_text())["data"]
    assert data.keys() == {"prompts", f"reward {place(here, 'answer')}"}
    assert data[f"reward {place(here, 'answer')}"]["path"] == str(file)


def test_validation_and_training_never_share_their_uniforms(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def spy(*args: Any, **named: Any) -> Any:
        seeds.append(named["seed"])
        return generate(*args, **named)

    monkeypatch.setattr(ppo_sampling, "generate", spy)
    run(made, tmp_path / "out", of_reward_model(made / "reward", quiet()))
    before, first, after, second, last = seeds
    assert before == after == last != first == second


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("as_list", r"must return a tensor \[1\], one per response, got list"),
        ("too_few", r"must return a tensor \[5\], one per response, got shape \[1\]"),
        ("raising", "raised KeyError: 'colour'"),
        (
            "not_a_number",
            r"the score of response 0 \(to the prompt of line \d+\) is nan, not a finite number",
        ),
    ],
)
def test_a_rule_that_fails_says_how_and_leaves_nothing(made: Path, here: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(made, here / "out", of_rule(place(here, name)))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("answer", "expected module:function or path/to/file.py:function, got 'answer'"),
        (":answer", "expected module:function"),
        ("RULES:", "expected module:function"),
        ("no_such_rules:answer", "importing no_such_rules failed: .*No module named 'no_such_rules'"),
        ("json.no_such_part:answer", "importing json.no_such_part failed"),
        ("RULES:answr", r"has no 'answr' \(did you mean answer\?\)"),
        ("RULES:xyz", "has no 'xyz'; it has answer, as_list, too_few"),
        ("RULES:threshold", "is a int, expected a function"),
        ("RULES.py:answr", r"has no 'answr' \(did you mean answer\?\)"),
        ("no_such_rules.py:answer", "no_such_rules.py: no such file"),
    ],
)
def test_a_rule_that_is_not_there_is_named(here: Path, wrong: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_rule(wrong.replace("RULES", f"rules_{here.name}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_thing", "failed: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0", r"failed: ZeroDivisionError: division by zero \(line 1 of .*broken_"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"),
        ("def f(:", "failed: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(here: Path, text: str, said: str) -> None:
    (here / f"broken_{here.name}.py").write_text(text)
    with pytest.raises(InputError, match=said):
        load_rule(f"broken_{here.name}:score")


def test_looking_for_a_rule_leaves_the_search_path_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ["one", "two"]
    monkeypatch.setattr("sys.path", path)
    load_rule(place(here, "answer"))
    with pytest.raises(InputError):
        load_rule("no_such_rules:answer")
    assert path == ["one", "two"]


def test_a_rule_may_be_any_installed_function() -> None:
    rule, file = load_rule("minirlhf.data.gold:gold_score")
    truth = {"name": "Irene", "item": "lamp", "order": "34", "intent": "refund"}
    text = " Dear Irene, thank you for writing. We have refunded the lamp from order 34."
    found: Tensor = rule(["x"], [text], [truth])
    assert found.shape == (1,) and float(found) > 4
    assert file is not None and file.name == "gold.py"


def test_exactly_one_reward_must_be_named(made: Path, here: Path) -> None:
    with pytest.raises(InputError, match=r"--reward SOURCE \(.*\) or --reward-model DIR, got neither"):
        the_one_reward(None, None, quiet())
    with pytest.raises(InputError, match="got both"):
        the_one_reward(made / "reward", place(here, "answer"), quiet())
    assert the_one_reward(made / "reward", None, quiet()).weights == {"reward_model": made / "reward"}
    assert list(the_one_reward(None, place(here, "answer"), quiet()).data) == [
        f"reward {place(here, 'answer')}"
    ]


def test_a_reward_model_of_another_shape_rewards_a_policy_with_its_tokenizer(
    made: Path, tmp_path: Path
) -> None:
    shape = ShapeConfig(n_layer=1, n_embd=32, n_head=2, n_positions=48)
    stages.new_model(made / "data/tokenizer.json", tmp_path / "wide", shape=shape, seed=0)
    stages.group(
        tmp_path / "wide",
        tmp_path / "wide",
        of_reward_model(made / "reward", quiet()),
        made / "data/prompts.jsonl",
        tmp_path / "out",
        config=CONFIG,
        objective=RLOO,
        setting=quiet(),
        name="group",
    )
    assert load_language_model(tmp_path / "out")[0].config.n_embd == 32


def test_a_directory_with_files_in_it_is_refused_and_untouched(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty directory, found a directory with files"):
        run(made, out, of_reward_model(made / "reward", quiet()))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_another_reference_is_what_the_kl_is_measured_to(made: Path, tmp_path: Path) -> None:
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
    stages.new_model(made / "data/tokenizer.json", tmp_path / "other", shape=shape, seed=1)
    stages.group(
        made / "model",
        tmp_path / "other",
        of_reward_model(made / "reward", quiet()),
        made / "data/prompts.jsonl",
        tmp_path / "out",
        config=CONFIG,
        objective=RLOO,
        setting=quiet(),
        name="group",
    )
    first = read_metrics(tmp_path / "out/metrics.jsonl")[0]
    assert first["step"] == 0 and abs(first["validation/kl"]) > 0.01
