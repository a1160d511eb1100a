"""A second device, made of host memory: where a program would wait for a GPU, or mix it up with the host.

A tensor `There` says that it is on cuda:0; its numbers are in a tensor of the host, by which every operation
is done. So results are real, and three things show that a CPU alone does not show: an operation that is given
tensors of both devices fails; every copy between the two is counted, for the line that asked for it; and what
has been recorded (`Device.record`, as by a CUDA graph) is replayed without any of its Python.

What torch does before it dispatches (an index, a number from a tensor) `__torch_function__` does here. It is
for code without autograd; the wrappers of torch.func would lie outside of a `There`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import minirlhf

CUDA = torch.device("cuda:0")
_ROOT = str(Path(minirlhf.__file__).parent)
_NUMBERS = (Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist)
_aten = torch.ops.aten
_INDEXED = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)
_made = torch.tensor


def _leaves(tree: Any) -> list[Any]:
    """Of what operations take and give: lists and tuples. (A pytree takes half of the time.)"""
    if not isinstance(tree, list | tuple):
        return [tree]
    return [leaf for each in tree for leaf in _leaves(each)]


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if not isinstance(tree, list | tuple):
        return change(tree)
    return type(tree)(_mapped(change, each) for each in tree)


def _bare(leaf: Any) -> Any:
    return leaf.numbers if type(leaf) is There else leaf


class There(Tensor):
    """A tensor on the second device. numbers: where its numbers are."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=CUDA,
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"There({self.numbers!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(each, Tensor) for each in types):
            return NotImplemented
        first, device = args[0] if args else None, Device.now
        if device is not None and type(first) is There:
            if func is Tensor.__getitem__:
                return device.getitem(first, args[1])
            if func is Tensor.__setitem__:
                return device.setitem(first, *args[1:])
            if func is Tensor.copy_:
                device.setitem(first, ..., args[1])
                return first
            if func is Tensor.contiguous:
                return (
                    first
                    if first.numbers.is_contiguous()
                    else first.clone(memory_format=torch.contiguous_format)
                )
            if func in _NUMBERS:
                device.note("to host")
                return func(first.numbers)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Device.now is not None, "a tensor of the second device is used outside of it"
        return Device.now.do(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered there is a second device.

    copies: how often "to host", "to device" or "index" (by host memory), and where: (kind, file:line).
    """

    now: "Device | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.tape: list[Callable[[], object]] | None = None

    def count(self, kind: str) -> int:
        """Copies of this kind."""
        return sum(number for (each, _), number in self.copies.items() if each == kind)

    def note(self, kind: str) -> None:
        """Counts a copy of this kind for the line of minirlhf that asked for it."""
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_ROOT):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename[len(_ROOT) + 1 :]}:{frame.f_lineno}" if frame else "outside"
        self.copies[kind, where] += 1

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What step() returned, and what does its operations again, on the same memory, without Python."""
        self.tape = []
        try:
            out = step()
        finally:
            tape, self.tape = self.tape, None

        def replay() -> None:
            with torch.no_grad():
                for again in tape:
                    again()

        return out, replay

    def _keep(self, out: Any, inputs: list[Tensor], again: Callable[[], Any]) -> None:
        """Puts an operation on the tape; what is new in its results goes to where it is now."""
        if self.tape is None:
            return
        known = {each.untyped_storage().data_ptr() for each in inputs}
        fresh = [
            (number, each)
            for number, each in enumerate(_leaves(out))
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known
        ]

        def run() -> None:
            results = _leaves(again())
            for number, each in fresh:
                each.copy_(results[number])

        self.tape.append(run)

    def do(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: with whose tensors, on which device its results are, and by host memory."""
        if func in (_aten.is_pinned.default, _aten._pin_memory.default):
            return func is _aten._pin_memory.default and args[0].clone()
        leaves = _leaves((args, tuple(kwargs.values())))
        there = [leaf for leaf in leaves if type(leaf) is There]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not There]
        copies, goal = func in (_aten._to_copy.default, _aten.copy_.default), bool(there)
        if func in _INDEXED and there and here:
            self.note("index")
        elif there and not copies and any(each.ndim for each in here):
            raise RuntimeError(f"{func}: expected all tensors on one device, got {here} and {there}")
        if kwargs.get("device") is not None:
            goal = torch.device(kwargs["device"]).type == "cuda"
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if func is _aten.copy_.default:
            goal = type(args[0]) is There
        if copies and ((there and not goal) or (here and goal)):
            self.note("to device" if goal else "to host")
        given, named = _mapped(_bare, args), {name: _mapped(_bare, value) for name, value in kwargs.items()}
        out = func(*given, **named)
        if not goal:
            return out
        self._keep(out, [leaf.numbers for leaf in there], lambda: func(*given, **named))
        known = {id(each.numbers): each for each in there}  # what works in place returns its input

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else There(leaf)

        return _mapped(wrapped, out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.do(func, args, kwargs or {})

    def _index(self, index: Any) -> Any:
        for each in _leaves(index):
            if isinstance(each, np.ndarray) or (isinstance(each, Tensor) and type(each) is not There):
                self.note("index")
        return _mapped(_bare, index)

    def getitem(self, tensor: There, index: Any) -> There:
        """tensor[index]"""
        bare = self._index(index)
        out = tensor.numbers[bare]
        self._keep(out, [tensor.numbers], lambda: tensor.numbers[bare])
        return There(out)

    def setitem(self, tensor: There, index: Any, value: Any) -> None:
        """tensor[index] = value"""
        bare = self._index(index)
        if isinstance(value, Tensor) and type(value) is not There and value.ndim:
            self.note("to device")
        value = _bare(value)

        def run() -> None:
            tensor.numbers[bare] = value

        run()
        if self.tape is not None:
            self.tape.append(run)


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    made = _made(data, **options)
    return made if device is None else made.to(device)


@contextmanager
def second_device() -> Iterator[Device]:
    """Within: tensors can be made on, and moved to, `CUDA`."""
    device = Device()
    # torch.tensor does not dispatch, and CUDA would be initialised before anything does.
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch, "tensor", _tensor),
        mock.patch.object(Device, "now", device),
        device,
    ):
        yield device


def moved(tree: Any) -> Any:
    """The same tensors on the second device."""
    return tree_map_only(Tensor, lambda leaf: leaf.to(CUDA), tree)


def host(tree: Any) -> Any:
    """The same tensors on the host, uncounted."""
    return tree_map_only(There, lambda leaf: leaf.numbers, tree)
