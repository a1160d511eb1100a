"""Models whose whole output is known, and what the sampler's tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models import gpt2
from minirlhf.models.interface import Cache, LanguageModel, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.sampler import Rollout, generate

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
}


@dataclass(frozen=True)
class CountingConfig:
    vocab_size: int = 50
    n_positions: int = 64
    eos_token_id: int = 0


def counting_model(config: CountingConfig = CountingConfig()) -> LanguageModel:
    """Predicts with certainty: the previous token + the row's first token, modulo the vocabulary.

    It reads the first token from its cache, and the previous one both from its input and from its cache, so
    a row that is given another row's cache, or a wrong position, predicts something else.
    """
    size = config.vocab_size

    def hidden(params: Params, tokens: Tensor) -> Tensor:
        return F.one_hot((tokens + tokens[:, :1]) % size, size).float()

    def new_cache(params: Params, batch: int, capacity: int) -> Cache:
        assert capacity <= config.n_positions
        return Cache(keys=[torch.full((batch, 1, capacity, 1), -1.0)], values=[torch.zeros(batch, 1, 1, 1)])

    def extend_(params: Params, tokens: Tensor, start: Tensor, cache: Cache) -> Tensor:
        position = start[:, None] + torch.arange(tokens.shape[1])
        stored = cache.keys[0][:, 0, :, 0]
        stored.scatter_(1, position, tokens.float())
        before = torch.arange(stored.shape[1]) < start[:, None]
        assert not (before & (stored < 0)).any(), "a position was skipped"
        return F.one_hot((stored.gather(1, position).long() + stored[:, :1].long()) % size, size).float()

    return LanguageModel(
        config=config,
        init=lambda generator: {"identity": torch.eye(size) * 100},
        hidden=hidden,
        unembedding=lambda params: params["identity"],
        new_cache=new_cache,
        extend_=extend_,
        stop_ids=(config.eos_token_id,),
    )


def tiny_gpt2(
    *, vocabulary: int = 31, context: int = 48, spread: float = 20.0, seed: int = 0
) -> tuple[LanguageModel, Params]:
    """A GPT-2 of two layers whose laws are far from uniform and from each other: `spread` × the recipe."""
    config = gpt2.GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=16, n_layer=2, n_head=2, eos_token_id=0
    )
    model = gpt2.bind(config)
    params = model.init(torch.Generator().manual_seed(seed))
    for table in ("wte", "wpe"):
        params[table]["weight"] = params[table]["weight"] * spread
    for block in params["h"]:
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            block[part][name]["weight"] = block[part][name]["weight"] * spread / 2
    return model, params


def ragged_prompts(
    count: int, *, longest: int = 9, vocabulary: int = 31, seed: int = 1
) -> tuple[list[list[int]], Tensor]:
    """Prompts of 1 .. longest ids, EOS (0) among them, and the index of each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return prompts, torch.arange(count)


def sample(model: LanguageModel, params: Params, prompts: Sequence[Sequence[int]], **changed: Any) -> Rollout:
    """`generate` with settings that most tests share."""
    index = torch.arange(len(prompts))
    settings: dict[str, Any] = {
        "law": sampling_law,
        "max_new_tokens": 12,
        "stop_ids": [0],
        "seed": 3,
        "prompt_index": index,
        "sample_index": torch.zeros_like(index),
    }
    return generate(model, params, prompts, **(settings | changed))


def rows(rollout: Rollout) -> list[list[int]]:
    """Prompt and response of each row, without padding."""
    return [
        row[:length] for row, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
    ]
