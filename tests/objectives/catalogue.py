"""Every objective that takes a mask, in one form, so that one test can be run over all of them.

A case calls its function with tensors [B, T] (or [B, T, 3] where `vocabulary` is set) and a mask, and says
what kind of result it gives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.objectives import advantages, divergence, masked, policy, supervised, value


class Case(NamedTuple):
    """One function in one variant (named after a colon).

    tensors: how many it takes; call: (*tensors, mask) -> result; kind: "token" is [B, T] where each element
    depends on its own token, "row" is [B, T] on its own row, "sequence" is [B] on its own row, "batch"
    depends on all rows; boolean: the result is bool and has no gradient.
    """

    name: str
    tensors: int
    call: Callable[..., Tensor]
    kind: str
    vocabulary: bool = False
    boolean: bool = False


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
