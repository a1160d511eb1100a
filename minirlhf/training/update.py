"""The one update step: gradients by torch.func, exact accumulation, clipping, fused AdamW, schedules.

    loss(params, micro_batch, normaliser) -> (scalar, aux)          a pure function; the stage writes it
    update(state, micro_batches, normaliser, ...) -> (state, metrics)

`params` are what the model computes with; the state's are what is trained, and `trained.Whole` leads from one
to the other.

A loss returns the sum over *its* micro-batch divided by the normaliser of the *whole* batch (the number of
trained tokens, of pairs, ...). Contributions then simply add up, and any split of a batch has the gradient of
the batch: no mean of means, however unequal the token counts are.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw
from torch.utils import _pytree as pytree

from minirlhf.models.interface import Params
from minirlhf.training.trained import FULL, Form, Whole

Loss = Callable[[Params, Any, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(params, micro_batch, normaliser of the whole batch) -> (its share of the loss, of each metric)."""

Differentiated = Callable[[Params, Any, Tensor], tuple[Params, tuple[Tensor, dict[str, Tensor]]]]
"""(params, micro_batch, normaliser) -> (gradient, (value, aux)) of a loss."""

Differentiate = Callable[[Loss], Differentiated]
"""How the gradient of a loss is computed: `differentiated`, or `compiling.Compiler`."""

# Devices with a fused AdamW kernel in torch >= 2.11; on any other the multi-tensor ("foreach") path runs.
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


class TrainState(NamedTuple):
    """What a training step carries on; it owns all of its tensors.

    Attributes:
        params: what is trained.
        exp_avg: first moments of Adam, shaped like `params`.
        exp_avg_sq: second moments, likewise.
        step: optimiser steps taken so far.
    """

    params: Params
    exp_avg: Params
    exp_avg_sq: Params
    step: int


Optimiser = Callable[[TrainState, Params, float], TrainState]
"""(state, gradients, learning_rate) -> next state; may write into the buffers that the state owns."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite; the parameters are still those of the step before.

    Attributes:
        step: the optimiser step that failed, counted from 1 (0: before the first).
        what: what was not finite.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: not finite: {what}")
        self.step = step
        self.what = what


def init_state(params: Params) -> TrainState:
    """A state that owns a copy of `params`: training never writes into the caller's tensors."""
    zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
    return TrainState(
        params=pytree.tree_map(lambda x: x.detach().clone(memory_format=torch.contiguous_format), params),
        exp_avg=pytree.tree_map(zeros, params),
        exp_avg_sq=pytree.tree_map(zeros, params),
        step=0,
    )


def adamw(
    state: TrainState,
    grads: Params,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> TrainState:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), in place on the state's own buffers.

    Args:
        state: is used up; read only the state that comes back.
        grads: the gradient, shaped like `state.params`.
        learning_rate: step size, per step.
        betas: decay of the first and of the second moment, per step.
        eps: added to the root of the bias-corrected second moment (PyTorch's convention).
        weight_decay: decoupled decay per unit of learning rate; applies to every parameter.
    """
    params = pytree.tree_leaves(state.params)
    device = params[0].device
    fused = device.type in FUSED_DEVICES
    # The kernel counts steps in one tensor per parameter and adds 1 itself: views of one small buffer.
    steps = torch.full((len(params),), float(state.step), device=device if fused else "cpu").unbind()
    _torch_adamw(
        params,
        [grad.contiguous() for grad in pytree.tree_leaves(grads)],  # the fused kernel does not read strides
        pytree.tree_leaves(state.exp_avg),
        pytree.tree_leaves(state.exp_avg_sq),
        [],
        list(steps),
        foreach=not fused,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    return state._replace(step=state.step + 1)


def differentiated(loss: Loss) -> Differentiated:
    """torch.func's gradient of a loss, operation by operation.

    As torch.func.grad_and_value, which however records its backward pass for a second derivative: a step of
    GPT-2 124M on 768 tokens then peaks at 2.7 GB instead of 1.9.
    """

    def gradient_and_value(
        params: Params, batch: Any, normaliser: Tensor
    ) -> tuple[Params, tuple[Tensor, dict[str, Tensor]]]:
        value, pull, *aux = torch.func.vjp(lambda each: loss(each, batch, normaliser), params, has_aux=True)
        (grads,) = pull(torch.ones_like(value), retain_graph=False, create_graph=False)
        return grads, (value, aux[0])

    return gradient_and_value


def gradient(
    params: Params,
    micro_batches: Sequence[Any],
    normaliser: Tensor,
    *,
    loss: Loss,
    differentiate: Differentiate = differentiated,
    whole: Whole = FULL,
) -> tuple[Params, Tensor, dict[str, Tensor]]:
    """Gradient, loss and metrics of the whole batch: the sum over its micro-batches.

    The gradient is by `params`, the trained tree, and of its types: what is computed in fewer bits is added
    up in the tree's own.

    Raises:
        ValueError: there is no micro-batch.
    """
    if not micro_batches:
        raise ValueError("expected at least one micro-batch, got none")
    one, cast = differentiate(partial(_of_trained, loss, whole.whole)), whole.cast(params)
    grads, (value, aux) = one(cast, micro_batches[0], normaliser)
    leaves, layout = pytree.tree_flatten(grads)
    del grads
    for i, owner in enumerate(pytree.tree_leaves(params)):
        leaves[i] = leaves[i].to(owner.dtype)  # one after the other: never two whole gradients at once
    if len(micro_batches) == 1:
        return pytree.tree_unflatten(leaves, layout), value, aux
    leaves = _owned(leaves)
    for batch in micro_batches[1:]:
        more, (more_value, more_aux) = one(cast, batch, normaliser)
        for leaf, part in zip(leaves, pytree.tree_leaves(more), strict=True):
            leaf += part  # in the type of leaf
        del more
        value = value + more_value
        aux = {name: aux[name] + more_aux[name] for name in aux}
    return pytree.tree_unflatten(leaves, layout), value, aux


def update(
    state: TrainState,
    micro_batches: Sequence[Any],
    normaliser: Tensor,
    *,
    loss: Loss,
    optimiser: Optimiser,
    learning_rate: float,
    max_grad_norm: float,
    differentiate: Differentiate = differentiated,
    whole: Whole = FULL,
) -> tuple[TrainState, dict[str, Tensor]]:
    """One optimiser step on one batch, given as micro-batches.

    Args:
        state: is used up; read only the state that comes back.
        micro_batches: parts of the batch, of any sizes, each as `loss` takes it.
        normaliser: [] what the sum over the whole batch is divided by (passed on to `loss`); positive.
        loss: see `Loss`.
        optimiser: `adamw`, with its keywords bound, or any `Optimiser`.
        learning_rate: of this step.
        max_grad_norm: the gradient is scaled down to this global L2 norm where it exceeds it; inf: never.
        differentiate: see `Differentiate`.
        whole: from the state's parameters to the model's.

    Returns:
        The next state, and "loss", "grad_norm" (before clipping) and the summed aux, as tensors.

    Raises:
        ValueError: there is no micro-batch, nothing in the batch counts (its normaliser is not positive), or
            max_grad_norm is not positive.
        NonFiniteError: the loss or the gradient is NaN or infinite; the state was not touched.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive (inf: no clipping), got {max_grad_norm}")
    grads, value, aux = gradient(
        state.params, micro_batches, normaliser, loss=loss, differentiate=differentiate, whole=whole
    )
    leaves, layout = pytree.tree_flatten(grads)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=_at_least_fp32(g.dtype)) for g in leaves])
    norm = torch.linalg.vector_norm(norms)
    read = [each.detach().to(norm) for each in (value, norm, normaliser)]
    loss_now, norm_now, counted = torch.stack(read).tolist()  # a step's only read
    if not 0 < counted < math.inf:  # also refuses NaN
        raise ValueError(
            f"step {state.step + 1}: normaliser must be positive and finite, got {counted:g} "
            f"(0: nothing in the batch counts)"
        )
    if not (math.isfinite(loss_now) and math.isfinite(norm_now)):
        raise NonFiniteError(state.step + 1, _blame(loss_now, norms, grads, state.params))
    if norm_now > max_grad_norm:
        leaves = _owned(leaves)
        for leaf in leaves:
            leaf *= max_grad_norm / norm_now
        grads = pytree.tree_unflatten(leaves, layout)
    state = optimiser(state, grads, learning_rate)
    return state, {"loss": value.detach(), "grad_norm": norm, **aux}


