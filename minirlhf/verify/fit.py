"""Convention detection: which of the legitimate variants of its kind a subject is.

The subject is evaluated on the generic cases, and compared with the oracle under every combination of the
kind's conventions, of sign, factor and reduction, and of the built-in numbers that it does not take as
arguments. The combination that agrees on most cases is what the laws are then held against; where none
agrees on any, ours is kept, and the laws say what is wrong.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.cases import generic
from minirlhf.verify.kinds import Argument, Case, Dialect, Kind, Numbers
from minirlhf.verify.reductions import Reduction, of_shape
from minirlhf.verify.subject import Binding, SubjectError, own, results_of

FP64 = 1e-8
FP32 = 2e-5


class Variant(NamedTuple):
    """One combination of conventions.

    tolerance: relative and absolute, of comparisons with an oracle: FP64, or FP32 for a subject that computes
        in single precision whatever it is given.
    matched: the share of generic cases on which oracle and subject agree.
    """

    options: Mapping[str, Any]
    built_in: Mapping[str, float]
    reduction: Reduction
    sign: int
    factor: float
    tolerance: float
    matched: float


def fit(binding: Binding) -> tuple[Binding, Variant]:
    """The variant that explains the subject best, and the binding with its built-in numbers and mask dtype.

    Raises:
        SubjectError: the subject raises on every generic case, or returns a shape that no reduction explains.
    """
    saying_more = [dialect for dialect in binding.kind.dialects if dialect.carries]
    for found in filter(None, (_in_dialect(binding, dialect) for dialect in saying_more)):
        return found
    plain, complaint = None, None
    try:
        plain = _fitted(binding)
    except SubjectError as error:
        complaint = error
    if plain and plain[1].matched == 1.0:
        return plain
    for dialect in binding.kind.dialects:
        found = None if dialect in saying_more else _in_dialect(binding, dialect)
        # A tensor with an axis less fits the others only where it is meant to: where both run, it is meant.
        fewer = dialect.say(generic(binding.kind)[0]).ndim < len(
            binding.kind.argument(dialect.argument).shape
        )
        usual = plain is not None and (found is None or plain[1].matched > found[1].matched)
        if found and not usual and (fewer or plain is None or not _runs(plain[0])):
            return found
    if plain is None:
        assert complaint is not None
        raise complaint
    return plain


def _in_dialect(binding: Binding, dialect: Dialect) -> tuple[Binding, Variant] | None:
    """The fit of a subject that is spoken to in a dialect; None where it cannot be, on any generic case."""
    takes = dialect.argument in binding.names or dialect.argument in binding.positions
    if not takes or not set(dialect.carries) <= binding.absent:
        return None
    spoken = replace(binding, dialect=dialect, absent=binding.absent - set(dialect.carries))
    try:
        fitted, variant = _fitted(spoken)
    except SubjectError:
        return None
    return (fitted, variant) if _runs(fitted) else None


def _runs(binding: Binding) -> bool:
    """Whether the subject takes every generic case."""
    try:
        for case in generic(binding.kind):
            binding.call(own(binding.restricted(case)))
    except (Exception, SystemExit):  # of a stranger's function
        return False
    return True


def _fitted(binding: Binding) -> tuple[Binding, Variant]:
    kind = binding.kind
    cases = [binding.restricted(case) for case in generic(kind)]
    cases += [kind.anchor(case) for case in cases] if kind.anchor else []
    binding, outputs = _outputs(binding, cases)
    binding, outputs = _laid_out(binding, cases, outputs)
    reductions = _possible(kind, cases, outputs)
    seen = outputs if kind.fit_by is None else [_slope(binding, case, kind.fit_by) for case in cases]
    best: Variant | None = None
    for built_in in _built_in(binding):
        bound = [{**case, **built_in} for case in cases]
        for options in _combinations(kind):
            targets = [_target(kind, case, options) for case in bound]
            for variant in _output_variants(kind, options, built_in, reductions, bound, targets, seen):
                if best is None or _quality(variant) > _quality(best):
                    best = variant
        if best is not None and _quality(best) == (1.0, -FP64, 0):
            break
    assert best is not None
    return replace(binding, built_in={**binding.built_in, **best.built_in}), best


def _quality(variant: Variant) -> tuple[float, float, int]:
    """How well it explains the subject: on how many cases, then how closely, then, where it does not explain
    all, with how few numbers read off a subject that is wrong anyway."""
    fewer = 0 if variant.matched == 1.0 else -len(variant.built_in)
    return round(variant.matched, 9), -variant.tolerance, fewer


def agree(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Same shape, and equal within the tolerance, absolute and relative to the largest magnitude.

    Infinities agree with themselves; NaN agrees with nothing. A log-prob of -inf may be any below -10,000,
    whose exponential is 0 in every precision.
    """
    if got.shape != want.shape:
        return False
    # Few numbers, compared often: lists are several times as fast as tensors.
    ours, theirs = (x.detach().double().flatten().tolist() for x in (got, want))
    slack = tolerance * max(1.0, max((abs(b) for b in theirs if math.isfinite(b)), default=1.0))
    pairs = zip(ours, theirs, strict=True)
    return all(a == b or abs(a - b) <= slack or (b == -math.inf and a < -1e4) for a, b in pairs)


