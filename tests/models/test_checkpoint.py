"""Directories: what is written, what is read back, and every way in which one can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.checkpoint import (
    Normalisation,
    load_language_model,
    load_scalar_model,
    save_language_model,
    save_scalar_model,
)
from minirlhf.models.interface import with_scalar_head
from minirlhf.models.tensor_files import named, nested
from minirlhf.runs import InputError
from tests.models.tiny import CONFIG, tiny


def headed() -> tuple[Any, Any]:
    model, params = tiny()
    return model, with_scalar_head(model, params, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    save_language_model(tmp_path / "policy", *tiny(), tokenizer=None)
    return tmp_path / "policy"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    save_scalar_model(
        tmp_path / "reward", *headed(), tokenizer=None, normalisation=Normalisation(shift=-0.5, scale=2.5)
    )
    return tmp_path / "reward"


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def edit_config(directory: Path, **entries: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def message(load: Callable[[Path], object], directory: Path) -> str:
    with pytest.raises(InputError) as error:
        load(directory)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_policy_comes_back_bit_by_bit_with_its_config(policy: Path) -> None:
    model, params = tiny()
    again, reread = load_language_model(policy)
    assert again.config == model.config and same(params, reread)
    assert sorted(path.name for path in policy.iterdir()) == ["config.json", "model.safetensors"]


def test_a_reward_model_comes_back_with_its_head_and_normalisation(reward: Path) -> None:
    _, params = headed()
    _, reread, normalisation = load_scalar_model(reward)
    assert same(params, reread) and normalisation == Normalisation(-0.5, 2.5)
    entries = json.loads((reward / "config.json").read_text())
    assert entries["architectures"] == ["GPT2ForSequenceClassification"] and len(entries["id2label"]) == 1
    assert entries["pad_token_id"] != entries["eos_token_id"]


def test_the_files_carry_the_prefix_and_no_tied_head(policy: Path, reward: Path) -> None:
    names = set(load_file(policy / "model.safetensors"))
    assert all(name.startswith("transformer.") for name in names)
    assert set(load_file(reward / "model.safetensors")) == names | {"score.weight"}


def test_names_without_prefix_the_hubs_buffers_and_an_equal_tied_head_are_accepted(policy: Path) -> None:
    _, params = tiny()

    def as_on_the_hub(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_tensors(policy, as_on_the_hub)
    assert same(load_language_model(policy)[1], params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_files_load_as_fp32(policy: Path, dtype: torch.dtype) -> None:
    _, params = tiny()
    edit_tensors(policy, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    _, reread = load_language_model(policy)
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(reread))
    assert same(reread, tree_map(lambda leaf: leaf.to(dtype).float(), params))


def test_parameters_of_any_dtype_layout_and_gradient_are_written_as_fp32(tmp_path: Path) -> None:
    model, params = tiny(dtype=torch.float64)
    odd = tree_map(lambda x: x.t().contiguous().t().requires_grad_() if x.ndim == 2 else x, params)
    save_language_model(tmp_path / "out", model, odd, tokenizer=None)
    assert same(load_language_model(tmp_path / "out")[1], tree_map(lambda x: x.float(), params))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
        assert file.metadata() == {"format": "pt"}, "older transformers refuse a file without the mark"


def test_loaded_parameters_do_not_live_in_the_file(policy: Path) -> None:
    _, params = load_language_model(policy)
    (policy / "model.safetensors").write_bytes(b"")
    assert same(params, tiny()[1])


def test_the_tokenizer_is_copied_from_a_file_or_a_directory(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(source))
    for number, given in enumerate((source, tmp_path)):
        save_language_model(tmp_path / str(number), *tiny(), tokenizer=given)
        assert (tmp_path / str(number) / "tokenizer.json").read_bytes() == source.read_bytes()


def test_a_missing_tokenizer_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    text = message(
        lambda to: save_language_model(to, *tiny(), tokenizer=tmp_path / "no.json"), tmp_path / "x"
    )
    assert text == f"{tmp_path / 'no.json'}: no such tokenizer"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocabulary", "byte_level", "eos", "expected"),
    [
        (["<eos>", "a", "b", "ÿ"], True, 0, 4),  # the embedding has rows that the tokenizer never names
        (["a", "b", "c"], True, 3, 4),  # such a row that is not EOS
        (["<eos>", "a", "ÿ", "b", "ab"], True, 0, 2),  # the byte that UTF-8 never uses
        (["<eos>", "a", "ÿ", "b", "ab"], False, 0, 4),  # not byte level: ÿ is a letter; the rarest merge
        (["a", "b", "c", "d", "<eos>"], True, 4, 3),
    ],
)
def test_the_pad_id_of_a_reward_model_is_one_that_no_text_contains(
    tmp_path: Path, vocabulary: list[str], byte_level: bool, eos: int, expected: int
) -> None:
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("a", "b")] if "ab" in ids else []))
    if byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model, params = tiny(vocab_size=5, eos_token_id=eos)
    params = with_scalar_head(model, params, generator=torch.Generator().manual_seed(0))
    save_scalar_model(tmp_path / "rm", model, params, tokenizer=tmp_path, normalisation=Normalisation())
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["pad_token_id"] == expected


def test_saving_replaces_a_directory_as_a_whole(policy: Path) -> None:
    (policy / "old.txt").write_text("")
    model, other = tiny(seed=9)
    save_language_model(policy, model, other, tokenizer=None)
    assert same(load_language_model(policy)[1], other) and not (policy / "old.txt").exists()


def test_saving_what_is_not_this_models_is_refused_and_leaves_the_directory_alone(policy: Path) -> None:
    model, params = tiny()
    before = (policy / "model.safetensors").read_bytes()
    nan = {**params, "ln_f": {**params["ln_f"], "bias": torch.full((24,), torch.nan)}}
    text = message(lambda to: save_language_model(to, model, nan, tokenizer=None), policy)
    assert text == f"{policy}: not finite: ln_f.bias"
    text = message(lambda to: save_language_model(to, *headed(), tokenizer=None), policy)
    assert text == f"{policy}: unknown tensors: score.weight [1, 24]"
    text = message(
        lambda to: save_scalar_model(to, model, params, tokenizer=None, normalisation=Normalisation()), policy
    )
    assert text == f"{policy}: missing tensors: score.weight [1, 24]"
    for bad in (Normalisation(0.0, 0.0), Normalisation(0.0, -1.0), Normalisation(float("nan"), 1.0)):
        text = message(
            lambda to, bad=bad: save_scalar_model(to, *headed(), tokenizer=None, normalisation=bad), policy
        )
        assert "normalisation needs a finite shift and a scale > 0" in text
    assert (policy / "model.safetensors").read_bytes() == before


def test_a_reward_directory_is_no_policy_and_the_other_way_round(policy: Path, reward: Path) -> None:
    assert message(load_language_model, reward) == (
        f"{reward}: expected a language model (GPT2LMHeadModel or GPT2Model), "
        "found a reward model (GPT2ForSequenceClassification)"
    )
    assert message(load_scalar_model, policy) == (
        f"{policy}: expected a reward model (GPT2ForSequenceClassification), "
        "found a language model (GPT2LMHeadModel)"
    )
    for directory in (policy, reward):  # without the entry, the tensors tell
        edit_config(directory, architectures=None)
    assert message(load_language_model, reward) == (
        f"{reward}: expected a language model, found a reward model (score.weight in model.safetensors)"
    )
    assert message(load_scalar_model, policy) == (
        f"{policy}: expected a reward model, found no score.weight in model.safetensors"
    )


def test_another_use_of_the_family_is_named(policy: Path) -> None:
    edit_config(policy, architectures=["GPT2ForTokenClassification"])
    text = message(load_language_model, policy)
    assert text.endswith("found something else (GPT2ForTokenClassification)")


def test_missing_unknown_and_misshapen_tensors_are_listed_with_both_shapes(policy: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.0.attn.rotary"] = torch.zeros(3)
        tensors["transformer.h.1.attn.c_attn.weight"] = torch.zeros(72, 24)

    edit_tensors(policy, damage)
    assert message(load_language_model, policy) == (
        f"{policy}: missing tensors: ln_f.bias [24]; unknown tensors: h.0.attn.rotary [3]; "
        "misshapen tensors: h.1.attn.c_attn.weight expected [24, 72] got [72, 24]"
    )


def test_a_long_list_of_faults_stays_one_readable_line(policy: Path) -> None:
    edit_config(policy, n_layer=4)
    text = message(load_language_model, policy)
    assert "h.2.ln_1.weight [24], " in text and text.endswith(" and 16 more") and len(text) < 500


@pytest.mark.parametrize("name", ["h.0.mlp.bias", "h.0.attn.bias_2", "x.h.0.attn.bias", "attn.masked_bias"])
def test_only_the_hubs_buffers_are_ignored(policy: Path, name: str) -> None:
    edit_tensors(policy, lambda tensors: tensors.update({f"transformer.{name}": torch.zeros(1)}))
    assert f"unknown tensors: {name} [1]" in message(load_language_model, policy)


def test_a_tensor_with_and_without_prefix_is_ambiguous(policy: Path) -> None:
    edit_tensors(policy, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(24)}))
    assert message(load_language_model, policy) == (
        f"{policy}: holds ln_f.bias twice, with and without 'transformer.'"
    )


def test_a_head_of_several_labels_is_misshapen(reward: Path) -> None:
    edit_tensors(reward, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 24)}))
    assert "score.weight expected [1, 24] got [2, 24]" in message(load_scalar_model, reward)


def test_an_untied_head_is_refused(policy: Path) -> None:
    edit_tensors(
        policy, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    )
    assert message(load_language_model, policy) == (
        f"{policy}: lm_head.weight differs from wte.weight, but its config says that the head is tied"
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(policy: Path, poison: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.ln_1.weight"][3] = poison

    edit_tensors(policy, spoil)
    assert message(load_language_model, policy).endswith("model.safetensors: not finite: h.0.ln_1.weight")


def test_integer_tensors_are_refused(policy: Path) -> None:
    edit_tensors(
        policy, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.zeros(24, dtype=torch.int8)})
    )
    assert "expected floating-point tensors, got ln_f.bias I8" in message(load_language_model, policy)


def test_an_unsupported_option_stops_before_any_tensor_is_read(policy: Path) -> None:
    edit_config(policy, scale_attn_by_inverse_layer_idx=True)
    (policy / "model.safetensors").write_bytes(b"not read")
    assert message(load_language_model, policy) == (
        f"{policy / 'config.json'}: unsupported option scale_attn_by_inverse_layer_idx = True; "
        "gpt2 supports False"
    )


def test_another_family_is_named_with_those_that_are_supported(policy: Path) -> None:
    edit_config(policy, model_type="bloom")
    assert message(load_language_model, policy) == (
        f"{policy / 'config.json'}: unsupported model_type 'bloom'; supported: "
        "gpt2, llama, mistral, qwen2, gpt_neox, gpt_neo"
    )


@pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
def test_missing_and_broken_files_are_named(load: Callable[[Path], object], tmp_path: Path) -> None:
    assert message(load, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such model directory"
    config = tmp_path / "config.json"
    assert message(load, tmp_path) == f"{config}: cannot be read: No such file or directory"
    config.write_text('{"model_type": "gpt2",\n "n_layer": }')
    assert message(load, tmp_path) == f"{config}:2: broken JSON: Expecting value"
    config.write_text("[1]")
    assert message(load, tmp_path) == f"{config}: expected a JSON object, got list"
    config.write_bytes(b'{"a": "\xff"}')
    assert message(load, tmp_path) == f"{config}: broken JSON: not UTF-8 text"
    config.write_text('{"model_type": "gpt2"}')
    assert message(load, tmp_path) == f"{tmp_path}: has no model.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "holds weights only as pickle (pytorch_model.bin), which can run code" in message(load, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    assert "model.safetensors: not a readable safetensors file" in message(load, tmp_path)


@pytest.mark.parametrize(
    ("ours", "found"),
    [
        ({"reward_shift": 0.0}, "got {'reward_shift': 0.0}"),
        ({"reward_shift": "a", "reward_scale": 1}, "must hold the numbers reward_shift and reward_scale"),
        ([1], r"got [1]"),
        ({"reward_shift": 0.0, "reward_scale": 0.0}, "a scale > 0, got 0.0 and 0.0"),
    ],
)
def test_a_broken_normalisation_is_an_error(reward: Path, ours: object, found: str) -> None:
    edit_config(reward, minirlhf=ours)
    text = message(load_scalar_model, reward)
    assert text.startswith(f"{reward / 'config.json'}: ") and found in text


def test_a_reward_model_without_our_entry_has_the_identity_as_normalisation(reward: Path) -> None:
    entries = json.loads((reward / "config.json").read_text())
    del entries["minirlhf"]
    (reward / "config.json").write_text(json.dumps(entries))
    assert load_scalar_model(reward)[2] == Normalisation(0.0, 1.0)


def shard(directory: Path) -> Path:
    """Splits a directory's tensors into two files under an index, as large checkpoints come."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    placed = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index


def test_shards_load_and_a_missing_one_is_named(policy: Path) -> None:
    index = shard(policy)
    assert same(load_language_model(policy)[1], tiny()[1])
    (policy / "model-00002-of-00002.safetensors").unlink()
    assert message(load_language_model, policy) == (
        f"{index}: names files that are not there: model-00002-of-00002.safetensors"
    )


@pytest.mark.parametrize("weight_map", [None, {}, {"wte.weight": 3}, {"wte.weight": "../secret.safetensors"}])
def test_an_index_names_plain_files_beside_it(policy: Path, weight_map: object) -> None:
    index = shard(policy)
    shutil.copy(policy / "model-00001-of-00002.safetensors", policy.parent / "secret.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert message(load_language_model, policy) == (
        f"{index}: expected a weight_map of tensor names to file names beside it"
    )


def test_names_and_nesting_are_inverse() -> None:
    _, params = tiny()
    flat = named(params)
    assert flat["h.1.mlp.c_proj.weight"] is params["h"][1]["mlp"]["c_proj"]["weight"]
    assert len(flat) == len(tree_leaves(params))
    again = nested(params, flat)
    assert isinstance(again["h"], list) and same(again, params)
    assert CONFIG.n_layer == len(again["h"])
