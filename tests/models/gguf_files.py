"""Tiny GGUF files, written as llama.cpp's converter writes them, for the tests of reading them.

The changes of layout are those of `convert_hf_to_gguf.py` (ggml-org/llama.cpp, commit b647b7c), in its words:
they are what our reading has to undo, so nothing of ours is used here.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from gguf.quants import quantize
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
F32 = gguf.GGMLQuantizationType.F32
TEXT = [
    "The year 2024 has 366 days, 12 months and 52 weeks; 1000 hours are 3600000 seconds.",
    "12345678 12345678 12345678 12345678",
    "I'm sure they'll say it's what we've got, and we'd agree: you're right, aren't you?",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n        pass\n",
    "über straße naïve café 日本語 текст 漢字  two  spaces   three",
]


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A file with these entries and tensors.

    kinds: the quantisation of some tensors, F32 for the others. A tensor of uint8 is quantised already.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, F32)
        values = tensor.contiguous().numpy()
        writer.add_tensor(name, values if values.dtype == "uint8" else quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(
    *, pre: str, tail: bool = False, size: int = 500, padding: int = 0, **entries: Any
) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose merges cross every boundary, so that the splitting decides.

    tail: the special tokens come last (Qwen2), not first (SmolLM2). padding: rows without a token.
    """
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=6
    )
    raw.train_from_iterator(TEXT * 3, trainer)
    vocabulary = raw.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special, added = ["<|end|>", "<|start|>"], ["<think>"]
    extra = special + added
    kinds = [CONTROL] * 2 + [USER_DEFINED]
    pads = [f"[PAD{i}]" for i in range(padding)]
    merges = [" ".join(merge) for merge in json.loads(raw.to_str())["model"]["merges"]]
    first = len(tokens) if tail else 0
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": (tokens + extra if tail else extra + tokens) + pads,
        "tokenizer.ggml.token_type": (
            ([NORMAL] * len(tokens) + kinds) if tail else (kinds + [NORMAL] * len(tokens))
        )
        + [UNUSED] * padding,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": first,
        "tokenizer.ggml.bos_token_id": first + 1,
        **entries,
    }


def sentencepiece(**entries: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE as Llama 2 has it: three named tokens, 256 bytes, pieces by score."""
    pieces = ["▁t", "he", "▁the", "in", "▁a", "er", "▁in", "ing", "▁▁", "an", "nd", "and", "▁and", "12", "▁1"]
    letters = sorted(set("".join(TEXT)) - {" ", "\n"} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) + len(letters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **entries,
    }


def permute(weights: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute: the halves that rotate together become neighbours."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def regroup(qkv: Tensor, heads: int) -> Tensor:
    """GPTNeoXModel.modify_tensors: from head by head to all queries, all keys, all values."""
    parts = qkv.reshape(heads, 3, qkv.shape[0] // heads // 3, *qkv.shape[1:])
    return torch.cat([parts[:, i].reshape(-1, *qkv.shape[1:]) for i in range(3)])


_NAMES = {
    "llama": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "gptneox": {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "embed_out": "output",
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
}
_NAMES["qwen2"] = _NAMES["llama"]
_BLOCKS = ("model.layers.", "transformer.h.", "gpt_neox.layers.")


def as_llama_cpp(architecture: str, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of a transformers model under llama.cpp's names, in its layout."""
    tensors = {}
    for name, tensor in state.items():
        for block in _BLOCKS:
            name = name.replace(block, "blk.") if name.startswith(block) else name
        start, number, rest = (*name.split(".", 2), "", "")[:3]
        stem, _, part = (rest if start == "blk" else name).rpartition(".")
        theirs = f"{_NAMES[architecture][stem]}.{part}"
        if architecture == "llama" and theirs == "attn_q.weight":
            tensor = permute(tensor, config.num_attention_heads)
        if architecture == "llama" and theirs == "attn_k.weight":
            tensor = permute(tensor, config.num_key_value_heads)
        if architecture == "gptneox" and theirs.startswith("attn_qkv"):
            tensor = regroup(tensor, config.num_attention_heads)
        if architecture == "gpt2" and stem.split(".")[0] in ("attn", "mlp") and part == "weight":
            tensor = tensor.T
        tensors[f"blk.{number}.{theirs}" if start == "blk" else theirs] = tensor
    return tensors


def shape_of(architecture: str, config: Any) -> dict[str, Any]:
    """The metadata that describe a transformers config."""
    entries: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        entries |= {"feed_forward_length": config.n_inner, "attention.layer_norm_epsilon": 1e-5}
    elif architecture == "gptneox":
        width = config.hidden_size // config.num_attention_heads
        entries |= {
            "feed_forward_length": config.intermediate_size,
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": int(config.rope_parameters["partial_rotary_factor"] * width),
            "use_parallel_residual": config.use_parallel_residual,
        }
    else:
        entries |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": 50000.0,
        }
    return {f"{architecture}.{name}": value for name, value in entries.items()}


SMOL = byte_level(pre="smollm")
SIZE = len(SMOL["tokenizer.ggml.tokens"])
LLAMA = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
}


def their_model(name: str, entries: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**entries)
    kind = {"Llama": "LlamaForCausalLM", "Qwen2": "Qwen2ForCausalLM"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def a_file(path: Path, entries: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A small llama of random weights; entries, changes: of its metadata, None takes one away."""
    model = their_model("Llama", LLAMA | {"tie_word_embeddings": True, "num_hidden_layers": 1})
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    metadata = SMOL | shape_of("llama", model.config) | (entries or {}) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, "llama", metadata, as_llama_cpp("llama", state, model.config))
