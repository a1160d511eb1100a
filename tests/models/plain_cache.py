"""The plainest cache there is, one row of slots per sequence: what pages and families must equal."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params


class Cache(NamedTuple):
    """keys, values: per layer [B, H, S, Dh]; slots beyond a row's length hold garbage that nothing sees."""

    keys: list[Tensor]
    values: list[Tensor]


def new_cache(model: LanguageModel, params: Params, batch: int, capacity: int) -> Cache:
    """Empty, in the parameters' dtype."""
    layers, heads, width = model.cache
    like = model.unembedding(params)
    keys, values = ([like.new_zeros(batch, heads, capacity, width) for _ in range(layers)] for _ in range(2))
    return Cache(keys, values)


def extend_(model: LanguageModel, params: Params, tokens: Tensor, start: Tensor, cache: Cache) -> Tensor:
    """States of `tokens` [B, T], which continue each row at its own position start[b]: -> [B, T, D]."""
    positions = start[:, None] + torch.arange(tokens.shape[1])
    rows = torch.arange(len(tokens))[:, None]
    slots, now = torch.arange(cache.keys[0].shape[2]), positions[:, None, :, None]

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys[rows, :, positions] = k.transpose(1, 2)  # [B, T, H, Dh], advanced indices first
        values[rows, :, positions] = v.transpose(1, 2)
        visible = (slots <= now) & (slots > now - (window or len(slots)))
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, visible, scale=scale, enable_gqa=True)

    return model.states(params, tokens, positions, attend)
