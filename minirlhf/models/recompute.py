"""Activation recomputation under torch.func: a block keeps its inputs alone, and runs again going backward.

    forward   y = block(θ, x)                            keeps θ and x, none of what lies between
    backward  (∂y/∂θ)ᵀ g, (∂y/∂x)ᵀ g                     by torch.func.vjp of block at θ, x

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), one segment per block:
memory for the activations of one block and for the stream between blocks, in exchange for a second forward
pass of the blocks. The same numbers are computed twice, so the gradient is the same up to the order of
its sums.

`torch.utils.checkpoint` does this for autograd by hooks on saved tensors, which torch.func refuses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.opened import opened


def recomputing(model: LanguageModel) -> LanguageModel:
    """The same model, whose blocks are computed again in the backward pass: for a training loss.

    Without a gradient (sampling, evaluation) its blocks run as they are.
    """
    return model._replace(states=partial(model.states, run=recomputed))


def recomputed(block: Callable[..., Tensor], params: Params, x: Tensor, *context: Any) -> Tensor:
    """`interface.RunBlock`: block(params, x, *context), of which only the inputs are kept for the backward.

    Args:
        block: a pure function; nothing that it reads may be written to before the backward pass.
        params, x, context: trees whose tensors `opened` finds; gradients reach all of them, and what `block`
            itself is closed over.
    """
    if not torch.is_grad_enabled():  # a sampler's attention writes to its cache: it runs once
        return block(params, x, *context)
    found = opened((block, params, x, context))

    def work(*tensors: Tensor) -> Tensor:
        block, params, x, context = found.rebuild(tensors)
        return block(params, x, *context)

    return _Recomputed.apply(work, *found.tensors)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return work(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.work, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[1:])
        found = iter(_Gradient.apply(ctx.work, wanted, *by_outputs, *ctx.saved_tensors))
        return None, *(next(found) if want else None for want in wanted)


class _Gradient(torch.autograd.Function):
    """Of `_Recomputed`; a function of its own, so that nothing of the second pass is kept for a third."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        work: Callable[..., Tensor], wanted: tuple[bool, ...], by_output: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return _pulled_back(work, wanted, by_output, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.work, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *by_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives: of the pull-back, by torch's own rules."""
        pull = partial(_pulled_back, ctx.work, ctx.wanted)
        floating = tuple(each.is_floating_point() for each in ctx.saved_tensors)
        found = iter(_pulled_back(pull, floating, by_gradients, *ctx.saved_tensors))
        return None, None, *(next(found) if each else None for each in floating)


def _pulled_back(
    work: Callable[..., Any], wanted: tuple[bool, ...], cotangents: Any, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Cotangents pulled back through `work`, to those of its tensors that are wanted."""

    def of_wanted(*chosen: Tensor) -> Any:
        following = iter(chosen)
        return work(*(next(following) if want else each for each, want in zip(tensors, wanted, strict=True)))

    chosen = (each for each, want in zip(tensors, wanted, strict=True) if want)
    _, pull, *_ = torch.func.vjp(of_wanted, *chosen)
    again = torch.is_grad_enabled()  # for a further derivative; in a custom function's forward it is not
    return pull(cotangents, retain_graph=again, create_graph=again)
