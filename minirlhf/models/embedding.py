"""The token embedding, whose gradient takes the memory of the rows that were read, and not of the table.

    x = E[tokens]        ∂/∂E = Σ over positions of the gradient by x, in the row of the position's token

The gradient is [V, D] all the same, and almost all of it is zeros that nobody writes. On the CPU it lies in
pages that are new to the process, which the system backs by one page of zeros until they are written to.
Where embedding and unembedding are tied, theirs is the largest gradient of a small model, and it is added to
the unembedding's when all other gradients are there.
"""

import mmap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels.fused import one_after_the_other

_LARGE = 2**20  # bytes from which new pages are worth asking for


def embedded(tokens: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding(tokens, weight)`: ids [...] and a table [V, D] -> [..., D]."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.embedding(tokens, weight)
    return _Embedding.apply(tokens, weight)


class _Embedding(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        tokens, weight = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(tokens)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[None, Tensor]:
        return None, _Scattered.apply(*ctx.saved_tensors, by_outputs[0], ctx.rows)


class _Scattered(torch.autograd.Function):
    """Of `_Embedding`; a function of its own, since vmap cannot write into a table that it did not make."""

    @staticmethod
    def forward(tokens: Tensor, by_rows: Tensor, rows: int) -> Tensor:
        flat = by_rows.reshape(-1, by_rows.shape[-1])
        return _zeros(rows, flat).index_add_(0, tokens.reshape(-1), flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[None, Tensor, None]:
        return None, embedded(ctx.saved_tensors[0], by_outputs[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        (stacked,), (place,) = one_after_the_other(
            lambda *one: (_Scattered.apply(*one),), info.batch_size, in_dims, given
        )
        return stacked, place


def _zeros(rows: int, like: Tensor) -> Tensor:
    """[rows, D] of the type and on the device of [N, D]; large ones on the CPU in pages of their own."""
    size = rows * like.shape[1] * like.itemsize
    if size < _LARGE or like.device.type != "cpu" or type(like) is not Tensor:  # a fake has no memory
        return like.new_zeros(rows, like.shape[1])
    room = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared pages come when read, too
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would be as large as 700 rows of GPT-2's
        room.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=like.dtype).view(rows, -1)
