"""A user's function behind the canonical signature of its kind: which of its parameters is which argument.

Parameters are matched by the names the user gives, else by their own names, else by known synonyms, else by
position where nothing is left to guess. What a subject lacks is an absent feature, where the kind can do
without it; a width or weight that is built in is measured or stated.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.cases import generic
from minirlhf.verify.kinds import Argument, Case, Dialect, Kind, Layout, Mask, Numbers


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
    derived: Mapping[str, Callable[[Case], Any]] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())
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
        if self.mask_dtype == torch.bool or not isinstance(self.kind.argument(name).domain, Mask):
            return value
        return value.to(self.mask_dtype)

    def _shared(self) -> list[list[str]]:
        theirs: dict[str, list[str]] = {}
        for name, parameter in self.names.items():
            theirs.setdefault(parameter, []).append(name)
        return [names for names in theirs.values() if len(names) > 1]


def bind(
    fn: Callable[..., Any],
    kind: Kind,
    *,
    order: Sequence[str] | None,
    fixed: Mapping[str, Any] | None,
    derived: Mapping[str, Callable[[Case], Any]] | None = None,
    output: int | str | Callable[[Any], Any] | None,
    renamed: Mapping[str, Any],
) -> Binding:
    """Matches the subject's parameters with the arguments of the kind.

    Raises:
        SubjectError: a name is unknown, a required argument has no parameter, or a parameter no argument.
    """
    if not callable(fn):
        raise SubjectError(f"the subject must be callable, got {type(fn).__name__}")
    known = [argument.name for argument in kind.arguments]
    for name in [*renamed, *(order or ())]:
        if name not in known:
            raise SubjectError(f"{kind.name} has no argument {name!r}; it has {', '.join(known)}")
    parameters, catches_all = _parameters(fn)
    if order is not None:
        positions, names = {name: place for place, name in enumerate(order)}, {}
    else:
        settled = {*(fixed or ()), *(derived or ())}
        positions, names = {}, _matched(kind, parameters, renamed, settled, catches_all)
    built_in = {
        n: float(v) for n, v in renamed.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    found = set(names) | set(positions) | set(built_in) | _read(derived or {}, kind)
    absent = frozenset(name for name in known if name not in found)
    constants = dict(fixed or {})
    if order is None:
        _check_complete(fn, kind, parameters, names, {*constants, *(derived or ())})
    return Binding(
        fn=fn,
        kind=kind,
        names=names,
        positions=positions,
        constants=constants,
        built_in=built_in,
        absent=absent,
        pick=_picker(output),
        label=name_of(fn),
        derived=dict(derived or {}),
        asked=frozenset(
            n
            for n in (*positions, *(n for n, p in names.items() if not _none_by_default(parameters, p)))
            if kind.argument(n).optional
        ),
    )


def name_of(fn: Callable[..., Any]) -> str:
    """The subject's name in reports."""
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__


def required(argument: Argument) -> bool:
    """Whether a subject without it cannot be of the kind."""
    return not argument.optional and argument.neutral is None and not isinstance(argument.domain, Numbers)


