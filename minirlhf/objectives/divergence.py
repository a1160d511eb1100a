"""How far the policy is from its reference: KL estimators, exact KL, entropy, and KL as a reward.

Every KL here is KL(π‖π_ref), in nats, for tokens sampled from π. An estimate of the *value* is not an
estimate of the *gradient*; for tokens y ~ π held fixed (verified by enumeration in the tests):

    estimator   as a detached reward            differentiated as a loss
    k1          ∇ KL(π‖π_ref): use this one     expectation 0: no regulariser
    k2          not a regulariser               ∇ KL(π‖π_ref)
    k3          not a regulariser               ∇ KL(π_ref‖π), the other direction
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_mask,
    check_non_negative,
    check_per_sequence,
    check_positive,
    check_same_shape,
    check_tokens,
)
from minirlhf.objectives.masked import select


def kl_k1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k1, the log ratio of each token: estimates KL(π‖π_ref) without bias; tokens sampled from π.

        k1 = s,   s = log π(y) - log π_ref(y)

    Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html). Single values may be
    negative. It is the estimator that belongs in the reward; as a loss its expected gradient is 0.

    Args:
        logp: [B, T] log π of each token in nats.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, exactly 0 where the mask is False. Summed over a row: the sequence's log ratio.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂k1/∂logp = 1.

    >>> kl_k1(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.5000]])
    """
    check_tokens(mask, logp=logp, ref_logp=ref_logp)
    return select(logp, mask) - select(ref_logp, mask)


def kl_k2(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k2, half the squared log ratio: estimates KL(π‖π_ref) with third-order bias; tokens sampled from π.

        k2 = ½ s²,   s = log π(y) - log π_ref(y)

    Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html). Its value is biased,
    but differentiated as a loss its expected gradient is that of KL(π‖π_ref), per state or per sequence.

    Args:
        logp: [B, T] log π of each token in nats.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T], at least 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂k2/∂logp = s.

    >>> kl_k2(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.1250]])
    """
    return 0.5 * kl_k1(logp, ref_logp, mask).square()


def kl_k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3, never negative: estimates KL(π‖π_ref) without bias; tokens sampled from π.

        k3 = (e⁻ˢ - 1) + s,   s = log π(y) - log π_ref(y)

    Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html). By expm1: in fp32,
    exp(-s) - 1 + s is negative for 8 % of values at |s| ~ 1e-3. Nothing is clamped, so e⁻ˢ overflows to
    infinity for s < -88 in fp32. Its value is unbiased, its gradient is not: differentiated as a loss it
    pulls along KL(π_ref‖π), and as a detached reward it is no regulariser.

    Args:
        logp: [B, T] log π of each token in nats.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T], at least 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂k3/∂logp = 1 - e⁻ˢ.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.1065]])
    """
    s = kl_k1(logp, ref_logp, mask)
    return torch.expm1(-s) + s


def exact_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(π‖π_ref) of the whole next-token law at each position, no sampling.

        KLₜ = Σᵥ π(v|sₜ) [log π(v|sₜ) - log π_ref(v|sₜ)]

    Kullback & Leibler 1951. Summed over positions of sequences sampled from π it estimates the KL of the
    sequences, with less variance than k1 (the tower rule).

    Args:
        logits: [B, T, V] of π; -inf where a token is excluded.
        ref_logits: [B, T, V] of π_ref.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, 0 where the laws agree (up to rounding) and exactly 0 where the mask is False;
        infinite where π has a token that π_ref excludes.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or mask is not bool.

    Gradient: ∂KL/∂logitᵥ = πᵥ (log πᵥ - log π_refᵥ - KL).

    >>> logits, ref_logits = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    >>> exact_kl(logits, ref_logits, torch.tensor([[True]]))
    tensor([[0.1438]])
    """
    check_floating(ref_logits=ref_logits)
    check_same_shape(logits=logits, ref_logits=ref_logits)
    logp, ref_logp = _law(logits, mask), _law(ref_logits, mask)
    possible = logp > -torch.inf  # 0 · log 0 = 0: a token that π excludes adds nothing
    s = torch.where(possible, logp, 0.0) - torch.where(possible, ref_logp, 0.0)
    return (logp.exp() * s).sum(dim=-1)  # under the mask both laws are uniform, so exactly 0


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Entropy of the next-token law at each position.

        Hₜ = -Σᵥ π(v|sₜ) log π(v|sₜ)

    Shannon 1948. As a bonus it must be this sum: -log π of the sampled token has expected gradient 0.

    Args:
        logits: [B, T, V] of π; -inf where a token is excluded.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, between 0 and log V; exactly 0 where the mask is False.

    Raises:
        ValueError: mask is not bool or not the shape of the logits without V, or logits is not floating
            point.

    Gradient: ∂H/∂logitᵥ = -πᵥ (log πᵥ + H); 0 for the uniform law.

    >>> entropy(torch.zeros(1, 2, 4), torch.tensor([[True, False]]))
    tensor([[1.3863, 0.0000]])
    """
    logp = _law(logits, mask)
    safe = torch.where(logp > -torch.inf, logp, 0.0)  # 0 · log 0 = 0
    return select(-(logp.exp() * safe).sum(dim=-1), mask)


