"""A second device, made of host memory: where a program would wait for a GPU, or mix it up with the host.

A tensor `There` says that it is on cuda:0; its numbers are in a tensor of the host, by which every operation
is done. So results are real, and three things show that a CPU alone does not show: an operation that is given
tensors of both devices fails; every copy between the two is counted, for the line that asked for it; and what
has been recorded (`Device.record`, as by a CUDA graph) is replayed without any of its Python.

To torch's C++ a `There` lies on "meta", the one device beside the CPU where autograd works in any build; in
Python it says cuda:0, and so do the tensors that torch.func wraps around it (`_Face`). Not for fake tensors,
which are on "meta" too.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import minirlhf
from minirlhf.kernels import paged

CUDA, _META = torch.device("cuda:0"), torch.device("meta")
_ROOT = str(Path(minirlhf.__file__).parent)
_aten = torch.ops.aten
_INDEXED = (
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default
)  # fmt: skip
_SIZED = (  # whose result the host has to see before it goes on
    _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.repeat_interleave, _aten.equal
)  # fmt: skip
_asked: Any = vars(torch._C.TensorBase)
_on_meta = _asked["is_meta"].__get__
_FACE = {_asked["device"].__get__: CUDA, _asked["is_cuda"].__get__: True, _on_meta: False}
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
    return leaf.inner if type(leaf) is There else leaf


class There(Tensor):
    """A tensor on the second device. inner: where its numbers are."""

    inner: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=_META,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"There({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Device.now is not None, "a tensor of the second device is used outside of it"
        return Device.now.do(func, args, kwargs or {})


class _Face(TorchFunctionMode):
    """What Python asks of a tensor: where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func in _FACE and isinstance(first, Tensor) and _on_meta(first):
            return _FACE[func]
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func is Tensor.tolist and type(first) is There:  # torch's own takes no subclass
            return first.cpu().tolist()
        return func(*map(_numbered, args), **{name: _numbered(each) for name, each in (kwargs or {}).items()})


def _is_pointwise(func: Any) -> bool:
    """Whether a host's tensor [] may stand beside tensors of the device."""
    return torch.Tag.pointwise in func.tags


def _numbered(given: Any) -> Any:
    """torch asks CUDA which of its devices is meant where none is named."""
    return CUDA if type(given) in (str, torch.device) and str(given) == "cuda" else given


class Device(TorchDispatchMode):
    """While it is entered there is a second device.

    copies: how often "to host", "to device", "index" (by host memory) or "size" (of a result, for which the
        host waits), and where: (kind, file:line).
    """

    now: "Device | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.tape: list[Callable[[], object]] | None = None

    def count(self, kind: str) -> int:
        """Copies of this kind."""
        return sum(number for (each, _), number in self.copies.items() if each == kind)

    def waits(self, *rooms: str) -> int:
        """How often the host waited for the device, in these rooms of minirlhf; in all of them by default."""
        return sum(
            number
            for (kind, where), number in self.copies.items()
            if kind != "to device" and (not rooms or where.split("/")[0] in rooms)
        )

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
        """Puts an operation on the tape: its results go into the memory of those of now."""
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
        leaves = _leaves((args, tuple(kwargs.values())))
        there = [leaf for leaf in leaves if type(leaf) is There]
        if there and func._schema.name in OPDEFS:  # minirlhf's own: what it does here, not on the CPU
            with self, _Face():
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if func._can_decompose():  # in minirlhf's own nothing has taken it apart before
            with self, torch._C.DisableTorchFunction():
                return func.decompose(*args, **kwargs)
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not There]
        copies, goal = func in (_aten._to_copy.default, _aten.copy_.default), bool(there)
        indexed = func in _INDEXED and all(type(each) is There or not each.ndim for each in args[2:3])
        if indexed and there and here:
            self.note("index")
        elif there and not copies and any(each.ndim or not (indexed or _is_pointwise(func)) for each in here):
            raise RuntimeError(f"{func}: expected all tensors on one device, got {here} and {there}")
        if kwargs.get("device") is not None:
            goal = torch.device(kwargs["device"]).type in ("cuda", "meta")
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if func is _aten.copy_.default:
            goal = type(args[0]) is There
        if copies and ((there and not goal) or (here and goal)):
            self.note("to device" if goal else "to host")
        masked = indexed and any(type(each) is There and each.dtype == torch.bool for each in args[1])
        if there and (masked or func.overloadpacket in _SIZED):
            self.note("size")
        if there and func is _aten._local_scalar_dense.default:
            self.note("to host")
        given, named = _mapped(_bare, args), {name: _mapped(_bare, value) for name, value in kwargs.items()}
        out = func(*given, **named)
        if not goal:
            return out
        self._keep(out, [leaf.inner for leaf in there], lambda: func(*given, **named))
        known = {id(each.inner): each for each in there}  # what works in place returns its input

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else There(leaf)

        return _mapped(wrapped, out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.do(func, args, kwargs or {})


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
        mock.patch.object(paged, "available", lambda where: False),  # Triton would launch on a real one
        mock.patch.object(Device, "now", device),
        device,
        _Face(),
    ):
        yield device


def moved(tree: Any) -> Any:
    """The same tensors on the second device."""
    return tree_map_only(Tensor, lambda leaf: leaf.to(CUDA), tree)


def host(tree: Any) -> Any:
    """The same tensors on the host, uncounted."""
    return tree_map_only(There, lambda leaf: leaf.inner, tree)
