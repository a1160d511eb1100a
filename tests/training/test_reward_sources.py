"""Every source rewards every on-policy stage: by its scores, checked beforehand, with a critic that fits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.models.checkpoint import load_language_model
from minirlhf.runs import InputError, read_metrics
from minirlhf.training import ppo_sampling, stages
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import RLOO
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.reward_sources import Reward, load_rule, open_reward
from minirlhf.training.setting import ReadingConfig, Setting
from tests.miniature import write_files
from tests.training.test_http_reward import Server, serve
from tests.training.test_text_rewards import Made, made

__all__ = ["made", "serve"]  # fixtures

PPO = PPOConfig(
    iterations=2,
    batch_size=8,
    epochs=1,
    minibatches=1,
    max_response=8,
    temperature=1.0,
    learning_rate=1e-3,
    evaluate_every=1,
    missing_eos_penalty=0.0,
)
GROUP = GroupConfig(
    iterations=2,
    prompts_per_batch=2,
    samples_per_prompt=4,
    epochs=1,
    minibatches=1,
    max_response=8,
    temperature=1.0,
    learning_rate=1e-3,
    evaluate_every=1,
    missing_eos_penalty=0.0,
)
RULE = """
import torch

def letters(prompts, responses, facts):
    return torch.tensor([float(sum(c in "aeiou" for c in text)) for text in responses])

def needs_facts(prompts, responses, facts):
    return torch.tensor([float(fact["answer"] in text) for text, fact in zip(responses, facts)])

def needs_words(prompts, responses, facts):
    return torch.tensor([float(len(text.split()[0])) for text in responses])
