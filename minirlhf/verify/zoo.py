"""Known bugs: right implementations, each changed in one line.

A page of the zoo (`minirlhf/verify/zoo_*.py`) holds *specimens*, right implementations in the plain style of
the field, and for each a list of `Bug`s: which text of the specimen becomes which other text. That is how
bugs happen, and it keeps every one of them a line long. The wrong function is made when it is needed.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.cases import generic
from minirlhf.verify.fit import agree
from minirlhf.verify.probe import Probe, Raised
from minirlhf.verify.subject import own


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


def nearest_bug(probe: Probe, bugs: Sequence[Bug]) -> Nearest | None:
    """The bug whose results agree with the subject's most often; None where none explains it better than
    the right formula does, or on less than half of the probes."""
    cases = [probe.binding.restricted(case) for case in generic(probe.binding.kind)]
    theirs = [_seen(probe.value, probe.grad, case, probe) for case in cases]
    best, best_share = (
        None,
        _share(theirs, [_seen(probe.expected, probe.expected_grad, c, probe) for c in cases]),
    )
    for bug in bugs:
        wrong = _planted(bug)
        ours = [_bug_results(wrong, probe, case) for case in cases]
        share = _share(theirs, ours)
        if share > best_share:
            best, best_share = bug, share
    return Nearest(best, best_share) if best is not None and best_share >= 0.5 else None


@cache
def _planted(bug: Bug) -> Callable[..., Any]:
    return bug.plant()


Results = list[Tensor | None]


def _seen(value: Callable, grad: Callable, case: dict[str, Any], probe: Probe) -> Results:
    """The value on a case and its gradients; None for what raised."""
    results: Results = []
    for ask in [lambda: value(case), *(lambda n=n: grad(case, n) for n in _wrt(probe, case))]:
        try:
            results.append(ask())
        except Raised:
            results.append(None)
    return results


def _wrt(probe: Probe, case: dict[str, Any]) -> list[str]:
    return [name for name in probe.binding.kind.differentiable if name in case]


def _bug_results(wrong: Callable[..., Any], probe: Probe, case: dict[str, Any]) -> Results:
    """The bug's value and gradients on the case, reduced as the subject reduces."""
    results: Results = []
    for name in [None, *_wrt(probe, case)]:
        try:
            given = own(case)
            if name is not None:
                given[name] = case[name].detach().clone().requires_grad_()
            result = wrong(**given)
            result = probe.reduced(result[0] if isinstance(result, tuple) else result, case)
            if name is None:
                results.append(result.detach())
            elif not result.requires_grad:
                results.append(torch.zeros_like(given[name]))
            else:
                (g,) = torch.autograd.grad(result.sum(), given[name], allow_unused=True)
                results.append(torch.zeros_like(given[name]) if g is None else g)
        except (RuntimeError, ValueError, IndexError):
            results.append(None)
    return results


def _share(theirs: list[Results], ours: list[Results]) -> float:
    """The share of results on which both agree; both raising is agreement."""
    pairs = [pair for a, b in zip(theirs, ours, strict=True) for pair in zip(a, b, strict=True)]
    same = sum(a is b if a is None or b is None else agree(a, b, 1e-5) for a, b in pairs)
    return same / len(pairs)
