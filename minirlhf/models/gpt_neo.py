"""GPT-Neo from scratch: pure functions of (params, config).

Black et al. 2021, "GPT-Neo" (doi:10.5281/zenodo.5297715). As GPT-2, but every other layer looks back over a
window only, scores are not divided by √Dh (the initialisation took that over) and always fp32, and queries,
keys and values have no bias. Names and [out, in] weights are the checkpoint's. Logits, greedy continuations
and directories agree with transformers' GPTNeoForCausalLM. No dropout: the same tokens give the same states.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import products
from minirlhf.kernels.activations import gelu_tanh
from minirlhf.models.interface import Attend, CacheShape, LanguageModel, Params, RunBlock, directly
from minirlhf.runs import InputError


@dataclass(frozen=True)
class GPTNeoConfig:
    """Shape of a GPT-Neo, under the names of its `config.json`; the defaults are those of transformers.

    max_position_embeddings: the longest sequence, prompt and response together, in tokens.
    attention_layers: "global" or "local" for each of the num_layers.
    window_size: tokens that a local layer sees, the current one included.
    intermediate_size: width of the feed-forward layer; None means 4 hidden_size.
    initializer_range: σ of fresh weights. eos_token_id: ends a response. bos_token_id: only handed on.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 16
    attention_layers: tuple[str, ...] = ("global", "local") * 12
    window_size: int = 256
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int = 50256
    bos_token_id: int | None = 50256
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, vars(self)[field.name]
            if name == "intermediate_size" and value is None:
                continue
            is_int = field.type is int or name == "intermediate_size"
            if is_int and not (type(value) is int and value >= (name != "eos_token_id")):
                raise InputError(f"{name} must be a positive integer or token id, got {value!r}")
            if field.type is float and not (type(value) in (int, float) and 0 < value < float("inf")):
                raise InputError(f"{name} must be a positive number, got {value!r}")
        width, heads, layers = self.hidden_size, self.num_heads, self.attention_layers
        if width % heads:
            raise InputError(f"hidden_size must be a multiple of num_heads, got {width} and {heads}")
        for index, kind in enumerate(layers):
            if kind not in ("global", "local"):
                option = f"attention_layers[{index}] = {kind!r}"
                raise InputError(f"unsupported option {option}; gpt_neo supports 'global' or 'local'")
        if len(layers) != self.num_layers:
            raise InputError(f"attention_layers must name {self.num_layers} (num_layers), got {len(layers)}")

    @property
    def n_positions(self) -> int:
        return self.max_position_embeddings


def init_params(generator: torch.Generator, *, config: GPTNeoConfig) -> Params:
    """Fresh fp32 parameters as transformers draws them: weights N(0, σ²), biases 0, norms 1."""
    width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size

    def weight(*shape: int) -> Params:
        return {"weight": torch.randn(*shape, generator=generator) * config.initializer_range}

    def biased(fan_in: int, fan_out: int) -> Params:
        return weight(fan_out, fan_in) | {"bias": torch.zeros(fan_out)}

    def norm() -> Params:
        return {"weight": torch.ones(width), "bias": torch.zeros(width)}

    def block() -> Params:
        q_k_v = {name: weight(width, width) for name in ("q_proj", "k_proj", "v_proj")}
        return {
            "ln_1": norm(),
            "attn": {"attention": q_k_v | {"out_proj": biased(width, width)}},
            "ln_2": norm(),
            "mlp": {"c_fc": biased(width, inner), "c_proj": biased(inner, width)},
        }

    return {
        "wte": weight(config.vocab_size, width),
        "wpe": weight(config.max_position_embeddings, width),
        "h": [block() for _ in range(config.num_layers)],
        "ln_f": norm(),
    }


def _linear(params: Params, x: Tensor) -> Tensor:
    return products.linear(x, params["weight"], params.get("bias"))


def _norm(params: Params, x: Tensor, config: GPTNeoConfig) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params["weight"], params["bias"], config.layer_norm_epsilon)


def _heads(params: Params, x: Tensor, config: GPTNeoConfig) -> tuple[Tensor, Tensor, Tensor]:
    def split(name: str) -> Tensor:  # [B, T, D] -> [B, H, T, Dh]
        return _linear(params[name], x).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)

    return split("q_proj"), split("k_proj"), split("v_proj")


