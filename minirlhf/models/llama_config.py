"""What a Llama, Mistral or Qwen2 `config.json` says: sizes, rotary positions, windows; and what is refused.

The model itself is models/llama.py. An absent entry has the value that transformers gives that model type.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from minirlhf.runs import InputError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeParameters:
    """How fast the rotary positions turn. The fields after rope_type belong to the ways to stretch a context.

    rope_theta: base of the frequencies.
    original_max_position_embeddings: the context before stretching, in tokens.
    attention_factor: yarn's factor on cosines and sines, so its square is one on the attention scores.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must exceed low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a model, under the names of its `config.json`.

    model_type: llama, mistral, or qwen2, whose q, k and v have biases.
    num_key_value_heads: heads of keys and values, each shared by a group of query heads.
    max_position_embeddings: the longest sequence, prompt and response together, in tokens.
    layer_types: full or sliding, by layer; a sliding one sees `sliding_window` tokens, the query's included.
    initializer_range: σ of fresh weights.
    eos_token_id: the token that ends a response. bos_token_id is only handed on.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None
    layer_types: tuple[str, ...]
    bos_token_id: int | None
    eos_token_id: int
    rope_parameters: RopeParameters
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def n_positions(self) -> int:
        """The context, as every family calls it."""
        return self.max_position_embeddings

    def __post_init__(self) -> None:
        _check(self)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {groups}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        known = {FULL, SLIDING} if self.sliding_window else {FULL}
        if len(self.layer_types) != self.num_hidden_layers or any(k not in known for k in self.layer_types):
            raise ValueError(
                f"layer_types must be {self.num_hidden_layers} of {' or '.join(sorted(known))}, "
                f"got {list(self.layer_types)} and sliding_window = {self.sliding_window}"
            )


def _check(config: LlamaConfig | RopeParameters) -> None:
    """Sizes are positive integers, token ids not negative, other numbers positive, switches true or false."""
    for field in fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0 if name.endswith("token_id") else 1
        if kind == int | None and value is None:
            continue
        if kind in (int, int | None) and not (number and isinstance(value, int) and value >= least):
            raise ValueError(
                f"{name} must be {'a token id' if not least else 'a positive integer'}, got {value!r}"
            )
        if kind is float and not (number and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
# The entries that each model type has, with transformers' defaults; None of a size: it follows from others.
_ENTRIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    | {"sliding_window": 4096},
    "qwen2": _LLAMA
    | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
    | {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
}
# What the page computes, for the options that would change it. swish is another name of silu.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "use_mrope": (False, None),
}


def from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """The config that a llama, mistral or qwen2 `config.json` describes.

    Entries that change nothing here (dropout, `use_cache`, another type's options, ...) are passed over.

    Raises:
        InputError: an option asks for what models/llama.py does not compute, or a value is impossible.

    >>> config = from_huggingface({"model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2})
    >>> config.head_dim, config.layer_types
    (2, ('sliding_attention', 'sliding_attention'))
    """
    kind = entries["model_type"]
    for option, supported in _SUPPORTED.items():
        value = entries.get(option, supported[0])
        if value not in supported:
            names = " or ".join(repr(each) for each in supported if each is not None) or "its absence"
            raise InputError(f"unsupported option {option} = {value!r}; {kind} supports {names}")
    known = {name: entries.get(name, default) for name, default in _ENTRIES[kind].items()}
    try:
        _derive_sizes(known)
        known["layer_types"] = _layer_types(kind, known)
        if SLIDING not in known["layer_types"]:
            known["sliding_window"] = None
        own = {field.name: known[field.name] for field in fields(LlamaConfig) if field.name in known}
        rope = _rope(entries, context=known["max_position_embeddings"])
        return LlamaConfig(model_type=kind, rope_parameters=rope, **own)
    except ValueError as error:
        raise InputError(str(error)) from error


