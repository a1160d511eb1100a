"""From a law and a uniform to a token: the inverse of the cumulative distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

BOUNDARY = 1e-5
"""Probability; a uniform this close to another token's interval may fall into it under another rounding."""

_BLOCK = 256


class Draw(NamedTuple):
    """token: int64 [B]; near_boundary: bool [B], another token's interval lay within BOUNDARY."""

    token: Tensor
    near_boundary: Tensor


def inverse_cdf(law_logp: Tensor, uniform: Tensor) -> Draw:
    """The token v whose interval [F(v - 1), F(v)) of the cumulative law holds the uniform.

    One uniform per row instead of a noise tensor [B, V]. Sums run in fp64: in fp32 the last of 50,257
    intervals would be off by more than a rare token's width. Only sums of blocks are accumulated over the
    vocabulary, and tokens within the one block that holds the uniform: a cumulative sum over all of [B, V]
    took ten times as long at B = 128. Tokens of probability 0 have no interval and are never drawn; where
    rounding leaves the total below the uniform, the last token with mass is taken.

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
    batch, vocabulary = law_logp.shape
    uniform = uniform.to(law_logp.device, torch.float64)[:, None].contiguous()
    mass = torch.nn.functional.pad(law_logp.exp(), (0, -vocabulary % _BLOCK)).view(batch, -1, _BLOCK)
    up_to = mass.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, blocks]
    last_block = _first_total(up_to)
    block = torch.minimum(torch.searchsorted(up_to, uniform, right=True), last_block)
    before = torch.where(block > 0, up_to.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = mass[torch.arange(batch, device=mass.device), block[:, 0]]
    cumulative = before + inside.cumsum(-1, dtype=torch.float64)  # [B, _BLOCK]
    last = _first_total(cumulative)
    place = torch.minimum(torch.searchsorted(cumulative, uniform, right=True), last)
    upper = cumulative.gather(1, place)
    lower = torch.where(place > 0, cumulative.gather(1, (place - 1).clamp(min=0)), before)
    near_lower = (lower > 0) & (uniform - lower < BOUNDARY)  # nobody lies below 0, nor above the last token
    near_upper = ((block < last_block) | (place < last)) & (upper - uniform < BOUNDARY)
    token = (block * _BLOCK + place)[:, 0]
    return Draw(token.to(device), (near_lower | near_upper)[:, 0].to(device))


def _first_total(cumulative: Tensor) -> Tensor:
    """Where a cumulative sum [B, n] first reaches its total, [B, 1]: the last entry with mass."""
    return torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())


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
