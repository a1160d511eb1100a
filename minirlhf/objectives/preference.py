"""Losses of a pair, chosen y⁺ against rejected y⁻, under a reference: DPO and its kin, IPO.

All return one loss per pair, unreduced. Log-probs come in *summed* over the response tokens; the one
function that averages them (`ipo_loss`) is given the lengths and does it itself. Nothing is detached: that
the reference receives no gradient is the caller's choice of `argnums`.
"""

from torch import Tensor
from torch.nn import functional as F

from minirlhf.objectives.inputs import (
    Scalar,
    check_floating,
    check_label_smoothing,
    check_positive,
    check_same_shape,
    widen,
)


def implicit_reward(logp: Tensor, ref_logp: Tensor, *, beta: Scalar) -> Tensor:
    """The reward for which π is the optimal policy at KL weight β, up to a constant of the prompt.

        r̂(x, y) = β [log π(y|x) - log π_ref(y|x)]

    Rafailov et al. 2023, "Direct Preference Optimization", Eq. 5 without its prompt term (arXiv:2305.18290).

    Args:
        logp: [B] log π(y|x) in nats, summed over response tokens.
        ref_logp: [B] log π_ref(y|x), likewise.
        beta: β > 0, reward units per nat.

    Returns:
        [B] implicit rewards.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or beta <= 0.

    Gradient: β with respect to logp, -β with respect to ref_logp.

    >>> import torch
    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-15.0]), beta=0.1)
    tensor([0.5000])
    """
    _check_pairs(logp=logp, ref_logp=ref_logp)
    check_positive(beta=beta)
    return beta * (widen(logp) - widen(ref_logp))


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: Scalar,
) -> Tensor:
    """Direct Preference Optimization: Bradley-Terry on implicit rewards.

        loss = -log σ(β h),   h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)]

    Rafailov et al. 2023, "Direct Preference Optimization", Eq. 7 (arXiv:2305.18290).

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, summed over response tokens (not averaged).
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        beta: β > 0, the weight of KL(π‖π_ref) in the objective that this loss solves.

    Returns:
        [B] losses in nats, positive; log 2 where h = 0. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or beta <= 0.

    Gradient: ∂loss/∂chosen_logp = -β σ(-β h) < 0, the opposite for rejected_logp. It never changes sign: on
    a pair that is always ranked the same way h grows without bound (compare `ipo_loss`).

    >>> from torch import tensor as lp
    >>> dpo_loss(lp([-10.0]), lp([-12.0]), lp([-15.0]), lp([-11.0]), beta=0.1)
    tensor([0.4375])
    """
    check_positive(beta=beta)
    margin = _log_ratio_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return -F.logsigmoid(beta * margin)


def conservative_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Tensor:
    """DPO where a share ε of the labels is assumed to be flipped (cDPO).

        loss = -(1 - ε) log σ(β h) - ε log σ(-β h),   h as in `dpo_loss`

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO"
    (https://ericmitchell.ai/cdpo.pdf).

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, summed over response tokens.
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        beta: β > 0, the weight of KL(π‖π_ref).
        label_smoothing: ε in [0, 0.5); at 0 this is `dpo_loss`.

    Returns:
        [B] losses in nats, at least the entropy of (ε, 1 - ε). Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, beta <= 0, or label_smoothing is
            outside [0, 0.5).

    Gradient: ∂loss/∂chosen_logp = β [σ(β h) - (1 - ε)]: 0 where σ(β h) = 1 - ε, restoring on both sides.

    >>> from torch import tensor as lp
    >>> conservative_dpo_loss(lp([-10.]), lp([-12.]), lp([-15.]), lp([-11.]), beta=0.1, label_smoothing=0.1)
    tensor([0.4975])
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    margin = _log_ratio_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def robust_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Tensor:
    """DPO where a share ε of the labels is known to be flipped, with the noise taken out (rDPO).

        loss = [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε),   h as in `dpo_loss`

    Ray Chowdhury, Kini & Natarajan 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    (arXiv:2403.00409). Averaged over labels that are flipped with probability ε it is the
    `dpo_loss` of the clean labels, exactly; `conservative_dpo_loss` is not.

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, summed over response tokens.
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        beta: β > 0, the weight of KL(π‖π_ref).
        label_smoothing: ε in [0, 0.5), the share of flipped labels; at 0 this is `dpo_loss`.

    Returns:
        [B] losses in nats, without a lower bound for ε > 0. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, beta <= 0, or label_smoothing is
            outside [0, 0.5).

    Gradient: ∂loss/∂chosen_logp = -β [(1 - ε) σ(-β h) + ε σ(β h)] / (1 - 2ε), the opposite for rejected_logp.
    Never 0: a single pair pushes its margin on for ever, and only pairs that contradict it hold it.

    >>> from torch import tensor as lp
    >>> robust_dpo_loss(lp([-10.0]), lp([-12.0]), lp([-15.0]), lp([-11.0]), beta=0.1, label_smoothing=0.1)
    tensor([0.3625])
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    margin = _log_ratio_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: Scalar,
) -> Tensor:
    """The hinge on implicit rewards: a pair whose margin has reached 1 is left alone.

        loss = max(0, 1 - β h),   h as in `dpo_loss`

    Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback" (arXiv:2305.10425); on
    log ratios to a reference, Liu et al. 2023, "Statistical Rejection Sampling Improves Preference
    Optimization" ("hinge-norm", arXiv:2309.06657).

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, summed over response tokens.
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        beta: β > 0; the margin that is asked for is h = 1/β nats.

    Returns:
        [B] losses without unit, at least 0; 1 where h = 0. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or beta <= 0.

    Gradient: ∂loss/∂chosen_logp = -β where β h < 1, and 0 from there on; the opposite for rejected_logp.

    >>> from torch import tensor as lp
    >>> hinge_loss(lp([-10.0, -12.0]), lp([-12.0, -10.0]), lp([-15.0] * 2), lp([-11.0] * 2), beta=0.1)
    tensor([0.4000, 0.8000])
    """
    check_positive(beta=beta)
    margin = _log_ratio_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return F.relu(1 - beta * margin)


