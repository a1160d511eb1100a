"""A row's tokens, read through attention alone: for models that are tables rather than networks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models.interface import Attend, CacheShape


def shape(places: int, vocabulary: int) -> CacheShape:
    """What `read` keeps per token: one layer, one head, a one-hot vector of (position, token)."""
    return CacheShape(1, 1, places * vocabulary)


def read(tokens: Tensor, positions: Tensor, attend: Attend, *, places: int, vocabulary: int) -> Tensor:
    """[B, T, places] the tokens up to each token, itself included; -1 behind it.

    All scores are 0, so attention is the mean of the one-hot vectors so far: a token that is missing, twice
    there, another row's or at another position shows.
    """
    where = positions.expand(tokens.shape)
    marks = F.one_hot(where * vocabulary + tokens, places * vocabulary).float()[:, None]  # [B, 1, T, P · V]
    nothing = torch.zeros_like(marks)
    mean = attend(0, nothing, nothing, marks, scale=None, window=None)[:, 0]
    counts = (mean * (where + 1)[..., None]).unflatten(-1, (places, vocabulary))
    seen = counts.round()
    assert (counts - seen).abs().max() < 1e-3, "not a mean over position + 1 tokens"
    there = torch.arange(places) <= where[..., None]
    assert torch.equal(seen.sum(-1), there.float()), "a position was skipped, or written twice"
    return torch.where(there, seen.argmax(-1), -1)
