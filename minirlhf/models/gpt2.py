"""GPT-2 from scratch: pure functions of (params, config).

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The parameters keep the
checkpoint's names and its [in, out] weights, so loading transposes nothing. Logits, greedy continuations and
directories agree with transformers' GPT2LMHeadModel. No dropout: the same tokens give the same states.
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
from minirlhf.models.embedding import embedded
from minirlhf.models.interface import Attend, CacheShape, LanguageModel, Params, RunBlock, directly
from minirlhf.models.lean import LinearOf, linear_of, made_once
from minirlhf.runs import InputError


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2, under the names of its `config.json`.

    n_positions: the longest sequence, prompt and response together, in tokens.
    n_inner: width of the feed-forward layer; None means 4 n_embd.
    initializer_range: σ of fresh weights.
    eos_token_id: the token that ends a response.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int = 50256
    n_inner: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if not (_is_int(value) and value > 0 or name == "n_inner" and value is None):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value < float("inf")):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not (_is_int(self.eos_token_id) and self.eos_token_id >= 0):
            raise ValueError(f"eos_token_id must be one token id, got {self.eos_token_id!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


def init_params(generator: torch.Generator, *, config: GPT2Config) -> Params:
    """Fresh fp32 parameters by the GPT-2 recipe: weights N(0, σ²), biases 0, norms 1.

    The 2 n_layer projections that add to the residual stream have σ / √(2 n_layer) instead (Radford et al.
    2019, section 2.3), so that the stream's variance does not grow with depth.
    """
    width, inner, std = config.n_embd, config.n_inner or 4 * config.n_embd, config.initializer_range
    residual_std = std / (2 * config.n_layer) ** 0.5

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def linear(fan_in: int, fan_out: int, scale: float = std) -> Params:
        return {"weight": normal(fan_in, fan_out, scale=scale), "bias": torch.zeros(fan_out)}

    def norm() -> Params:
        return {"weight": torch.ones(width), "bias": torch.zeros(width)}

    def block() -> Params:
        return {
            "ln_1": norm(),
            "attn": {"c_attn": linear(width, 3 * width), "c_proj": linear(width, width, residual_std)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(width, inner), "c_proj": linear(inner, width, residual_std)},
        }

    return {
        "wte": {"weight": normal(config.vocab_size, width, scale=std)},
        "wpe": {"weight": normal(config.n_positions, width, scale=std)},
        "h": [block() for _ in range(config.n_layer)],
        "ln_f": norm(),
    }


def _linear(params: Params, x: Tensor) -> Tensor:
    weight = params["weight"]
    return products.addmm(params["bias"], x.reshape(-1, weight.shape[0]), weight).view(*x.shape[:-1], -1)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def _linear_of_norm(norm: Params, linear: Params, x: Tensor, config: GPT2Config, of: LinearOf) -> Tensor:
    make = partial(_normed, epsilon=config.layer_norm_epsilon)
    return of(make, (x, norm["weight"], norm["bias"]), linear["weight"], linear["bias"])


def _heads(block: Params, x: Tensor, config: GPT2Config, of: LinearOf) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = x.shape
    qkv = _linear_of_norm(block["ln_1"], block["attn"]["c_attn"], x, config, of)
    qkv = qkv.view(batch, time, 3, config.n_head, width // config.n_head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, Dh]
    return q, k, v


def _merge(params: Params, attended: Tensor) -> Tensor:
    batch, heads, time, head_width = attended.shape
    return _linear(params["c_proj"], attended.transpose(1, 2).reshape(batch, time, heads * head_width))


def _mlp(block: Params, x: Tensor, config: GPT2Config, of: LinearOf) -> Tensor:
    inner, out = _linear_of_norm(block["ln_2"], block["mlp"]["c_fc"], x, config, of), block["mlp"]["c_proj"]
    return of(gelu_tanh, (inner,), out["weight"], out["bias"])


def _block(
    params: Params, x: Tensor, attend: Attend, layer: int, *, config: GPT2Config, of: LinearOf
) -> Tensor:
    q, k, v = _heads(params, x, config, of)
    x = x + _merge(params["attn"], attend(layer, q, k, v, scale=None, window=None))
    return x + _mlp(params, x, config, of)


def states(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    config: GPT2Config,
    run: RunBlock = directly,
) -> Tensor:
    """States after each token, final norm applied: tokens [B, T] at positions [T] or [B, T] -> [B, T, D].

    Nothing here knows whether the tokens before are part of this call or lie in a cache: `attend` does.
    """
    # A scalar head takes the unembedding's place: then the table's gradient is the embedding's alone.
    embed = F.embedding if "score" in params else embedded
    x = embed(tokens, params["wte"]["weight"]) + F.embedding(positions, params["wpe"]["weight"])
    of_config = partial(_block, config=config, of=linear_of if run is directly else made_once)
    for layer, block in enumerate(params["h"]):
        x = run(of_config, block, x, attend, layer)
    return _normed(x, params["ln_f"]["weight"], params["ln_f"]["bias"], epsilon=config.layer_norm_epsilon)


def unembedding(params: Params) -> Tensor:
    """[V, D]: GPT-2 ties it to the token embedding."""
    return params["wte"]["weight"]


def bind(config: GPT2Config) -> LanguageModel:
    """The functions of this page, bound to one config."""
    return LanguageModel(
        config=config,
        init=partial(init_params, config=config),
        states=partial(states, config=config),
        unembedding=unembedding,
        cache=CacheShape(config.n_layer, config.n_head, config.n_embd // config.n_head),
        stop_ids=(config.eos_token_id,),
    )


# What this page computes, for the options of `config.json` that would change it. gelu_pytorch_tanh is
# another name of gelu_new. Dropout probabilities are accepted and not applied.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def from_huggingface(entries: Mapping[str, Any]) -> GPT2Config:
    """The config that a GPT-2 `config.json` describes; absent entries have the values of GPT-2 small.

    Entries that change nothing here (dropout, `use_cache`, `summary_*`, ...) are passed over.

    Raises:
        InputError: an option asks for what this page does not compute, or a size is impossible.

    >>> from_huggingface({"n_embd": 64, "n_head": 4, "n_ctx": 32, "resid_pdrop": 0.1}).n_positions
    32
    """
    for option, supported in _SUPPORTED.items():
        value = entries.get(option, supported[0])
        if value not in supported:
            names = " or ".join(repr(each) for each in supported)
            raise InputError(f"unsupported option {option} = {value!r}; gpt2 supports {names}")
    known = {field.name: entries[field.name] for field in fields(GPT2Config) if field.name in entries}
    if "n_ctx" in entries:  # the old name, which transformers ignores beside the new one
        known.setdefault("n_positions", entries["n_ctx"])
    try:
        return GPT2Config(**known)
    except ValueError as error:
        raise InputError(str(error)) from error


def to_huggingface(config: GPT2Config) -> dict[str, Any]:
    """The entries of `config.json`, with dropout 0 since the parameters were trained without."""
    options = {option: supported[0] for option, supported in _SUPPORTED.items()}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    names = {"model_type": "gpt2", "n_ctx": config.n_positions, "bos_token_id": config.eos_token_id}
    return names | asdict(config) | options | dropout


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)
