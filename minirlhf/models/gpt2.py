"""GPT-2 from scratch: pure functions of (params, config).

Radford et al. 2019. The parameters keep the checkpoint's names and its [in, out] weights, so loading
transposes nothing. Must match transformers' GPT2LMHeadModel to rounding (tests/models).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models.interface import Cache, LanguageModel, Params


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2, under the names of its `config.json`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int = 50256

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


def init_params(generator: torch.Generator, *, config: GPT2Config) -> Params:
    """Fresh parameters by the GPT-2 recipe: N(0, σ²), residual projections scaled by 1/√(2 n_layer)."""
    width, std = config.n_embd, config.initializer_range
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
            "mlp": {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width, residual_std)},
        }

    return {
        "wte": {"weight": normal(config.vocab_size, width, scale=std)},
        "wpe": {"weight": normal(config.n_positions, width, scale=std)},
        "h": [block() for _ in range(config.n_layer)],
        "ln_f": norm(),
    }


def _linear(params: Params, x: Tensor) -> Tensor:
    weight = params["weight"]
    return torch.addmm(params["bias"], x.reshape(-1, weight.shape[0]), weight).view(*x.shape[:-1], -1)


def _norm(params: Params, x: Tensor, config: GPT2Config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params["weight"], params["bias"], config.layer_norm_epsilon)


def _heads(params: Params, x: Tensor, config: GPT2Config) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = x.shape
    qkv = _linear(params["c_attn"], x).view(batch, time, 3, config.n_head, width // config.n_head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, Dh]
    return q, k, v


def _merge(params: Params, attended: Tensor) -> Tensor:
    batch, heads, time, head_width = attended.shape
    return _linear(params["c_proj"], attended.transpose(1, 2).reshape(batch, time, heads * head_width))


def _mlp(params: Params, x: Tensor) -> Tensor:
    return _linear(params["c_proj"], F.gelu(_linear(params["c_fc"], x), approximate="tanh"))


def hidden(params: Params, tokens: Tensor, *, config: GPT2Config) -> Tensor:
    """States after each token, final norm applied: tokens [B, T] -> [B, T, D].

    Attention is causal, so right padding reaches no valid position and needs no mask.
    """
    _check_fits(tokens.shape[1], config)
    x = params["wte"]["weight"][tokens] + params["wpe"]["weight"][: tokens.shape[1]]
    for block in params["h"]:
        q, k, v = _heads(block["attn"], _norm(block["ln_1"], x, config), config)
        x = x + _merge(block["attn"], F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + _mlp(block["mlp"], _norm(block["ln_2"], x, config))
    return _norm(params["ln_f"], x, config)


def unembedding(params: Params) -> Tensor:
    """[V, D]: GPT-2 ties it to the token embedding."""
    return params["wte"]["weight"]


def new_cache(params: Params, batch: int, capacity: int, *, config: GPT2Config) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens, in the parameters' dtype and device."""
    _check_fits(capacity, config)
    shape = (batch, config.n_head, capacity, config.n_embd // config.n_head)
    like = params["wte"]["weight"]
    return Cache(
        keys=[like.new_zeros(shape) for _ in range(config.n_layer)],
        values=[like.new_zeros(shape) for _ in range(config.n_layer)],
    )


def extend_(params: Params, tokens: Tensor, start: Tensor, cache: Cache, *, config: GPT2Config) -> Tensor:
    """States of `tokens` [B, T], which continue each row at its own position start[b]: -> [B, T, D].

    Writes keys and values of row b into slots start[b] .. start[b] + T - 1. Token i of row b attends to
    slots 0 .. start[b] + i, so rows of unequal length share a batch without left padding.
    """
    batch, time = tokens.shape
    positions = start[:, None] + torch.arange(time, device=tokens.device)  # [B, T]
    end = int(positions.max()) + 1
    rows = torch.arange(batch, device=tokens.device)[:, None]
    visible = torch.arange(end, device=tokens.device) <= positions[:, None, :, None]  # [B, 1, T, S]
    x = params["wte"]["weight"][tokens] + params["wpe"]["weight"][positions]
    for block, keys, values in zip(params["h"], cache.keys, cache.values, strict=True):
        q, k, v = _heads(block["attn"], _norm(block["ln_1"], x, config), config)
        keys[rows, :, positions] = k.transpose(1, 2)  # [B, T, H, Dh], advanced indices first
        values[rows, :, positions] = v.transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=visible)
        x = x + _merge(block["attn"], attended)
        x = x + _mlp(block["mlp"], _norm(block["ln_2"], x, config))
    return _norm(params["ln_f"], x, config)


def bind(config: GPT2Config) -> LanguageModel:
    """The functions of this page, bound to one config."""
    return LanguageModel(
        config=config,
        init=partial(init_params, config=config),
        hidden=partial(hidden, config=config),
        unembedding=unembedding,
        new_cache=partial(new_cache, config=config),
        extend_=partial(extend_, config=config),
    )


def _check_fits(length: int, config: GPT2Config) -> None:
    if length > config.n_positions:
        raise ValueError(f"sequence of {length} tokens exceeds the context of {config.n_positions}")
