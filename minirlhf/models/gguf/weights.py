"""What llama.cpp calls a model's parts, and what the model's own directory calls them.

One table per architecture. llama.cpp's converter (`convert_hf_to_gguf.py`) changed the layout of some,
and each change is undone here, by name: llama's queries and keys (its rotation pairs neighbours), GPT-2's
transposes, GPT-NeoX's fused projection.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from minirlhf.models.gguf.file import GGUFFile
from minirlhf.models.tensor_files import listing
from minirlhf.runs import InputError

ROTARY_DIVISORS = "rope_freqs.weight"  # no weight: read with the configuration
Layout = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""(a tensor as llama.cpp keeps it, config.json) -> the tensor as the model's own directory keeps it."""


class Architecture(NamedTuple):
    """How llama.cpp keeps one family.

    outside, block: llama.cpp's name -> ours; block names follow `blk.3.` there and `prefix.3.` here.
    prefix: of the blocks.
    layouts: our name (of a block: without prefix and number) -> how its layout is undone.
    head: our name of the unembedding, where the file has one.
    """

    outside: Mapping[str, str]
    block: Mapping[str, str]
    prefix: str
    layouts: Mapping[str, Layout]
    head: str


def architecture_of(file: GGUFFile) -> Architecture:
    """The family of a file.

    Raises:
        InputError: it is none that we read, or has none.
    """
    name = file.value("general.architecture", str)
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: unsupported architecture {name!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def names_of(file: GGUFFile, *, layers: int) -> dict[str, tuple[str, str]]:
    """llama.cpp's name of every tensor -> (our full name, the name that `layouts` goes by).

    Raises:
        InputError: tensors of the architecture are missing, or there are others.
    """
    architecture = architecture_of(file)
    names = {theirs: (ours, ours) for theirs, ours in architecture.outside.items()}
    for i in range(layers):
        for theirs, ours in architecture.block.items():
            names[f"blk.{i}.{theirs}"] = (f"{architecture.prefix}{i}.{ours}", ours)
    missing = [name for name in names if name not in file.shapes]
    if "output.weight" in file.shapes:
        names["output.weight"] = (architecture.head, architecture.head)
    unknown = [name for name in file.shapes if name not in names and name != ROTARY_DIVISORS]
    if missing or unknown:
        kind, some = ("missing", missing) if missing else ("unknown", unknown)
        raise InputError(f"{file.path}: {kind} tensors: {listing(some)}")
    return names


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs (2i, 2i+1), as llama.cpp wants them, back to (i, i + Dh/2). weight: [H·Dh, ...]."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _queries(weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return _halves(weight, config["num_attention_heads"])


def _keys(weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return _halves(weight, config["num_key_value_heads"])


def _transposed(weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return weight.T


def _per_head(weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """All queries, all keys, all values -> head by head. weight: [3·H·Dh, ...]."""
    return weight.unflatten(0, (3, config["num_attention_heads"], -1)).transpose(0, 1).flatten(0, 2)


def _both(table: Mapping[str, str]) -> dict[str, str]:
    """The same names for weight and bias."""
    return {f"{a}.{part}": f"{b}.{part}" for a, b in table.items() for part in ("weight", "bias")}


_LLAMA_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LLAMA_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_QWEN2_BIASES = {f"attn_{letter}.bias": f"self_attn.{letter}_proj.bias" for letter in ("q", "k", "v")}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPTNEOX_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}

ARCHITECTURES = {
    "llama": Architecture(
        outside=_LLAMA_OUTSIDE,
        block=_LLAMA_BLOCK,
        prefix="model.layers.",
        layouts={"self_attn.q_proj.weight": _queries, "self_attn.k_proj.weight": _keys},
        head="lm_head.weight",
    ),
    "qwen2": Architecture(
        outside=_LLAMA_OUTSIDE,
        block=_LLAMA_BLOCK | _QWEN2_BIASES,
        prefix="model.layers.",
        layouts={},
        head="lm_head.weight",
    ),
    "gpt2": Architecture(
        outside={
            "token_embd.weight": "transformer.wte.weight",
            "position_embd.weight": "transformer.wpe.weight",
            **_both({"output_norm": "transformer.ln_f"}),
        },
        block=_both(_GPT2_BLOCK),
        prefix="transformer.h.",
        layouts={
            f"{name}.weight": _transposed for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
        head="lm_head.weight",
    ),
    "gptneox": Architecture(
        outside={
            "token_embd.weight": "gpt_neox.embed_in.weight",
            **_both({"output_norm": "gpt_neox.final_layer_norm"}),
        },
        block=_both(_GPTNEOX_BLOCK),
        prefix="gpt_neox.layers.",
        layouts={f"attention.query_key_value.{part}": _per_head for part in ("weight", "bias")},
        head="embed_out.weight",
    ),
}
