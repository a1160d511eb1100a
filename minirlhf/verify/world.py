"""A language that can be enumerated: every response is listed, so every expectation is a finite sum.

Vocabulary 0 = EOS and the words 1 .. V-1; a response ends at its first EOS or is cut after T tokens. There
are K prefixes that a token can follow and N = K + (V-1)^T responses. Prefixes are numbered like a heap,
breadth first: the empty one is 0, and k followed by word w is (V-1)·k + w. Response n < K is prefix n and
then EOS; response n >= K is the cut one whose T words have the number n.

A policy is a table of logits [X, K, V], a row for each prompt and prefix: it can be any law over responses.
What is returned is fp64, exact to rounding, and differentiable in the logits; expectations are means over the
X prompts, which are equally likely. What is *best* in this world is in `optima`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class WorldConfig:
    """The size of a world: V tokens (EOS is one of them), responses of at most T tokens, X prompts."""

    vocab_size: int
    length: int
    prompts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 2), ("length", 1), ("prompts", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def prefixes(self) -> int:
        """K, the prefixes that a token can follow."""
        return sum((self.vocab_size - 1) ** n for n in range(self.length))

    @property
    def responses(self) -> int:
        """N, the responses."""
        return self.prefixes + (self.vocab_size - 1) ** self.length


class World(NamedTuple):
    """Every response and what is known about it.

    config: V, T, X.
    responses: the N responses as token ids, EOS included where there is one.
    states: int64 [N, T] the prefix before each token; tokens: int64 [N, T]; mask: bool [N, T], True on the
        tokens of the response. Both numbers are 0 where it is False.
    gold: [X, N] the reward of each response.
    ref_logits: [X, K, V] the reference policy. Replace either (`_replace`) for another world.
    """

    config: WorldConfig
    responses: tuple[tuple[int, ...], ...]
    states: Tensor
    tokens: Tensor
    mask: Tensor
    gold: Tensor
    ref_logits: Tensor


def world(*, vocab_size: int, length: int, prompts: int = 1) -> World:
    """A world with rewards and a reference in closed form, without random numbers.

        r(x, n) = 1.5 sin(1.7 n + 0.9 x) + 0.5 cos(0.3 n²)
        ref logits(x, k, v) = 0.8 sin(0.7 + 1.3 k + 2.1 v + 0.5 x)

    Raises:
        ValueError: fewer than 2 tokens, or less than one token a response, or no prompt.

    >>> [world(vocab_size=v, length=t).gold.shape[1] for v, t in ((3, 3), (4, 4), (4, 6))]
    [15, 121, 1093]
    """
    config = WorldConfig(vocab_size, length, prompts)
    words = range(1, vocab_size)
    prefixes = [prefix for n in range(length) for prefix in product(words, repeat=n)]
    responses = tuple([(*prefix, 0) for prefix in prefixes] + list(product(words, repeat=length)))
    tokens = torch.tensor([[*response, *[0] * (length - len(response))] for response in responses])
    mask = torch.tensor([[t < len(response) for t in range(length)] for response in responses])
    states = torch.zeros_like(tokens)
    for t in range(1, length):
        states[:, t] = torch.where(mask[:, t], (vocab_size - 1) * states[:, t - 1] + tokens[:, t - 1], 0)
    n, x = torch.arange(len(responses)).double(), torch.arange(prompts).double()[:, None]
    gold = 1.5 * torch.sin(1.7 * n + 0.9 * x) + 0.5 * torch.cos(0.3 * n**2)
    k, v = torch.arange(len(prefixes)).double()[:, None], torch.arange(vocab_size).double()
    ref_logits = 0.8 * torch.sin(0.7 + 1.3 * k + 2.1 * v + 0.5 * x[:, :, None])
    return World(config, responses, states, tokens, mask, gold, ref_logits)


def small_world(prompts: int = 1) -> World:
    """W_small: 3 tokens, at most 3 of them, 15 responses."""
    return world(vocab_size=3, length=3, prompts=prompts)


def standard_world(prompts: int = 2) -> World:
    """W_std: 4 tokens, at most 4 of them, 121 responses."""
    return world(vocab_size=4, length=4, prompts=prompts)


def big_world(prompts: int = 1) -> World:
    """W_big: 4 tokens, at most 6 of them, 1093 responses; for over-optimisation."""
    return world(vocab_size=4, length=6, prompts=prompts)


def prefix_number(words: Sequence[int], vocab_size: int) -> int:
    """The number of a prefix; an EOS at its end adds nothing.

    >>> prefix_number([2, 1], vocab_size=3)
    5
    """
    number = 0
    for word in words:
        number = number * (vocab_size - 1) + word if word else number
    return number


def lengths(w: World) -> Tensor:
    """[N] tokens of each response, EOS included."""
    return w.mask.sum(1).double()


def truncated(w: World) -> Tensor:
    """bool [N], True for the responses that the length limit ended, and no EOS."""
    return w.mask[:, -1] & (w.tokens[:, -1] != 0)


def token_logp(logits: Tensor, w: World) -> Tensor:
    """log π(token | prefix) of every token of every response: [X, N, T], 0 under the mask."""
    _check_logits(logits, w)
    logp = torch.log_softmax(logits.double(), dim=-1)
    return torch.where(w.mask, logp[:, w.states, w.tokens], 0.0)


def response_logp(logits: Tensor, w: World) -> Tensor:
    """log π(y|x) of every response, by the chain rule over the table: [X, N]."""
    return token_logp(logits, w).sum(-1)


def tabulate(law: Tensor, w: World) -> Tensor:
    """Logits [X, K, V] whose law over responses is the given one, log-probs [X, N].

    The logit of a token is the log of the probability that a response passes through it. The row of a prefix
    that the law never reaches is -∞.
    """
    _check_law(law, w)
    mass = torch.zeros_like(w.ref_logits)
    rows = torch.arange(len(law))[:, None]
    for t in range(w.config.length):
        on = w.mask[:, t]
        place = (rows, w.states[on, t][None], w.tokens[on, t][None])
        mass = mass.index_put(place, law.double().exp()[:, on], accumulate=True)
    return mass.log()


def visits(logits: Tensor, w: World) -> Tensor:
    """The probability that the policy ever stands at each prefix: [X, K]."""
    through = torch.where(w.mask, response_logp(logits, w).exp()[..., None], 0.0)  # [X, N, T]
    empty = torch.zeros(w.ref_logits.shape[:2], dtype=torch.float64)
    return empty.index_add(1, w.states.flatten(), through.flatten(1))


def draw(logits: Tensor, w: World, *, count: int, generator: torch.Generator) -> Tensor:
    """`count` responses to each prompt as their numbers, int64 [X, count]; the generator is advanced."""
    probabilities = response_logp(logits, w).exp()
    return torch.multinomial(probabilities, count, replacement=True, generator=generator)


def expectation(logits: Tensor, of: Tensor, w: World) -> Tensor:
    """E_x E_{y~π} of any function of the response, given as [X, N]: []."""
    return (response_logp(logits, w).exp() * of).sum(1).mean()


def expected_reward(logits: Tensor, w: World) -> Tensor:
    """E_x E_{y~π} r(x, y): []."""
    return expectation(logits, w.gold, w)


def kl_of_laws(law: Tensor, other: Tensor) -> Tensor:
    """KL(law‖other) in nats of log-probs [X, N], the mean over prompts: []. Where the law is 0 it adds 0."""
    inner = torch.where(law > -torch.inf, law - other, 0.0)
    return (law.exp() * inner).sum(1).mean()


def kl(logits: Tensor, other_logits: Tensor, w: World) -> Tensor:
    """KL(π‖π') over whole responses, in nats: []."""
    return kl_of_laws(response_logp(logits, w), response_logp(other_logits, w))


def entropy(logits: Tensor, w: World) -> Tensor:
    """The entropy of the law over whole responses, in nats: []."""
    logp = response_logp(logits, w)
    return -(logp.exp() * logp).sum(1).mean()


def objective(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """J(π) = E_x E_{y~π} [r - β log π/π_ref]: []. Ziegler et al. 2019 (arXiv:1909.08593), Eq. 2."""
    return expected_reward(logits, w) - beta * kl(logits, w.ref_logits, w)


def policy_gradient(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """∂J/∂logits [X, K, V], by differentiating the sum itself: no estimator is involved."""
    free = logits.detach().double().requires_grad_()
    return torch.autograd.grad(objective(free, w, beta=beta), free)[0]


def expected_gradient(logits: Tensor, advantage: Tensor, w: World) -> Tensor:
    """E_x E_{y~π} Σ_t A(x, y, t) ∂log π(y_t|y_<t)/∂logits, the advantages [X, N, T] held fixed: [X, K, V].

    What a policy-gradient estimator does on average, whatever its advantages are.
    """
    free = logits.detach().double().requires_grad_()
    logp = token_logp(free, w)
    probability = logp.detach().sum(-1).exp()[..., None]
    surrogate = (probability * torch.where(w.mask, advantage.detach(), 0.0) * logp).sum((1, 2)).mean()
    return torch.autograd.grad(surrogate, free)[0]


def token_reward(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """The KL-shaped reward of each token: -β log π/π_ref, and r on the last one: [X, N, T]."""
    penalty = -beta * (token_logp(logits, w) - token_logp(w.ref_logits, w))
    last = torch.arange(w.config.length) == w.mask.sum(1, keepdim=True) - 1
    return penalty + torch.where(last, w.gold[..., None], 0.0)


def state_value(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """V^π: the KL-shaped reward that is still to come, on average, at each prefix: [X, K].

    NaN at a prefix that the policy cannot reach.
    """
    to_go = token_reward(logits, w, beta=beta).flip(-1).cumsum(-1).flip(-1)
    weight = torch.where(w.mask, response_logp(logits, w).exp()[..., None], 0.0)
    empty = torch.zeros(w.ref_logits.shape[:2], dtype=torch.float64)
    total = empty.index_add(1, w.states.flatten(), (weight * to_go).flatten(1))
    return total / visits(logits, w)


def _check_logits(logits: Tensor, w: World) -> None:
    if logits.shape != w.ref_logits.shape:
        raise ValueError(
            f"logits must have shape [X, K, V] = {list(w.ref_logits.shape)}, got {list(logits.shape)}"
        )


def _check_law(law: Tensor, w: World) -> None:
    if law.shape != w.gold.shape:
        raise ValueError(f"law must have shape [X, N] = {list(w.gold.shape)}, got {list(law.shape)}")
