"""Drawing a token and normalising its logits: by the compiled kernels where these can, else by torch."""

import torch
from torch import Tensor

from minirlhf.kernels import cpu
from minirlhf.rollout.draw import BOUNDARY, Draw, inverse_cdf


def drawn(law_logp: Tensor, uniform: Tensor) -> Draw:
    """`inverse_cdf`, whose arguments these are; the kernel sums in another order."""
    if _by_kernel(law_logp):
        return Draw(*cpu.draw(law_logp, uniform, BOUNDARY))
    return inverse_cdf(law_logp, uniform)


def log_normaliser(logits: Tensor) -> Tensor:
    """log Σ_v e^(z_v) of each row of [B, V]."""
    return cpu.logsumexp(logits) if _by_kernel(logits) else logits.logsumexp(-1)


def _by_kernel(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and cpu.available()
