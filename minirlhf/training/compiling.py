"""The gradient of a training step as one compiled graph.

`Compiler` is a `update.Differentiate`: loss -> (params, micro_batch, normaliser) -> (gradient, (value, aux)),
by `torch.compile` of the whole of it, forward and backward pass, with torch.func inside. The compiler traces
operations on tensors; it never reads the Python of a loss. So all tensors are arguments, found by
`models.opened`, and all else (the form) is part of the graph: another form is another graph. The sizes of a
micro-batch are symbols, so that one graph serves all of them; a size of 1 has its own.
"""

import itertools
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minirlhf.kernels import fused, products
from minirlhf.models.interface import Params
from minirlhf.models.opened import Opened, opened
from minirlhf.runs import InputError
from minirlhf.training.progress import note
from minirlhf.training.update import Differentiated, Loss, differentiated

Aux = dict[str, Tensor]


class Compiler:
    """A `Differentiate` that compiles; keep one for a stage, and what it compiled is found again.

    Attributes:
        graphs: compiled so far.
        seconds: what that took.
    """

    def __init__(
        self,
        *,
        name: str,
        needed: bool,
        tell: Callable[[str], None] = note,
        backend: str = "inductor",
    ) -> None:
        """
        Args:
            name: of the stage, in what it says.
            needed: whether a compiler that fails at once is an error; otherwise it is said, and steps go on
                without it.
            tell: gets a line after every compilation.
            backend: as `torch.compile` knows it.
        """
        self.graphs, self.seconds = 0, 0.0
        self._name, self._needed, self._tell, self._backend = name, needed, tell, backend
        self._steps: dict[Any, _Step] = {}
        self._broken = False
        fused.tell_compiler()
        products.tell_compiler()

    def __call__(self, loss: Loss) -> Differentiated:
        return partial(self._gradient, loss)

    def _gradient(
        self, loss: Loss, params: Params, batch: Any, normaliser: Tensor
    ) -> tuple[Params, tuple[Tensor, Aux]]:
        from torch._dynamo.exc import TorchDynamoException

        if self._broken:
            return differentiated(loss)(params, batch, normaliser)
        before, start = self.graphs, time.perf_counter()
        try:
            result = self._compiled(loss, params, batch, normaliser)
        except TorchDynamoException as error:
            result = differentiated(loss)(
                params, batch, normaliser
            )  # what is wrong with the loss is said here
            self._give_up(error)
        if self.graphs > before:
            spent = time.perf_counter() - start
            self.seconds += spent
            self._tell(f"{self._name}: graph {self.graphs} of a step compiled in {spent:.1f} s")
        return result

    def _compiled(
        self, loss: Loss, params: Params, batch: Any, normaliser: Tensor
    ) -> tuple[Params, tuple[Tensor, Aux]]:
        fixed, moving = opened((loss, params, normaliser)), opened(_carried(batch))
        # A place in another tensor would be a size, too.
        sized = [each.clone() if each.storage_offset() else each for each in moving.tensors]
        for tensor in sized:
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
        form = (fixed.form, moving.form)
        if form not in self._steps:
            self._steps[form] = _step(fixed, moving, partial(_counting, self, self._backend))
        step = self._steps[form]
        return pytree.tree_unflatten(list(step.run(*fixed.tensors, *sized)), step.layout[0])

    def _give_up(self, error: Exception) -> None:
        cause = getattr(error, "inner_exception", error)
        why = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        if self._needed and not self.graphs:
            raise InputError(
                f"{self._name}: compile: the compiler failed; set compile to off, or to auto, which goes on "
                f"without ({why})"
            ) from error
        self._broken = True
        self._tell(f"{self._name}: steps are not compiled from here on, since the compiler failed: {why}")


class _Size(NamedTuple):
    """An integer as the size of a tensor, which the compiler can take for a symbol."""

    tensor: Tensor


class _Step(NamedTuple):
    """run: tensors -> the leaves of the result. layout: [of the result], known after the first trace."""

    run: Callable[..., Sequence[Tensor]]
    layout: list[Any]


def _carried(batch: Any) -> Any:
    def of(leaf: Any) -> Any:
        return _Size(torch.empty(leaf, 0)) if type(leaf) is int and leaf >= 0 else leaf

    return pytree.tree_map(of, batch)


def _read(batch: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.tensor.shape[0] if isinstance(leaf, _Size) else leaf,
        batch,
        is_leaf=lambda leaf: isinstance(leaf, _Size),
    )


_numbers = itertools.count()


def _step(fixed: Opened, moving: Opened, backend: Callable[..., Any]) -> _Step:
    layout: list[Any] = []
    count = len(fixed.tensors)

    def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
        loss, params, normaliser = fixed.rebuild(tensors[:count])
        batch = _read(moving.rebuild(tensors[count:]))
        leaves, structure = pytree.tree_flatten(differentiated(loss)(params, batch, normaliser))
        layout[:] = [structure]
        return tuple(leaves)

    torch.compiler.allow_in_graph(traced)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        return traced(*tensors)

    # The compiler keeps graphs, and what it learnt of sizes, by the name and place of the code.
    code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    own = types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    return _Step(torch.compile(own, fullgraph=True, backend=backend), layout)


def _counting(compiler: Compiler, name: str, graph: Any, inputs: Sequence[Any]) -> Any:
    result = _backend(name)(graph, list(inputs))
    compiler.graphs += 1
    return result


def _backend(name: str) -> Callable[[Any, list[Any]], Any]:
    return torch._dynamo.lookup_backend(name)
