"""Small GPT-2s with weights that matter everywhere, and ragged batches for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params

CONFIG = gpt2.GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3, eos_token_id=7)


def tiny(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[LanguageModel, Params]:
    """A bound model and parameters of which none is 0 or 1: biases, norms and all weights are drawn."""
    model = gpt2.bind(replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(seed)
    params = model.init(generator)
    noisy = tree_map(lambda x: x + 0.2 * torch.randn(x.shape, generator=generator), params)
    return model, tree_map(lambda x: x.to(dtype), noisy)


def ragged(seed: int = 0, *, rows: int = 5, longest: int = 17, vocab_size: int = 61) -> tuple[Tensor, Tensor]:
    """tokens [B, T] with arbitrary ids as padding, and lengths [B], of which one is T and one is 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0], lengths[-1] = longest, 1
    return tokens, lengths


def valid(tokens: Tensor, lengths: Tensor) -> Tensor:
    """bool [B, T]: positions before each row's end."""
    return torch.arange(tokens.shape[1]) < lengths[:, None]
