"""Hypothesis strategies for ragged batches: the inputs on which most masking bugs show.

Rows have unequal prompts and responses, some are empty, some run to the last column, some have holes (the
tokens of a tool); square shapes (B = T) are as likely as all others together. Numbers are dyadic, so that
they shrink well and are exact in every dtype.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Batch(NamedTuple):
    """A mask [B, T] and as many fp64 tensors [B, T] as were asked for."""

    mask: Tensor
    tensors: tuple[Tensor, ...]


@st.composite
def masks(draw: st.DrawFn, *, max_rows: int = 4, max_length: int = 7, holes: bool = True) -> Tensor:
    """[B, T] bool masks `[prompt][response][padding]` made from lengths."""
    length = draw(st.integers(1, max_length))
    square = draw(st.booleans()) and length <= max_rows
    rows = length if square else draw(st.integers(1, max_rows))
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        start = draw(st.integers(0, length))  # start = length: nothing counts
        stop = draw(st.integers(start, length) | st.just(length))
        mask[row, start:stop] = True
        if holes and stop - start > 2 and draw(st.booleans()):
            mask[row, draw(st.integers(start + 1, stop - 2))] = False
    return mask


def numbers(*shape: int, low: float = -4.0, high: float = 4.0) -> st.SearchStrategy[Tensor]:
    """fp64 tensors of one shape with multiples of 1/8 between low and high."""
    count = int(torch.Size(shape).numel())
    eighths = st.integers(int(low * 8), int(high * 8))
    return st.lists(eighths, min_size=count, max_size=count).map(
        lambda values: (torch.tensor(values, dtype=torch.float64) / 8).reshape(shape)
    )


@st.composite
def batches(draw: st.DrawFn, *, tensors: int, holes: bool = True) -> Batch:
    """Ragged batches with `tensors` tensors [B, T]."""
    mask = draw(masks(holes=holes))
    return Batch(mask, tuple(draw(numbers(*mask.shape)) for _ in range(tensors)))


def poisoned(x: Tensor, mask: Tensor, poison: float = torch.nan) -> Tensor:
    """x with `poison` wherever the mask is False; x may have trailing axes."""
    trailing = (1,) * (x.ndim - mask.ndim)
    return torch.where(mask.reshape(*mask.shape, *trailing), x, poison)
