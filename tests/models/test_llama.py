"""Llama's page: positions and their stretchings, windows, grouped queries, half precision, config entries."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import llama
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.llama_config import LlamaConfig, RopeParameters, from_huggingface, to_huggingface
from minirlhf.runs import InputError
from tests.models import parity
from tests.models.tiny import ragged

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "eos_token_id": 7,
}


def tiny(seed: int = 0, **entries: Any) -> tuple[LanguageModel, Params]:
    model = llama.bind(from_huggingface(TINY | entries))
    generator = torch.Generator().manual_seed(seed)
    params = model.init(generator)
    return model, tree_map(lambda x: (x + 0.2 * torch.randn(x.shape, generator=generator)).double(), params)


# --- positions ----------------------------------------------------------------------------------------------


def test_unstretched_positions_turn_by_powers_of_theta() -> None:
    got = llama.frequencies(RopeParameters(rope_theta=500.0), 8, device=torch.device("cpu"))
    assert got.tolist() == pytest.approx([500.0 ** (-2 * i / 8) for i in range(4)], rel=1e-6)


def test_llama3_keeps_fast_pairs_slows_the_slow_ones_and_blends_between() -> None:
    # wavelengths 2π θ^(i/4); within 64 tokens they turn 10.2, 1.8, 0.32, 0.06 times
    rope = RopeParameters(
        rope_theta=1024.0, rope_type="llama3", factor=8.0, original_max_position_embeddings=64
    )
    got = llama.frequencies(rope, 8, device=torch.device("cpu")).tolist()
    plain = [1024.0 ** (-i / 4) for i in range(4)]
    kept = (64 * plain[1] / (2 * math.pi) - 1) / (4 - 1)
    blended = kept * plain[1] + (1 - kept) * plain[1] / 8
    assert got == pytest.approx([plain[0], blended, plain[2] / 8, plain[3] / 8], rel=1e-6)


# What checkpoints say: Llama 3.1 and 3.2, LongChat, Qwen2.5 at 128k, a yarn with every option.
PUBLISHED: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10_000.0},
    "Llama 3.1": {
        "rope_theta": 500_000.0,
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama3 without the original context": {
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0
        },
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    },
    "yarn without the original context": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "yarn with every option": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 5000.0, "factor": 40.0, "beta_fast": 20.0, "beta_slow": 2.0,
            "original_max_position_embeddings": 1000, "truncate": False, "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    },
    "yarn with its own attention factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.5, "attention_factor": 1.25}
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entries", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_frequencies_and_attention_factors_of_published_configs_equal_theirs(entries: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install 'minirlhf[test]')")
    parity.transformers()
    from transformers.models.llama.configuration_llama import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    entries = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 4096} | entries
    right: Any = LlamaRotaryEmbedding(TheirConfig(**deepcopy(entries)))  # it fills in nested entries
    config = from_huggingface({"model_type": "llama"} | entries)
    got = llama.frequencies(config.rope_parameters, 128, device=torch.device("cpu"))
    torch.testing.assert_close(got, right.inv_freq, rtol=2e-7, atol=0)
    assert config.rope_parameters.attention_factor == pytest.approx(right.attention_scaling, rel=1e-12)


def test_old_and_new_keys_of_the_same_positions_give_the_same_config() -> None:
    scaling = {"factor": 2.5}
    old = TINY | {"rope_theta": 77.0, "rope_scaling": scaling | {"type": "linear"}}
    new = TINY | {"rope_theta": 77.0, "rope_scaling": scaling | {"rope_type": "linear"}}
    newest = TINY | {"rope_parameters": scaling | {"rope_type": "linear", "rope_theta": 77.0}}
    assert from_huggingface(old) == from_huggingface(new) == from_huggingface(newest)
    assert from_huggingface(old).rope_parameters == RopeParameters(77.0, "linear", 2.5)
    both = from_huggingface(new | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}})
    assert both == from_huggingface(old), "as in transformers, rope_scaling comes first"


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_window_of_w_reaches_w_minus_1_tokens_back_per_layer(kind: str) -> None:
    entries: dict[str, Any] = {"model_type": kind, "sliding_window": 4, "bos_token_id": 3}
    if kind == "qwen2":
        entries |= {"use_sliding_window": True, "max_window_layers": 0}
    model, params = tiny(num_hidden_layers=2, **entries)
    tokens, _ = ragged(rows=2, longest=16)
    base = model.hidden(params, tokens)
    for t in range(8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        moved = ((model.hidden(params, changed) - base).abs().amax(dim=(0, 2)) > 0).nonzero().flatten()
        assert moved.tolist() == list(range(t, t + 2 * 3 + 1))


def test_only_the_sliding_layers_of_a_mixed_model_forget() -> None:
    entries = {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1
    }  # fmt: skip
    model, params = tiny(**entries)
    assert model.config.layer_types == ("full_attention", "sliding_attention")
    assert to_huggingface(model.config)["max_window_layers"] == 1  # what transformers before 4.53 reads
    tokens, _ = ragged(rows=1, longest=16)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    assert ((model.hidden(params, changed) - model.hidden(params, tokens)).abs().amax(dim=(0, 2)) > 0).all()


def test_a_window_of_the_context_is_no_window() -> None:
    wide, params = tiny(model_type="mistral", sliding_window=24)
    none, _ = tiny(model_type="mistral", sliding_window=None)
    tokens, _ = ragged(longest=24)
    assert torch.equal(wide.hidden(params, tokens), none.hidden(params, tokens))


def test_grouped_queries_are_all_heads_with_the_keys_of_their_group() -> None:
    grouped, params = tiny(num_key_value_heads=2)
    full, _ = tiny(num_key_value_heads=4)

    def repeated(weight: Tensor) -> Tensor:
        return weight.view(2, 6, 24).repeat_interleave(2, dim=0).reshape(24, 24)

    wide = tree_map(lambda x: x, params)
    for block in wide["layers"]:
        for name in ("k_proj", "v_proj"):
            block["self_attn"][name]["weight"] = repeated(block["self_attn"][name]["weight"])
    tokens, _ = ragged()
    torch.testing.assert_close(grouped.hidden(params, tokens), full.hidden(wide, tokens), rtol=0, atol=1e-12)
    assert (grouped.cache, full.cache) == ((2, 2, 6), (2, 4, 6))  # layers, heads, width


def test_states_too_large_to_square_in_half_precision_are_normalised() -> None:
    model, params = tiny()
    half = tree_map(lambda x: x.half(), params)
    half["embed_tokens"]["weight"] = half["embed_tokens"]["weight"] * 3000  # squares beyond 65504
    tokens, _ = ragged()
    states = model.hidden(half, tokens)
    right = model.hidden(tree_map(lambda x: x.double(), half), tokens)
    assert states.dtype == torch.float16
    torch.testing.assert_close(states.double(), right, rtol=0, atol=0.01 * right.abs().max().item())


def test_fresh_parameters_have_the_std_of_the_config_and_biases_where_the_family_has_them() -> None:
    config = from_huggingface(TINY | {"hidden_size": 128, "vocab_size": 300, "initializer_range": 0.05})
    params = llama.bind(config).init(torch.Generator().manual_seed(0))
    for leaf in tree_leaves(params):
        if leaf.ndim == 2:
            assert leaf.std().item() == pytest.approx(0.05, rel=0.05)
        else:
            assert torch.equal(leaf, torch.ones(128))

    def biased(**entries: Any) -> set[str]:
        model = llama.bind(from_huggingface(TINY | entries))
        block = model.init(torch.Generator().manual_seed(0))["layers"][0]
        linears = block["self_attn"] | block["mlp"]
        assert not any(bool(each["bias"].any()) for each in linears.values() if "bias" in each)
        return {name for name, each in linears.items() if "bias" in each}

    assert biased() == biased(model_type="mistral") == set()
    assert biased(model_type="qwen2") == {"q_proj", "k_proj", "v_proj"}
    assert biased(attention_bias=True) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biased(mlp_bias=True) == {"gate_proj", "up_proj", "down_proj"}


# --- entries of config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_absent_entries_have_the_defaults_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install 'minirlhf[test]')")
    library = parity.transformers()
    name = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}[kind]
    theirs = getattr(library, name)(eos_token_id=2)
    ours = from_huggingface({"model_type": kind, "eos_token_id": 2})
    assert from_huggingface(theirs.to_dict()) == ours
    for entry, value in to_huggingface(ours).items():
        if entry not in ("rope_theta", "rope_scaling", "head_dim", "max_window_layers"):
            assert getattr(theirs, entry) == value, entry
    assert ours.head_dim == 128 and ours.rope_parameters == RopeParameters()


def test_a_published_config_reads_as_it_should() -> None:
    smol = {  # HuggingFaceTB/SmolLM2-135M-Instruct
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True,
        "vocab_size": 49152,
    }  # fmt: skip
    assert from_huggingface(smol) == LlamaConfig(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        sliding_window=None, layer_types=("full_attention",) * 30, bos_token_id=1, eos_token_id=2,
        rope_parameters=RopeParameters(rope_theta=100_000), rms_norm_eps=1e-5, initializer_range=1 / 24,
        tie_word_embeddings=True,
    )  # fmt: skip


def test_a_window_that_is_switched_off_is_none() -> None:
    off = from_huggingface(TINY | {"model_type": "qwen2", "sliding_window": 4, "max_window_layers": 0})
    assert off.sliding_window is None and set(off.layer_types) == {"full_attention"}
    assert to_huggingface(off)["use_sliding_window"] is False
    llama_with_one = from_huggingface(TINY | {"sliding_window": 4})
    assert llama_with_one.sliding_window is None and "sliding_window" not in to_huggingface(llama_with_one)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "unsupported option hidden_act = 'gelu'; llama supports 'silu' or 'swish'"),
    ({"pretraining_tp": 2}, "unsupported option pretraining_tp = 2; llama supports 1"),
    ({"partial_rotary_factor": 0.5}, "unsupported option partial_rotary_factor = 0.5; llama supports 1.0"),
    ({"use_mrope": True}, "unsupported option use_mrope = True; llama supports False"),
    (
        {"quantization_config": {"bits": 4}},
        "unsupported option quantization_config = {'bits': 4}; llama supports its absence",
    ),
    (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        "unsupported option rope_type = 'longrope'; supported: default, linear, dynamic, llama3, yarn",
    ),
    ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor, got {'type': 'linear'}"),
    (
        {"rope_scaling": {"type": "llama3", "factor": 8.0}},
        "rope_type 'llama3' needs low_freq_factor, high_freq_factor, got {'type': 'llama3', 'factor': 8.0}",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope parameters must be one set of values for all layers, "
        "got {'full_attention': {'rope_type': 'default'}}",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "unsupported option partial_rotary_factor = 0.25; supported: 1.0",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "1"}},
        "mscale must be a number of at least 0, got '1'",
    ),
    (
        {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor must exceed low_freq_factor, got 4 and 4",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}},
        "truncate must be true or false, got 1",
    ),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive number, got -1"),
    ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
    ({"rope_scaling": "linear"}, "rope parameters must be one set of values for all layers, got 'linear'"),
    ({"hidden_size": 25}, "hidden_size must be a multiple of num_attention_heads, got 25 and 4"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3",
    ),
    ({"head_dim": 5}, "head_dim must be even, got 5"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
    ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
    ({"intermediate_size": 4.5}, "intermediate_size must be a positive integer, got 4.5"),
    ({"eos_token_id": None}, "eos_token_id must be a token id, got None"),
    ({"eos_token_id": [1, 2]}, "eos_token_id must be a token id, got [1, 2]"),
    ({"bos_token_id": -1}, "bos_token_id must be a token id, got -1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
    ({"initializer_range": float("nan")}, "initializer_range must be a positive number, got nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
        "layer_types must be 2 of full_attention, got ['full_attention'] and sliding_window = None",
    ),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types with sliding_attention need use_sliding_window and a sliding_window, got False and 4096",
    ),
    (
        {"model_type": "qwen2", "layer_types": "full_attention"},
        "layer_types must be a list, got 'full_attention'",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
        "max_window_layers must be an integer, got None",
    ),
]


@pytest.mark.parametrize(("entries", "text"), REFUSED, ids=[text[:50] for _, text in REFUSED])
def test_what_the_page_does_not_compute_is_named_with_what_came_and_what_is_supported(
    entries: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError) as error:
        from_huggingface(TINY | entries)
    assert str(error.value) == text


def test_a_config_built_by_hand_is_checked_too() -> None:
    config = tiny()[0].config
    with pytest.raises(ValueError, match="layer_types must be 2 of full_attention or sliding_attention"):
        replace(config, sliding_window=4, layer_types=("full_attention", "local"))
