"""The products of linear layers, by the processor's tiles where these are faster than torch's own.

`linear`, `addmm` and `matmul` are torch's functions of the same names, and call them wherever
`cpu.multiplies` says no: on another device, in another type, for small sizes, or for a weight that answers
for itself. A product is an operator, so that a compiler sees one node, and its derivatives are products:

    y = x w + b,   ∂x = g wᵀ,   ∂w = xᵀ g,   ∂b = Σ_n g_n
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], transposed, plus bias [out]: [..., out]."""
    if isinstance(weight, Tensor) and _ours(x, weight.T):
        return _differentiable(x.reshape(-1, x.shape[-1]), weight.T, bias).view(
            *x.shape[:-1], weight.shape[0]
        )
    return F.linear(x, weight, bias)


def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """bias [out] plus x [N, in] times weight [in, out]: [N, out]."""
    if isinstance(weight, Tensor) and _ours(x, weight):
        return _differentiable(x, weight, bias)
    return torch.addmm(bias, x, weight)


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [N, in] times w [in, out]: [N, out]."""
    return _differentiable(x, w, None) if _ours(x, w) else x @ w


def mm(x: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """x w, written to `out`; without derivatives."""
    return cpu.matmul(x, w, out=out) if cpu.multiplies(x, w) else torch.mm(x, w, out=out)


def add_mm(x: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """x w, added to `out`; without derivatives."""
    return cpu.matmul(x, w, out=out, more=True) if cpu.multiplies(x, w) else out.addmm_(x, w)


def tell_compiler() -> None:
    """Lets `torch.compile` take a product as one node, with its derivatives; see `kernels.fused`."""
    global _known_to_compiler
    torch.compiler.allow_in_graph(_differentiable)
    _known_to_compiler = True


_known_to_compiler = False


def _ours(x: Tensor, w: Tensor) -> bool:
    if torch.compiler.is_compiling() and not _known_to_compiler:
        return False
    return w.ndim == 2 and x.shape[-1] == w.shape[0] and cpu.multiplies(x, w)


def _differentiable(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.matmul(x, w, bias=bias) if cpu.bare(x) else _Product.apply(x, w, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, w, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _ = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (by_y,), (x, w) = by_outputs, ctx.saved_tensors
        want_x, want_w, want_bias = ctx.needs_input_grad
        by_x = by_w = None
        if want_x:
            by_x = _Product.apply(by_y, w.T, None)
        if want_w:  # laid out as the weight is
            turned = w.stride(0) == 1 != w.stride(1)
            by_w = _Product.apply(by_y.T, x, None).T if turned else _Product.apply(x.T, by_y, None)
        return by_x, by_w, by_y.sum(0) if want_bias else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        x, w, bias = (
            each if place is None else each.movedim(place, 0)
            for each, place in zip(given, in_dims, strict=True)
        )
        y: Tensor = x @ w  # with sizes in front, of which one side may lack
        if bias is not None:
            y = y + (bias if in_dims[2] is None else bias[:, None])
        return (y, 0) if y.ndim == 3 else (y.expand(info.batch_size, *y.shape), 0)


def _product_shape(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("minirlhf::product", mutates_args=())
def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if cpu.multiplies(x, w):
        return cpu.matmul(x, w, bias=bias)
    return x @ w if bias is None else torch.addmm(bias, x, w)


_product.register_fake(_product_shape)
