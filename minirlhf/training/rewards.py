"""One number per response: a reward model on ids, or any rule, judge or function on text.

A scorer is called with the rollout and the number of each row's prompt, so that a reward on text can find the
prompt's words and facts without decoding ids (decoding and encoding again is not the identity).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minirlhf.data.records import RewardFn
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import LanguageModel, Params, scalar
from minirlhf.models.packing import Packing, hidden
from minirlhf.rollout.sampler import Rollout, responses
from minirlhf.training.offload import Lendable, using
from minirlhf.training.packed import in_order, parts_of

Scorer = Callable[[Rollout, Tensor], Tensor]
"""`scorer(rollout, prompt_index [B]) -> score [B]`, higher is better; row b answers prompt_index[b]."""


SCORED_ROWS = 64
"""Rows that a reward model reads at a time."""


class Decoder(Protocol):
    """The one thing that a reward on text asks of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of these ids."""
        ...


def reward_model_scorer(
    model: LanguageModel,
    params: Lendable,
    normalisation: Normalisation,
    *,
    micro_batch_size: int = SCORED_ROWS,
) -> Scorer:
    """Our own reward model, on the very ids that were sampled.

        score = (w · h[last] - shift) / scale,   last = lengths - 1

    The head reads the state *after* the last valid token, whether the response is finished or truncated; what
    stands in the padding is never looked at.

    Args:
        params: backbone and `score` head.
        normalisation: (shift, scale) in raw reward units; afterwards SFT rollouts have mean 0, variance 1.
        micro_batch_size: rows per forward pass; it changes the memory, not the scores.
    """

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        del prompt_index  # the prompt is in the ids
        tokens, lengths, parts = rollout.tokens, rollout.lengths, parts_of(rollout, size=micro_batch_size)

        def read(here: Params) -> Tensor:
            raw = [
                raw_score(model, here, tokens[rows, :width], lengths[rows], packing)
                for rows, width, packing in parts
            ]
            return in_order(raw, parts)

        return (using(params, read) - normalisation.shift) / normalisation.scale

    return torch.no_grad()(score)


def raw_score(
    model: LanguageModel, params: Params, tokens: Tensor, lengths: Tensor, packing: Packing | None = None
) -> Tensor:
    """The head's output at the last valid token: tokens [B, T], lengths [B] -> [B], in raw reward units."""
    row = torch.arange(tokens.shape[0], device=tokens.device)  # not len(), which a compiler would fix
    return scalar(params, hidden(model, params, tokens, packing)[row, lengths - 1])


class Reader(NamedTuple):
    """A model that scores responses, as a memory plan sees it.

    raw: (params, tokens [B, T], lengths [B]) -> [B]. context: most tokens of a row that it reads.
    waits: whether `--offload` keeps it on the CPU between uses.
    """

    params: Params
    raw: Callable[[Params, Tensor, Tensor], Tensor]
    context: int
    waits: bool


def reader_of(model: LanguageModel, params: Params) -> Reader:
    """A reward model with a language model's backbone."""
    return Reader(params, partial(raw_score, model), model.config.n_positions, waits=True)


def text_scorer(
    reward: RewardFn,
    tokenizer: Decoder,
    prompts: Sequence[str],
    facts: Sequence[Mapping[str, Any] | None],
) -> Scorer:
    """Any `RewardFn` as reward; it sees the response as a reader would, without the stop token.

    Args:
        prompts: the text of every prompt, in the order that prompt_index counts.
        facts: what is known about each, or None.

    Raises:
        ValueError: as many facts as prompts were expected; later, a reward of another shape than [B].
    """
    if len(prompts) != len(facts):
        raise ValueError(f"expected one facts entry per prompt, got {len(facts)} for {len(prompts)} prompts")

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        rows: list[int] = prompt_index.tolist()
        texts = [tokenizer.decode(ids) for ids in responses(rollout)]
        rewards = reward([prompts[row] for row in rows], texts, [facts[row] for row in rows])
        if rewards.shape != (len(rows),):
            raise ValueError(f"expected the reward of {len(rows)} responses, got shape {list(rewards.shape)}")
        return rewards.to(rollout.tokens.device, torch.float32)

    return score


def critic_from_reward_model(params: Params, normalisation: Normalisation) -> Params:
    """A critic's starting point: the reward model with its head in units of the normalised score.

    The shift has no place in a head without bias; the critic learns it, best before the policy moves
    (`PPOConfig.critic_pretraining`). The backbone is shared with the reward model, not copied.
    """
    return {**params, "score": {"weight": params["score"]["weight"] / normalisation.scale}}
