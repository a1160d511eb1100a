"""Activation recomputation under torch.func: a block keeps only its inputs, and runs again in the backward pass.

    forward   y = block(θ, x)                            keeps θ and x, none of what lies between
    backward  (∂y/∂θ)ᵀ g, (∂y/∂x)ᵀ g                     by torch.func.vjp of block at θ, x

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), one segment per block:
memory for the activations of one block and for the stream between blocks, in exchange for a second forward
pass of the blocks. The same numbers are computed twice, so the gradient is the same.

`torch.utils.checkpoint` does this for autograd by hooks on saved tensors, which torch.func refuses.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minirlhf.models.interface import LanguageModel, Params

Rebuild = Callable[[list[Tensor]], Any]


def recomputing(model: LanguageModel) -> LanguageModel:
    """The same model, whose blocks are computed again in the backward pass: for a training loss.

    Without a gradient (sampling, evaluation) its blocks run as they are.
    """
    return model._replace(states=partial(model.states, run=recomputed))


def recomputed(block: Callable[..., Tensor], params: Params, x: Tensor, *context: Any) -> Tensor:
    """`interface.RunBlock`: block(params, x, *context), of which only the inputs are kept for the backward.

    Args:
        block: a pure function. params, x, context: whatever trees; their tensors are found in dicts, lists,
            tuples, in what a function or a `partial` has closed over, and in the attributes of objects that
            stand for a tensor (an adapter, a packed weight). Gradients reach all of them.
    """
    if not torch.is_grad_enabled():
        return block(params, x, *context)
    tensors, rebuild = opened((block, params, x, context))

    def work(*tensors: Tensor) -> Tensor:
        block, params, x, context = rebuild(list(tensors))
        return block(params, x, *context)

    return _Recomputed.apply(work, *tensors)


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
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[1:])
        found = iter(_Gradient.apply(ctx.work, wanted, by_output, *ctx.saved_tensors))
        return None, *(next(found) if want else None for want in wanted)


class _Gradient(torch.autograd.Function):
    """Of `_Recomputed`; a function of its own, so that nothing of the second pass is kept for a third."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        work: Callable[..., Tensor], wanted: tuple[bool, ...], by_output: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return _pulled_back(work, wanted, by_output, *tensors)  # under no_grad: nothing of it is kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.work, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *by_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives: of the pull-back, by autograd's own rules."""
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
    _, pull = torch.func.vjp(of_wanted, *chosen)
    again = torch.is_grad_enabled()
    return pull(cotangents, retain_graph=again, create_graph=again)


def opened(tree: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors of a tree, and how the same tree is made of others; see `recomputed` for what is a tree."""
    leaves, layout = pytree.tree_flatten(tree)
    parts = [_opened_leaf(leaf) for leaf in leaves]

    def rebuild(tensors: list[Tensor]) -> Any:
        made, start = [], 0
        for own, make in parts:
            made.append(make(tensors[start : start + len(own)]))
            start += len(own)
        return pytree.tree_unflatten(made, layout)

    return [tensor for own, _ in parts for tensor in own], rebuild


def _opened_leaf(leaf: Any) -> tuple[list[Tensor], Rebuild]:
    if isinstance(leaf, Tensor):
        return [leaf], lambda tensors: tensors[0]
    if isinstance(leaf, partial):
        tensors, rebuild = opened((leaf.func, leaf.args, leaf.keywords))
        make = _partial_again
    elif isinstance(leaf, types.FunctionType) and leaf.__closure__:
        tensors, rebuild = opened([cell.cell_contents for cell in leaf.__closure__])
        make = partial(_function_again, leaf)
    elif hasattr(type(leaf), "__torch_function__"):  # it stands for a tensor
        tensors, rebuild = opened(vars(leaf))
        make = partial(_object_again, leaf)
    else:
        tensors, rebuild, make = [], None, None
    if not tensors or rebuild is None or make is None:
        return [], lambda _: leaf
    return tensors, lambda tensors: make(rebuild(tensors))


def _partial_again(parts: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Any:
    function, args, keywords = parts
    return partial(function, *args, **keywords)


def _function_again(function: types.FunctionType, contents: list[Any]) -> Any:
    cells = tuple(types.CellType(each) for each in contents)
    again = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    again.__kwdefaults__ = function.__kwdefaults__
    return again


def _object_again(stand_in: Any, attributes: dict[str, Any]) -> Any:
    again = object.__new__(type(stand_in))
    vars(again).update(attributes)
    return again
