"""A linear layer that keeps what its input was made of, where making it again costs next to nothing.

    y = f(x) W + b        keeps x and W, where autograd keeps f(x) as well

    backward, from g = ∂/∂y    ∂/∂W = f(x)ᵀ g,   ∂/∂b = Σ g,   ∂/∂x = (∂f/∂x)ᵀ (g Wᵀ),   f(x) computed again

f is an activation function or a norm, one pass over its input beside a product of thousands. In a block of
GPT-2 its outputs are 9 of 25 numbers per token and unit of width that the backward pass would read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.kernels import products
from minirlhf.models.stand_in import StandIn

LinearOf = Callable[[Callable[..., Tensor], tuple[Tensor, ...], Any, Tensor], Tensor]
"""`linear_of`, or `made_once`."""


def linear_of(make: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight: Any, bias: Tensor) -> Tensor:
    """make(*inputs) [..., in] times a weight [in, out], plus bias [out]: [..., out].

    Args:
        make: a pure function of tensors, closed over none: what it reads is among its inputs.
        inputs: differentiable, all of them.
        weight: a `StandIn` multiplies as it does, and keeps what it keeps.
    """
    if isinstance(weight, StandIn) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return made_once(make, inputs, weight, bias)
    return _LinearOf.apply(make, weight, bias, *inputs)


def made_once(make: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight: Any, bias: Tensor) -> Tensor:
    """`linear_of` as it stands: for a block that runs again as a whole."""
    x = make(*inputs)
    return products.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class _LinearOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(make: Callable[..., Tensor], weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:
        return made_once(make, inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.make, weight, _, *read = inputs
        ctx.save_for_backward(weight, *read)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradient.apply(ctx.make, by_outputs[0], *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """Of `_LinearOf`; a function of its own, so that nothing of the second pass is kept for a third."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        make: Callable[..., Tensor], by_output: Tensor, weight: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return _gradient(make, by_output, weight, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.make, *read = inputs
        ctx.save_for_backward(*read)

    @staticmethod
    def backward(ctx: Any, *by_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives: of the gradient, by torch's own rules."""
        _, pull, *_ = torch.func.vjp(lambda *read: _gradient(ctx.make, *read), *ctx.saved_tensors)
        return None, *pull(by_gradients)


def _gradient(
    make: Callable[..., Tensor], by_output: Tensor, weight: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """(by weight, by bias, by each input)."""
    x, pull, *_ = torch.func.vjp(make, *inputs)
    rows, by_rows = x.reshape(-1, x.shape[-1]), by_output.reshape(-1, by_output.shape[-1])
    again = torch.is_grad_enabled()  # for a further derivative; in a custom function's forward it is not
    by_inputs = pull(products.matmul(by_rows, weight.T).view(x.shape), retain_graph=again, create_graph=again)
    return products.matmul(rows.T, by_rows), by_rows.sum(0), *by_inputs
