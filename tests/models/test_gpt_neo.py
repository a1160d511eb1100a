"""GPT-Neo by itself: windows, unscaled scores, fresh weights, config entries, the files that are published.

Parity with transformers and what holds for every family (causality, cache, transforms) are parametrised over
tests/models/cases.py elsewhere.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import gpt_neo
from minirlhf.models.checkpoint import load_language_model, save_language_model
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.runs import InputError
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import ragged

CONFIG = gpt_neo.GPTNeoConfig(
    vocab_size=61, max_position_embeddings=24, hidden_size=24, num_layers=2, num_heads=3,
    attention_layers=("global", "local"), window_size=5, eos_token_id=7, bos_token_id=7,
)  # fmt: skip


def tiny(*kinds: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[LanguageModel, Params]:
    """A bound model with layers of these kinds, and parameters of which none is 0 or 1."""
    layers = {"attention_layers": kinds, "num_layers": len(kinds)} if kinds else {}
    model = gpt_neo.bind(replace(CONFIG, **layers, **changes))
    generator = torch.Generator().manual_seed(0)
    params = model.init(generator)
    return model, tree_map(lambda x: (x + 0.2 * torch.randn(x.shape, generator=generator)).to(dtype), params)


def cached(model: LanguageModel, params: Params, tokens: Tensor, *, take: int) -> Tensor:
    """The states of whole rows, read in chunks through a cache."""
    cache = new_cache(model, params, *tokens.shape)
    chunks = []
    for start in range(0, tokens.shape[1], take):
        at = torch.full((len(tokens),), start)
        chunks.append(extend_(model, params, tokens[:, start : start + take], at, cache))
    return torch.cat(chunks, dim=1)


def reach(model: LanguageModel, params: Params, tokens: Tensor, *, take: int | None) -> list[int]:
    """For every token, how many states a change of it moves, itself included; cached in chunks of `take`."""

    def states(ids: Tensor) -> Tensor:
        return model.hidden(params, ids) if take is None else cached(model, params, ids, take=take)

    base, reached = states(tokens), []
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        moved = (states(changed) - base).abs().amax(dim=(0, 2)) > 1e-9
        reached.append(int(moved.sum()))
        assert moved[t : t + reached[-1]].all(), "the states that move follow the token without a gap"
    return reached


@pytest.mark.parametrize("take", [None, 1, 4, 20], ids=lambda take: f"chunks of {take}" if take else "whole")
@pytest.mark.parametrize(
    ("kinds", "window", "far"),
    [
        (("local",), 5, 5),
        (("local",), 1, 1),
        (("local", "local"), 4, 7),  # two windows in a row reach 2 · 3 back
        (("local", "global"), 3, 20),
        (("global",), 3, 20),
    ],
)
def test_a_local_layer_sees_exactly_its_window_and_a_global_one_everything(
    kinds: tuple[str, ...], window: int, far: int, take: int | None
) -> None:
    model, params = tiny(*kinds, window_size=window)
    tokens = ragged(longest=20)[0][:2]
    assert reach(model, params, tokens, take=take) == [min(far, 20 - t) for t in range(20)]


def test_rows_of_unequal_length_each_have_their_own_window_in_the_cache() -> None:
    model, params = tiny("local", "global", window_size=3)
    tokens, _ = ragged()
    expected = model.hidden(params, tokens)
    cache = new_cache(model, params, *tokens.shape)
    lengths = torch.tensor([13, 4, 9, 1, 2])
    extend_(model, params, tokens[:, :13], torch.zeros(5, dtype=torch.int64), cache)
    for step in range(4):
        at = lengths + step
        got = extend_(model, params, tokens.gather(1, at[:, None]), at, cache)[:, 0]
        torch.testing.assert_close(got, expected[torch.arange(5), at], rtol=0, atol=1e-10)


def test_scores_are_not_scaled_and_at_least_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, scale: float, **_: bool
    ) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
        assert scale == 1.0
        return scores.softmax(-1) @ v

    tokens, _ = ragged()
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        model, params = tiny(dtype=dtype)
        expected = model.hidden(params, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention)
            got = model.hidden(params, tokens), cached(model, params, tokens, take=5)
        assert set(seen) == {(wide,) * 3} and {each.dtype for each in got} == {dtype}
        for each in got:
            torch.testing.assert_close(each, expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
        seen.clear()


def test_queries_keys_and_values_have_no_bias_and_everything_else_has() -> None:
    _, params = tiny()
    attention, mlp = params["h"][0]["attn"]["attention"], params["h"][0]["mlp"]
    assert {name: set(each) for name, each in attention.items()} == {
        "q_proj": {"weight"}, "k_proj": {"weight"}, "v_proj": {"weight"}, "out_proj": {"weight", "bias"}
    }  # fmt: skip
    assert set(mlp["c_fc"]) == set(mlp["c_proj"]) == {"weight", "bias"}
    assert mlp["c_fc"]["weight"].shape == (96, 24), "[out, in], and four times the width unless stated"
    assert tiny(intermediate_size=10)[1]["h"][0]["mlp"]["c_fc"]["weight"].shape == (10, 24)


def test_fresh_weights_have_the_stated_deviation_and_everything_else_starts_neutral() -> None:
    config = replace(
        CONFIG, vocab_size=500, hidden_size=120, max_position_embeddings=99, initializer_range=0.05
    )
    params = gpt_neo.bind(config).init(torch.Generator().manual_seed(0))
    block = params["h"][1]
    linears = [*block["attn"]["attention"].values(), *block["mlp"].values()]
    for weight in [each["weight"] for each in (params["wte"], params["wpe"], *linears)]:
        assert weight.std().item() == pytest.approx(0.05, rel=0.03)
        assert abs(weight.mean().item()) < 5 * 0.05 / weight.numel() ** 0.5
    assert params["wpe"]["weight"].shape == (99, 120)
    assert all(not linear["bias"].any() for linear in linears if "bias" in linear)
    for norm in (block["ln_1"], block["ln_2"], params["ln_f"]):
        assert torch.equal(norm["weight"], torch.ones(120)) and not norm["bias"].any()
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(params))


# EleutherAI/gpt-neo-125m, as published.
PUBLISHED = {
    "activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"], "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 6, "attention_types": [[["global", "local"], 6]],
    "bos_token_id": 50256, "embed_dropout": 0, "eos_token_id": 50256, "gradient_checkpointing": False,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 12, "num_layers": 12,
    "resid_dropout": 0, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "torch_dtype": "float32", "transformers_version": "4.9.0.dev0", "use_cache": True, "vocab_size": 50257,
    "window_size": 256,
}  # fmt: skip


def test_the_published_config_is_understood() -> None:
    config = gpt_neo.from_huggingface(PUBLISHED)
    assert config == gpt_neo.GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, attention_layers=("global", "local") * 6
    )
    assert config.n_positions == 2048 and config.vocab_size == 50257 and config.window_size == 256


def test_a_published_file_with_its_buffers_and_tied_head_loads(tmp_path: Path) -> None:
    model, params = gpt_neo.bind(CONFIG), gpt_neo.bind(CONFIG).init(torch.Generator().manual_seed(0))
    save_language_model(tmp_path / "out", model, params, tokenizer=None)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.attention"
        tensors[f"{name}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
        tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, file)
    _, reread = load_language_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(reread), tree_leaves(params), strict=True))
    save_file(tensors | {"transformer.h.0.attn.attention.q_proj.bias": torch.ones(24)}, file)
    with pytest.raises(InputError, match=r"unknown tensors: h\.0\.attn\.attention\.q_proj\.bias"):
        load_language_model(tmp_path / "out")


def test_config_entries_survive_the_way_out_and_back() -> None:
    config = gpt_neo.GPTNeoConfig(
        vocab_size=11, max_position_embeddings=9, hidden_size=16, num_layers=3, num_heads=2,
        attention_layers=("local", "global", "global"), window_size=4, layer_norm_epsilon=1e-6,
        initializer_range=0.1, eos_token_id=4, bos_token_id=None, intermediate_size=20,
    )  # fmt: skip
    entries = json.loads(json.dumps(gpt_neo.to_huggingface(config)))
    assert gpt_neo.from_huggingface(entries) == config
    assert entries["attention_types"] == [[["local", "global", "global"], 1]]
    assert entries["attention_layers"] == ["local", "global", "global"]
    assert entries["model_type"] == "gpt_neo" and entries["activation_function"] == "gelu_new"
    assert entries["resid_dropout"] == entries["attention_dropout"] == entries["embed_dropout"] == 0.0


@pytest.mark.parametrize(
    ("entries", "kinds"),
    [
        ({}, "gl" * 12),
        ({"num_layers": 4, "attention_types": [[["global", "local"], 2]]}, "glgl"),
        ({"num_layers": 5, "attention_types": [[["local"], 2], [["global", "local", "local"], 1]]}, "llgll"),
        ({"num_layers": 2, "attention_layers": ["local", "global"]}, "lg"),
        ({"num_layers": 2, "attention_layers": ["local", "global"], "attention_types": None}, "lg"),
    ],
)
def test_the_kinds_of_layers_are_read_with_their_repetitions(entries: dict[str, Any], kinds: str) -> None:
    expected = tuple({"g": "global", "l": "local"}[kind] for kind in kinds)
    assert gpt_neo.from_huggingface(entries).attention_layers == expected


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size must be a multiple of num_heads, got 30 and 4"),
        ({"num_layers": 12}, "attention_layers must name 12 (num_layers), got 24"),
        ({"num_layers": 0}, "num_layers must be a positive integer or token id, got 0"),
        ({"window_size": 0}, "window_size must be a positive integer or token id, got 0"),
        ({"window_size": None}, "window_size must be a positive integer or token id, got None"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive integer or token id, got 0"),
        ({"eos_token_id": -1}, "eos_token_id must be a positive integer or token id, got -1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive number, got 0.0"),
        ({"initializer_range": float("inf")}, "initializer_range must be a positive number, got inf"),
        (
            {"attention_types": ["global"]},
            "expected lists of [kinds, times] and of kinds, got {'attention_types': ['global']}",
        ),
        (
            {"attention_layers": 3},
            "expected lists of [kinds, times] and of kinds, got {'attention_layers': 3}",
        ),
    ],
)
def test_an_impossible_entry_is_named(entries: dict[str, object], text: str) -> None:
    with pytest.raises(InputError) as error:
        gpt_neo.from_huggingface(entries)
    assert str(error.value) == text


def test_token_id_zero_ends_a_response_where_the_config_says_so() -> None:
    assert gpt_neo.bind(gpt_neo.from_huggingface({"eos_token_id": 0})).stop_ids == (0,)
