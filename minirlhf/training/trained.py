"""What a stage trains, and how the parameters that the model computes with come of it.

    trained tree --cast, once a step--> --whole, inside the gradient--> what the model computes with
    trained tree --kept--> what is evaluated and saved: fp32

Full training in fp32 trains the model's own parameters, and all three are the identity. With adapters the
tree is small, and `whole` puts it beside a base that is never written to. With bf16 the tree stays fp32, and
so do Adam's moments: one step changes a weight by less than the 2⁻⁸ of itself that bf16 can tell. The model
computes with a rounded copy, made outside the gradient and once for all micro-batches of a step: a cast has
derivative 1, so the gradient by the copy is the gradient by the master, and `update` adds up those of the
micro-batches in the master's type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapters import ALL_LINEAR, adapter_params, joined
from minirlhf.models.families import family_of
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.runs import InputError

Precision = Literal["fp32", "bf16"]
"""What a model computes in while it is trained."""

Form = Callable[[Params], Params]


@dataclass(frozen=True)
class TrainedConfig:
    """What of a model is trained, and in which precision it computes meanwhile."""

    precision: Precision = "fp32"
    """bf16: the model computes in bf16; trained parameters, gradients' sums, Adam's moments, log-probs and
    reductions stay fp32."""
    adapter_rank: int | None = None
    """Rank of low-rank adapters, which are trained in the place of all parameters (PEFT's r; 8 is usual, with
    ten times the learning rate of full training); None: all parameters are trained."""
    adapter_alpha: float = 16.0
    """α: adapters act with the factor α / rank (PEFT's lora_alpha)."""
    adapter_targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of the linear layers that get adapters, such as c_attn or mlp.c_proj (PEFT's target_modules);
    all-linear: all of the blocks."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise InputError(f"adapter_rank must be at least 1, or left out, got {self.adapter_rank}")
        if not 0 < self.adapter_alpha < float("inf"):
            raise InputError(f"adapter_alpha must be positive, got {self.adapter_alpha}")
        if not self.adapter_targets:
            raise InputError(f"adapter_targets: expected names of linear layers, or {ALL_LINEAR}, got none")


def as_it_is(params: Params) -> Params:
    """The identity."""
    return params


class Whole(NamedTuple):
    """Pure functions from a trained tree to a model's parameters.

    cast: to what is computed with, same structure; applied once a step, outside the gradient.
    whole: cast tree -> the parameters that the model's functions take; differentiated through.
    kept: trained tree -> parameters to evaluate and to save, unrounded; adapted weights are still apart.
    """

    cast: Form = as_it_is
    whole: Form = as_it_is
    kept: Form = as_it_is

    def computing(self, trained: Params) -> Params:
        """What the model computes with: the same numbers as in the training step."""
        return self.whole(self.cast(trained))


FULL = Whole()
"""All parameters are trained, in the precision that they have."""


class Trained(NamedTuple):
    """What is trained of one model.

    initial: the tree before the first step; shares tensors with the model it came from.
    whole: how it becomes the model's parameters.
    frozen: a model that is not trained (a reference) -> what it computes with; shares copies that were made.
    """

    initial: Params
    whole: Whole
    frozen: Form


def trained(
    model: LanguageModel, params: Params, config: TrainedConfig, *, generator: torch.Generator
) -> Trained:
    """What the config says is trained of a model.

    Args:
        params: the model as it starts; not written to. With adapters it is their base, and stays in use.
        generator: of fresh adapters; not advanced without.

    Raises:
        InputError: see `models.adapters.adapter_params`.
    """
    cast = _CASTS[config.precision]
    if config.adapter_rank is None:
        return Trained(params, Whole(cast=cast), cast)
    adapters = adapter_params(
        model, params, rank=config.adapter_rank, targets=config.adapter_targets, generator=generator
    )
    join = partial(
        joined,
        scale=config.adapter_alpha / config.adapter_rank,
        outputs_first=family_of(model).outputs_first,
    )
    base = cast(params)
    whole = Whole(cast=cast, whole=partial(join, base), kept=partial(join, params))
    made = list(zip(tree_leaves(params), tree_leaves(base), strict=True))
    return Trained(adapters, whole, partial(_frozen, cast=cast, made=made))


class TrainingBytes(NamedTuple):
    """Bytes that training takes beside the base and the activations.

    trained: the trained tree. copy: what it is cast to for computing. gradients: in the tree's own type.
    optimiser: Adam's two moments.
    """

    trained: int
    copy: int
    gradients: int
    optimiser: int


def training_bytes(initial: Params, whole: Whole = FULL) -> TrainingBytes:
    """What one optimiser step holds of a trained tree."""
    size = _bytes(tree_leaves(initial))
    cast = whole.cast(initial)
    copied = [a for a, b in zip(tree_leaves(cast), tree_leaves(initial), strict=True) if a is not b]
    return TrainingBytes(trained=size, copy=_bytes(copied), gradients=size, optimiser=2 * size)


def _bytes(leaves: Sequence[Tensor]) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in leaves)


def _to_bf16(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(torch.bfloat16), tree)


def _frozen(params: Params, *, cast: Form, made: Sequence[tuple[Tensor, Tensor]]) -> Params:
    """The cast parameters; a tensor that was cast before is not cast again."""
    known = {id(before): after for before, after in made}
    return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else cast(leaf), params)


_CASTS: dict[Precision, Callable[[Any], Any]] = {"fp32": as_it_is, "bf16": _to_bf16}