def _derive_sizes(known: dict[str, Any]) -> None:
    """Fills the sizes that follow from others; those must be there and right."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if type(known[name]) is not int or known[name] <= 0:
            raise ValueError(f"{name} must be a positive integer, got {known[name]!r}")
    width, heads = known["hidden_size"], known["num_attention_heads"]
    if known["num_key_value_heads"] is None:
        known["num_key_value_heads"] = heads
    if known["head_dim"] is None:
        if width % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {width} and {heads}"
            )
        known["head_dim"] = width // heads


def _layer_types(kind: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Which layers have a window: in Llama none, in Mistral all if there is one, in Qwen2 those it says."""
    layers, window = known["num_hidden_layers"], known.get("sliding_window")
    if kind != "qwen2":
        return (FULL if window is None else SLIDING,) * layers
    windowed, first = known["use_sliding_window"] and window is not None, known["max_window_layers"]
    if type(first) is not int:
        raise ValueError(f"max_window_layers must be an integer, got {first!r}")
    stated = known["layer_types"]
    if stated is None:
        stated = [SLIDING if windowed and layer >= first else FULL for layer in range(layers)]
    if not isinstance(stated, list):
        raise ValueError(f"layer_types must be a list, got {stated!r}")
    if SLIDING in stated and not windowed:
        raise ValueError(
            f"layer_types with {SLIDING} need use_sliding_window and a sliding_window, "
            f"got {known['use_sliding_window']} and {window}"
        )
    return tuple(stated)


# By rope type: the entries that it needs, and those that have a default.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        ),
    ),
}


def _rope(entries: Mapping[str, Any], *, context: int) -> RopeParameters:
    """`rope_theta` and `rope_scaling` (whose key was once `type`), or transformers 5's `rope_parameters`."""
    given = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise InputError(f"rope parameters must be one set of values for all layers, got {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise InputError(f"unsupported option rope_type = {kind!r}; supported: {', '.join(_ROPE_TYPES)}")
    if (part := given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"unsupported option partial_rotary_factor = {part!r}; supported: 1.0")
    needed, optional = _ROPE_TYPES[kind]
    known = {name: given[name] for name in needed + optional if given.get(name) is not None}
    missing = [name for name in needed if name not in known]
    if missing:
        raise InputError(f"rope_type {kind!r} needs {', '.join(missing)}, got {dict(given)!r}")
    known["rope_theta"] = given.get("rope_theta", entries.get("rope_theta", RopeParameters.rope_theta))
    if "original_max_position_embeddings" in optional:
        known.setdefault("original_max_position_embeddings", context)
    rope = RopeParameters(rope_type=kind, **known)
    if kind == "yarn" and "factor" not in known:
        rope = replace(rope, factor=context / rope.original_max_position_embeddings)
    if kind == "yarn" and "attention_factor" not in known:
        rope = replace(rope, attention_factor=_yarn_attention(rope.factor, given))
    return rope


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    """0.1 ln(factor) + 1 (Peng et al. 2023, arXiv:2309.00071, Eq. 22), or a ratio of two weighted ones."""
    above, below = given.get("mscale"), given.get("mscale_all_dim")
    for name, value in (("mscale", above), ("mscale_all_dim", below)):
        if not (value is None or isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if factor <= 1 or not (above and below):
        return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)


def to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The entries of `config.json`, each one that its model type has.

    Rotary positions under their older names, which every version of transformers reads; dropout 0, since the
    parameters were trained without.
    """
    values, rope = asdict(config), config.rope_parameters
    needed, optional = _ROPE_TYPES[rope.rope_type]
    scaling = {"rope_type": rope.rope_type} | {name: getattr(rope, name) for name in needed + optional}
    values |= {
        "layer_types": list(config.layer_types),
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": (*config.layer_types, SLIDING).index(SLIDING),
    }
    return {
        "model_type": config.model_type,
        **{name: values[name] for name in _ENTRIES[config.model_type]},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
    }
