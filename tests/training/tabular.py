"""A language that can be enumerated, with a table as its model: oracles for whatever trains a policy.

Vocabulary 0 = EOS, 1 .. V-1; a response ends at its first EOS or after T tokens. A prefix of words w₁ w₂ is
numbered like a heap: the empty one is 0, and k followed by word w is (V-1)·k + w. So is a complete response,
by its words; EOS is told from the length. The prompt is one token; token 1 + x stands for prompt x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.models.interface import Cache, LanguageModel, Params
from minirlhf.rollout.sampler import Rollout


@dataclass(frozen=True)
class TabularConfig:
    """V tokens, responses of at most T, X prompts."""

    vocab_size: int
    length: int
    prompts: int = 1
    eos_token_id: int = 0

    @property
    def n_positions(self) -> int:
        return 1 + self.length

    @property
    def prefixes(self) -> int:
        """Prefixes that a token can follow."""
        words = self.vocab_size - 1
        return sum(words**n for n in range(self.length))

    @property
    def states(self) -> int:
        """One state for each prompt and prefix, and a last one for everything after the end."""
        return self.prompts * self.prefixes + 1


class World(NamedTuple):
    """Every response and what is known about it, [X, N] or [N]."""

    config: TabularConfig
    responses: list[list[int]]
    gold: Tensor
    ref_logits: Tensor


def world(*, vocab_size: int, length: int, prompts: int = 1) -> World:
    """W_small is (3, 3, 1), W_std (4, 4, 2): closed forms, no random numbers."""
    config = TabularConfig(vocab_size, length, prompts)
    words = range(1, vocab_size)
    responses = [[*prefix, 0] for n in range(length) for prefix in product(words, repeat=n)]
    responses += [list(prefix) for prefix in product(words, repeat=length)]
    i, x = torch.arange(len(responses)).double(), torch.arange(prompts).double()[:, None]
    gold = 1.5 * torch.sin(1.7 * i + 0.9 * x) + 0.5 * torch.cos(0.3 * i**2)
    k, v = torch.arange(config.prefixes).double()[:, None], torch.arange(vocab_size).double()
    ref = 0.8 * torch.sin(0.7 + 1.3 * k + 2.1 * v + 0.5 * x[:, :, None])
    return World(config, responses, gold, ref)


def prefix_number(words: list[int], vocab_size: int) -> int:
    """The heap number of a prefix (an EOS at its end adds nothing)."""
    number = 0
    for word in words:
        number = number * (vocab_size - 1) + word if word else number
    return number


def response_logp(logits: Tensor, w: World, *, temperature: float = 1.0) -> Tensor:
    """log π(y|x) of every response under logits [X, K, V]: [X, N], by the chain rule over the table."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    columns = []
    for response in w.responses:
        states = [prefix_number(response[:t], w.config.vocab_size) for t in range(len(response))]
        columns.append(logp[:, states, response].sum(-1))
    return torch.stack(columns, dim=1)


def best_objective(w: World, *, beta: float, temperature: float = 1.0) -> float:
    """J* = β E_x log Σ_y π_ref(y|x) e^{r/β}."""
    ref = response_logp(w.ref_logits, w, temperature=temperature)
    return float(beta * torch.logsumexp(ref + w.gold / beta, dim=1).mean())


def objective(logits: Tensor, w: World, *, beta: float, temperature: float = 1.0) -> float:
    """J(π) = E_x E_y [r - β log π/π_ref], exactly."""
    logp = response_logp(logits, w, temperature=temperature)
    ref = response_logp(w.ref_logits, w, temperature=temperature)
    return float((logp.exp() * (w.gold - beta * (logp - ref))).sum(1).mean())


def regret_fraction(logits: Tensor, w: World, *, beta: float, temperature: float = 1.0) -> float:
    """(J* - J(π)) / (J* - J(π_ref)): 0 at the optimum, 1 where nothing was gained."""
    best = best_objective(w, beta=beta, temperature=temperature)
    start = objective(w.ref_logits, w, beta=beta, temperature=temperature)
    return (best - objective(logits, w, beta=beta, temperature=temperature)) / (best - start)


def bind(config: TabularConfig) -> LanguageModel:
    """The table as a LanguageModel: the state is the one-hot vector of (prompt, prefix)."""

    def one_hot(tokens: Tensor) -> Tensor:
        number = torch.zeros_like(tokens)  # of the prefix read so far
        alive = torch.ones_like(tokens, dtype=torch.bool)
        words = config.vocab_size - 1
        count = torch.zeros_like(tokens[:, 0])
        over = torch.zeros_like(count, dtype=torch.bool)
        for t in range(1, tokens.shape[1]):
            over = over | (tokens[:, t] == config.eos_token_id)
            count = torch.where(over, 0, count * words + tokens[:, t])
            number[:, t] = count
            alive[:, t] = ~over & (count < config.prefixes)
        prompt = tokens[:, :1] - 1
        state = torch.where(alive, prompt * config.prefixes + number, config.states - 1)
        return torch.nn.functional.one_hot(state, config.states).float()

    def extend_(params: Params, tokens: Tensor, start: Tensor, cache: Cache) -> Tensor:
        rows, columns = torch.arange(len(tokens))[:, None], start[:, None] + torch.arange(tokens.shape[1])
        cache.keys[0][rows, columns] = tokens
        return one_hot(cache.keys[0])[rows, columns]

    def init(generator: torch.Generator) -> Params:
        return {"table": torch.randn(config.vocab_size, config.states, generator=generator)}

    return LanguageModel(
        config=config,
        init=init,
        hidden=lambda params, tokens: one_hot(tokens),
        unembedding=lambda params: params["table"],
        new_cache=lambda params, batch, capacity: Cache([torch.ones(batch, capacity).long()], []),
        extend_=extend_,
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
    return {"score": {"weight": torch.zeros(1, w.config.states)}}
