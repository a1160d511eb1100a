"""`minirlhf import`: any source becomes a checked directory, in one line; a mistake leaves nothing."""

import json
from pathlib import Path

import pytest
import torch

from minirlhf import cli
from minirlhf.models.checkpoint import (
    Normalisation,
    load_language_model,
    load_scalar_model,
    save_language_model,
    save_scalar_model,
)
from minirlhf.models.interface import with_scalar_head
from minirlhf.models.tensor_files import named
from tests.miniature import write_tokenizer
from tests.models.gguf_files import a_file
from tests.models.tiny import tiny


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer.json")
    model, params = tiny(vocab_size=320, eos_token_id=0)
    save_language_model(tmp_path / "policy", model, params, tokenizer=tmp_path)
    (tmp_path / "policy" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return tmp_path / "policy"


def test_a_gguf_file_becomes_a_directory_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    a_file(tmp_path / "a.gguf", {"tokenizer.chat_template": template})
    assert cli.main(["import", str(tmp_path / "a.gguf"), "--out", str(tmp_path / "out")]) == 0
    [line] = capsys.readouterr().out.splitlines()
    vocabulary = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    size = vocabulary * 32 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 3 * 32
    assert line == (
        f"llama: {size:,} parameters, 1 layers, vocabulary {vocabulary}, context 64, a chat template, "
        f"responses end with <|end|>; from {tmp_path / 'a.gguf'}, written to {tmp_path / 'out'}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "out"]


def test_a_directory_is_saved_anew_with_what_it_says_of_its_tokenizer(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import", str(policy), "--out", str(tmp_path / "out")]) == 0
    assert "gpt2: " in (told := capsys.readouterr().out) and "no chat template" in told
    before, after = load_language_model(policy)[1], load_language_model(tmp_path / "out")[1]
    assert all(torch.equal(a, b) for a, b in zip(named(before).values(), named(after).values(), strict=True))
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"eos_token": "<|endoftext|>"}'


def test_a_reward_model_keeps_its_head_and_normalisation(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = load_language_model(policy)
    headed = with_scalar_head(model, params, generator=torch.Generator().manual_seed(0))
    scale = Normalisation(shift=1.5, scale=2.0)
    save_scalar_model(tmp_path / "reward", model, headed, tokenizer=policy, normalisation=scale)
    assert cli.main(["import", str(tmp_path / "reward"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("reward model, gpt2: ")
    _, again, normalisation = load_scalar_model(tmp_path / "out")
    assert torch.equal(again["score"]["weight"], headed["score"]["weight"]) and normalisation == scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{here}/nothing", "--out", "{here}/out"], "nothing: no such model directory"),
        (["{here}/policy", "--out", "{here}/policy"], "expected a new or empty directory"),
        (["{here}/policy", "--out", "{here}/out", "--tokenizer", "t.json"], "--tokenizer is for a GGUF file"),
        (["{here}/policy"], "--out"),
        (["--out", "{here}/out"], "NAME|GGUF|DIR"),
        (
            ["{here}/tokenizer.json", "--out", "{here}/out"],
            "expected a model directory, a .gguf file or a name",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import", *(part.format(here=tmp_path) for part in arguments)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "tokenizer.json"]


def test_a_model_whose_tokenizer_knows_more_ids_is_refused_and_nothing_written(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = tiny(vocab_size=61, eos_token_id=0)
    save_language_model(tmp_path / "small", model, params, tokenizer=policy)
    assert cli.main(["import", str(tmp_path / "small"), "--out", str(tmp_path / "out")]) == 2
    assert "ids, its model a vocabulary of only 61" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
