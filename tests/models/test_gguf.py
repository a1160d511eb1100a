"""GGUF files: weights, config and tokenizer of the model that was converted, or an error that says why."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors.torch import load_file

from minirlhf.models.checkpoint import load_language_model
from minirlhf.models.gguf import convert_gguf
from minirlhf.runs import InputError
from tests.models.gguf_files import (
    LLAMA,
    SIZE,
    SMOL,
    a_file,
    as_llama_cpp,
    sentencepiece,
    shape_of,
    their_model,
    write_gguf,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.integrations.gguf.dequant import dequantize as their_dequantize

NEOX = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rotary_pct": 0.5,
    "layer_norm_eps": 1e-6,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped queries, tied": ("llama", "Llama", LLAMA | {"tie_word_embeddings": True}),
    "every head its own keys": ("llama", "Llama", LLAMA | {"num_key_value_heads": 4}),
    "one head of keys, untied": ("llama", "Llama", LLAMA | {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", "Qwen2", LLAMA),
    "qwen2, tied": ("qwen2", "Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        "GPT2",
        {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64},
    ),
    "neox, parallel": ("gptneox", "GPTNeoX", NEOX | {"use_parallel_residual": True}),
    "neox, serial": ("gptneox", "GPTNeoX", NEOX | {"use_parallel_residual": False}),
}


def weights_of(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers writes of it; a tied head is not."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_with_its_weights_config_and_logits(case: str, tmp_path: Path) -> None:
    architecture, name, entries = MODELS[case]
    model = their_model(name, entries)
    state = weights_of(model, tmp_path / "theirs")
    metadata = SMOL | shape_of(architecture, model.config) | {"tokenizer.ggml.pre": "gpt-2"}
    write_gguf(tmp_path / "a.gguf", architecture, metadata, as_llama_cpp(architecture, state, model.config))
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")

    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[key], state[key]) for key in state)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(SIZE, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens).logits
        torch.testing.assert_close(again(tokens).logits, theirs, rtol=0, atol=1e-5)
        bound, params = load_language_model(tmp_path / "out")
        logits = bound.hidden(params, tokens) @ bound.unembedding(params).T
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_gpt2s_copy_of_its_embedding_is_left_out_and_a_differing_one_refused(tmp_path: Path) -> None:
    model = their_model("GPT2", MODELS["gpt2"][2])
    metadata = SMOL | shape_of("gpt2", model.config) | {"tokenizer.ggml.pre": "gpt-2"}
    tensors = as_llama_cpp("gpt2", model.state_dict(), model.config)
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    convert_gguf(write_gguf(tmp_path / "a.gguf", "gpt2", metadata, tensors), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")

    file = write_gguf(tmp_path / "b.gguf", "gpt2", metadata, tensors, {"output.weight": Kind.Q4_0})
    with pytest.raises(InputError, match="output.weight differs from token_embd.weight"):
        convert_gguf(file, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "out"]


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_half_precision_is_read_exactly(kind: Kind, tmp_path: Path) -> None:
    dtype = torch.float16 if kind is Kind.F16 else torch.bfloat16
    model = their_model("Llama", LLAMA)
    tensors = as_llama_cpp("llama", model.state_dict(), model.config)
    metadata = SMOL | shape_of("llama", model.config)
    write_gguf(tmp_path / "a.gguf", "llama", metadata, tensors, dict.fromkeys(tensors, kind))
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor.to(dtype).float())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_a_quantised_weight_is_off_by_at_most_a_step_of_its_block(kind: Kind, tmp_path: Path) -> None:
    model = their_model("Llama", LLAMA)
    name, theirs = "model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"
    tensors = as_llama_cpp("llama", model.state_dict(), model.config)
    write_gguf(tmp_path / "a.gguf", "llama", SMOL | shape_of("llama", model.config), tensors, {theirs: kind})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    got, wanted = load_file(tmp_path / "out" / "model.safetensors")[name], model.state_dict()[name]
    bits = int(kind.name[1])
    step = 2 * wanted.abs().amax(dim=1, keepdim=True) / (2**bits - 1)  # a row is one block of 32
    assert not torch.equal(got, wanted)
    assert bool(((got - wanted).abs() <= 1.1 * step).all())
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
        raw = torch.from_numpy(quantize(wanted.numpy(), kind))
        assert torch.equal(got, their_dequantize(raw, int(kind)).reshape(wanted.shape))


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS])
def test_a_k_quant_is_read_as_transformers_reads_it(kind: Kind, tmp_path: Path) -> None:
    _, width = gguf.GGML_QUANT_SIZES[kind]
    drawn = torch.randint(256, (2000, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    finite = drawn[their_dequantize(drawn, int(kind)).reshape(2000, -1).abs().amax(dim=1) < 1e6][:SIZE]
    assert len(finite) == SIZE  # a block a row
    model = their_model(
        "Llama", LLAMA | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 32}
    )
    tensors = as_llama_cpp("llama", model.state_dict(), model.config)
    tensors["token_embd.weight"] = finite
    metadata, path = SMOL | shape_of("llama", model.config), tmp_path / "a.gguf"
    write_gguf(path, "llama", metadata, tensors, {"token_embd.weight": kind})
    convert_gguf(path, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    expected = their_dequantize(finite, int(kind)).reshape(SIZE, 256)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 1.0}, None),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling_is_what_the_metadata_state(
    metadata: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    a_file(tmp_path / "a.gguf", {f"llama.{key}": value for key, value in metadata.items()})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_recognised_by_its_divisors(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    entries: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 1, "rope_theta": 500000.0}
    entries |= {"max_position_embeddings": 131072, "rope_scaling": {**scaling}}
    config = transformers.LlamaConfig(**LLAMA | entries)
    model = transformers.LlamaForCausalLM(config)
    divisors = []  # as LlamaModel.generate_extra_tensors of llama.cpp's converter makes them
    for frequency in 1 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64):
        wavelength = 2 * math.pi / float(frequency)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    assert 1 in divisors and factor in divisors and len(set(divisors)) > 3
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / torch.tensor(divisors), model.model.rotary_emb.inv_freq)
    metadata = SMOL | shape_of("llama", config) | {"llama.rope.freq_base": 500000.0}
    tensors = as_llama_cpp("llama", model.state_dict(), config)
    write_gguf(
        tmp_path / "a.gguf", "llama", metadata, tensors | {"rope_freqs.weight": torch.tensor(divisors)}
    )
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == scaling

    write_gguf(
        tmp_path / "b.gguf", "llama", metadata, tensors | {"rope_freqs.weight": torch.tensor(divisors) ** 1.1}
    )
    with pytest.raises(InputError, match=r"rope_freqs.weight is not the scaling of Llama 3"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "b")


def test_a_stated_window_makes_a_mistral(tmp_path: Path) -> None:
    a_file(tmp_path / "a.gguf", {"llama.attention.sliding_window": 16})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.sliding_window) == ("mistral", 16)


def test_special_ids_template_and_terminators_are_the_files(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    a_file(tmp_path / "a.gguf", {"tokenizer.chat_template": template, "tokenizer.ggml.eot_token_id": 1})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["rms_norm_eps"]) == (0, 1, 1e-6)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [0, 1]}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token, theirs.bos_token, theirs.chat_template) == ("<|end|>", "<|start|>", template)
    messages = [{"role": "user", "content": "the year"}]
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == [1, *theirs("the year").input_ids, 0]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no context": (
        {"llama.context_length": None},
        "expected the metadata entry llama.context_length, found none",
    ),
    "no eos": (
        {"tokenizer.ggml.eos_token_id": None},
        "expected the metadata entry tokenizer.ggml.eos_token_id",
    ),
    "eos out of range": ({"tokenizer.ggml.eos_token_id": 9999}, "expected tokenizer.ggml.eos_token_id below"),
    "a number as text": (
        {"llama.block_count": "1"},
        "expected llama.block_count to be of kind int, found '1'",
    ),
    "experts": ({"llama.expert_count": 8}, "unsupported entry llama.expert_count = 8"),
    "another scaling": ({"llama.rope.scaling.type": "longrope"}, "unsupported rope.scaling.type 'longrope'"),
    "two widths": ({"llama.rope.dimension_count": 4}, "one width of queries, values and rotation"),
    "more layers than tensors": ({"llama.block_count": 2}, "missing tensors: blk.1.attn_norm.weight"),
    "fewer layers than tensors": ({"llama.block_count": 0}, "unknown tensors: blk.0."),
    "unknown splitting": (
        {"tokenizer.ggml.pre": "tekken"},
        "unsupported pre-tokenizer 'tekken'.*--tokenizer FILE",
    ),
    "no splitting": ({"tokenizer.ggml.pre": None}, "unsupported pre-tokenizer 'default'"),
    "unknown tokenizer": ({"tokenizer.ggml.model": "t5"}, "unsupported tokenizer 't5'.*--tokenizer FILE"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["a bcdefgh"]}, "expected merges of two tokens"),
    "types missing": ({"tokenizer.ggml.token_type": [1]}, "expected distinct tokens and a type of each"),
    "rewritten text": (
        sentencepiece(**{"tokenizer.ggml.remove_extra_whitespaces": True}),
        "rewrites text first.*--tokenizer FILE",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_we_do_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    entries, message = MISTAKES[case]
    a_file(tmp_path / "a.gguf", entries)
    with pytest.raises(InputError, match=message) as raised:
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert "a.gguf" in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_models_own_tokenizer_stands_in_where_we_cannot_rebuild_it(tmp_path: Path) -> None:
    a_file(tmp_path / "a.gguf", {"tokenizer.ggml.pre": "tekken"})
    own = tmp_path / "tokenizer.json"
    own.write_text('{"of": "its own"}')
    for given in (own, tmp_path):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out", tokenizer=given)
        assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "its own"}'
    with pytest.raises(InputError, match="nowhere: cannot be read"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "b", tokenizer=tmp_path / "nowhere")


def test_another_architecture_is_refused_before_anything_else(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "mamba", {}, {})
    with pytest.raises(
        InputError, match="unsupported architecture 'mamba'; supported: llama, qwen2, gpt2, gptneox"
    ):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_a_quantisation_without_a_way_back_names_the_tensor(tmp_path: Path) -> None:
    model = their_model("Llama", LLAMA)
    tensors = as_llama_cpp("llama", model.state_dict(), model.config)
    tensors["blk.1.ffn_up.weight"] = torch.zeros(64, 40, dtype=torch.uint8)
    metadata, kinds = SMOL | shape_of("llama", model.config), {"blk.1.ffn_up.weight": Kind.Q8_1}
    write_gguf(tmp_path / "a.gguf", "llama", metadata, tensors, kinds)
    with pytest.raises(InputError, match=r"a.gguf: tensor blk.1.ffn_up.weight has the type Q8_1, which"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 12, 100, 3000, -1000])
def test_a_truncated_file_says_so(keep: int, tmp_path: Path) -> None:
    whole = a_file(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:keep])
    message = (
        "starts with b'GGUF', found" if 0 <= keep < 4 else "broken GGUF file, perhaps an unfinished download"
    )
    with pytest.raises(InputError, match=message):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(InputError, match=r"a.gguf: expected a GGUF file, .* found b'PK"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(InputError, match="b.gguf: cannot be read: No such file"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "out")


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_file(tmp_path / "a.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'minirlhf\[data\]'"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
