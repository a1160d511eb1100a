"""The tiny configurations of every family that the checks run on: one plain list, to which a family appends.

All have 61 ids, EOS 7 and a context of 24, so that the batches of tests/models/tiny.py fit each of them.
"""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from minirlhf.models.families import FAMILIES
from minirlhf.models.interface import LanguageModel, Params


class Case(NamedTuple):
    """One tiny configuration of one family.

    family: the model_type.
    name: what is special about it.
    theirs: the config class in transformers.
    entries: of its config.json; every one that is left out has transformers' default.
    language_class, scalar_class: the model classes in transformers.
    """

    family: str
    name: str
    theirs: str
    entries: dict[str, Any]
    language_class: str
    scalar_class: str

    @property
    def label(self) -> str:
        """How tests call it."""
        return f"{self.family}: {self.name}"


def tiny_model(
    case: Case, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Params]:
    """Our model of a case, with parameters of which none is 0 or 1."""
    family = FAMILIES[case.family]
    model = family.bind(family.from_huggingface({"model_type": case.family} | case.entries))
    generator = torch.Generator().manual_seed(seed)
    params = model.init(generator)
    return model, tree_map(lambda x: (x + 0.2 * torch.randn(x.shape, generator=generator)).to(dtype), params)


# What all tiny models have, under the names of the newer families.
IDS = {"vocab_size": 61, "bos_token_id": 3, "eos_token_id": 7}
SIZES = IDS | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}


def _gpt2(name: str, **entries: Any) -> Case:
    sizes = IDS | {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
    return Case(
        "gpt2", name, "GPT2Config", sizes | entries, "GPT2LMHeadModel", "GPT2ForSequenceClassification"
    )


CASES: list[Case] = [
    _gpt2("plain"),
    _gpt2("narrow feed-forward, other epsilon", n_inner=10, layer_norm_epsilon=1e-3),
]

# --- llama, mistral, qwen2 (minirlhf/models/llama.py) -------------------------------------------------------


def _llama(family: str, name: str, **entries: Any) -> Case:
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    return Case(
        family,
        name,
        f"{kind}Config",
        SIZES | entries,
        f"{kind}ForCausalLM",
        f"{kind}ForSequenceClassification",
    )


# With 8 dimensions a head and these numbers, each stretching has pairs of every kind: kept, blended, slowed.
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}
CASES += [
    _llama("llama", "Llama 2: keys for every head, untied"),
    _llama(
        "llama", "Llama 3: grouped, stretched", num_key_value_heads=2, head_dim=8, rope_theta=1000.0,
        rope_scaling=_LLAMA3 | {"original_max_position_embeddings": 64},
    ),
    _llama(
        "llama", "SmolLM2: 3 heads on 1, tied", num_attention_heads=3, num_key_value_heads=1,
        rope_theta=100_000.0, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    _llama("llama", "biases everywhere", num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    _llama("llama", "linear stretching", rope_scaling={"type": "linear", "factor": 2.5}),
    _llama("llama", "dynamic stretching", rope_scaling={"type": "dynamic", "factor": 4.0}),
    _llama("llama", "yarn", head_dim=8, rope_parameters=_YARN | {"rope_theta": 500.0}),
    _llama("mistral", "window of 5, wider heads", num_key_value_heads=2, head_dim=10, sliding_window=5),
    _llama("mistral", "no window, deep", num_key_value_heads=2, sliding_window=None, num_hidden_layers=4),
    _llama("qwen2", "biases, tied", num_key_value_heads=2, tie_word_embeddings=True),
    _llama(
        "qwen2", "window of 5 in the upper layers", num_key_value_heads=2, num_hidden_layers=3,
        use_sliding_window=True, sliding_window=5, max_window_layers=1,
    ),
    _llama(
        "qwen2", "window of 4 in the middle, yarn", num_key_value_heads=4, num_hidden_layers=3,
        use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_scaling=_YARN | {"truncate": False, "beta_fast": 8.0, "mscale": 2.0, "mscale_all_dim": 0.5},
    ),
]  # fmt: skip

# --- gpt_neox (minirlhf/models/neox.py), gpt_neo (minirlhf/models/gpt_neo.py) -------------------------------


def _gpt_neox(name: str, turned: float = 0.25, **entries: Any) -> Case:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": turned}
    return Case(
        "gpt_neox",
        name,
        "GPTNeoXConfig",
        SIZES | {"num_attention_heads": 3, "rope_parameters": rope} | entries,
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
    )


def _gpt_neo(name: str, layers: list[Any], **entries: Any) -> Case:
    sizes = IDS | {"hidden_size": 24, "num_heads": 3, "max_position_embeddings": 24, "window_size": 5}
    sizes |= {"num_layers": sum(len(kinds) * times for kinds, times in layers), "attention_types": layers}
    return Case(
        "gpt_neo",
        name,
        "GPTNeoConfig",
        sizes | entries,
        "GPTNeoForCausalLM",
        "GPTNeoForSequenceClassification",
    )


CASES += [
    _gpt_neox("Pythia: a quarter turned, parallel residual, own head"),
    _gpt_neox("all of a head turned, four heads", 1.0, num_attention_heads=4),
    _gpt_neox("half turned, another base", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=77.0),
    _gpt_neox("sequential residual", use_parallel_residual=False),
    _gpt_neox("no attention bias, gelu_new", attention_bias=False, hidden_act="gelu_new"),
    _gpt_neox("tied head, relu", tie_word_embeddings=True, hidden_act="relu"),
    _gpt_neox(
        "one head, one layer, gelu_fast", num_attention_heads=1, num_hidden_layers=1, hidden_act="gelu_fast"
    ),
    _gpt_neox(
        "deep, sequential, other epsilon",
        use_parallel_residual=False,
        num_hidden_layers=5,
        layer_norm_eps=1e-3,
    ),
    _gpt_neo("alternating, a window of 5", [[["global", "local"], 2]]),
    _gpt_neo("all global", [[["global"], 2]]),
    _gpt_neo("all local, a window of 2", [[["local"], 3]], window_size=2),
    _gpt_neo("local first, then two global", [[["local"], 1], [["global"], 2]]),
    _gpt_neo("window of 1", [[["local", "global"], 1]], window_size=1),
    _gpt_neo("window longer than the context", [[["global", "local"], 1]], window_size=256),
    _gpt_neo(
        "intermediate_size, other epsilon",
        [[["global", "local"], 1]],
        intermediate_size=10,
        layer_norm_epsilon=1e-3,
    ),
]
