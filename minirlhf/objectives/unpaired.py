"""Kahneman-Tversky Optimization: a loss of single responses that are labelled desirable or not, no pairs."""

import torch
from torch import Tensor

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_non_negative,
    check_positive,
    check_same_shape,
    widen,
)


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> Tensor:
    """Kahneman-Tversky Optimization: the distance of each response from the best that can be felt about it.

        desirable:    loss = w_d [1 - σ(β (s - z₀))]
        undesirable:  loss = w_u [1 - σ(β (z₀ - s))],   s = log π(y|x) - log π_ref(y|x)

    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", Eq. 8
    (arXiv:2402.01306), where w is λ. The reference point z₀ is one number for the batch and gets no gradient
    (the paper's stop-gradient); a batch with one kind of label is as good as any.

    Args:
        logp: [B] log π(y|x) in nats, summed over response tokens.
        ref_logp: [B] log π_ref(y|x), likewise.
        desirable: [B] bool, True for a desirable response.
        kl: [] z₀ in nats, the reference point; usually `kto_reference_point`. Detached here.
        beta: β > 0, reward units per nat.
        desirable_weight: w_d >= 0. The paper balances unequal counts by w_d n_d / (w_u n_u) in [1, 4/3].
        undesirable_weight: w_u >= 0.

    Returns:
        [B] losses in [0, w], w/2 where s = z₀. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a log-prob or kl is not floating point, desirable is not bool, kl is
            not a tensor [], beta <= 0, or a weight is negative.

    Gradient: ∂loss/∂logp = -w_d β σ(1 - σ) if desirable, else w_u β σ(1 - σ), with σ as in the loss: at most
    w β/4, at s = z₀, and vanishing far from there on both sides. 0 with respect to kl.

    >>> from torch import tensor as lp
    >>> kto_loss(lp([-10.0] * 2), lp([-15.0] * 2), lp([True, False]), lp(0.2), beta=0.1)
    tensor([0.3823, 0.6177])
    """
    check_positive(beta=beta)
    check_non_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    check_floating(logp=logp, ref_logp=ref_logp, kl=kl)
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        came = desirable.dtype if isinstance(desirable, Tensor) else type(desirable).__name__
        raise ValueError(f"desirable must be a bool tensor (True = desirable), got {came}")
    check_same_shape(logp=logp, ref_logp=ref_logp, desirable=desirable)
    if kl.ndim != 0:
        raise ValueError(f"kl must be a tensor [], got shape {list(kl.shape)}")
    above = beta * (widen(logp) - widen(ref_logp) - widen(kl).detach())
    # 1 - σ(x) as σ(-x): the difference would round to 0 where the loss is small.
    gain = desirable_weight * torch.sigmoid(-above)
    return torch.where(desirable, gain, undesirable_weight * torch.sigmoid(above))


def kto_reference_point(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """z₀ of `kto_loss`: KL(π‖π_ref) as estimated from mismatched pairs of prompt and response.

        z₀ = sg[max(0, mean over the batch of log π(y'|x) - log π_ref(y'|x))]

    where sg stops the gradient and y' is the response to another prompt than x. Ethayarajh et al. 2024,
    "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.1 (arXiv:2402.01306). A biased
    estimate, chosen for its price: it needs no sampling.

    Args:
        logp: [B] log π(y'|x) in nats, summed over the tokens of y', which belongs to another prompt of the
            batch (for instance, responses moved on by one). With a response's own prompt it would measure the
            labels, not the drift.
        ref_logp: [B] log π_ref(y'|x), likewise.

    Returns:
        [] z₀ >= 0 in nats, one number for the batch.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or the batch is empty.

    Gradient: 0; the reference point is detached.

    >>> from torch import tensor as lp
    >>> kto_reference_point(lp([-10.0, -12.0]), lp([-11.0, -11.5]))
    tensor(0.2500)
    """
    check_floating(logp=logp, ref_logp=ref_logp)
    check_same_shape(logp=logp, ref_logp=ref_logp)
    if logp.numel() == 0:
        raise ValueError(f"logp must hold at least one sequence, got shape {list(logp.shape)}")
    return (widen(logp) - widen(ref_logp)).mean().clamp(min=0).detach()
