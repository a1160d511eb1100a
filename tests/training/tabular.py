"""An enumerable world's table as a LanguageModel, so that whatever trains GPT-2 can train it.

The prompt is one token: token 1 + x stands for prompt x. A hidden state is the one-hot vector of (prompt,
prefix), and the unembedding is the table of logits, transposed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.models.interface import Attend, LanguageModel, Params
from minirlhf.rollout.sampler import Rollout
from minirlhf.verify.optima import best_objective, regret_fraction
from minirlhf.verify.world import World, WorldConfig, objective, prefix_number, response_logp, world
from tests.rollout import history

__all__ = [
    "World",
    "best_objective",
    "bind",
    "gold_scorer",
    "logits_of",
    "objective",
    "prefix_number",
    "regret_fraction",
    "response_logp",
    "table_of",
    "world",
    "zero_critic",
]


@dataclass(frozen=True)
class TabularConfig:
    """What a LanguageModel's config says, of a table."""

    vocab_size: int
    n_positions: int
    eos_token_id: int = 0


def states(config: WorldConfig) -> int:
    """One state for each prompt and prefix, and a last one for everything after the end."""
    return config.prompts * config.prefixes + 1


class Reading(NamedTuple):
    """What was read so far at each position, [B, T].

    number: of the words read; the EOS and what follows it add nothing.
    ended: an EOS was read at this position or before. words: how many were read.
    """

    number: Tensor
    ended: Tensor
    words: Tensor


def read(tokens: Tensor, config: WorldConfig) -> Reading:
    """Reads rows of a prompt token and a response; padding after the end may be any token."""
    ended = (tokens == 0).cumsum(1) > 0
    words = (~ended).long().cumsum(1) - 1  # the prompt is none
    number = torch.zeros_like(tokens)
    for t in range(1, tokens.shape[1]):
        longer = number[:, t - 1] * (config.vocab_size - 1) + tokens[:, t]
        number[:, t] = torch.where(ended[:, t], number[:, t - 1], longer)
    return Reading(number, ended, words)


def bind(config: WorldConfig) -> LanguageModel:
    """A table of logits: the state is the one-hot vector of (prompt, prefix) where a token can follow."""

    def one_hot(tokens: Tensor) -> Tensor:
        reading = read(tokens, config)
        open_ = ~reading.ended & (reading.words < config.length)
        prompt = tokens[:, :1] - 1
        state = torch.where(open_, prompt * config.prefixes + reading.number, states(config) - 1)
        return torch.nn.functional.one_hot(state, states(config)).float()

    return _bound(config, one_hot)


def bind_reader(config: WorldConfig) -> LanguageModel:
    """A table of rewards: the state is the one-hot vector of (prompt, response) where one is complete."""
    responses = config.responses

    def one_hot(tokens: Tensor) -> Tensor:
        reading = read(tokens, config)
        complete = reading.ended | (reading.words == config.length)
        prompt = tokens[:, :1] - 1
        state = torch.where(complete, prompt * responses + reading.number, config.prompts * responses)
        return torch.nn.functional.one_hot(state, config.prompts * responses + 1).float()

    return _bound(config, one_hot)


def _bound(config: WorldConfig, one_hot: Callable[[Tensor], Tensor]) -> LanguageModel:
    places = 1 + config.length

    def at_each_place(tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        row = history.read(tokens, positions, attend, places=places, vocabulary=config.vocab_size)
        read_on = torch.where(row < 0, 1, row).flatten(0, 1)  # what follows changes nothing
        whole = one_hot(read_on).unflatten(0, tokens.shape)  # [B, T, places, states]
        where = positions.expand(tokens.shape)[..., None, None]
        return whole.gather(2, where.expand(-1, -1, 1, whole.shape[-1]))[:, :, 0]

    def init(generator: torch.Generator) -> Params:
        return {"table": torch.randn(config.vocab_size, states(config), generator=generator)}

    return LanguageModel(
        config=TabularConfig(config.vocab_size, places),
        init=init,
        states=lambda params, tokens, positions, attend: at_each_place(tokens, positions, attend),
        unembedding=lambda params: params["table"],
        cache=history.shape(places, config.vocab_size),
        stop_ids=(0,),
    )


def table_of(logits: Tensor) -> Params:
    """Parameters whose law at (x, k) is the softmax of logits [X, K, V]; the last state is never scored."""
    flat = logits.float().reshape(-1, logits.shape[-1])
    return {"table": torch.cat([flat, torch.zeros_like(flat[:1])]).T.contiguous()}


def logits_of(params: Params, w: World) -> Tensor:
    """[X, K, V] back from the table."""
    return params["table"].T[:-1].reshape(w.ref_logits.shape).double()


def gold_scorer(w: World) -> Callable[[Rollout, Tensor], Tensor]:
    """The gold reward of each sampled response, looked up in the list of all responses."""
    number = {tuple(response): i for i, response in enumerate(w.responses)}

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        rows = zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True)
        index = [number[tuple(tokens[start:end].tolist())] for tokens, start, end in rows]
        return w.gold[prompt_index, index].float()

    return score


def zero_critic(w: World) -> Params:
    """V = 0 in every state."""
    return {"score": {"weight": torch.zeros(1, states(w.config))}}


def zero_rewards(w: World) -> Params:
    """A `bind_reader` reward of 0 for every response."""
    return {"score": {"weight": torch.zeros(1, w.gold.numel() + 1)}}
