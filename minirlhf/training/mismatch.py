"""Responses that another law sampled than the one that is trained: by how much, and the correction.

A rollout with 8-bit weights draws from π_sampler, whose log-probs it records; the trainer's π_old is that of
the parameters. Each token's loss is weighted by min(π_old / π_sampler, C) (Yao et al. 2025, see
`objectives.importance`). The clipped surrogate is homogeneous in the advantage, and a weight is not negative:

    w · min(ρ A, clip(ρ) A) = min(ρ (w A), clip(ρ) (w A))

so the weight goes into the advantage, and losses, minibatches and guards stay as they are. Returns and the
critic's targets are not weighted: they describe what was sampled.
"""

from typing import Literal

import torch
from torch import Tensor

from minirlhf.models.interface import Params
from minirlhf.objectives.divergence import kl_k3
from minirlhf.objectives.importance import truncated_importance_weight
from minirlhf.objectives.policy import ratio
from minirlhf.rollout.weights import Weights, fastest, int8
from minirlhf.training.guards import tolerance_for

Precision = Literal["full", "int8"]
"""What responses are sampled with."""

WEIGHTS: dict[Precision, Weights] = {"full": fastest, "int8": int8}


def tolerated_gap(params: Params, precision: Precision) -> float:
    """Nats by which the sampler's log-probs may differ from the trainer's; any, where the weights differ."""
    return tolerance_for(params) if precision == "full" else torch.inf


def weighted(
    advantage: Tensor,
    old_logp: Tensor,
    sampled_logp: Tensor,
    mask: Tensor,
    *,
    precision: Precision,
    cap: float,
) -> Tensor:
    """The advantage [N, T] times min(π_old / π_sampler, cap); as it is where both laws are the same."""
    if precision == "full":
        return advantage
    return advantage * truncated_importance_weight(old_logp, sampled_logp, mask, cap=cap)


def mismatch_metrics(old_logp: Tensor, sampled_logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the sampler's law is from the trainer's, on the sampled tokens; see `ppo_metrics.METRICS`."""
    weight, count = ratio(old_logp, sampled_logp, mask), mask.sum()  # 0 outside the mask
    return {
        "sampler/kl": kl_k3(sampled_logp, old_logp, mask).sum() / count,
        "sampler/largest_ratio": weight.max(),
        "sampler/effective_share": weight.sum() ** 2 / (count * (weight**2).sum()),
    }