"""


def vowels(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
    return 200, {"rewards": [sum(c in "aeiou" for c in text) for text in body["responses"]]}


def quiet(said: list[object] | None = None) -> Setting:
    show = (lambda line: None) if said is None else said.append
    return Setting(0, "cpu", ReadingConfig(), show=show)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    write_files(root, rows=24)
    return root / "prompts.jsonl"


@pytest.fixture
def rule(tmp_path: Path) -> str:
    (tmp_path / "rules.py").write_text(RULE)
    return f"{tmp_path}/rules.py:"


def ppo(
    made: Made, reward: Reward, data: Path, out: Path, said: list[object] | None = None, **changes: Any
) -> Any:
    stages.ppo(
        made.policy, made.policy, reward, data, out, config=replace(PPO, **changes), setting=quiet(said)
    )
    return read_metrics(out / "metrics.jsonl")


def test_ppo_learns_from_a_rule_with_a_critic_of_its_own_and_says_so(
    made: Made, prompts: Path, rule: str, tmp_path: Path
) -> None:
    said: list[object] = []
    rows = ppo(made, open_reward(rule + "letters", quiet()), prompts, tmp_path / "out", said)
    critics = [line for line in said if str(line).startswith("critic: ")]
    assert len(critics) == 1 and "the policy's backbone with a fresh head, since the reward" in str(
        critics[0]
    )
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert samples
    for row in samples:
        assert row["score"] == sum(c in "aeiou" for c in row["response"])
    assert len(rows) == 3 and rows[1]["loss/value_avg"] > 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["data"].keys() == {"prompts", f"reward {rule}letters"}
    assert manifest["weights"].keys() == {"policy", "reference"}


def test_the_same_reward_as_rule_and_behind_http_trains_the_same_policy(
    made: Made, prompts: Path, rule: str, tmp_path: Path, serve: Any
) -> None:
    server: Server = serve(vowels)
    remote = RemoteConfig(reward_batch=3, reward_timeout=5.0)
    sources = (open_reward(rule + "letters", quiet()), open_reward(server.url, quiet(), remote=remote))
    found = []
    for name, reward in zip("ab", sources, strict=True):
        rows = ppo(made, reward, prompts, tmp_path / name)
        keys = ("objective/scores", "policy/grad_norm_avg", "loss/value_avg", "validation/score")
        found.append([[row.get(key) for key in keys] for row in rows])
    assert found[0] == found[1] and found[0][1][1] > 0
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    assert manifest["data"]["reward"] == {"url": server.url}
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("which", ["other", "encoder"])
def test_ppo_and_groups_learn_from_models_with_other_tokenizers(
    made: Made, prompts: Path, tmp_path: Path, which: str
) -> None:
    said: list[object] = []
    reward = open_reward(str(getattr(made, which)), quiet(said))
    if which == "encoder":  # of 16 tokens, 8 of a prompt
        short = [json.dumps({"prompt": f"a {w} lamp.\n"}) for w in "red no i want here is lamp a".split()]
        prompts = tmp_path / "short.jsonl"
        prompts.write_text("\n".join([*short, *(line.replace(".", "") for line in short)]) + "\n")
    rows = ppo(made, reward, prompts, tmp_path / "ppo", said)
    assert sum("reads text" in str(line) for line in said) == 1
    assert sum(str(line).startswith("critic: ") for line in said) == 1
    config = {"config": GROUP, "objective": RLOO, "setting": quiet(said), "name": "group"}
    stages.group(made.policy, made.policy, reward, prompts, tmp_path / "group", **config)  # type: ignore[arg-type]
    grouped = read_metrics(tmp_path / "group/metrics.jsonl")
    assert abs(rows[1]["objective/scores"]) > 1e-4 and abs(grouped[1]["objective/scores"]) > 1e-4
    weights = json.loads((tmp_path / "ppo/manifest.json").read_text())["weights"]
    assert weights["reward_model"]["path"] == str(getattr(made, which))
    assert load_language_model(tmp_path / "ppo")[0].config == load_language_model(made.policy)[0].config


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("RULES:needs_facts", "raised TypeError: 'NoneType' object is not subscriptable"),
        ("RULES:needs_words", "raised IndexError"),
        ("URL", r"reward http://127.0.0.1:\d+/score: expected status 200, got 404: 'nothing here'"),
    ],
)
def test_a_source_that_cannot_reward_an_empty_response_is_refused_before_anything_is_sampled(
    made: Made,
    prompts: Path,
    rule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve: Any,
    source: str,
    said: str,
) -> None:
    def sampling(*args: Any, **named: Any) -> Any:
        raise AssertionError("sampled before the reward was checked")

    monkeypatch.setattr(ppo_sampling, "generate", sampling)
    server: Server = serve(lambda body, number: (404, b"nothing here"))
    source = server.url if source == "URL" else source.replace("RULES:", rule)
    with pytest.raises(InputError, match=said):
        ppo(made, open_reward(source, quiet()), prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_is_known_by_its_form(made: Made, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_reward(rule + "letters", quiet()).name == f"the reward {rule}letters"
    assert open_reward("minirlhf.data.gold:gold_score", quiet()).name.endswith("gold:gold_score")
    assert open_reward("https://me:pw@host:1/x", quiet()).name == "reward https://host:1/x"
    model = open_reward(str(made.other), quiet())
    assert model.name == f"reward model {made.other}" and model.backbone is not None
    assert model.weights == {"reward_model": made.other} and model.data == {}
    encoder = open_reward(str(made.encoder), quiet())
    assert encoder.backbone is None and encoder.weights == {"reward_model": made.encoder}
    # a directory whose name has a colon in it is a directory
    odd = made.other.with_name("odd:name")
    if not odd.exists():
        odd.symlink_to(made.other)
    assert open_reward(str(odd), quiet()).backbone is not None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="reward: expected a reward model's directory or name, mod"):
        open_reward("no/such/dir/anywhere", quiet())


def test_a_rule_of_a_file_comes_with_that_file_for_the_manifest(rule: str, tmp_path: Path) -> None:
    found, file = load_rule(rule + "letters")
    given: Sequence[float] = found(["", ""], ["aei", "x"], [None, None]).tolist()
    assert given == [3, 0] and file == tmp_path / "rules.py"


def test_a_policy_is_no_reward_model(made: Made) -> None:
    with pytest.raises(InputError, match="expected a reward model"):
        open_reward(str(made.policy), quiet())
