"""Convention detection: which of the legitimate variants of its kind a subject is.

The subject is evaluated on the generic cases, and compared with the oracle under every combination of the
kind's conventions, of sign, factor and reduction, and of the built-in numbers that it does not take as
arguments. The combination that agrees on most cases is what the laws are then held against; where none
agrees on any, ours is kept, and the laws say what is wrong.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.cases import generic
from minirlhf.verify.kinds import Case, Kind, Numbers
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
    kind = binding.kind
    cases = [binding.restricted(case) for case in generic(kind)]
    binding, outputs = _outputs(binding, cases)
    reductions = _possible(kind, cases, outputs)
    best: Variant | None = None
    for built_in in _built_in(binding):
        bound = [{**case, **built_in} for case in cases]
        for options in _combinations(kind):
            elements = [_oracle(kind, case, options) for case in bound]
            for variant in _output_variants(kind, options, built_in, reductions, bound, elements, outputs):
                if best is None or variant.matched > best.matched + 1e-12:
                    best = variant
        if best is not None and best.matched == 1.0:
            break
    assert best is not None
    return replace(binding, built_in={**binding.built_in, **best.built_in}), best


def agree(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Same shape, and equal within the tolerance, absolute and relative to the largest magnitude.

    Infinities agree with themselves; NaN agrees with nothing.
    """
    if got.shape != want.shape:
        return False
    got, want = got.detach().double(), want.detach().double()
    same = got == want
    finite = want.isfinite()
    scale = max(1.0, float(want[finite].abs().max())) if bool(finite.any()) else 1.0
    return bool((same | ((got - want).abs() <= tolerance * scale)).all())


def _outputs(binding: Binding, cases: list[Case]) -> tuple[Binding, list[Tensor | None]]:
    """The main result on each case, None where it raised; masks become numbers where bool is refused."""
    main = binding.kind.fields[0] if binding.kind.fields else "result"
    first_error: BaseException | None = None
    for dtype in (torch.bool, torch.float64, torch.int64):
        tried, outputs = replace(binding, mask_dtype=dtype), []
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
        if not any(a.neutral for a in binding.kind.arguments) or binding.kind.mask is None:
            break
    raise SubjectError(
        f"{binding.label} raises on every input: {type(first_error).__name__}: {first_error}"
    ) from first_error


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
    elements: list[Tensor],
    outputs: list[Tensor | None],
) -> Iterator[Variant]:
    for way in reductions:
        reduced = [
            way.apply(e, case.get(kind.mask) if kind.mask else None)
            for e, case in zip(elements, cases, strict=True)
        ]
        for sign in (1, -1) if kind.signed else (1,):
            for factor in kind.factors:
                seen = [_counted(kind, o, case) for o, case in zip(outputs, cases, strict=True)]
                pairs = [(o, sign * factor * r) for o, r in zip(seen, reduced, strict=True) if o is not None]
                exact = sum(agree(o, r, FP64) for o, r in pairs)
                near = sum(agree(o, r, FP32) for o, r in pairs)
                single = near > exact  # agreement that fp64 does not reach, but fp32 does
                matched = (near if single else exact) / len(outputs)
                yield Variant(options, built_in, way, sign, factor, FP32 if single else FP64, matched)


def _counted(kind: Kind, output: Tensor | None, case: Case) -> Tensor | None:
    """One number per token where the mask is True; 0 elsewhere, whatever the subject leaves there."""
    if output is None or kind.mask is None or output.shape != case[kind.mask].shape:
        return output
    return torch.where(case[kind.mask], output, 0.0)


def _built_in(binding: Binding) -> Iterator[dict[str, float]]:
    """Values to try for the numbers that the subject does not take and the user did not state."""
    numbers = [
        a
        for a in binding.kind.arguments
        if isinstance(a.domain, Numbers) and a.name in binding.absent and not a.optional
    ]
    values = [a.domain.usual or a.domain.choices for a in numbers if isinstance(a.domain, Numbers)]
    for chosen in itertools.product(*values):
        yield {a.name: v for a, v in zip(numbers, chosen, strict=True)}


def _combinations(kind: Kind) -> Iterator[dict[str, Any]]:
    names = [convention.name for convention in kind.conventions]
    for chosen in itertools.product(*(convention.values for convention in kind.conventions)):
        yield dict(zip(names, chosen, strict=True))


def _first(kind: Kind) -> dict[str, Any]:
    return {convention.name: next(iter(convention.values)) for convention in kind.conventions}


def _oracle(kind: Kind, case: Case, options: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return kind.oracle(case, options)
