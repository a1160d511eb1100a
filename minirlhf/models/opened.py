"""The tensors that lie in anything: in trees, in what functions are closed over, in what stands for a tensor.

What differentiates, maps or compiles a function by hand has to pass every tensor that it reads as an
argument; a tensor that slips in through a closure is a constant to it, or belongs to another level.
"""

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Opened(NamedTuple):
    """What was found.

    tensors: in a fixed order; one that is met twice is there twice.
    rebuild: as many tensors -> the same thing made of them; the original is not written to.
    form: all the rest, hashable: equal for two things that differ in their tensors at most.
    """

    tensors: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]
    form: Any


def opened(tree: Any) -> Opened:
    """The tensors of a tree, and how the same tree is made of others.

    Looks into dicts, lists, tuples, whatever pytree knows; into the arguments of a `functools.partial`; into
    what a function is closed over; and into the attributes of objects that answer for a tensor
    (`__torch_function__`: a packed or an adapted weight). Everything else is kept as it is.

    >>> found = opened({"double": partial(Tensor.mul, Tensor([2.0])), "name": "f"})
    >>> found.rebuild([Tensor([3.0])])["double"](1.0)
    tensor([3.])
    """
    leaves, layout = pytree.tree_flatten(tree)
    parts = [_opened_leaf(leaf) for leaf in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        made, start = [], 0
        for part in parts:
            made.append(part.rebuild(tensors[start : start + len(part.tensors)]))
            start += len(part.tensors)
        return pytree.tree_unflatten(made, layout)

    form = (repr(layout), *(part.form for part in parts))
    return Opened([tensor for part in parts for tensor in part.tensors], rebuild, form)


def _opened_leaf(leaf: Any) -> Opened:
    if isinstance(leaf, Tensor):
        return Opened([leaf], lambda tensors: tensors[0], Tensor)
    if isinstance(leaf, partial):
        return _made_of(leaf, (leaf.func, leaf.args, leaf.keywords), _partial_again, partial)
    if isinstance(leaf, types.FunctionType):
        contents = [cell.cell_contents for cell in leaf.__closure__ or ()]
        return _made_of(leaf, (contents, leaf.__kwdefaults__), partial(_function_again, leaf), leaf.__code__)
    if hasattr(type(leaf), "__torch_function__"):
        return _made_of(leaf, vars(leaf), partial(_object_again, leaf), type(leaf))
    try:
        hash(leaf)
    except TypeError:
        return Opened([], lambda _: leaf, id(leaf))  # `rebuild` keeps it alive, so the number stays its own
    return Opened([], lambda _: leaf, (type(leaf), leaf))


def _made_of(leaf: Any, parts: Any, make: Callable[[Any], Any], kind: Any) -> Opened:
    found = opened(parts)

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        return make(found.rebuild(tensors)) if found.tensors else leaf

    return Opened(found.tensors, rebuild, (kind, found.form))


def _partial_again(parts: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Any:
    function, args, keywords = parts
    return partial(function, *args, **keywords)


def _function_again(function: types.FunctionType, parts: tuple[list[Any], dict[str, Any] | None]) -> Any:
    contents, keyword_defaults = parts
    cells = tuple(types.CellType(each) for each in contents)
    again = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    again.__kwdefaults__ = keyword_defaults
    return again


def _object_again(stand_in: Any, attributes: dict[str, Any]) -> Any:
    again = object.__new__(type(stand_in))
    vars(again).update(attributes)
    return again