def _outputs(binding: Binding, cases: list[Case]) -> tuple[Binding, list[Tensor | None]]:
    """The main result on each case, None where it raised.

    Masks become numbers where bool is refused, and fp64 becomes fp32 where that is.
    """
    main = binding.kind.fields[0] if binding.kind.fields else "result"
    first_error: BaseException | None = None
    masked = binding.kind.mask is not None and binding.kind.mask not in binding.absent
    masks = (torch.bool, torch.float64, torch.int64) if masked else (torch.bool,)
    for reals, mask in itertools.product((None, torch.float32), masks):
        tried, outputs = replace(binding, mask_dtype=mask, real_dtype=reals), []
        for case in cases:
            try:
                outputs.append(results_of(tried.call(own(case)), binding.kind)[main].detach())
            except SubjectError:
                raise
            except (Exception, SystemExit) as error:  # anything may come out of a stranger's function
                first_error = first_error or error
                outputs.append(None)
        if any(output is not None for output in outputs):
            return tried, outputs
    raise SubjectError(
        f"{binding.label} raises on every input: {type(first_error).__name__}: {first_error}"
    ) from first_error


def _laid_out(
    binding: Binding, cases: list[Case], outputs: list[Tensor | None]
) -> tuple[Binding, list[Tensor | None]]:
    """The results in the shape of the kind, where all of them come in one known other layout."""
    pairs = [(o, case) for o, case in zip(outputs, cases, strict=True) if o is not None]
    for layout in binding.kind.layouts:
        if all(layout.fits(o, case) for o, case in pairs):
            straight = [None if o is None else layout.canonical(o) for o in outputs]
            return replace(binding, layout=layout), straight
    return binding, outputs


def _possible(kind: Kind, cases: list[Case], outputs: list[Tensor | None]) -> list[Reduction]:
    known = of_shape(kind.shape, masked=kind.mask is not None)
    ways = known if kind.reducible else known[:1]
    fitting = [
        way for way in ways if all(_has_shape(way, kind, c, o) for c, o in zip(cases, outputs, strict=True))
    ]
    if not fitting:
        shown = ", ".join(str(list(o.shape)) for o in outputs if o is not None)
        raise SubjectError(f"expected a result of shape {list(kind.shape)}"
                           f"{' or a reduction of it' if kind.reducible else ''}, got {shown}")  # fmt: skip
    return fitting


def _has_shape(way: Reduction, kind: Kind, case: Case, output: Tensor | None) -> bool:
    if output is None:
        return True
    expected = _oracle(kind, case, _first(kind)).shape
    return len(way.result) == output.ndim and output.shape == expected[: output.ndim]


