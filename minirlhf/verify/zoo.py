"""Known bugs: right implementations, each changed in one line.

A page of the zoo (`minirlhf/verify/zoo_*.py`) holds *specimens*, right implementations in the plain style of
the field, and for each a list of `Bug`s: which text of the specimen becomes which other text. That is how
bugs happen, and it keeps every one of them a line long. The wrong function is made when it is needed.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.cases import generic
from minirlhf.verify.fit import agree
from minirlhf.verify.kinds import Case, Claim
from minirlhf.verify.probe import Probe, Raised
from minirlhf.verify.subject import own, results_of


class Bug(NamedTuple):
    """One known bug.

    name: what went wrong, in two or three words ("reference forgotten").
    kind: the kind of subject; specimen: the right function; right → wrong: the text that changes, which
        occurs exactly once in it.
    seen: where it happened: a repository and number, or a word on how common it is.
    """

    name: str
    kind: str
    specimen: Callable[..., Any]
    right: str
    wrong: str
    seen: str = "common"

    def plant(self) -> Callable[..., Any]:
        """The wrong function.

        Raises:
            ValueError: the text does not occur exactly once in the specimen.
        """
        source = inspect.getsource(self.specimen)
        if source.count(self.right) != 1:
            raise ValueError(f"{self.name}: {self.right!r} occurs {source.count(self.right)} times in "
                             f"{self.specimen.__name__}, expected once")  # fmt: skip
        namespace = dict(self.specimen.__globals__)
        exec(compile(source.replace(self.right, self.wrong), f"<zoo: {self.name}>", "exec"), namespace)
        return namespace[self.specimen.__name__]


class Nearest(NamedTuple):
    """The known bug that a subject resembles most, and on what share of the probes it does the same."""

    bug: Bug
    share: float


def nearest_bug(probe: Probe, bugs: Sequence[Bug], claims: Sequence[Claim] = ()) -> Nearest | None:
    """The bug whose results agree with the subject's most often; None where none explains it better than
    the right formula does, or on less than half of the probes.

    claims: that the subject broke; their cases are probes too, since some bugs show on no ordinary input.
    """
    kind = probe.binding.kind
    cases = [probe.binding.restricted(case) for case in (*generic(kind), *kind.extra_cases())]
    cases += [claim.case for claim in claims]
    wrt = tuple(dict.fromkeys([*kind.differentiable, *(claim.wrt for claim in claims if claim.wrt)]))
    raw = kind.mask is not None and any(claim.raw for claim in claims)
    theirs = [
        _seen(probe.value, probe.grad, c, wrt) + _beside(probe.binding.call, c, probe, raw) for c in cases
    ]
    right = [_seen(probe.expected, probe.expected_grad, case, wrt) for case in cases]
    if bugs:
        right = [
            seen + _beside(_with(bugs[0].specimen), c, probe, raw)
            for seen, c in zip(right, cases, strict=True)
        ]
    best, best_share = None, _share(theirs, right)
    for bug in bugs:
        wrong = _planted(bug)
        ours = (_bug_results(wrong, probe, c, wrt) + _beside(_with(wrong), c, probe, raw) for c in cases)
        share = _best_share(theirs, ours, _scales(probe), best_share)
        if share > best_share:
            best, best_share = bug, share
    return Nearest(best, best_share) if best is not None and best_share >= 0.5 else None


@cache
def _planted(bug: Bug) -> Callable[..., Any]:
    return bug.plant()


Results = list[Tensor | None]


def _seen(value: Callable, grad: Callable, case: dict[str, Any], wrt: Sequence[str]) -> Results:
    """The value on a case and its gradients; None for what raised."""
    results: Results = []
    for ask in [lambda: value(case), *(lambda n=n: grad(case, n) for n in wrt if n in case)]:
        try:
            results.append(ask())
        except Raised:
            results.append(None)
    return results


def _with(fn: Callable[..., Any]) -> Callable[[Case], Any]:
    return lambda case: fn(**own(case))


def _beside(call: Callable[[Case], Any], case: Case, probe: Probe, raw: bool) -> Results:
    """Further fields that the subject has, and (raw) what lies under the mask."""
    kind = probe.binding.kind
    fields = [name for name in kind.fields[1:] if probe.has(name)]
    mask = case[kind.mask] if raw and kind.mask else None
    if not fields and mask is None:
        return []
    try:
        results = results_of(call(case), kind)
        found: Results = [probe.counted(results[name].detach(), case) for name in fields]
        outside = [next(iter(results.values())).detach().masked_fill(m, 0.0) for m in [mask] if m is not None]
        return found + outside
    except Exception:  # of a stranger's function, or a wrong one's
        return [None] * (len(fields) + (mask is not None))


def _bug_results(
    wrong: Callable[..., Any], probe: Probe, case: dict[str, Any], wrt: Sequence[str]
) -> Results:
    """The bug's value and gradients on the case, reduced as the subject reduces."""
    results: Results = []
    for name in [None, *(name for name in wrt if name in case)]:
        try:
            given = own(case)
            if name is not None:
                given[name] = case[name].detach().clone().requires_grad_()
            result = next(iter(results_of(wrong(**given), probe.binding.kind).values()))
            result = probe.counted(result, case)
            if result.ndim == len(probe.binding.kind.shape):  # else it reduces by itself
                result = probe.reduced(result, case)
            if name is None:
                results.append(result.detach())
            elif not result.requires_grad:
                results.append(torch.zeros_like(given[name]))
            else:
                (g,) = torch.autograd.grad(result.sum(), given[name], allow_unused=True)
                results.append(torch.zeros_like(given[name]) if g is None else g)
        except (RuntimeError, ValueError, IndexError, TypeError):  # TypeError: it lacks an optional argument
            results.append(None)
    return results


def _scales(probe: Probe) -> list[float]:
    """What a result may legitimately be multiplied with: a bug may be one of an objective to maximise."""
    kind = probe.binding.kind
    return [sign * factor for sign in ((1, -1) if kind.signed else (1,)) for factor in kind.factors]


def _best_share(theirs: list[Results], ours: Iterable[Results], scales: list[float], least: float) -> float:
    """The largest share of agreeing results that a scale gives; 0 as soon as none can exceed `least`."""
    total = left = sum(len(results) for results in theirs)
    same = [0] * len(scales)
    for seen, results in zip(theirs, ours, strict=False):
        left -= len(seen)
        for place, scale in enumerate(scales):
            same[place] += _agreeing(seen, [_divided(r, scale) for r in results])
        if max(same) + left <= least * total:
            return 0.0
    return max(same) / total


def _divided(x: Tensor | None, scale: float) -> Tensor | None:
    return x if x is None or scale == 1.0 or x.dtype == torch.bool else x / scale


def _named(x: Tensor) -> Tensor:
    """NaN as a number, which agrees with itself."""
    return torch.where(x.isnan(), -98765.0, x)


def _agreeing(theirs: Results, ours: Results) -> int:
    """How many results agree; both raising is agreement."""
    pairs = zip(theirs, ours, strict=True)
    return sum(a is b if a is None or b is None else agree(_named(a), _named(b), 1e-5) for a, b in pairs)


def _share(theirs: list[Results], ours: list[Results]) -> float:
    return sum(map(_agreeing, theirs, ours)) / sum(map(len, theirs))
