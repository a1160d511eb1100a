"""Every command on models of other families than GPT-2, small and random, with their own tokenizers.

Nothing outside `models/` may know which family runs: the same arguments, the same files, the same report.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from minirlhf import cli, recipes
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.models.checkpoint import load_language_model, load_scalar_model, save_language_model
from minirlhf.models.families import FAMILIES
from minirlhf.recipes import RunConfig
from minirlhf.runs import RunLayout, dump_config
from minirlhf.training.inputs import read_pairs
from minirlhf.training.setting import ChatTemplate, NormaliseConfig, ReadingConfig, Setting
from minirlhf.training.workspace import load_policy
from tests.miniature import write_files, write_rows

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As their namesakes, but small: 64 wide at most, two layers, contexts of 96 tokens.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2": {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
        "tie_word_embeddings": True,
    },
    "Pythia": {
        "model_type": "gpt_neox",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
    },
    "GPT-Neo": {
        "model_type": "gpt_neo",
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 96,
    },
}


def make_model(name: str, folder: Path, data: Path) -> Path:
    """A random model of that shape with the miniature's tokenizer; SmolLM2's speaks ChatML."""
    tokenizer = tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))
    beside: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if name == "SmolLM2":
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        beside = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(beside["eos_token"])
    family = FAMILIES[MODELS[name]["model_type"]]
    config = family.from_huggingface(MODELS[name] | {"vocab_size": size, "eos_token_id": end})
    model = family.bind(config)
    params = model.init(torch.Generator().manual_seed(0))
    save_language_model(folder / "model", model, params, tokenizer=folder / "tokenizer.json")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    write_rows(folder / "chat.jsonl", [_as_chat(row) for row in rows])
    return folder


def _as_chat(row: dict[str, str]) -> dict[str, Any]:
    """A conversational preference with an explicit prompt, as TRL's."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": role, "content": row[key].strip()}] for key, role in roles.items()}


def small() -> RunConfig:
    """Real data's recipe, one step of everything."""
    real, replace = recipes.real(), dataclasses.replace
    response: dict[str, Any] = {"max_response": 8}
    return replace(
        real,
        policies=("ppo", "dpo", "ipo", "group"),
        normalise=NormaliseConfig(rollouts=8, **response),
        ppo=replace(real.ppo, batch_size=4, epochs=1, **response),
        group=replace(real.group, prompts_per_batch=2, samples_per_prompt=2, **response),
        evaluation=EvaluationConfig(prompts=4, samples=2, **response),
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_run_on_a_family_and_its_models_load_as_that_family(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(name, tmp_path / name, data)
    (tmp_path / "run.toml").write_text(dump_config(small()))
    preferences = data / ("chat.jsonl" if name == "SmolLM2" else "preferences.jsonl")
    done = cli.main(
        [
            *("run", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")),
            *("--model", str(model), "--preferences", str(preferences), "--max-steps", "1"),
        ]
    )
    said = capsys.readouterr()
    assert done == 0, said.err
    run, kind = RunLayout(tmp_path / "run"), MODELS[name]["model_type"]
    policies = ("sft", "ppo", "dpo", "ipo", "group")
    assert [
        row["policy"] for row in json.loads((run.evaluation / "report.json").read_text())["rows"]
    ] == list(policies)
    for policy in policies:
        loaded, _ = load_language_model(run.model(policy))
        assert loaded.config == load_language_model(model)[0].config
        written = {path.name for path in run.model(policy).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= written
    for judge in ("reward", "judge"):
        load_scalar_model(run.model(judge))
        entries = json.loads((run.model(judge) / "config.json").read_text())
        assert entries["model_type"] == kind
        assert entries["architectures"] == [FAMILIES[kind].scalar_class]


def test_conversations_are_written_by_the_models_template_or_as_transcripts_if_asked(
    data: Path, tmp_path: Path
) -> None:
    model = make_model("SmolLM2", tmp_path / "SmolLM2", data)

    def first_pair(chat_template: ChatTemplate) -> tuple[str, str]:
        setting = Setting(0, "cpu", ReadingConfig(chat_template=chat_template), show=lambda line: None)
        policy = load_policy(model, setting)
        pair = read_pairs(policy, data / "chat.jsonl", setting).train[0].chosen
        ids = [pair.ids[: pair.prompt_length], pair.ids[pair.prompt_length :]]
        prompt, response = (policy.tokenizer.decode(part) for part in ids)
        return prompt, response

    prompt, response = first_pair("auto")
    assert prompt.startswith("<|im_start|>user\nI want a ")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert response.startswith("Here is") and response.endswith("<|im_end|>")
    prompt, response = first_pair("none")
    assert prompt.startswith("\n\nHuman: I want a ") and prompt.endswith("\n\nAssistant:")
    assert response.startswith(" Here is") and response.endswith("<|im_end|>")  # the end is the model's still


FAST = ("--max-steps", "1", "--batch-size", "4", "--micro-batch-size", "4")
RESPONSE = ("--max-response", "8", "--temperature", "1.0")


@pytest.mark.parametrize("name", MODELS)
def test_each_stage_alone_on_a_family(name: str, data: Path, tmp_path: Path) -> None:
    root = make_model(name, tmp_path / name, data)
    pairs = data / ("chat.jsonl" if name == "SmolLM2" else "preferences.jsonl")

    def command(stage: str, *rest: object) -> Path:
        out = tmp_path / stage
        assert cli.main([stage, "--out", str(out), *map(str, rest)]) == 0
        return out

    base = command("pretrain", "--policy", root, "--data", data / "plain.jsonl", *FAST)
    sft = command("sft", "--policy", base, "--data", pairs, *FAST)
    reward = command("reward", "--policy", sft, "--data", pairs, *FAST, *RESPONSE, "--rollouts", 8)
    sampling = ("--policy", sft, "--reward-model", reward, "--data", pairs, "--max-steps", 1, *RESPONSE)
    ppo = command("ppo", *sampling, "--batch-size", 4, "--epochs", 1)
    group = command("group", *sampling, "--prompts-per-batch", 2, "--samples-per-prompt", 2)
    dpo = command("dpo", "--policy", sft, "--data", pairs, *FAST)
    ipo = command("ipo", "--policy", sft, "--data", pairs, *FAST)
    policies = [f"{path.name}={path}" for path in (ppo, group, dpo, ipo)]
    judged = ("--reward-model", reward, "--judge", reward, "--samples", 2, *RESPONSE)
    command("evaluate", "--policy", *policies, "--reference", sft, "--data", pairs, *judged)