def _add(block: Params, x: Tensor, attended: Tensor, config: GPTNeoConfig) -> Tensor:
    """The residual stream after attention [B, H, T, Dh] and feed-forward."""
    merged = attended.to(x.dtype).transpose(1, 2).flatten(2)
    x = x + _linear(block["attn"]["attention"]["out_proj"], merged)
    inner = gelu_tanh(_linear(block["mlp"]["c_fc"], _norm(block["ln_2"], x, config)))
    return x + _linear(block["mlp"]["c_proj"], inner)


def _block(
    params: Params, x: Tensor, attend: Attend, layer: int, window: int | None, *, config: GPTNeoConfig
) -> Tensor:
    q, k, v = _heads(params["attn"]["attention"], _norm(params["ln_1"], x, config), config)
    # Scores are not scaled: they are large, so at least fp32.
    q = q.to(torch.promote_types(x.dtype, torch.float32))
    return _add(params, x, attend(layer, q, k, v, scale=1.0, window=window), config)


def states(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    config: GPTNeoConfig,
    run: RunBlock = directly,
) -> Tensor:
    """States after each token, final norm applied: tokens [B, T] at positions [T] or [B, T] -> [B, T, D].

    Nothing here knows whether the tokens before are part of this call or lie in a cache: `attend` does.
    """
    x = F.embedding(tokens, params["wte"]["weight"]) + F.embedding(positions, params["wpe"]["weight"])
    windows, of_config = {"global": None, "local": config.window_size}, partial(_block, config=config)
    for layer, (block, kind) in enumerate(zip(params["h"], config.attention_layers, strict=True)):
        x = run(of_config, block, x, attend, layer, windows[kind])
    return _norm(params["ln_f"], x, config)


def unembedding(params: Params) -> Tensor:
    """[V, D]: GPT-Neo ties it to the token embedding."""
    return params["wte"]["weight"]


def bind(config: GPTNeoConfig) -> LanguageModel:
    """The functions of this page, bound to one config."""
    return LanguageModel(
        config=config,
        init=partial(init_params, config=config),
        states=partial(states, config=config),
        unembedding=unembedding,
        cache=CacheShape(config.num_layers, config.num_heads, config.hidden_size // config.num_heads),
        stop_ids=(config.eos_token_id,),
    )


# What this page computes, for the options of `config.json` that would change it. gelu_pytorch_tanh is
# another name of gelu_new. Dropout probabilities are accepted and not applied.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
}


def from_huggingface(entries: Mapping[str, Any]) -> GPTNeoConfig:
    """The config that a GPT-Neo `config.json` describes; absent entries have transformers' defaults.

    The kinds of layers are read from `attention_layers`, else from `attention_types` with its repetitions.
    Entries that change nothing here (dropout, `use_cache`, ...) are passed over. What this page does not
    compute, or an impossible size, is an InputError.

    >>> from_huggingface({"num_layers": 2, "attention_types": [[["local"], 2]]}).attention_layers
    ('local', 'local')
    """
    for option, supported in _SUPPORTED.items():
        if (value := entries.get(option, supported[0])) not in supported:
            names = " or ".join(repr(each) for each in supported)
            raise InputError(f"unsupported option {option} = {value!r}; gpt_neo supports {names}")
    known = {field.name: entries[field.name] for field in fields(GPTNeoConfig) if field.name in entries}
    types = entries.get("attention_types") or [[["global", "local"], 12]]
    try:
        expanded = [kind for kinds, times in types for _ in range(times) for kind in kinds]
        known["attention_layers"] = tuple(entries.get("attention_layers") or expanded)
    except (TypeError, ValueError) as error:
        stated = {name: entries[name] for name in ("attention_types", "attention_layers") if name in entries}
        raise InputError(f"expected lists of [kinds, times] and of kinds, got {stated}") from error
    return GPTNeoConfig(**known)


def to_huggingface(config: GPTNeoConfig) -> dict[str, Any]:
    """The entries of `config.json`, with dropout 0 since the parameters were trained without."""
    options = {option: supported[0] for option, supported in _SUPPORTED.items()}
    kinds = list(config.attention_layers)
    layers = {"attention_layers": kinds, "attention_types": [[kinds, 1]]}
    dropout = dict.fromkeys(
        ("resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout"), 0.0
    )
    return {"model_type": "gpt_neo"} | asdict(config) | layers | options | dropout
