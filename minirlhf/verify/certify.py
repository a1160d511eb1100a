"""`certify`: point the laws of a kind at any function, and read the verdict."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.binding import bind, required
from minirlhf.verify.cases import generic, key_of, pool, size_of, smallest
from minirlhf.verify.catalogue import bugs_of, kind_named, laws_of
from minirlhf.verify.fit import FP32, FP64, agree, fit
from minirlhf.verify.kinds import Case, Claim, Kind, Law
from minirlhf.verify.probe import Lacking, Probe, Raised
from minirlhf.verify.report import ABSENT, BROKEN, HOLDS, Finding, Report
from minirlhf.verify.subject import Binding, SubjectError, results_of
from minirlhf.verify.zoo import nearest_bug

_ATTEMPTS = 300
_CONDITION = 50.0


def certify(
    fn: Callable[..., Any],
    kind: str,
    *,
    order: Sequence[str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    derived: Mapping[str, Callable[[Case], Any]] | None = None,
    output: int | str | Callable[[Any], Any] | None = None,
    without: Sequence[str] = (),
    require: Sequence[str] = (),
    shrink_seconds: float = 1.5,
    **adapter: Any,
) -> Report:
    """Tries a function against every law of its kind.

    Args:
        fn: the subject, any callable on torch tensors.
        kind: a name of `KINDS` ("dpo", "gae", ...); `minirlhf verify --list` prints their signatures.
        order: canonical argument names in the order of the subject's positional parameters.
        fixed: the subject's own parameters that the kind does not know, with the values to pass.
        derived: the subject's own parameters, with what to pass as a function of the canonical arguments (a
            dict): `{"rewards": lambda case: case["reward"].flatten()}`. A result with as many elements as the
            canonical one is then brought into its shape.
        output: index, name or function that picks the result from what the subject returns.
        without: features (optional arguments or behaviours of the kind) to be treated as absent.
        require: features whose absence is to count as a defect; "all" for all of them.
        shrink_seconds: time for making counter-examples small; 0 takes them as they were found.
        adapter: canonical argument = the subject's parameter name, or the number that it has built in.

    Returns:
        A Report: laws held and broken, conventions found, features absent, the nearest known bug. True in a
        boolean context if no law is broken.

    Raises:
        SubjectError: the subject could not be tried: no such kind, an argument without a match, a function
            that raises on every input, a result of an impossible shape.
    """
    start = time.perf_counter()
    chosen = kind_named(kind)
    with _one_thread():
        binding = bind(fn, chosen, order=order, fixed=fixed, derived=derived, output=output, renamed=adapter)
        binding, variant = fit(_without(binding, without))
        demanded = _demanded(chosen, require)
        lacking = _lacking(binding, without, demanded)
        findings: list[Finding] = []
        for law in laws_of(chosen):
            probe = Probe(binding, variant, frozenset(lacking))
            finding = _finding(law, probe, lacking, demanded)
            if finding.status == ABSENT and law.proves:
                lacking.add(law.proves)
            findings.append(finding)
        probe = Probe(binding, variant, frozenset(lacking))
        findings = list(_shrunk(findings, probe, time.perf_counter() + shrink_seconds))
        broken = any(finding.status == BROKEN for finding in findings)
        nearest = nearest_bug(probe, bugs_of(kind), _telling(findings, chosen)) if broken else None
    return Report(
        subject=binding.label,
        binding=binding,
        variant=variant,
        findings=tuple(findings),
        absent=tuple(sorted(lacking)),
        nearest=nearest,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors have a dozen elements: to wake threads for them costs a hundred times their arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _telling(findings: Sequence[Finding], kind: Kind) -> list[Claim]:
    """The broken claims that the ordinary cases and gradients do not show."""
    broken = [
        (finding.law, finding.claim) for finding in findings if finding.status == BROKEN and finding.claim
    ]
    return [
        c
        for law, c in broken
        if law.cases is not None or c.raw or (c.wrt and c.wrt not in kind.differentiable)
    ]


def first_broken(law: Law, probe: Probe, cases: Sequence[Case]) -> Claim | None:
    """The first claim of a law that does not hold on these cases; None where all hold.

    Raises:
        Lacking: the law asks for a result that the subject does not give.
    """
    for case in cases:
        try:
            for claim in law.check(probe, probe.binding.restricted(case)):
                if not _holds(claim, _allowed(law, probe.variant.tolerance)):
                    return claim
        except Raised as raised:
            why = "an input that every subject of this kind has to take"
            return Claim(raised.case, raised.error, "holds", None, why)
        except (RuntimeError, IndexError) as error:  # of the law's arithmetic, on a result of another shape
            return Claim(case, error, "holds", None, "the result has the shape that its kind says")
    return None


def _allowed(law: Law, tolerance: float) -> float:
    """How far off a subject may be, relative: in single precision more, where a law follows from the formula
    and compares small differences of large numbers."""
    derived = tolerance >= FP32 and law.family not in ("value", "gradient")
    return tolerance * _CONDITION if derived else tolerance


def _holds(claim: Claim, tolerance: float) -> bool:
    got, want, slack = claim.got, claim.want, max(tolerance, FP64 * claim.loose)
    if isinstance(got, BaseException):
        return False
    if claim.relation == "finite":
        return bool(got.isfinite().all())
    if claim.relation == "holds":
        return bool(got.all())
    assert want is not None
    if claim.relation == "==":
        return agree(got, want, slack)
    margin = slack * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    if claim.relation == ">=":
        return bool((got.double() >= want.double() - margin).all())
    assert claim.relation == "<=", claim.relation
    return bool((got.double() <= want.double() + margin).all())


def _finding(law: Law, probe: Probe, lacking: set[str], demanded: set[str]) -> Finding:
    missing = [need for need in law.needs if need in lacking]
    if missing or law.proves in lacking:
        return Finding(law, ABSENT, lacks=missing[0] if missing else law.proves)
    cases = pool(probe.binding.kind) if law.cases is None else law.cases()
    if law.cases is not None:
        unable = next(filter(None, map(probe.binding.unable, cases)), None)
        if unable:
            return Finding(law, ABSENT, lacks=unable)
    try:
        claim = first_broken(law, probe, cases)
    except Lacking as lack:
        return Finding(law, ABSENT, lacks=str(lack))
    if claim is None:
        return Finding(law, HOLDS)
    if law.proves and law.proves not in demanded:
        return Finding(law, ABSENT, lacks=law.proves, claim=claim)
    return Finding(law, BROKEN, claim=claim)


def _shrunk(findings: Sequence[Finding], probe: Probe, deadline: float) -> Iterator[Finding]:
    """The findings, with the smallest counter-examples that the time allows; small ones are tried on all."""
    small: list[Case] = []
    for finding in findings:
        if finding.status != BROKEN or finding.law.cases is not None:
            yield finding
            continue
        claim = _first_of(finding.law, probe, small)
        if claim is None and time.perf_counter() < deadline:
            claim = _search(finding.law, probe, deadline)
            if claim is not None:
                small.append(claim.case)
        yield finding._replace(claim=claim or finding.claim)


def _first_of(law: Law, probe: Probe, cases: Sequence[Case]) -> Claim | None:
    try:
        return first_broken(law, probe, cases)
    except Lacking:
        return None


def _search(law: Law, probe: Probe, deadline: float) -> Claim | None:
    best: list[Case] = []
    seen: dict[str, bool] = {}

    def breaks(case: Case) -> bool:
        key = key_of(case)
        if key not in seen:
            late = time.perf_counter() > deadline
            seen[key] = not late and _first_of(law, probe, [case]) is not None
            if seen[key] and (not best or size_of(case) < size_of(best[0])):
                best[:] = [case]
        return seen[key]

    smallest(probe.binding.kind, breaks, attempts=_ATTEMPTS)
    return _first_of(law, probe, best)


def _demanded(kind: Kind, require: Sequence[str]) -> set[str]:
    names = set(kind.features) if list(require) == ["all"] else set(require)
    unknown = sorted(names - set(kind.features))
    if unknown:
        raise SubjectError(f"{kind.name} has no feature {unknown[0]!r}; it has {', '.join(kind.features)}")
    return names


def _some_results(binding: Binding) -> dict[str, Tensor]:
    """What the subject returns on the first generic case on which it returns anything."""
    for case in generic(binding.kind):
        try:
            return results_of(binding.call(binding.restricted(case)), binding.kind)
        except (
            Exception,
            SystemExit,
        ):  # a stranger's function: on this case it is a defect, found by the laws
            continue
    return {}


def _without(binding: Binding, features: Sequence[str]) -> Binding:
    """The subject as if it lacked these arguments: it is not given them, or given their neutral value."""
    arguments = [argument for argument in binding.kind.arguments if argument.name in features]
    dropped = {a.name for a in arguments if a.optional}
    neutral = {a.name for a in arguments if a.neutral is not None}
    names = {name: theirs for name, theirs in binding.names.items() if name not in dropped}
    return replace(binding, names=names, absent=binding.absent | dropped | neutral)


def _lacking(binding: Binding, without: Sequence[str], demanded: set[str]) -> set[str]:
    kind = binding.kind
    unknown = sorted(set(without) - set(kind.features))
    if unknown:
        raise SubjectError(f"{kind.name} has no feature {unknown[0]!r}; it has {', '.join(kind.features)}")
    lacking = {name for name in binding.absent if not required(kind.argument(name))}
    lacking |= set(binding.built_in)
    results = _some_results(binding)
    lacking |= {name for name in kind.fields[1:] if name not in results}
    if lacking & demanded:
        raise SubjectError(
            f"{binding.label} lacks {', '.join(sorted(lacking & demanded))}, which was required"
        )
    return lacking | set(without)
