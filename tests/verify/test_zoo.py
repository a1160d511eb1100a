"""The zoo: every known bug is certified as defective, every right implementation it is made from is not."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest

from minirlhf.verify import KINDS, certify
from minirlhf.verify.catalogue import BUGS, laws_of
from minirlhf.verify.zoo import Bug

SPECIMENS: dict[tuple[str, str], Callable[..., Any]] = {
    (bug.kind, bug.specimen.__name__): bug.specimen for bug in BUGS
}


class Seen(NamedTuple):
    """What `certify` made of a planted bug."""

    verdict: str
    nearest: str | None
    share: float


@cache
def certified(bug: Bug) -> Seen:
    report = certify(bug.plant(), bug.kind, shrink_seconds=0)
    near = report.nearest
    return Seen(report.verdict, near.bug.name if near else None, near.share if near else 0.0)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.kind}: {bug.name}")
def test_every_known_bug_is_certified_as_defective(bug: Bug) -> None:
    assert certified(bug).verdict == "defective"


@pytest.mark.parametrize("kind, name", SPECIMENS, ids=" ".join)
def test_what_the_zoo_is_made_from_is_right(kind: str, name: str) -> None:
    report = certify(SPECIMENS[kind, name], kind, shrink_seconds=0)
    assert report, [finding.law.name for finding in report.broken]


def test_there_are_more_than_200_laws_and_200_bugs_and_every_kind_has_both() -> None:
    assert len(BUGS) >= 200
    assert sum(len(laws_of(kind)) for kind in KINDS.values()) >= 200
    assert {bug.kind for bug in BUGS} == set(KINDS)
    assert all(laws_of(kind) for kind in KINDS.values())


def test_a_known_bug_is_recognised_as_one_that_does_the_same() -> None:
    missed = [(bug.kind, bug.name, certified(bug)) for bug in BUGS if certified(bug).share < 0.99]
    assert len(missed) <= len(BUGS) // 100, missed


def test_a_known_bug_is_called_by_its_own_name() -> None:
    other = [(bug.kind, bug.name, certified(bug)) for bug in BUGS if certified(bug).nearest != bug.name]
    assert len(other) <= len(BUGS) // 100, other


def test_names_are_unique_within_a_kind_and_every_law_says_where_it_comes_from() -> None:
    assert not [key for key, n in Counter((bug.kind, bug.name) for bug in BUGS).items() if n > 1]
    for kind in KINDS.values():
        laws = laws_of(kind)
        assert len({law.name for law in laws}) == len(laws), kind.name
        assert all(law.statement and law.source for law in laws), kind.name


def test_a_bug_whose_text_is_not_in_its_specimen_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        BUGS[0]._replace(right="no such text").plant()