def kl_shaped_reward(score: Tensor, kl: Tensor, mask: Tensor, *, beta: Scalar) -> Tensor:
    """The reward of each token: a KL penalty everywhere, and the score on the last token that counts.

        rₜ = -β klₜ + score · 1[t is the last token of the row that counts]

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", Eq. 2 (arXiv:1909.08593);
    Ouyang et al. 2022, Eq. 2 (arXiv:2203.02155). `kl` should be k1 (`kl_k1`): the row then sums to
    score - β log π(y|x)/π_ref(y|x), whose maximum is π ∝ π_ref e^(score/β).

    Args:
        score: [B] the reward of each sequence, finished or cut.
        kl: [B, T] KL estimate of each token in nats, for tokens sampled from π.
        mask: [B, T] bool, True = counts.
        beta: β >= 0 in reward units per nat; a number, or the tensor [] of a `KLController`.

    Returns:
        [B, T] in reward units, exactly 0 where the mask is False. A row where nothing counts is paid nothing.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, mask is not bool, or beta < 0.

    Gradient: rewards are constants, so the training step takes none.

    >>> kl = torch.tensor([[0.2, -0.5, 0.0, torch.nan]])
    >>> kl_shaped_reward(torch.tensor([2.0]), kl, torch.tensor([[True, True, True, False]]), beta=0.1)
    tensor([[-0.0200,  0.0500,  2.0000,  0.0000]])
    """
    check_tokens(mask, kl=kl)
    check_per_sequence("score", score, mask)
    check_non_negative(beta=beta)
    counted_from_here = mask.flip(-1).cumsum(dim=-1).flip(-1)
    last = mask & (counted_from_here == 1)
    terminal = select(score[..., None].expand(mask.shape), last)
    return terminal - beta * select(kl, mask)


class KLController(NamedTuple):
    """State of the adaptive KL controller.

    coefficient: [] tensor, β of `kl_shaped_reward`, in reward units per nat.
    """

    coefficient: Tensor


def adapt_kl(
    state: KLController, kl: Tensor, *, target: Scalar, horizon: Scalar, n_steps: Scalar
) -> KLController:
    """Moves β towards the value at which the policy keeps its target KL: a pure function of the state.

        e = clip(KL/target - 1, -0.2, 0.2)
        β' = β (1 + e · n/horizon)

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2
    (arXiv:1909.08593), whose K_β is n/horizon.

    Args:
        state: the current coefficient.
        kl: [] measured KL(π‖π_ref) in nats per sequence; mean over sequences sampled from π.
        target: KL > 0 to hold, in nats per sequence.
        horizon: > 0, the episodes in which β can change by about 20 %.
        n_steps: > 0, the episodes since the last call; less than 5 · horizon, so that β stays positive.

    Returns:
        The next state; the argument is not changed. β rises where KL > target and falls where KL < target.

    Raises:
        ValueError: kl is not a tensor [], or a number is not positive, or n_steps >= 5 · horizon.

    Gradient: the controller is not differentiated.

    >>> adapt_kl(KLController(torch.tensor(0.2)), torch.tensor(6.3), target=6.0, horizon=10000, n_steps=256)
    KLController(coefficient=tensor(0.2003))
    """
    check_floating(coefficient=state.coefficient, kl=kl)
    if kl.ndim != 0:
        raise ValueError(f"kl must be a tensor [], got shape {list(kl.shape)}")
    check_positive(target=target, horizon=horizon, n_steps=n_steps)
    if not isinstance(horizon, Tensor) and not isinstance(n_steps, Tensor) and n_steps >= 5 * horizon:
        raise ValueError(f"n_steps must be less than 5 · horizon = {5 * horizon}, got {n_steps}")
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return KLController(state.coefficient * (1 + error * n_steps / horizon))


def _law(logits: Tensor, mask: Tensor) -> Tensor:
    """log π over the vocabulary, [B, T, V]; uniform where the mask is False, whatever lies there."""
    check_floating(logits=logits)
    check_mask(mask)
    if logits.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask must have shape {list(logits.shape[:-1])} (logits {list(logits.shape)} without V), "
            f"got {list(mask.shape)}"
        )
    return torch.log_softmax(select(logits, mask), dim=-1)
