"""Where a run computes: one name in, one device out, whole records onto it, and numbers back."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minirlhf.models.interface import Params
from minirlhf.runs import InputError

Tree = TypeVar("Tree")


def resolve(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else MPS (Apple), else the CPU.

    Raises:
        InputError: there is no such device here.

    >>> resolve("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    known = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in known or (index and not index.isdigit()):
        raise InputError(f"expected --device auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if not known[kind]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; try --device auto")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def move(tree: Tree, device: torch.device) -> Tree:
    """The same nested dict, list or NamedTuple, its tensors on `device` (copied unless already there)."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def numbers(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The same names, and numbers; the host waits once for all floating tensors [], and for each other one.

    >>> numbers({"a": torch.tensor(2.5), "b": 1.0, "c": torch.tensor(3)})
    {'a': 2.5, 'b': 1.0, 'c': 3.0}
    """
    # A count in one stack with fp32 would be rounded to it; floating types widen without.
    floating = {
        name: value.detach()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    read = torch.stack(list(floating.values())).tolist() if floating else []
    found = dict(zip(floating, read, strict=True))
    return {name: found[name] if name in found else float(value) for name, value in values.items()}


def device_of(params: Params) -> torch.device:
    """Where these parameters live; all of them live there."""
    return pytree.tree_leaves(params)[0].device
