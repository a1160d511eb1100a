"""Every objective that takes a mask, in one form, so that one test can be run over all of them.

A case calls its function with tensors [B, T] (or [B, T, 3] where `vocabulary` is set) and a mask, and says
what kind of result it gives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.objectives import (
    advantages,
    divergence,
    group_advantages,
    importance,
    kl_usage,
    masked,
    policy,
    policy_variants,
    ranking,
    supervised,
    value,
)


class Case(NamedTuple):
    """One function in one variant (named after a colon).

    tensors: how many it takes; call: (*tensors, mask) -> result; kind: "token" is [B, T] where each element
    depends on its own token, "row" is [B, T] on its own row, "sequence" is [B] on its own row, "batch"
    depends on all rows; boolean: the result is bool and has no gradient; slopes: where the equation has a
    stop-gradient, ∂resultₜ/∂tensorₜ of each tensor in closed form, since finite differences cannot see it.
    """

    name: str
    tensors: int
    call: Callable[..., Tensor]
    kind: str
    vocabulary: bool = False
    boolean: bool = False
    slopes: Callable[..., tuple[Tensor, ...]] | None = None


def _surrogate(dual_clip: float | None) -> Callable[..., Tensor]:
    def call(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return policy.clipped_surrogate_loss(
            logp, old_logp, advantage, mask, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip
        )

    return call


def _bootstrapped(r: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bootstrap = torch.full_like(r[..., 0], 0.75)
    return advantages.gae(r, v, mask, gamma=0.9, lam=0.7, bootstrap_value=bootstrap).advantage


def _indicator(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    return policy.clip_indicator(logp, old_logp, advantage, mask, clip_low=0.2, clip_high=0.3)


def _shaped(kl: Tensor, mask: Tensor) -> Tensor:
    return divergence.kl_shaped_reward(torch.full_like(kl[..., 0], 1.5), kl, mask, beta=0.1)


def _gspo(advantage: float) -> Callable[..., Tensor]:
    def call(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        constant = torch.full_like(logp[..., 0], advantage)
        return policy_variants.gspo_loss(logp, old_logp, constant, mask, clip_low=0.2, clip_high=0.3)

    return call


def _cispo(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    return policy_variants.cispo_loss(logp, old_logp, advantage, mask, clip_low=0.2, clip_high=0.3)


def _cispo_slopes(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> tuple[Tensor, ...]:
    weight = (logp - old_logp).exp().clamp(0.8, 1.3)
    return -weight * advantage, torch.zeros_like(old_logp), -weight * logp


def _k3_ratio_slopes(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, ...]:
    s = logp - ref_logp
    return s, (-s).exp() - 1


def _no_slopes(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x) for x in tensors)


def _normalised(correction: int) -> Callable[..., Tensor]:
    def call(reward: Tensor, mask: Tensor) -> Tensor:
        # A generous epsilon, as with `whiten` below.
        return group_advantages.group_normalised_advantage(reward, mask, epsilon=0.1, correction=correction)

    return call


def _truncated(logp: Tensor, behaviour_logp: Tensor, mask: Tensor) -> Tensor:
    return importance.truncated_importance_weight(logp, behaviour_logp, mask, cap=1.5)


def _banded(logp: Tensor, behaviour_logp: Tensor, mask: Tensor) -> Tensor:
    return importance.masked_importance_weight(logp, behaviour_logp, mask, low=0.5, high=2.0)


CASES = [
    Case("select", 1, masked.select, "token"),
    Case("token_sum", 1, masked.token_sum, "batch"),
    Case("token_mean", 1, masked.token_mean, "batch"),
    Case("token_variance", 1, masked.token_variance, "batch"),
    Case("sequence_sum", 1, masked.sequence_sum, "sequence"),
    Case("sequence_mean", 1, masked.sequence_mean, "sequence"),
    Case("scaled_sum", 1, lambda x, m: masked.scaled_sum(x, m, constant=3.0), "batch"),
    Case("token_loss", 1, supervised.token_loss, "token"),
    Case("log_ratio", 2, policy.log_ratio, "token"),
    Case("ratio", 2, policy.ratio, "token"),
    Case("clip_indicator", 3, _indicator, "token", boolean=True),
    Case("clipped_surrogate_loss", 3, _surrogate(None), "token"),
    Case("clipped_surrogate_loss:dual", 3, _surrogate(3.0), "token"),
    Case("value_loss", 2, value.value_loss, "token"),
    Case(
        "clipped_value_loss",
        3,
        lambda v, old, ret, m: value.clipped_value_loss(v, old, ret, m, clip=0.3),
        "token",
    ),
    Case("explained_variance", 2, value.explained_variance, "batch"),
    Case("gae", 2, lambda r, v, m: advantages.gae(r, v, m, gamma=0.9, lam=0.7).advantage, "row"),
    Case("gae:returns", 2, lambda r, v, m: advantages.gae(r, v, m, gamma=0.9, lam=0.7).ret, "row"),
    Case("gae:bootstrap", 2, _bootstrapped, "row"),
    Case("discounted_return", 1, lambda r, m: advantages.discounted_return(r, m, gamma=0.9), "row"),
    # A generous epsilon: with 1e-8 the derivative at constant input is 1e4, beyond finite differences.
    Case("whiten", 1, lambda x, m: advantages.whiten(x, m, epsilon=0.1), "batch"),
    Case("whiten_scale_only", 1, lambda x, m: advantages.whiten_scale_only(x, m, epsilon=0.1), "batch"),
    Case("kl_k1", 2, divergence.kl_k1, "token"),
    Case("kl_k2", 2, divergence.kl_k2, "token"),
    Case("kl_k3", 2, divergence.kl_k3, "token"),
    Case("exact_kl", 2, divergence.exact_kl, "token", vocabulary=True),
    Case("entropy", 1, divergence.entropy, "token", vocabulary=True),
    Case("kl_shaped_reward", 1, _shaped, "row"),
    Case("plackett_luce_loss", 1, ranking.plackett_luce_loss, "sequence"),
    Case("rloo_advantage", 1, group_advantages.rloo_advantage, "row"),
    Case("group_centred_advantage", 1, group_advantages.group_centred_advantage, "row"),
    Case("group_normalised_advantage", 1, _normalised(1), "row"),
    Case("group_normalised_advantage:biased", 1, _normalised(0), "row"),
    Case("gspo_loss", 2, _gspo(1.5), "sequence"),
    Case("gspo_loss:negative", 2, _gspo(-0.5), "sequence"),
    Case("cispo_loss", 3, _cispo, "token", slopes=_cispo_slopes),
    Case("truncated_importance_weight", 2, _truncated, "token", slopes=_no_slopes),
    Case("masked_importance_weight", 2, _banded, "token", slopes=_no_slopes),
    Case("k1_reward", 2, kl_usage.k1_reward, "token", slopes=_no_slopes),
    Case("k2_reward", 2, kl_usage.k2_reward, "token", slopes=_no_slopes),
    Case("k3_reward", 2, kl_usage.k3_reward, "token", slopes=_no_slopes),
    Case("entropy_reward", 1, kl_usage.entropy_reward, "token", slopes=_no_slopes),
    Case("k1_loss", 2, kl_usage.k1_loss, "token"),
    Case("k2_loss", 2, kl_usage.k2_loss, "token"),
    Case("k3_loss", 2, kl_usage.k3_loss, "token"),
    Case("k3_ratio_loss", 2, kl_usage.k3_ratio_loss, "token", slopes=_k3_ratio_slopes),
    Case("entropy_loss", 1, kl_usage.entropy_loss, "token", vocabulary=True),
    Case("sampled_entropy_loss", 1, kl_usage.sampled_entropy_loss, "token"),
]

EXAMPLE_MASK = torch.tensor(
    [
        [False, True, True, False, True, True],
        [False, False, True, True, False, False],
        [False, False, False, False, False, False],
        [True, True, True, True, True, True],
        [False, False, False, True, False, False],
        [True, False, False, False, False, False],
    ]
)
"""Square; with a hole, an empty row, a full row, a row of one token at the end of its prompt."""


def example(case: Case, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """Generic tensors for a case, in the shape of EXAMPLE_MASK; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*EXAMPLE_MASK.shape, 3) if case.vocabulary else EXAMPLE_MASK.shape
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(case.tensors)]
    return tuple(draw.to(torch.bfloat16).to(dtype) for draw in draws)