def _output_variants(
    kind: Kind,
    options: Mapping[str, Any],
    built_in: Mapping[str, float],
    reductions: list[Reduction],
    cases: list[Case],
    targets: list[Callable[[Reduction], Tensor]],
    outputs: list[Tensor | None],
) -> Iterator[Variant]:
    for way in reductions:
        reduced = [target(way) for target in targets]
        for sign in (1, -1) if kind.signed else (1,):
            for factor in kind.factors:
                seen = [_counted(kind, o, case) for o, case in zip(outputs, cases, strict=True)]
                pairs = [(o, sign * factor * r) for o, r in zip(seen, reduced, strict=True) if o is not None]
                exact = sum(agree(o, r, FP64) for o, r in pairs)
                near = sum(agree(o, r, FP32) for o, r in pairs)
                single = near > exact  # agreement that fp64 does not reach, but fp32 does
                matched = (near if single else exact) / len(outputs)
                yield Variant(options, built_in, way, sign, factor, FP32 if single else FP64, matched)


def _target(kind: Kind, case: Case, options: Mapping[str, Any]) -> Callable[[Reduction], Tensor]:
    """What a right subject gives in each reduction: the value, or the gradient that the kind is fitted by."""
    mask = case.get(kind.mask) if kind.mask else None
    if kind.fit_by is None:
        elements = _oracle(kind, case, options)
        return lambda way: way.apply(elements, mask)
    x = case[kind.fit_by].detach().clone().requires_grad_()
    graph = kind.oracle({**case, kind.fit_by: x}, options)
    return lambda way: torch.autograd.grad(way.apply(graph, mask).sum(), x, retain_graph=True)[0]


def _slope(binding: Binding, case: Case, wrt: str) -> Tensor | None:
    """The gradient of what the subject returns; None where it raised."""
    x = case[wrt].detach().clone().requires_grad_()
    try:
        result = next(iter(results_of(binding.call(own({**case, wrt: x})), binding.kind).values()))
        counted = _counted(binding.kind, result, case)
        if counted is None or not counted.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(counted.sum(), x, allow_unused=True)
    except (Exception, SystemExit):  # of a stranger's function
        return None
    return torch.zeros_like(x) if gradient is None else gradient


def _counted(kind: Kind, output: Tensor | None, case: Case) -> Tensor | None:
    """One number per token where the mask is True; 0 elsewhere, whatever the subject leaves there."""
    if output is None or kind.mask is None or output.shape != case[kind.mask].shape:
        return output
    return torch.where(case[kind.mask], output, 0.0)


def _built_in(binding: Binding) -> Iterator[dict[str, float]]:
    """Values to try for the numbers that the subject does not take and the user did not state."""
    values = {a.name: _candidates(binding, a) for a in binding.kind.arguments if a.name in binding.absent}
    values = {name: candidates for name, candidates in values.items() if candidates}
    for chosen in itertools.product(*values.values()):
        yield {name: v for name, v in zip(values, chosen, strict=True) if v is not None}


def _candidates(binding: Binding, argument: Argument) -> list[float | None]:
    """Values of a number that the subject may have built in; None is the feature that is not there."""
    if not isinstance(argument.domain, Numbers):
        return []
    measured = _measured(binding, argument.name)
    if argument.optional:
        return [None] if measured is None else [measured, None]
    return [measured] if measured is not None else list(argument.domain.usual or argument.domain.choices)


def _measured(binding: Binding, name: str) -> float | None:
    """The number, read off the subject's answers; to six digits, since it may compute in single precision."""
    main = binding.kind.fields[0] if binding.kind.fields else "result"

    def ask(case: Case) -> float:
        returned = binding.call(own(binding.restricted(case)))
        return float(results_of(returned, binding.kind)[main].detach().double().sum())

    try:
        value = binding.kind.measure[name](ask) if name in binding.kind.measure else None
    except (Exception, SystemExit):  # of a stranger's function
        return None
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _combinations(kind: Kind) -> Iterator[dict[str, Any]]:
    names = [convention.name for convention in kind.conventions]
    for chosen in itertools.product(*(convention.values for convention in kind.conventions)):
        yield dict(zip(names, chosen, strict=True))


def _first(kind: Kind) -> dict[str, Any]:
    return {convention.name: next(iter(convention.values)) for convention in kind.conventions}


def _oracle(kind: Kind, case: Case, options: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return kind.oracle(case, options)
