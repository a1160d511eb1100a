"""A user's function behind the canonical signature of its kind: how it is called, and what its results are.

`binding.bind` makes a `Binding`. What a subject lacks is an absent feature, where the kind can do without it;
a width or weight that is built in is measured or stated.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.kinds import Case, Dialect, Kind, Layout, Mask, Reals


class SubjectError(Exception):
    """The subject cannot be tried: what is wrong, and what to say instead."""


@dataclass(frozen=True)
class Binding:
    """How to call the subject.

    names: canonical argument → the subject's parameter (several arguments may share one).
    positions: canonical argument → place, for parameters that cannot be named.
    constants: the subject's parameter → a value that the user fixed.
    derived: the subject's parameter → what it gets, computed from the canonical case.
    built_in: canonical number → the value that the subject has built in.
    absent: arguments that the subject lacks.
    pick: from what the function returns to the result, or the tuple of results.
    asked: optional arguments that it takes and whose default is not None: they get their neutral value.
    mask_dtype, real_dtype: what masks, and fp64 tensors, are given as; None leaves them.
    dialect, layout: how it takes one argument and returns its result, where that is not the canonical way.
    label: the name in reports; place: what to import it from, "" where it cannot be imported.
    """

    fn: Callable[..., Any]
    kind: Kind
    names: Mapping[str, str]
    positions: Mapping[str, int]
    constants: Mapping[str, Any]
    built_in: Mapping[str, float]
    absent: frozenset[str]
    pick: Callable[[Any], Any] | None
    label: str
    mask_dtype: torch.dtype = torch.bool
    real_dtype: torch.dtype | None = None
    derived: Mapping[str, Callable[[Case], Any]] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    dialect: Dialect | None = None
    layout: Layout | None = None

    def restricted(self, case: Case) -> Case:
        """The case as far as this subject can express it."""
        kept = self.dialect.project(dict(case)) if self.dialect else dict(case)
        for argument in self.kind.arguments:
            name = argument.name
            if name in self.built_in:
                kept[name] = self.built_in[name]
            elif name in self.absent and argument.optional:
                kept.pop(name, None)
            elif name in self.absent and argument.neutral is not None:
                kept[name] = argument.neutral(kept)
        for shared in self._shared():
            present = [name for name in shared if name in kept]
            for name in present[1:]:
                kept[name] = kept[present[0]]
        return kept

    def call(self, case: Case) -> Any:
        """What the subject returns, its own pick applied."""
        positional, named = self.arguments(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about themselves
            result = self.fn(*positional, **named)
        result = self.pick(result) if self.pick else result
        if self.layout and isinstance(result, Tensor) and self.layout.fits(result, case):
            result = self.layout.canonical(result)
        return self._in_shape(result, case) if self.derived else result

    def arguments(self, case: Case) -> tuple[list[Any], dict[str, Any]]:
        """(positional, named) as the subject is called."""
        neutral = {n: self.kind.argument(n).neutral for n in self.asked if n not in case}
        full = case | {name: value(case) for name, value in neutral.items() if value is not None}
        given = {n: self._converted(n, v) for n, v in full.items() if n in self.positions or n in self.names}
        if self.dialect and self.dialect.argument in given:
            given[self.dialect.argument] = self.dialect.say(full)
        placed = sorted((self.positions[name], name) for name in given if name in self.positions)
        named = {self.names[name]: value for name, value in given.items() if name in self.names}
        computed = {parameter: value(full) for parameter, value in self.derived.items()}
        return [given[name] for _, name in placed], {**named, **computed, **self.constants}

    def unable(self, case: Case) -> str | None:
        """The first argument of the case that the subject cannot be given as it is, or a feature that it has
        built in and the case does without; None where it can be given all."""
        can = self.restricted(case)
        forced = [name for name in self.built_in if name in can and name not in case]
        if forced:
            return forced[0]
        for name, value in case.items():
            same = name in can and (
                can[name] is value or torch.equal(torch.as_tensor(can[name]), torch.as_tensor(value))
            )
            if not same:
                return name
        return None

    def _in_shape(self, result: Any, case: Case) -> Any:
        """A flattened result in the shape of the kind: a subject that takes [P * G] returns [P * G]."""
        if not isinstance(result, Tensor) or result.ndim in (0, len(self.kind.shape)):
            return result
        sizes = {
            letter: size
            for argument in self.kind.arguments
            if isinstance(case.get(argument.name), Tensor)
            for letter, size in zip(argument.shape, case[argument.name].shape, strict=True)
        }
        shape = torch.Size([sizes[letter] for letter in self.kind.shape])
        return result.reshape(shape) if result.numel() == shape.numel() else result

    def _converted(self, name: str, value: Any) -> Any:
        if self.mask_dtype == torch.bool and self.real_dtype is None:
            return value
        domain = self.kind.argument(name).domain
        if isinstance(domain, Mask):
            return value.to(self.mask_dtype)
        wide = isinstance(domain, Reals) and isinstance(value, Tensor) and value.dtype == torch.float64
        return value.to(self.real_dtype) if wide and self.real_dtype else value

    def _shared(self) -> list[list[str]]:
        theirs: dict[str, list[str]] = {}
        for name, parameter in self.names.items():
            theirs.setdefault(parameter, []).append(name)
        return [names for names in theirs.values() if len(names) > 1]


def own(case: Case) -> Case:
    """The case with tensors that a subject may write to; what is differentiated stays itself."""
    return {n: v.clone() if isinstance(v, Tensor) and not v.requires_grad else v for n, v in case.items()}


def results_of(returned: Any, kind: Kind) -> dict[str, Tensor]:
    """The subject's results by canonical name: the main one, and further fields if it returns them.

    Raises:
        SubjectError: there is no tensor in what it returned.
    """
    main = kind.fields[0] if kind.fields else "result"
    if isinstance(returned, Tensor):
        return {main: returned}
    if isinstance(returned, int | float):
        return {main: torch.tensor(float(returned), dtype=torch.float64)}
    if isinstance(returned, Mapping):
        by_name = {name: returned[name] for name in kind.fields if isinstance(returned.get(name), Tensor)}
        likely = [returned.get(name) for name in ("loss", "losses", "result")]
        first = next((v for v in [*likely, *returned.values()] if isinstance(v, Tensor)), None)
        if by_name or first is not None:
            return by_name if main in by_name else {main: first, **by_name}  # type: ignore[dict-item]
    if hasattr(returned, "_fields"):
        by_name = {
            n: getattr(returned, n) for n in kind.fields if isinstance(getattr(returned, n, None), Tensor)
        }
        if main in by_name:
            return by_name
    if isinstance(returned, tuple | list):
        tensors = [item for item in returned if isinstance(item, Tensor)]
        if tensors:
            return dict(zip(kind.fields or (main,), tensors, strict=False))
    raise SubjectError(
        f"the subject must return a tensor, or a tuple or dict with one, got {type(returned).__name__}"
    )