def cosine_with_warmup(step: int, *, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Learning rate of the step after `step` completed ones: linear up to `peak`, then half a cosine down.

    Step 0 has peak / (warmup + 1), so no step is lost; step `warmup` has `peak`; `floor` is reached at
    `total`, one step after the last.

    >>> [round(cosine_with_warmup(s, total=4, warmup=1, peak=1.0), 2) for s in range(5)]
    [0.5, 1.0, 0.75, 0.25, 0.0]
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"expected 0 <= warmup <= total, got warmup {warmup}, total {total}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= total:
        return floor
    progress = (step - warmup) / (total - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant_with_warmup(step: int, *, warmup: int, peak: float) -> float:
    """Learning rate of the step after `step` completed ones: linear up to `peak`, which it keeps.

    >>> [constant_with_warmup(s, warmup=1, peak=1.0) for s in range(3)]
    [0.5, 1.0, 1.0]
    """
    if warmup < 0:
        raise ValueError(f"expected warmup >= 0, got {warmup}")
    return peak * min(1.0, (step + 1) / (warmup + 1))


def _of_trained(
    loss: Loss, whole: Form, trained: Params, batch: Any, normaliser: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as a function of what is trained."""
    return loss(whole(trained), batch, normaliser)


def _owned(leaves: list[Tensor]) -> list[Tensor]:
    """The same numbers, safe to write to: a gradient may be a view, or share memory with another."""
    seen: set[int] = set()
    own = []
    for leaf in leaves:
        memory = leaf.untyped_storage()
        whole = memory.nbytes() == leaf.numel() * leaf.itemsize and memory._cdata not in seen
        own.append(leaf if whole else leaf.clone(memory_format=torch.contiguous_format))
        seen.add(memory._cdata)  # an identity that tensors without memory have, too
    return own


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def non_finite(params: Params) -> list[str]:
    """The paths of the leaves that hold NaN or infinity."""
    leaves = pytree.tree_flatten_with_path(params)[0]
    finite = torch.stack([leaf.isfinite().all() for _, leaf in leaves]).tolist()
    return [_dotted(path) for (path, _), each in zip(leaves, finite, strict=True) if not each]


def _blame(loss: float, norms: Tensor, grads: Params, params: Params) -> str:
    """Names what was not finite: parameters, then the cause lies before this step; the loss; gradients."""
    found = [] if math.isfinite(loss) else [f"loss = {loss}"]
    paths = [_dotted(path) for path, _ in pytree.tree_flatten_with_path(grads)[0]]
    bad = [path for path, norm in zip(paths, norms.tolist(), strict=True) if not math.isfinite(norm)]
    if bad:
        found.append(f"gradient of {listed(bad)}")
    if before := non_finite(params):
        found.insert(0, f"parameters before the step: {listed(before)}")
    return "; ".join(found) or "the global norm of the gradient"


def listed(names: Sequence[str]) -> str:
    """The first five, and how many more.

    >>> listed(["a", "b"]), listed("abcdefg")
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
