"""How a subject may reduce one number per element to fewer: each way is a function of elements and mask."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor, Tensor | None], Tensor]


class Reduction(NamedTuple):
    """One way.

    result: the shape that is left, in letters; note: what its user should know, "" for nothing.
    by_row: the result still has one entry per row, or element, of the batch.
    """

    name: str
    result: tuple[str, ...]
    apply: Reduce
    note: str = ""

    @property
    def by_row(self) -> bool:
        return bool(self.result)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x


def _count(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask.sum(-1).to(torch.float64)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sums of the rows; the elements under the mask are 0 already."""
    return x.sum(-1)


_PADDED = "it depends on how far the batch is padded"


def of_shape(shape: tuple[str, ...], *, masked: bool) -> tuple[Reduction, ...]:
    """The ways known for a canonical result of this shape, the likeliest first."""
    whole = Reduction("one value per element", shape, _kept)
    if len(shape) == 1:
        return (
            whole,
            Reduction("mean over the batch", (), lambda x, m: x.mean()),
            Reduction("sum over the batch", (), lambda x, m: x.sum()),
        )
    if not masked:
        return (
            whole,
            Reduction("mean over all elements", (), lambda x, m: x.mean()),
            Reduction("sum over all elements", (), lambda x, m: x.sum()),
        )
    return (
        whole,
        Reduction("token mean", (), lambda x, m: x.sum() / _count(m).sum()),
        Reduction("mean over sequences of token means", (), lambda x, m: (_rows(x, m) / _count(m)).mean()),
        Reduction("mean over sequences of token sums", (), lambda x, m: _rows(x, m).mean()),
        Reduction("token sum", (), lambda x, m: x.sum()),
        Reduction("sum over batch size × padded length", (), lambda x, m: x.mean(), _PADDED),
        Reduction("token sum over the padded length", (), lambda x, m: x.sum() / x.shape[-1], _PADDED),
        Reduction("token sum per sequence", shape[:1], _rows),
        Reduction("token mean per sequence", shape[:1], lambda x, m: _rows(x, m) / _count(m)),
    )
