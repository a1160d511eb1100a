"""Parameters that are needed now and then, and wait on the CPU in between: the reference, the reward model.

On a CUDA device PPO needs the reference for one forward pass per iteration and the reward model for another;
policy and critic, with gradients and moments, need the memory all the rest of the time. Waiting parameters
are page-locked, so a copy to the device runs at the speed of the bus.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_map

from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training.device import move, resolve
from minirlhf.training.setting import Setting

Result = TypeVar("Result")


class Waiting(NamedTuple):
    """Parameters on the CPU, and the device that they are used on. move: -> a copy there."""

    params: Params
    device: torch.device
    move: Callable[[Params, torch.device], Params] = move


Lendable = Params | Waiting
"""Parameters where they are used, or waiting elsewhere."""


def using(params: Lendable, work: Callable[[Params], Result]) -> Result:
    """work(parameters on their device); a copy made for it is gone afterwards, unless `work` kept it.

    >>> waiting = Waiting({"w": torch.ones(2)}, torch.device("cpu"))
    >>> using(waiting, lambda params: params["w"].sum())
    tensor(2.)
    """
    if not isinstance(params, Waiting):
        return work(params)
    return work(params.move(params.params, params.device))


def formed(params: Lendable, form: Callable[[Params], Params]) -> Lendable:
    """form(parameters); where these wait, so does the result, and nothing is made at each use.

    >>> waiting = Waiting({"w": torch.ones(2)}, torch.device("cpu"))
    >>> using(formed(waiting, lambda params: {"w": params["w"].half()}), lambda params: params["w"])
    tensor([1., 1.], dtype=torch.float16)
    """
    if not isinstance(params, Waiting):
        return form(params)
    return params._replace(params=_locked(form(params.params), params.device))


def waiting(params: Params, device: torch.device) -> Waiting:
    """Parameters that lie on the CPU, page-locked where the device is CUDA's; an entry shared is so still."""
    return Waiting(_locked(params, device), device)


def _locked(params: Params, device: torch.device) -> Params:
    return tree_map(lambda leaf: leaf.pin_memory() if device.type == "cuda" else leaf, params)


def where_it_waits(setting: Setting) -> Setting:
    """The setting with which to read a model that is to wait: the CPU, if `setting` asks for it.

    Raises:
        InputError: it does, and the run's device is not CUDA, where there is nothing to move.
    """
    if not setting.offload:
        return setting
    device = resolve(setting.device)
    if device.type != "cuda":
        raise InputError(
            f"--offload moves reference and reward model between the CPU and a CUDA device, and this run "
            f"computes on {device}; leave it out"
        )
    return setting._replace(device="cpu")
