"""A fitted subject as the laws see it: canonical orientation, its own reduction, and what it raised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.fit import Variant
from minirlhf.verify.kinds import Case
from minirlhf.verify.subject import Binding, own, results_of


class Raised(Exception):
    """The subject raised on a case that it has to take; the cause is what it raised."""

    def __init__(self, case: Case, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.case, self.error = case, error


class Lacking(Exception):
    """A law asked for what the subject does not have."""


@dataclass(frozen=True)
class Probe:
    """See `kinds.Probed`."""

    binding: Binding
    variant: Variant
    without: frozenset[str]

    @property
    def options(self) -> Mapping[str, Any]:
        return self.variant.options

    @property
    def per_element(self) -> bool:
        return self.variant.reduction.result == self.binding.kind.shape

    @property
    def by_row(self) -> bool:
        return self.variant.reduction.by_row

    @property
    def ascending_loss(self) -> bool:
        """Whether it is called a loss, and has the sign of an objective to maximise."""
        return self.variant.sign < 0 and "loss" in self.binding.label.rsplit(".", 1)[-1].lower()

    def has(self, feature: str) -> bool:
        """Whether the subject has the optional argument, field or behaviour."""
        return feature not in self.without

    def named(self, argument: str) -> str:
        """What the subject calls an argument; "" where it has no name."""
        return self.binding.names.get(argument, "")

    def value(self, case: Case, field: str | None = None) -> Tensor:
        """The result, sign and factor removed; a further field as it comes."""
        results = self._call(own(case))
        if field is not None:
            if field not in results:
                raise Lacking(field)
            return results[field].detach()
        return self.counted(next(iter(results.values())), case).detach() / self.scale

    def raw(self, case: Case) -> Tensor:
        """The result as the subject returns it, under the mask too."""
        return next(iter(self._call(own(case)).values())).detach()

    def written_to(self, case: Case) -> list[str]:
        """The tensors of the case that a call changes."""
        copy = {name: v.clone() if isinstance(v, Tensor) else v for name, v in case.items()}
        self._call(copy)
        return [n for n, v in copy.items() if isinstance(v, Tensor) and not torch.equal(v, case[n])]

    def grad(self, case: Case, wrt: str, weight: Tensor | None = None) -> Tensor:
        """The gradient of the sum of the (weighted) result; 0 where it does not depend on `wrt`."""
        x = case[wrt].detach().clone().requires_grad_()
        result = self.counted(next(iter(self._call(own({**case, wrt: x})).values())), case)
        if not result.requires_grad:
            return torch.zeros_like(x)
        total = result.sum() if weight is None else (result * weight).sum()
        try:
            (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
        except Exception as error:
            raise Raised(case, error) from error
        return torch.zeros_like(x) if gradient is None else gradient / self.scale

    def expected(self, case: Case) -> Tensor:
        """What the oracle gives for the case, in the subject's reduction."""
        with torch.no_grad():
            return self.reduced(self.binding.kind.oracle(case, self.options), case)

    def expected_grad(self, case: Case, wrt: str) -> Tensor:
        """The gradient of the sum of that."""
        x = case[wrt].detach().clone().requires_grad_()
        result = self.reduced(self.binding.kind.oracle({**case, wrt: x}, self.options), case)
        if not result.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(result.sum(), x, allow_unused=True)
        return torch.zeros_like(x) if gradient is None else gradient

    def reduced(self, per_element: Tensor, case: Case) -> Tensor:
        """One number per element, reduced as the subject reduces."""
        mask = case.get(self.binding.kind.mask) if self.binding.kind.mask else None
        return self.variant.reduction.apply(per_element, mask)

    def able(self, case: Case) -> bool:
        """Whether the subject can be given this case as it is."""
        return self.binding.unable(case) is None

    @property
    def scale(self) -> float:
        """What the canonical result is multiplied with to give the subject's."""
        return self.variant.sign * self.variant.factor

    def counted(self, result: Tensor, case: Case) -> Tensor:
        """One number per token counts only where the mask says so, whatever the subject leaves elsewhere."""
        name = self.binding.kind.mask
        if name is None or name not in case or result.shape != case[name].shape:
            return result
        return torch.where(case[name], result, 0.0)

    def _call(self, case: Case) -> dict[str, Tensor]:
        """The results by name, or Raised; callers pass copies, since a subject may write to what it gets."""
        try:
            return results_of(self.binding.call(case), self.binding.kind)
        except (Exception, SystemExit) as error:  # a stranger's function
            raise Raised(case, error) from error
