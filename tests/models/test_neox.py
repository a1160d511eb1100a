"""GPT-NeoX by itself: what its options do, fresh weights, config entries, the files that are published.

Parity with transformers and what holds for every family (causality, cache, transforms) are parametrised over
tests/models/cases.py elsewhere.
"""

import cmath
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import neox
from minirlhf.models.checkpoint import load_language_model, save_language_model
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.runs import InputError
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import ragged

CONFIG = neox.GPTNeoXConfig(
    vocab_size=61, max_position_embeddings=24, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, eos_token_id=7,
)  # fmt: skip


def tiny(**changes: Any) -> tuple[LanguageModel, Params]:
    """A bound model and fp64 parameters of which none is 0 or 1."""
    model = neox.bind(replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(0)
    params = model.init(generator)
    return model, tree_map(lambda x: (x + 0.2 * torch.randn(x.shape, generator=generator)).double(), params)


def test_fresh_weights_have_the_stated_deviation_and_everything_else_starts_neutral() -> None:
    config = replace(CONFIG, vocab_size=500, hidden_size=120, intermediate_size=300, initializer_range=0.05)
    params = neox.bind(config).init(torch.Generator().manual_seed(0))
    layer = params["layers"][1]
    linears = [*layer["attention"].values(), *layer["mlp"].values()]
    for weight in [each["weight"] for each in (params["embed_in"], params["embed_out"], *linears)]:
        assert weight.std().item() == pytest.approx(0.05, rel=0.03)
        assert abs(weight.mean().item()) < 5 * 0.05 / weight.numel() ** 0.5
    assert all(not linear["bias"].any() for linear in linears)
    for norm in (layer["input_layernorm"], layer["post_attention_layernorm"], params["final_layer_norm"]):
        assert torch.equal(norm["weight"], torch.ones(120)) and not norm["bias"].any()
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(params))
    assert not torch.equal(params["layers"][0]["mlp"]["dense_4h_to_h"]["weight"], linears[3]["weight"])


def test_the_first_token_is_not_turned_and_every_later_one_is() -> None:
    model, params = tiny()
    other = neox.bind(replace(CONFIG, rotary_emb_base=50.0, rotary_pct=1.0))
    tokens, _ = ragged()
    moved = (model.hidden(params, tokens) - other.hidden(params, tokens)).abs().amax(-1)
    assert not moved[:, 0].any() and bool((moved[:, 1:] > 1e-6).all())


