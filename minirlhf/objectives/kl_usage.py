"""KL estimators and entropy put to use: which gradient each really has, as a reward and as a loss.

A *reward* is detached and reaches the policy through the score function: with tokens sampled from π, the
gradient is E[Σₜ ∇log πₜ · (the rewards from t on)]. A *loss* is differentiated through its own log-probs,
the sampled tokens held fixed. The two are not the same, and neither is what the estimator's value suggests.
Signs are those of a maximised reward and a minimised loss, so that the good uses pull π towards π_ref (or
spread it, for the entropy). Each claim is enumerated in the tests.

    use of            as a reward -k: ascends          as a loss k: descends
    k1                -KL(π‖π_ref): use this one       nothing, expectation 0
    k2                KL(π‖π_ref) - E[½ s²]: repels    KL(π‖π_ref)
    k3                KL(π_ref‖π) - KL(π‖π_ref): repels    KL(π_ref‖π), the other direction
    k3 times ρ                                         KL(π‖π_ref)
    -log π (entropy)  H(π)                             nothing, expectation 0
    -H exactly                                         -H(π(·|s)) of each state

A loss summed over tokens is local: it takes the states for given. Token by token, k2 and ρ k3 give
Σₜ E ∇KL(π(·|sₜ)‖π_ref(·|sₜ)), which lacks what a token does to the states after it; the gradients named in
the table are exact for one-token responses and for log-probs summed over the sequence first.
"""

import torch
from torch import Tensor

from minirlhf.objectives.divergence import entropy, kl_k1, kl_k2, kl_k3
from minirlhf.objectives.inputs import check_tokens
from minirlhf.objectives.masked import select


def k1_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """The KL penalty that belongs in the reward: its policy gradient is that of -KL(π‖π_ref), exactly.

        rₜ = -sg[s],   s = log π(yₜ) - log π_ref(yₜ)

    where sg stops the gradient. Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
    Eq. 2 (arXiv:1909.08593). Times β and with the score it is `kl_shaped_reward`.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: 0, a reward is a constant. By the score function, with the rewards from each token on:
    E[…] = -∇KL(π‖π_ref) of whole sequences.

    >>> k1_reward(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[-0.5000]])
    """
    return select(-kl_k1(logp, ref_logp, mask), mask).detach()


def k2_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k2 as a penalty in the reward: not a regulariser, it pushes the policy away from π_ref.

        rₜ = -sg[½ s²],   s = log π(yₜ) - log π_ref(yₜ)

    where sg stops the gradient. The estimator: Schulman 2020, "Approximating KL Divergence"
    (http://joschu.net/blog/kl-approx.html); what it does as a reward: Tang & Munos 2025, "On a few pitfalls
    in KL divergence gradient estimation for RL" (arXiv:2506.09477).

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats², at most 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: 0, a reward is a constant. By the score function, with log-probs of whole sequences:
    E[…] = ∇KL(π‖π_ref) - ∇E_π[½ s²]; the score function misses that s itself depends on π.

    >>> k2_reward(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[-0.1250]])
    """
    return select(-kl_k2(logp, ref_logp, mask), mask).detach()


def k3_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 as a penalty in the reward: not a regulariser, although its value is unbiased and never negative.

        rₜ = -sg[(e⁻ˢ - 1) + s],   s = log π(yₜ) - log π_ref(yₜ)

    where sg stops the gradient. The estimator: Schulman 2020, "Approximating KL Divergence"
    (http://joschu.net/blog/kl-approx.html); what it does as a reward: Tang & Munos 2025, "On a few pitfalls
    in KL divergence gradient estimation for RL" (arXiv:2506.09477). Near π_ref it does
    next to nothing, since both directions of the KL have the same curvature there; what is left pushes away.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, at most 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: 0, a reward is a constant. By the score function, with log-probs of whole sequences:
    E[…] = ∇KL(π_ref‖π) - ∇KL(π‖π_ref).

    >>> k3_reward(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[-0.1065]])
    """
    return select(-kl_k3(logp, ref_logp, mask), mask).detach()


def entropy_reward(logp: Tensor, mask: Tensor) -> Tensor:
    """An entropy bonus in the reward: its policy gradient is that of the entropy of whole sequences, exactly.

        rₜ = -sg[log π(yₜ)]

    where sg stops the gradient. Williams & Peng 1991, "Function Optimization Using Connectionist
    Reinforcement Learning Algorithms". The same number as a loss is nothing: `sampled_entropy_loss`.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, at least 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, logp is not floating point, or mask is not bool.

    Gradient: 0, a reward is a constant. By the score function, with the rewards from each token on:
    E[…] = ∇H(π) of whole sequences.

    >>> entropy_reward(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    check_tokens(mask, logp=logp)
    return select(-logp, mask).detach()


def k1_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k1 differentiated as a loss: in expectation no gradient at all, only noise.

        lossₜ = s,   s = log π(yₜ) - log π_ref(yₜ)

    Its gradient is ∇log π(yₜ), and E_π[∇log π] = 0: the reference does not even enter. Tang & Munos 2025, "On
    a few pitfalls in KL divergence gradient estimation for RL" (arXiv:2506.09477). Here to be recognised; use
    `k1_reward`, `k2_loss` or `k3_ratio_loss`.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, exactly 0 where the mask is False. Its mean is an unbiased *value* of KL(π‖π_ref).

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = 1 for each token; E[∇loss] = 0.

    >>> k1_loss(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.5000]])
    """
    return kl_k1(logp, ref_logp, mask)


