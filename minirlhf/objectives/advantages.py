"""Advantages and returns of sampled sequences, and their whitening over the whole batch.

`reward[b, t]` comes after token t, `value[b, t]` is V before it. A token that does not count, in the padding
or *between* tokens that do (a tool's answer), takes no part: the recursion steps over it undecayed, as if
the row had been written without it.

GAE is one linear recurrence over time. It is solved in log₂ T vectorised steps (`_suffix_recurrence`), since
a Python loop over time takes a compiler 14 s at T = 64; `tests/objectives/oracles.py` has the loop.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.objectives.inputs import (
    Scalar,
    check_fraction,
    check_non_negative,
    check_per_sequence,
    check_tokens,
)
from minirlhf.objectives.masked import select, token_mean, token_variance


class AdvantageEstimate(NamedTuple):
    """What GAE returns, both in reward units and 0 where the mask is False.

    advantage: [B, T]; ret: [B, T] the targets of the critic, advantage + value.
    """

    advantage: Tensor
    ret: Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    gamma: Scalar,
    lam: Scalar,
    bootstrap_value: Tensor | None = None,
) -> AdvantageEstimate:
    """Generalised advantage estimation.

        δₜ = rₜ + γ Vₜ₊₁ - Vₜ
        Aₜ = δₜ + γ λ Aₜ₊₁,   Rₜ = Aₜ + Vₜ

    where t + 1 means the next token that counts; after the last one V is the bootstrap value and A is 0.
    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    Eq. 16 (arXiv:1506.02438). λ = 0 gives δ, λ = 1 the discounted return minus V.

    Args:
        reward: [B, T] the reward after each token.
        value: [B, T] V before each token, in reward units.
        mask: [B, T] bool, True = counts.
        gamma: γ in [0, 1], the discount per token.
        lam: λ in [0, 1], between bias (0) and variance (1).
        bootstrap_value: [B] V after the last token, for rows that were cut although the episode went on;
            0 for rows that ended. None means 0 for all.

    Returns:
        AdvantageEstimate, both [B, T] and exactly 0 where the mask is False. Not whitened.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or gamma or lam is
            outside [0, 1].

    Gradient: ∂Aₜ/∂rₖ = (γλ)^(k-t) for k >= t; ∂Aₜ/∂Vₜ = -1; ∂Aₜ/∂Vₖ = γ(1-λ)(γλ)^(k-t-1) for k > t.

    >>> mask = torch.tensor([[True, True, True]])
    >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), mask, gamma=1.0, lam=0.95).advantage
    tensor([[0.4512, 0.4750, 0.5000]])
    """
    check_tokens(mask, reward=reward, value=value)
    check_fraction(gamma=gamma, lam=lam)
    v = select(value, mask)
    final = _bootstrap(bootstrap_value, v, mask)
    # The value of the first token that counts at or after t; shifted by one, V of the next one.
    carried = _suffix_recurrence(v, torch.where(mask, 0.0, torch.ones_like(v)), final)
    next_value = torch.cat([carried[..., 1:], final[..., None]], dim=-1)
    delta = select(reward + gamma * next_value - v, mask)
    decay = torch.where(mask, gamma * lam, torch.ones_like(v))
    advantage = select(_suffix_recurrence(delta, decay, torch.zeros_like(final)), mask)
    return AdvantageEstimate(advantage=advantage, ret=advantage + v)


def discounted_return(
    reward: Tensor, mask: Tensor, *, gamma: Scalar, bootstrap_value: Tensor | None = None
) -> Tensor:
    """The discounted sum of the rewards from each token on.

        Gₜ = rₜ + γ Gₜ₊₁

    where t + 1 means the next token that counts; after the last one G is the bootstrap value. Sutton & Barto
    2018, "Reinforcement Learning", Eq. 3.9.

    Args:
        reward: [B, T] the reward after each token.
        mask: [B, T] bool, True = counts.
        gamma: γ in [0, 1], the discount per token.
        bootstrap_value: [B] V after the last token of rows that were cut; None means 0 for all.

    Returns:
        [B, T] returns in reward units, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or gamma is outside
            [0, 1].

    Gradient: ∂Gₜ/∂rₖ = γ^(k-t) for k >= t, 0 before.

    >>> mask = torch.tensor([[True, True, True]])
    >>> discounted_return(torch.tensor([[0.0, 0.0, 1.0]]), mask, gamma=0.5)
    tensor([[0.2500, 0.5000, 1.0000]])
    """
    check_tokens(mask, reward=reward)
    check_fraction(gamma=gamma)
    r = select(reward, mask)
    decay = torch.where(mask, gamma, torch.ones_like(r))
    return select(_suffix_recurrence(r, decay, _bootstrap(bootstrap_value, r, mask)), mask)


def whiten(x: Tensor, mask: Tensor, *, epsilon: Scalar = 1e-8) -> Tensor:
    """x with mean 0 and variance 1 over all tokens of the batch that count.

        (x - μ) / √(σ² + ε),   μ = token_mean(x),  σ² = token_variance(x), the unbiased one

    For advantages: over the whole batch of an iteration, after the returns are formed and before it is cut
    into minibatches. Ziegler et al. 2019 (arXiv:1909.08593), in its code; Huang et al. 2024, "The N+
    Implementation Details of RLHF with PPO" (arXiv:2403.17031).

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.
        epsilon: ε >= 0 in squared units of x; it keeps constant input finite.

    Returns:
        [B, T] without unit, exactly 0 where the mask is False. Constant input, and a single token, give 0.

    Raises:
        ValueError: the shapes differ, x is not floating point, mask is not bool, or epsilon is negative.

    Gradient: goes through μ and σ too; advantages are constants, so the training step takes none.

    >>> whiten(torch.tensor([[1.0, 2.0, 3.0, torch.nan]]), torch.tensor([[True, True, True, False]]))
    tensor([[-1.,  0.,  1.,  0.]])
    """
    deviation = select(x, mask) - token_mean(x, mask)
    return select(deviation * _inverse_deviation(x, mask, epsilon), mask)


def whiten_scale_only(x: Tensor, mask: Tensor, *, epsilon: Scalar = 1e-8) -> Tensor:
    """x with variance 1 and its mean kept, over all tokens of the batch that count.

        μ + (x - μ) / √(σ² + ε)

    For rewards, whose mean carries meaning (Huang et al. 2024, arXiv:2403.17031: "reward whitening").

    Args:
        x: [B, T] one number per token.
        mask: [B, T] bool, True = counts.
        epsilon: ε >= 0 in squared units of x; it keeps constant input finite.

    Returns:
        [B, T], exactly 0 where the mask is False. Constant input, and a single token, come back unchanged.

    Raises:
        ValueError: the shapes differ, x is not floating point, mask is not bool, or epsilon is negative.

    Gradient: goes through μ and σ too; rewards are constants, so the training step takes none.

    >>> whiten_scale_only(torch.tensor([[4.0, 6.0, 8.0]]), torch.tensor([[True, True, True]]))
    tensor([[5., 6., 7.]])
    """
    mean = token_mean(x, mask)
    deviation = select(x, mask) - mean
    return select(mean + deviation * _inverse_deviation(x, mask, epsilon), mask)


def _inverse_deviation(x: Tensor, mask: Tensor, epsilon: Scalar) -> Tensor:
    """1/√(σ² + ε) over all tokens that count: []."""
    check_non_negative(epsilon=epsilon)
    return torch.rsqrt(token_variance(x, mask) + epsilon)


def _bootstrap(bootstrap_value: Tensor | None, like: Tensor, mask: Tensor) -> Tensor:
    """The value after the last token of each row: [B], 0 where none is given."""
    if bootstrap_value is None:
        return like.new_zeros(like.shape[:-1])
    check_per_sequence("bootstrap_value", bootstrap_value, mask)
    return bootstrap_value


def _suffix_recurrence(term: Tensor, decay: Tensor, final: Tensor) -> Tensor:
    """Solves xₜ = termₜ + decayₜ · xₜ₊₁ backwards from x_T = final: [B, T].

    Each step doubles the reach of every position: after n steps, xₜ = termₜ + decayₜ · x at t + 2ⁿ (Hillis &
    Steele 1986). No division and no power: with decays in [0, 1] it is stable at any T, decay 0 included.
    """
    length = term.shape[-1]
    # The final value enters as one more term, which depends on nothing after it.
    term = torch.cat([term, final[..., None]], dim=-1)  # [B, T + 1]
    reach = 1
    while reach <= length:
        reached = term[..., :-reach] + decay * term[..., reach:]
        term = torch.cat([reached, term[..., -reach:]], dim=-1)  # the last are solved: they see the end
        decay = decay[..., :-reach] * decay[..., reach:]  # of those that will not see it yet
        reach *= 2
    return term[..., :-1]
