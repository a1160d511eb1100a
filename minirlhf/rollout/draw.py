"""From a law and a uniform to a token: the inverse of the cumulative distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

BOUNDARY = 1e-5
"""Probability; a uniform this close to another token's interval may fall into it under another rounding."""


class Draw(NamedTuple):
    """token: int64 [B]; near_boundary: bool [B], another token's interval lay within BOUNDARY."""

    token: Tensor
    near_boundary: Tensor


def inverse_cdf(law_logp: Tensor, uniform: Tensor) -> Draw:
    """The token v whose interval [F(v - 1), F(v)) of the cumulative law holds the uniform.

    One uniform per row instead of a noise tensor [B, V]. The sum runs in fp64: in fp32 the last of 50,257
    intervals would be off by more than a rare token's width. Tokens of probability 0 have no interval and
    are never drawn; where rounding leaves the total below the uniform, the last token with mass is taken.

    Args:
        law_logp: [B, V] normalised log-probs, -inf for excluded tokens.
        uniform: fp64 [B] in [0, 1), in any memory that is convertible to the law's device.

    Raises:
        ValueError: law_logp is not [B, V], or uniform not [B].

    >>> inverse_cdf(torch.tensor([[0.5, 0.0, 0.5]]).log().expand(3, 3), torch.tensor([0.0, 0.499995, 0.9]))
    Draw(token=tensor([0, 0, 2]), near_boundary=tensor([False,  True, False]))
    """
    if law_logp.ndim != 2 or uniform.shape != law_logp.shape[:1]:
        raise ValueError(
            f"expected law_logp [B, V] and uniform [B], got {list(law_logp.shape)} and {list(uniform.shape)}"
        )
    device = law_logp.device
    if device.type == "mps":  # it has no fp64
        law_logp = law_logp.cpu()
    uniform = uniform.to(law_logp.device, torch.float64)[:, None].contiguous()
    cumulative = law_logp.exp().cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())  # where the total is first reached
    token = torch.minimum(torch.searchsorted(cumulative, uniform, right=True), last)
    upper = cumulative.gather(1, token)
    lower = torch.where(token > 0, cumulative.gather(1, (token - 1).clamp(min=0)), 0.0)
    near_lower = (lower > 0) & (uniform - lower < BOUNDARY)  # nobody lies below 0, nor above the last token
    near_upper = (token < last) & (upper - uniform < BOUNDARY)
    return Draw(token[:, 0].to(device), (near_lower | near_upper)[:, 0].to(device))


def check_law(law_logp: Tensor, logits: Tensor) -> None:
    """Refuses what is no law over the logits' tokens; drawing from it would be silently biased.

    Raises:
        ValueError: another shape, or rows whose logsumexp is not 0 (NaN included).
    """
    if law_logp.shape != logits.shape:
        raise ValueError(f"law must keep the shape {list(logits.shape)}, got {list(law_logp.shape)}")
    excess = law_logp.logsumexp(-1).abs().max()
    if not excess < 1e-4:  # a comparison with NaN is False
        raise ValueError(
            f"law must give normalised log-probs of finite logits; logsumexp is off by {float(excess):.3g}"
        )