def k2_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k2 differentiated as a loss: its expected gradient is that of KL(π‖π_ref).

        lossₜ = ½ s²,   s = log π(yₜ) - log π_ref(yₜ)

    The estimator: Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html); as a
    loss: Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"
    (arXiv:2506.09477). Its value is biased, its gradient is not.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats², at least 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = s for each token; E[∇loss] = ∇KL(π‖π_ref) for log-probs of whole sequences, and
    Σₜ E ∇KL(π(·|sₜ)‖π_ref(·|sₜ)), the states taken for given, for those of tokens.

    >>> k2_loss(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.1250]])
    """
    return kl_k2(logp, ref_logp, mask)


def k3_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 differentiated as a loss: its expected gradient is that of KL(π_ref‖π), the other direction.

        lossₜ = (e⁻ˢ - 1) + s,   s = log π(yₜ) - log π_ref(yₜ)

    Shao et al. 2024, "DeepSeekMath", Eq. 4 (GRPO, arXiv:2402.03300), where it stands for KL(π‖π_ref); which
    gradient it has: Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"
    (arXiv:2506.09477). Under a reward r its optimum is π ∝ π_ref β/(λ - r), not π_ref e^(r/β) (Vojnovic & Yun
    2025, "What is the Alignment Objective of GRPO?", arXiv:2502.18548). `k3_ratio_loss` has the other one.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, at least 0, exactly 0 where the mask is False. Its mean is an unbiased *value* of
        KL(π‖π_ref). Infinite for s < -88 in fp32.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = 1 - e⁻ˢ for each token; E[∇loss] = ∇KL(π_ref‖π) for log-probs of whole sequences,
    and its counterpart of each state, the states taken for given, for those of tokens.

    >>> k3_loss(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.1065]])
    """
    return kl_k3(logp, ref_logp, mask)


def k3_ratio_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 under the ratio to its own sampling law: its expected gradient is that of KL(π‖π_ref).

        lossₜ = ρ [(e⁻ˢ - 1) + s],   ρ = π(yₜ)/sg[π(yₜ)],   s = log π(yₜ) - log π_ref(yₜ)

    where sg stops the gradient, so that ρ is 1 and only its gradient matters: the expectation is over π, and
    ρ says so to the derivative. DeepSeek-AI 2025, "DeepSeek-V3.2", Eq. 7 (arXiv:2512.02556), there with
    π_old below the line; Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"
    (arXiv:2506.09477).

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        ref_logp: [B, T] log π_ref of the same tokens.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats: the value of `k3_loss`, at least 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = s for each token, that of `k2_loss`; finite also where the value is infinite.
    E[∇loss] = ∇KL(π‖π_ref) for log-probs of whole sequences.

    >>> k3_ratio_loss(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]))
    tensor([[0.1065]])
    """
    s = kl_k1(logp, ref_logp, mask)
    frozen = kl_k1(logp.detach(), ref_logp, mask)
    rho = torch.exp(s - frozen)
    # ρ e⁻ˢ is π_ref/sg[π], which has no gradient by log π. Left as a product, it would have two that cancel,
    # e⁻ˢ and -e⁻ˢ: at s = -20 in fp32 no digit of s would survive between them.
    return torch.expm1(-frozen) + rho * s - (rho - 1)


def entropy_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """The entropy bonus as a loss: minus the entropy of the next-token law, the whole sum.

        lossₜ = -H(π(·|sₜ)) = Σᵥ π(v|sₜ) log π(v|sₜ)

    Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", section 4 (arXiv:1602.01783).

    Args:
        logits: [B, T, V] of π; -inf where a token is excluded.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, between -log V and 0; exactly 0 where the mask is False.

    Raises:
        ValueError: mask is not bool or not the shape of the logits without V, or logits is not floating
            point.

    Gradient: ∂loss/∂logitᵥ = πᵥ (log πᵥ + H), exact for each state; what a token does to the entropy of later
    states is not in it (that is in `entropy_reward`).

    >>> entropy_loss(torch.zeros(1, 2, 4), torch.tensor([[True, False]]))
    tensor([[-1.3863, 0.0000]])
    """
    return select(-entropy(logits, mask), mask)


def sampled_entropy_loss(logp: Tensor, mask: Tensor) -> Tensor:
    """log π of the sampled token as an entropy bonus: in expectation no gradient at all, only noise.

        lossₜ = log π(yₜ)

    -log π(yₜ) is an unbiased *value* of the entropy, but the score has mean 0. Williams 1992,
    "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning". Here to be
    recognised; use `entropy_loss` or `entropy_reward`.

    Args:
        logp: [B, T] log π of each token in nats; tokens sampled from π.
        mask: [B, T] bool, True = counts.

    Returns:
        [B, T] in nats, at most 0, exactly 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, logp is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = 1 for each token; E[∇loss] = 0.

    >>> sampled_entropy_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    tensor([[-1., 0.]])
    """
    check_tokens(mask, logp=logp)
    return select(logp, mask)
