"""Ways to the log-probs of tokens, each by what one would write or import for it."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import fused, passes

LogProbs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(states [N, D], unembedding [V, D], ids [N], mask [N]) -> log-probs [N], 0 where masked."""


def minirlhf(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return fused.log_prob(states, unembedding, ids, mask, 1.0, entropy=False)[0]


def minirlhf_kept(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """With as much memory as the logits need."""
    passes.KEPT = 2**40
    return minirlhf(states, unembedding, ids, mask)


def naive(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logp = torch.log_softmax((states @ unembedding.T).float(), dim=-1)
    return torch.where(mask, logp.gather(1, ids[:, None])[:, 0], 0.0)


def cross_entropy(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    ids = torch.where(mask, ids, -100)
    return -F.cross_entropy((states @ unembedding.T).float(), ids, reduction="none", ignore_index=-100)


def trl(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logp = import_module("trl.trainer.utils").selective_log_softmax(
        states @ unembedding.T, ids, row_mask=mask
    )
    return torch.where(mask, logp, 0.0)


def liger(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(unembedding, states, torch.where(mask, ids, -100))


def cut_cross_entropy(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return -loss(states, unembedding, torch.where(mask, ids, -100), reduction="none")


class System(NamedTuple):
    """work: see `LogProbs`. held: logits [N, V] in fp32 that it has at most, at once. needs: a package."""

    work: LogProbs
    held: int
    needs: str | None = None
    cuda_only: bool = False


SYSTEMS: dict[str, System] = {
    "naive": System(naive, held=4),
    "F.cross_entropy": System(cross_entropy, held=4),
    "TRL": System(trl, held=4, needs="trl"),
    "minirlhf": System(minirlhf, held=0),
    "minirlhf, logits kept": System(minirlhf_kept, held=2),
    "Liger": System(liger, held=0, needs="liger_kernel", cuda_only=True),
    "cut-cross-entropy": System(cut_cross_entropy, held=0, needs="cut_cross_entropy", cuda_only=True),
}
