"""How much memory a computation takes, found by running it on tensors that have shapes but no memory.

A fake tensor answers every operator with the shape, type and device of its result. What is counted is what
the operators allocate and how long torch keeps it: for a gradient exactly the tensors that autograd saves,
whichever attention, adapter, precision or recomputation the loss uses. What an operator needs only while it
runs is invisible here; the fused log-prob is the one where that is large, and says it (`kernels.workspace`).
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf.kernels.workspace import workspace
from minirlhf.models.opened import opened


class Live(NamedTuple):
    """Bytes beyond those of the arguments.

    peak: most that were live at once.
    kept: live in the end, in what was returned; of it `kept_at_peak` were live at the peak.
    inside: of the peak, what an operator held only while it ran.
    """

    peak: int
    kept: int
    kept_at_peak: int
    inside: int

    @property
    def passing(self) -> int:
        """Of the peak, what is gone in the end: activations and what operators held."""
        return self.peak - self.kept_at_peak


def live_memory(work: Callable[..., Any], *given: Any, device: torch.device) -> Live:
    """Memory of work(*given) on `device`.

    Args:
        work: must not look at values, as no loss does.
        given: anything whose tensors `models.opened` finds, of any device; of them shapes and types are read
            and nothing else. What `work` is closed over must hold no tensor.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    found = opened(given)
    with FakeTensorMode():
        fakes = [torch.empty(leaf.shape, dtype=leaf.dtype, device=device) for leaf in found.tensors]
        arguments, counter = found.rebuild(fakes), _Counter(fakes)
        with counter:
            result = work(*arguments)
        return counter.summary(result)


def without_gradient(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, as evaluation calls it."""
    return torch.no_grad()(work)


class _Counter(TorchDispatchMode):
    """Counts the bytes of every storage from the operator that made it until nobody has it any more."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self.arguments = [leaf.untyped_storage() for leaf in _tensors(arguments)]
        self.known: dict[int, int] = {storage._cdata: 0 for storage in self.arguments}  # address -> number
        self.live: dict[int, int] = {}  # number -> bytes
        self.now = self.peak = self.inside = self.made = 0
        self.live_at_peak: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in _tensors(out):
            storage = leaf.untyped_storage()
            if storage._cdata not in self.known:
                self.made += 1
                self.known[storage._cdata], self.live[self.made] = self.made, storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        inside = workspace(func, args)
        if self.now + inside > self.peak:
            self.peak, self.inside, self.live_at_peak = self.now + inside, inside, dict(self.live)
        return out

    def _gone(self, address: int) -> None:
        self.now -= self.live.pop(self.known.pop(address))

    def summary(self, result: Any) -> Live:
        """The numbers, while the result is still there."""
        kept = {self.known[leaf.untyped_storage()._cdata] for leaf in _tensors(result)} - {0}
        at_peak = sum(size for number, size in self.live_at_peak.items() if number in kept)
        return Live(self.peak, sum(self.live[number] for number in kept), at_peak, self.inside)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