def _parameters(fn: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters, and whether **kwargs catches others."""
    try:
        # A module's own call takes (*args, **kwargs) and hands them on.
        signature = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
    except (TypeError, ValueError) as error:
        raise SubjectError(
            f"the parameters of {name_of(fn)} cannot be read ({error}); say order=(...)"
        ) from error
    kinds = inspect.Parameter
    named = {
        name: p
        for name, p in signature.parameters.items()
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    }
    catches_all = any(p.kind == kinds.VAR_KEYWORD for p in signature.parameters.values())
    return named, catches_all


def _matched(
    kind: Kind,
    parameters: Mapping[str, inspect.Parameter],
    renamed: Mapping[str, Any],
    fixed: set[str],
    catches_all: bool,
) -> dict[str, str]:
    """Canonical argument → parameter."""
    names: dict[str, str] = {}
    for name, theirs in renamed.items():
        if isinstance(theirs, str):
            if theirs not in parameters and not catches_all:
                raise SubjectError(f"{name}={theirs!r}: the subject has no parameter {theirs!r}, only "
                                   f"{', '.join(parameters) or 'none'}")  # fmt: skip
            names[name] = theirs
    settled = set(renamed)
    free = [p for p in parameters if p not in names.values() and p not in fixed]
    for argument in kind.arguments:
        if argument.name not in settled and argument.name in free:
            names[argument.name] = argument.name
    for argument in kind.arguments:
        if argument.name in settled or argument.name in names:
            continue
        taken = {theirs for name, theirs in names.items() if not _may_share(kind, name, argument)}
        # What must be given comes first, then the better name: (cliprange, cliprange_low=None) is cliprange.
        likely = [p for s in argument.synonyms for p in free if _same(p, [s]) and p not in taken]
        needed = [p for p in likely if parameters[p].default is inspect.Parameter.empty]
        match = next(iter([*needed, *likely]), None)
        if match is not None:
            names[argument.name] = match
    _by_position(kind, parameters, free, settled, names)
    return names


def _may_share(kind: Kind, name: str, argument: Argument) -> bool:
    """Two numbers may be one parameter of the subject: a single clip width for both sides."""
    return isinstance(argument.domain, Numbers) and isinstance(kind.argument(name).domain, Numbers)


def _same(parameter: str, synonyms: Sequence[str]) -> bool:
    plain = parameter.lower().strip("_").replace("_", "")
    return any(plain == synonym.replace("_", "") for synonym in synonyms)


def _by_position(
    kind: Kind,
    parameters: Mapping[str, inspect.Parameter],
    free: Sequence[str],
    settled: set[str],
    names: dict[str, str],
) -> None:
    """Unknown names stand for the missing required tensors in order, if there are as many of both."""
    missing = [
        a.name for a in kind.arguments if required(a) and a.name not in names and a.name not in settled
    ]
    empty = inspect.Parameter.empty
    unknown = [p for p in free if p not in names.values() and parameters[p].default is empty]
    numbers = [
        a.name
        for a in kind.arguments
        if isinstance(a.domain, Numbers) and not a.optional and a.name not in names and a.name not in settled
    ]
    maskable = [a.name for a in kind.arguments if a.name in missing or (a.neutral and not a.optional)]
    tensors = [name for name in maskable if name not in names and name not in settled]
    orders = (missing, [*missing, *numbers], tensors, [*tensors, *numbers])
    wanted = next((order for order in orders if order and len(order) == len(unknown)), [])
    names.update(zip(wanted, unknown, strict=False))


def _check_complete(
    fn: Callable[..., Any],
    kind: Kind,
    parameters: Mapping[str, inspect.Parameter],
    names: Mapping[str, str],
    settled: set[str],
) -> None:
    used = set(names.values()) | settled
    left = [p for p, q in parameters.items() if p not in used and q.default is inspect.Parameter.empty]
    if left:
        raise SubjectError(
            f"{name_of(fn)} asks for {', '.join(left)}, which {kind.name} {kind.signature} does not know by "
            f"that name; rename (for example {kind.arguments[0].name}={left[0]!r}) or fix it "
            f"(fixed={{{left[0]!r}: ...}})"
        )


def _none_by_default(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name not in parameters or parameters[name].default is None


class _Noting(dict[str, Any]):
    """A case that notes which arguments are looked up."""

    def __init__(self, case: Case, seen: set[str]) -> None:
        super().__init__(case)
        self.seen = seen

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.seen.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)


def _read(derived: Mapping[str, Callable[[Case], Any]], kind: Kind) -> set[str]:
    """The canonical arguments that these are computed from, seen by computing them once.

    Raises:
        SubjectError: one of them raises.
    """
    seen: set[str] = set()
    for parameter, value in derived.items():
        for case in generic(kind):
            try:
                value(_Noting(case, seen))
            except Exception as error:
                raise SubjectError(
                    f"derived[{parameter!r}] raises {type(error).__name__}: {error}; it is given the arguments of "
                    f"{kind.name} {kind.signature} as a dict, optional ones only where they are used"
                ) from error
    return seen


def _picker(output: int | str | Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if output is None or callable(output):
        return output
    if isinstance(output, int):
        return lambda result: result[output]
    return lambda result: result[output] if isinstance(result, Mapping) else getattr(result, output)


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
        first = next((v for v in returned.values() if isinstance(v, Tensor)), None)
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
