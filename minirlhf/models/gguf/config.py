"""The metadata of a GGUF file -> config.json: one function per architecture.

What a file states and we do not know how to honour is refused; nothing is guessed.
"""

import math
from typing import Any

import torch

from minirlhf.models.gguf.file import GGUFFile, shortest
from minirlhf.models.gguf.weights import ROTARY_DIVISORS
from minirlhf.runs import InputError


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The entries of config.json, without the ids of special tokens.

    Raises:
        InputError: an entry is missing, or the file states something that we do not know how to honour.
    """
    name = file.value("general.architecture", str)
    if name not in _CONFIGS:
        raise InputError(f"{file.path}: unsupported architecture {name!r}; supported: {', '.join(_CONFIGS)}")
    config = _CONFIGS[name](file)
    known = {*_READ, *_WITHOUT_EFFECT}
    unknown = [
        key
        for key in file.metadata
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in known
    ]
    if unknown:
        key = unknown[0]
        raise InputError(
            f"{file.path}: unsupported entry {key} = {file.metadata[key]!r:.60}; nothing is guessed"
        )
    return config


_READ = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scale_linear", "use_parallel_residual"),
)
# What these say is in the tensors or concerns llama.cpp only.
_WITHOUT_EFFECT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


def _key(file: GGUFFile, name: str) -> str:
    return f"{file.metadata['general.architecture']}.{name}"


def _int(file: GGUFFile, name: str) -> int:
    return file.value(_key(file, name), int)


def _float(file: GGUFFile, name: str) -> float:
    return file.value(_key(file, name), float)


def _has(file: GGUFFile, name: str) -> bool:
    return _key(file, name) in file.metadata


def _vocabulary(file: GGUFFile) -> int:
    """Rows of the embedding: what `vocab_size` states may be missing, or count the tokens only."""
    if "token_embd.weight" not in file.shapes:
        raise InputError(f"{file.path}: expected the tensor token_embd.weight, found none")
    return file.shapes["token_embd.weight"][0]


def _rotary_decoder(file: GGUFFile) -> dict[str, Any]:
    """What llama and qwen2 share."""
    heads = _int(file, "attention.head_count")
    width = _int(file, "embedding_length")
    head_width = _int(file, "attention.key_length") if _has(file, "attention.key_length") else width // heads
    rotated = _int(file, "rope.dimension_count") if _has(file, "rope.dimension_count") else head_width
    values = _int(file, "attention.value_length") if _has(file, "attention.value_length") else head_width
    if not head_width == rotated == values:
        raise InputError(
            f"{file.path}: expected one width of queries, values and rotation, found {head_width}, {values} "
            f"and {rotated}"
        )
    grouped = _has(file, "attention.head_count_kv")
    return {
        "vocab_size": _vocabulary(file),
        "hidden_size": width,
        "intermediate_size": _int(file, "feed_forward_length"),
        "num_hidden_layers": _int(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _int(file, "attention.head_count_kv") if grouped else heads,
        "head_dim": head_width,
        "max_position_embeddings": _int(file, "context_length"),
        "rms_norm_eps": _float(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(file, "rope.freq_base") if _has(file, "rope.freq_base") else 10000.0,
        "rope_scaling": _rotary_scaling(file, head_width),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }


def _llama(file: GGUFFile) -> dict[str, Any]:
    """Llama, Mistral and SmolLM2 are one architecture; a stated sliding window makes it Mistral."""
    config = _rotary_decoder(file)
    if _has(file, "attention.sliding_window"):
        window = {"sliding_window": _int(file, "attention.sliding_window")}
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **config, **window}
    biases = {"attention_bias": False, "mlp_bias": False}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config, **biases}


def _qwen2(file: GGUFFile) -> dict[str, Any]:
    config = _rotary_decoder(file)
    if _has(file, "attention.sliding_window"):
        raise InputError(f"{file.path}: unsupported entry qwen2.attention.sliding_window")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **config,
        "use_sliding_window": False,
    }


def _gpt2(file: GGUFFile) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": _vocabulary(file),
        "n_positions": _int(file, "context_length"),
        "n_embd": _int(file, "embedding_length"),
        "n_layer": _int(file, "block_count"),
        "n_head": _int(file, "attention.head_count"),
        "n_inner": _int(file, "feed_forward_length"),
        "layer_norm_epsilon": _float(file, "attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


def _gptneox(file: GGUFFile) -> dict[str, Any]:
    heads, width = _int(file, "attention.head_count"), _int(file, "embedding_length")
    scaling = _rotary_scaling(file, width // heads)
    if scaling is not None:
        raise InputError(f"{file.path}: unsupported rotary scaling {scaling} of a gptneox model")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": _vocabulary(file),
        "hidden_size": width,
        "intermediate_size": _int(file, "feed_forward_length"),
        "num_hidden_layers": _int(file, "block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": _int(file, "context_length"),
        "layer_norm_eps": _float(file, "attention.layer_norm_epsilon"),
        "rotary_pct": _int(file, "rope.dimension_count") * heads / width,
        "rotary_emb_base": _float(file, "rope.freq_base") if _has(file, "rope.freq_base") else 10000.0,
        "use_parallel_residual": file.value("gptneox.use_parallel_residual", bool),
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }


def _rotary_scaling(file: GGUFFile, head_width: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json: stated in the metadata, or (Llama 3) as a tensor of divisors."""
    if ROTARY_DIVISORS in file.shapes:
        return _llama3_scaling(file, head_width)
    if _has(file, "rope.scale_linear"):  # what the first files said
        factor = _float(file, "rope.scale_linear")
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    kind = file.value(_key(file, "rope.scaling.type"), str) if _has(file, "rope.scaling.type") else "none"
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _float(file, "rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": _float(file, "rope.scaling.factor"),
            "original_max_position_embeddings": _int(file, "rope.scaling.original_context_length"),
        }
    raise InputError(f"{file.path}: unsupported rope.scaling.type {kind!r}; supported: none, linear, yarn")


def _llama3_scaling(file: GGUFFile, head_width: int) -> dict[str, Any]:
    """Llama 3.1 and later: llama.cpp keeps only the resulting divisors of the frequencies.

    The largest of them is the factor; the other three numbers are the same in every such model that was
    published. So they are tried, and must give exactly the divisors that the file holds.
    """
    divisors = file.tensor(ROTARY_DIVISORS).double()
    base = _float(file, "rope.freq_base") if _has(file, "rope.freq_base") else 10000.0
    low, high, trained, factor = 1.0, 4.0, 8192, shortest(float(divisors.max()))
    wavelength = 2 * math.pi * base ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{file.path}: rope_freqs.weight is not the scaling of Llama 3 (low {low}, high {high}, trained "
            f"on {trained} positions, factor {factor}); this scaling is not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


_CONFIGS = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "gptneox": _gptneox}