def test_scores_depend_on_the_distance_of_two_tokens_and_not_on_where_they_stand() -> None:
    model, params = tiny(num_hidden_layers=1, rotary_pct=1.0)
    tokens, keys = torch.tensor([[5, 9, 9, 3, 9, 5]]), []
    for start in (0, 6):
        cache = new_cache(model, params, 1, 12)
        extend_(model, params, tokens, torch.tensor([start]), cache)
        keys.append(cache.keys[0][0, :, start : start + 6])  # [H, T, Dh]
    assert (keys[0] - keys[1]).abs().max() > 0.1
    products = [each @ each.transpose(-1, -2) for each in keys]
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("part", "turned"), [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_only_the_front_part_of_a_head_is_turned(part: float, turned: int) -> None:
    model, params = tiny(rotary_pct=part, num_hidden_layers=1)
    cache = new_cache(model, params, 1, 6)
    extend_(model, params, torch.full((1, 6), 9), torch.tensor([0]), cache)
    keys = cache.keys[0][0]  # [H, T, Dh]; the same token at every place
    still = (keys - keys[:, :1]).abs().amax(dim=(0, 1)) < 1e-12
    assert still.tolist() == [False] * turned + [True] * (8 - turned)
    torch.testing.assert_close(keys.norm(dim=-1), keys[:, :1].norm(dim=-1).expand(3, 6), rtol=0, atol=1e-12)


def test_a_pair_turns_by_its_angle() -> None:
    """Su et al. 2021, Eq. 34: entries i and i + R/2 turn by position · base^(-2i/R), here for R = 4."""
    model, params = tiny(rotary_pct=0.5, rotary_emb_base=100.0, num_hidden_layers=1)
    cache = new_cache(model, params, 1, 6)
    extend_(model, params, torch.full((1, 6), 9), torch.tensor([0]), cache)
    keys = cache.keys[0][0, 1]  # [T, Dh] of head 1
    for i, rate in ((0, 1.0), (1, 0.1)):  # 100^0, 100^(-1/2)
        start = torch.complex(keys[0, i], keys[0, i + 2])
        for position in range(6):
            turn = cmath.exp(1j * rate * position)
            got = torch.complex(keys[position, i], keys[position, i + 2])
            torch.testing.assert_close(got, start * turn, rtol=0, atol=1e-12)


def test_angles_far_into_the_context_keep_their_precision_where_the_parameters_are_half() -> None:
    model, params = tiny(num_hidden_layers=1, max_position_embeddings=2048)
    half, keys = tree_map(lambda x: x.bfloat16(), params), []
    for each in (half, tree_map(lambda x: x.double(), half)):
        cache = new_cache(model, each, 1, 1003)
        extend_(model, each, torch.tensor([[9, 5]]), torch.tensor([1001]), cache)
        keys.append(cache.keys[0][0, :, 1001:].double())
    assert (keys[0] - keys[1]).abs().max() < 0.02 * keys[1].abs().max()  # 1001 in bf16 is 1000: 1 rad away


def test_the_two_residual_forms_differ_by_what_the_feed_forward_reads() -> None:
    parallel, params = tiny()
    sequential = neox.bind(replace(CONFIG, use_parallel_residual=False))
    tokens, _ = ragged()
    assert (parallel.hidden(params, tokens) - sequential.hidden(params, tokens)).abs().max() > 0.01
    for layer in params["layers"]:  # attention that adds nothing: the same state either way
        layer["attention"]["dense"] = tree_map(torch.zeros_like, layer["attention"]["dense"])
    torch.testing.assert_close(
        parallel.hidden(params, tokens), sequential.hidden(params, tokens), rtol=0, atol=1e-12
    )


def test_without_attention_bias_the_states_are_those_of_zero_biases() -> None:
    plain, params = tiny(attention_bias=False)
    assert [set(each) for each in params["layers"][0]["attention"].values()] == [{"weight"}, {"weight"}]
    assert set(params["layers"][0]["mlp"]["dense_h_to_4h"]) == {"weight", "bias"}
    biased = neox.bind(CONFIG)
    zeros = tree_map(lambda x: x, params)
    for layer in zeros["layers"]:
        for linear in layer["attention"].values():
            linear["bias"] = torch.zeros(len(linear["weight"])).double()
    tokens, _ = ragged()
    assert torch.equal(plain.hidden(params, tokens), biased.hidden(zeros, tokens))


def test_the_head_is_its_own_or_the_embedding_and_the_model_says_which() -> None:
    own, params = tiny()
    assert own.head == "embed_out" and own.unembedding(params) is params["embed_out"]["weight"]
    tied, params = tiny(tie_word_embeddings=True)
    assert tied.head is None and tied.unembedding(params) is params["embed_in"]["weight"]
    assert "embed_out" not in params


# EleutherAI/pythia-70m, as published.
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
    "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip


def test_the_published_config_of_pythia_is_understood() -> None:
    config = neox.from_huggingface(PYTHIA)
    assert config == neox.GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    assert config.n_positions == 2048


def test_a_published_file_with_its_buffers_loads(tmp_path: Path) -> None:
    model, params = neox.bind(CONFIG), neox.bind(CONFIG).init(torch.Generator().manual_seed(0))
    save_language_model(tmp_path / "out", model, params, tokenizer=None)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert "embed_out.weight" in tensors and "gpt_neox.embed_in.weight" in tensors
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{name}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, file)
    _, reread = load_language_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(reread), tree_leaves(params), strict=True))
    save_file(tensors | {"gpt_neox.layers.0.attention.gate.bias": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"unknown tensors: layers\.0\.attention\.gate\.bias"):
        load_language_model(tmp_path / "out")


def test_a_tied_file_with_another_head_is_refused(tmp_path: Path) -> None:
    model = neox.bind(replace(CONFIG, tie_word_embeddings=True))
    save_language_model(tmp_path / "out", model, model.init(torch.Generator().manual_seed(0)), tokenizer=None)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert "embed_out.weight" not in tensors
    save_file(tensors | {"embed_out.weight": tensors["gpt_neox.embed_in.weight"] + 1}, file)
    with pytest.raises(InputError, match=r"embed_out\.weight differs from embed_in\.weight"):
        load_language_model(tmp_path / "out")


def test_config_entries_survive_the_way_out_and_back() -> None:
    config = neox.GPTNeoXConfig(
        vocab_size=11, max_position_embeddings=9, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=20, rotary_pct=0.5, rotary_emb_base=77.0, hidden_act="relu", layer_norm_eps=1e-6,
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, initializer_range=0.1,
        eos_token_id=4, bos_token_id=None,
    )  # fmt: skip
    entries = json.loads(json.dumps(neox.to_huggingface(config)))
    assert neox.from_huggingface(entries) == config
    assert entries["model_type"] == "gpt_neox"
    # transformers 4 reads the first two, transformers 5 the third.
    assert (entries["rotary_pct"], entries["rotary_emb_base"]) == (0.5, 77.0)
    assert entries["rope_parameters"] == {
        "rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 77.0
    }  # fmt: skip
    assert entries["attention_dropout"] == entries["hidden_dropout"] == 0.0


def test_rotary_entries_are_read_under_old_and_new_names_and_have_transformers_defaults() -> None:
    def rotary(**entries: object) -> tuple[float, float]:
        config = neox.from_huggingface(entries)
        return config.rotary_pct, config.rotary_emb_base

    assert rotary() == (0.25, 10000.0)
    assert rotary(rotary_pct=0.5, rotary_emb_base=77) == (0.5, 77)
    assert rotary(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 55.0}) == (
        0.25,
        55,
    )
    new = {"partial_rotary_factor": 1.0, "rope_theta": 66.0}
    assert rotary(rotary_pct=0.5, rotary_emb_base=77, rope_parameters=new) == (1.0, 66.0)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "hidden_size must be a multiple of num_attention_heads",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer or token id, got 0"),
        ({"intermediate_size": None}, "intermediate_size must be a positive integer or token id, got None"),
        ({"eos_token_id": None}, "eos_token_id must be a positive integer or token id, got None"),
        ({"eos_token_id": -1}, "eos_token_id must be a positive integer or token id, got -1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive number, got 0.0"),
        ({"rotary_emb_base": float("nan")}, "rotary_emb_base must be a positive number, got nan"),
        ({"use_parallel_residual": "no"}, "use_parallel_residual must be true or false, got 'no'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rotary_pct": 0.26, "hidden_size": 768}, "even number of a head's entries, got 3 of 12"),
        ({"rotary_pct": 0.01}, "rotary_pct must turn an even number of a head's entries, got 0 of 96"),
        ({"rotary_pct": 1.5}, "rotary_pct must turn an even number of a head's entries, got 144 of 96"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
    ],
)
def test_an_impossible_entry_is_named(entries: dict[str, object], text: str) -> None:
    with pytest.raises(InputError) as error:
        neox.from_huggingface(entries)
    assert text in str(error.value)


def test_token_id_zero_ends_a_response_where_the_config_says_so() -> None:
    assert neox.bind(neox.from_huggingface(PYTHIA)).stop_ids == (0,)
