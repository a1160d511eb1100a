"""Which of a function's parameters is which argument of its kind.

They are matched by the names that the user gives, else by their own names, else by known synonyms, else by
position where nothing is left to guess.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from minirlhf.verify.cases import generic
from minirlhf.verify.kinds import Argument, Case, Kind, Numbers, Reals
from minirlhf.verify.subject import Binding, SubjectError


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
    fn = _instance(fn)
    known = [argument.name for argument in kind.arguments]
    for name in [*renamed, *(order or ())]:
        if name not in known:
            raise SubjectError(f"{kind.name} has no argument {name!r}; it has {', '.join(known)}")
    parameters, catches_all = _parameters(fn)
    if derived is None and order is None:
        derived = _flattened(kind, parameters, renamed, set(fixed or ()))
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


def _instance(fn: Any) -> Callable[..., Any]:
    """The subject itself; of a class, one made without arguments."""
    if inspect.isclass(fn):
        try:
            fn = fn()
        except Exception as error:
            raise SubjectError(
                f"{fn.__name__} is a class, and {fn.__name__}() raises {type(error).__name__}: {error}; "
                f"certify an instance, or a function"
            ) from error
    if not callable(fn):
        raise SubjectError(f"the subject must be callable, got {type(fn).__name__}")
    return fn


def _flattened(
    kind: Kind, parameters: Mapping[str, inspect.Parameter], renamed: Mapping[str, Any], settled: set[str]
) -> dict[str, Callable[[Case], Any]] | None:
    """What a subject gets that asks for the length of the last axis, and takes the tensors flattened."""
    free = {name: p for name, p in parameters.items() if name not in settled}
    size = next((name for name in free if _same(name, kind.last_axis)), None)
    if size is None:
        return None
    names = _matched(kind, parameters, renamed, {*settled, size}, catches_all=False)
    main = next(a.name for a in kind.arguments if isinstance(a.domain, Reals))
    flat = [a.name for a in kind.arguments if len(a.shape) == 2 and a.name in names]
    derived: dict[str, Callable[[Case], Any]] = {size: lambda case: case[main].shape[-1]}
    return derived | {names[name]: partial(_flat, name) for name in flat}


def _flat(name: str, case: Case) -> Any:
    return case[name].flatten()


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
                    f"derived[{parameter!r}] raises {type(error).__name__}: {error}; it gets the arguments "
                    f"of {kind.name} {kind.signature} as a dict, optional ones only where they are used"
                ) from error
    return seen


def _picker(output: int | str | Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if output is None or callable(output):
        return output
    if isinstance(output, int):
        return lambda result: result[output]
    return lambda result: result[output] if isinstance(result, Mapping) else getattr(result, output)
