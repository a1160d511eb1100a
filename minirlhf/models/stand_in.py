"""Weights that answer for themselves: an object in the place of a matrix, which computes its products.

A family's page calls torch's products (`torch.addmm` on weights [in, out], `F.linear` on [out, in]) with
whatever lies in its parameters, and torch asks the arguments first (`__torch_function__`). So a weight can be
packed, rounded or adapted, and no page knows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map


class StandIn(ABC):
    """A matrix that answers for itself in products, and is the matrix it was made from everywhere else."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(args)
        if func is torch.addmm and not kwargs and isinstance(given[2], StandIn):
            return given[2].product(given[1], given[0], outputs_first=False)
        if func is F.linear and isinstance(given[1], StandIn):
            bias = given[2] if len(given) > 2 else (kwargs or {}).get("bias")
            return given[1].product(given[0], bias, outputs_first=True)
        plain = tree_map(lambda x: x.weight if isinstance(x, StandIn) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None, *, outputs_first: bool) -> Tensor:
        """x [..., in] times the weight, stored [in, out] or [out, in] if `outputs_first`, plus bias."""
