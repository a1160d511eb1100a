"""How a stage computes its gradients: activations kept or recomputed, compiled or not; does that pay?

Measured for a DPO micro-batch of 8 rows of 96 tokens on a 2-core CPU (fp32, torch 2.13): seconds per
gradient, MiB beyond the parameters (of GPT-2 124M, 475 are the gradient itself), seconds of the first call:

                     GPT-2 124M (148 tensors)      1 M parameters (52 tensors)
    as it is             2.93    870 MiB               0.041    50 MiB
    recomputed           3.51    652                   0.054    39
    compiled             2.41            47 s          0.038    41         28 s

That is without tiles (AMX). With them, whose products a graph calls too, compiling saves nothing: a whole
step of GPT-2 124M takes 1.54 s as it is and 1.57 s compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch.utils import _pytree as pytree

from minirlhf.kernels import cpu
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.recompute import recomputing
from minirlhf.runs import InputError
from minirlhf.training.compiling import Compiler
from minirlhf.training.progress import note
from minirlhf.training.update import Differentiate, differentiated

Compile = Literal["auto", "on", "off"]
"""Whether the gradient of a training step is compiled."""


@dataclass(frozen=True)
class ComputeConfig:
    """How the gradient of a training step is computed: time and memory, not the gradient."""

    activation_recomputation: bool = False
    """Keep only the inputs of each block for the backward pass, and compute the block again there: much less
    memory for activations, for a second forward pass of the blocks."""
    compile: Compile = "off"
    """on: compile the gradient of the whole step. auto: where the steps to come make up for it, by an
    estimate that is said. off: never. Compiled sums have another order, so losses agree to rounding."""

    def __post_init__(self) -> None:
        if self.compile not in get_args(Compile):
            raise InputError(f"compile must be auto, on or off, got {self.compile!r}")


def model_of_loss(model: LanguageModel, config: ComputeConfig) -> LanguageModel:
    """The model as the loss of a step runs it."""
    return recomputing(model) if config.activation_recomputation else model


class Work(NamedTuple):
    """What there is to do in a stage, for the estimate whether compiling pays.

    entries: of all parameters. tensors: that hold them. tokens: read by all gradients of the stage. passes:
    micro-batches.
    """

    entries: int
    tensors: int
    tokens: int
    passes: int


def work_of(params: Params, *, tokens: int, passes: int) -> Work:
    """The work of training these parameters."""
    leaves = pytree.tree_leaves(params)
    return Work(sum(leaf.numel() for leaf in leaves), len(leaves), tokens, passes)


def differentiate_by(
    mode: Compile, work: Work, device: torch.device, *, name: str, tell: Callable[[str], None] = note
) -> Differentiate:
    """How a stage computes its gradients, and a line that says so unless the mode is off.

    Args:
        mode: on: compiled; off: not; auto: where the estimate says that it saves more than it costs.
        work: of the whole stage.
        device: that it trains on.
        name: of the stage.
        tell: gets what there is to say.
    """
    if mode == "off":
        return differentiated
    if mode == "auto":
        kind = "cpu with tiles" if device.type == "cpu" and cpu.has_tiles() else device.type
        if kind not in _PRICES:
            tell(f"{name}: steps are not compiled: whether that pays is not known for {device.type}")
            return differentiated
        saves, costs = estimate(work, _PRICES[kind])
        pays = saves > costs
        tell(
            f"{name}: steps are {'compiled' if pays else 'not compiled'}: over {work.passes:,} passes of "
            f"{work.entries:,} parameters that saves about {saves:,.0f} s and costs about {costs:,.0f} s"
        )
        if not pays:
            return differentiated
    return Compiler(name=name, needed=mode == "on", tell=tell)


class Price(NamedTuple):
    """Seconds that compiling saves per parameter entry and token; that a graph costs, and each parameter
    tensor in it."""

    entry_token: float
    graph: float
    graph_tensor: float


_PRICES = {"cpu": Price(3.5e-12, 17.5, 0.2), "cpu with tiles": Price(0.0, 17.5, 0.2)}  # of the table above
_GRAPHS = 2  # that a stage usually needs: of most micro-batches, and of one of a single row


def estimate(work: Work, price: Price) -> tuple[float, float]:
    """(Seconds that compiling saves over a stage, seconds that it costs), on a machine like that above.

    >>> tiny, gpt2 = Work(10**6, 52, tokens=10**6, passes=10**3), Work(124 * 10**6, 148, 10**6, 10**3)
    >>> [saves > costs for saves, costs in (estimate(work, _PRICES["cpu"]) for work in (tiny, gpt2))]
    [False, True]
    """
    saves = price.entry_token * work.entries * work.tokens
    return saves, _GRAPHS * (price.graph + price.graph_tensor * work.tensors)
