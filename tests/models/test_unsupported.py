"""What no page computes is refused by name, for every family, before any weights are looked at.

The directories of these tests hold a config.json and nothing else: whoever looked for weights first would
report a missing file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minirlhf.models.checkpoint import load_language_model, load_scalar_model
from minirlhf.models.families import FAMILIES
from minirlhf.runs import InputError

families = pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gpt_neox", "gpt_neo"])
loads = pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
Load = Callable[[Path], object]


def architecture(family: str, kind: str) -> str:
    """transformers' class of this family for another use, as LlamaForTokenClassification."""
    return FAMILIES[family].scalar_class.removesuffix("ForSequenceClassification") + kind


def refusal(load: Load, directory: Path, family: str, **entries: object) -> str:
    """The one line that a directory with nothing but this config.json gives, less the name of the file."""
    config = directory / "config.json"
    config.write_text(json.dumps({"model_type": family, "eos_token_id": 7} | entries))
    with pytest.raises(InputError) as error:
        load(directory)
    text = str(error.value)
    assert "\n" not in text and text.startswith((f"{config}: ", f"{directory}: "))
    return text.removeprefix(f"{config}: ").removeprefix(f"{directory}: ")


class Option(NamedTuple):
    """Entries of config.json that ask for something, and how the refusal calls it."""

    family: str
    entries: dict[str, Any]
    named: str
    supported: str


def _option(family: str, name: str, value: object, supported: str) -> Option:
    return Option(family, {name: value}, f"{name} = {value!r}", f"{family} supports {supported}")


def _stretched(family: str, key: str, kind: str, supported: str) -> Option:
    return Option(family, {"rope_scaling": {key: kind, "factor": 2.0}}, f"rope_type = {kind!r}", supported)


ACTIVATIONS = "'gelu' or 'gelu_new' or 'gelu_fast' or 'relu'"
ROPE_TYPES = "supported: default, linear, dynamic, llama3, yarn"
OPTIONS = [
    _option("gpt2", "activation_function", "relu", "'gelu_new' or 'gelu_pytorch_tanh'"),
    _option("gpt2", "scale_attn_by_inverse_layer_idx", True, "False"),
    _option("gpt2", "add_cross_attention", True, "False"),
    _option("gpt2", "tie_word_embeddings", False, "True"),
    _option("llama", "hidden_act", "gelu", "'silu' or 'swish'"),
    _option("llama", "pretraining_tp", 2, "1"),
    _stretched("llama", "type", "longrope", ROPE_TYPES),
    _option("mistral", "hidden_act", "relu", "'silu' or 'swish'"),
    _stretched("mistral", "rope_type", "longrope", ROPE_TYPES),
    _option("qwen2", "hidden_act", "gelu_new", "'silu' or 'swish'"),
    _option("qwen2", "use_mrope", True, "False"),
    _stretched("qwen2", "type", "mrope", ROPE_TYPES),
    _option("gpt_neox", "hidden_act", "silu", ACTIVATIONS),
    _stretched("gpt_neox", "type", "linear", "gpt_neox supports 'default'"),
    _stretched("gpt_neox", "rope_type", "yarn", "gpt_neox supports 'default'"),
    _option("gpt_neo", "activation_function", "gelu", "'gelu_new' or 'gelu_pytorch_tanh'"),
    _option("gpt_neo", "tie_word_embeddings", False, "True"),
    Option(
        "gpt_neo",
        {"num_layers": 2, "attention_types": [[["global", "sparse"], 1]]},
        "attention_layers[1] = 'sparse'",
        "gpt_neo supports 'global' or 'local'",
    ),
]


def test_every_family_is_tested_here() -> None:
    assert {option.family for option in OPTIONS} == set(FAMILIES)


@families
@loads
def test_a_config_that_asks_for_nothing_unsupported_gets_as_far_as_the_missing_weights(
    load: Load, family: str, tmp_path: Path
) -> None:
    assert refusal(load, tmp_path, family) == "has no model.safetensors"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.family}-{option.named}")
@loads
def test_an_unsupported_option_is_named_with_its_value_and_what_is_supported_before_weights_are_read(
    load: Load, option: Option, tmp_path: Path
) -> None:
    text = refusal(load, tmp_path, option.family, **option.entries)
    assert text == f"unsupported option {option.named}; {option.supported}"


@families
@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForQuestionAnswering"])
def test_a_model_for_another_use_is_named_before_weights_are_read(
    family: str, kind: str, tmp_path: Path
) -> None:
    other = architecture(family, kind)
    language, reward = FAMILIES[family].language_classes, FAMILIES[family].scalar_class
    assert refusal(load_language_model, tmp_path, family, architectures=[other]) == (
        f"expected a language model ({' or '.join(language)}), found something else ({other})"
    )
    assert refusal(load_scalar_model, tmp_path, family, architectures=[other]) == (
        f"expected a reward model ({reward}), found something else ({other})"
    )


@families
def test_a_reward_model_is_no_policy_and_the_other_way_round_before_weights_are_read(
    family: str, tmp_path: Path
) -> None:
    language, reward = FAMILIES[family].language_classes[0], FAMILIES[family].scalar_class
    text = refusal(load_language_model, tmp_path, family, architectures=[reward])
    assert text.endswith(f"found a reward model ({reward})")
    text = refusal(load_scalar_model, tmp_path, family, architectures=[language])
    assert text.endswith(f"found a language model ({language})")


@families
@loads
def test_quantised_weights_are_refused_by_name(load: Load, family: str, tmp_path: Path) -> None:
    text = refusal(load, tmp_path, family, quantization_config={"quant_method": "gptq", "bits": 4})
    assert text == (
        "unsupported option quantization_config = {'quant_method': 'gptq', 'bits': 4}; supported: weights in "
        "floating point, as transformers' dequantize and save_pretrained write them"
    )


@loads
@pytest.mark.parametrize("family", ["mamba", "gpt_neox_japanese", "Llama", "", None])
def test_an_unknown_model_type_is_named_with_those_that_are_supported(
    load: Load, family: Any, tmp_path: Path
) -> None:
    assert refusal(load, tmp_path, family) == (
        f"unsupported model_type {family!r}; supported: gpt2, llama, mistral, qwen2, gpt_neox, gpt_neo"
    )


@families
@pytest.mark.parametrize("value", [0, -1, 2.5, "64", None, True])
def test_an_impossible_size_is_named_before_weights_are_read(
    family: str, value: object, tmp_path: Path
) -> None:
    text = refusal(load_language_model, tmp_path, family, vocab_size=value)
    assert text.startswith("vocab_size must be a positive integer") and text.endswith(f"got {value!r}")