def ipo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    tau: Scalar,
) -> Tensor:
    """Identity Preference Optimization on log-probs averaged per token.

        loss = (h - 1/(2τ))²,   h = [log π(y⁺) - log π_ref(y⁺)]/|y⁺| - [log π(y⁻) - log π_ref(y⁻)]/|y⁻|

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", Eq. 17
    (arXiv:2310.12036); the division by the lengths is not in the paper, its authors confirmed it for
    language models. It asks for a margin of 1/(2τ) nats *per token*: this τ is not DPO's β.

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, *summed* over response tokens; averaged here.
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        chosen_length: [B] |y⁺|, the tokens that were summed; positive (0/0 is NaN), of any number type.
        rejected_length: [B] |y⁻|, likewise.
        tau: τ > 0.

    Returns:
        [B] losses in squared nats per token; 0 where h = 1/(2τ). Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a log-prob is not floating point, or tau <= 0.

    Gradient: ∂loss/∂h = 2 (h - 1/(2τ)): 0 at the target margin, restoring on both sides of it.

    >>> from torch import tensor as lp
    >>> ipo_loss(lp([-10.]), lp([-12.]), lp([-15.]), lp([-11.]), lp([5]), lp([1]), tau=0.5)
    tensor([1.])
    """
    check_positive(tau=tau)
    logps = _check_pairs(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        ref_chosen_logp=ref_chosen_logp,
        ref_rejected_logp=ref_rejected_logp,
    )
    check_same_shape(chosen_logp=chosen_logp, chosen_length=chosen_length, rejected_length=rejected_length)
    chosen, rejected, ref_chosen, ref_rejected = logps
    margin = (chosen - ref_chosen) / chosen_length - (rejected - ref_rejected) / rejected_length
    return (margin - 1 / (2 * tau)).square()


def ipo_summed_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    tau: Scalar,
) -> Tensor:
    """Identity Preference Optimization on summed log-probs, the form of the theory.

        loss = (h - 1/(2τ))²,   h as in `dpo_loss`

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", Eq. 17
    (arXiv:2310.12036). Its optimum on all pairs is π ∝ π_ref · exp(p(y ≻ μ)/τ).

    Args:
        chosen_logp: [B] log π(y⁺|x) in nats, summed over response tokens.
        rejected_logp: [B] log π(y⁻|x), likewise.
        ref_chosen_logp: [B] log π_ref(y⁺|x), likewise.
        ref_rejected_logp: [B] log π_ref(y⁻|x), likewise.
        tau: τ > 0, the weight of KL(π‖π_ref).

    Returns:
        [B] losses in squared nats; 0 where h = 1/(2τ). Reduce them yourself.

    Raises:
        ValueError: the shapes differ, a tensor is not floating point, or tau <= 0.

    Gradient: ∂loss/∂h = 2 (h - 1/(2τ)): 0 at the target margin, restoring on both sides of it.

    >>> from torch import tensor as lp
    >>> ipo_summed_loss(lp([-10.0]), lp([-12.0]), lp([-15.0]), lp([-11.0]), tau=0.1)
    tensor([1.])
    """
    check_positive(tau=tau)
    margin = _log_ratio_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return (margin - 1 / (2 * tau)).square()


def _log_ratio_margin(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor
) -> Tensor:
    """h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)], in nats."""
    chosen, rejected, ref_chosen, ref_rejected = _check_pairs(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        ref_chosen_logp=ref_chosen_logp,
        ref_rejected_logp=ref_rejected_logp,
    )
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _check_pairs(**tensors: Tensor) -> list[Tensor]:
    """The tensors in fp32 or fp64, after refusing other types and unequal shapes."""
    check_floating(**tensors)
    check_same_shape(**tensors)
    return [widen(tensor) for tensor in tensors.values()]
