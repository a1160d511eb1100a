"""Models whose whole output is known, and what the sampler's tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models import gpt2
from minirlhf.models.interface import Attend, LanguageModel, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.sampler import Rollout, generate
from tests.rollout import history

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

    It reads both from its cache, so a row that is given another row's cache, or a wrong position, predicts
    something else.
    """
    size, places = config.vocab_size, config.n_positions

    def states(params: Params, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        row = history.read(tokens, positions, attend, places=places, vocabulary=size)
        last = row.gather(-1, positions.expand(tokens.shape)[..., None])
        return F.one_hot((last[..., 0] + row[..., 0]) % size, size).float()

    return LanguageModel(
        config=config,
        init=lambda generator: {"identity": torch.eye(size) * 100},
        states=states,
        unembedding=lambda params: params["identity"],
        cache=history.shape(places, size),
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
