"""The zoo: every known bug is certified as defective, and every right implementation it is made from is not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from minirlhf.verify import KINDS, certify
from minirlhf.verify.catalogue import BUGS, laws_of
from minirlhf.verify.zoo import Bug

SPECIMENS: dict[tuple[str, str], Callable[..., Any]] = {
    (bug.kind, bug.specimen.__name__): bug.specimen for bug in BUGS
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.kind}: {bug.name}")
def test_every_known_bug_is_certified_as_defective(bug: Bug) -> None:
    report = certify(bug.plant(), bug.kind, shrink_seconds=0)
    assert report.verdict == "defective"


@pytest.mark.parametrize("kind, name", SPECIMENS, ids=" ".join)
def test_what_the_zoo_is_made_from_is_right(kind: str, name: str) -> None:
    report = certify(SPECIMENS[kind, name], kind, shrink_seconds=0)
    assert report, [finding.law.name for finding in report.broken]


def test_the_zoo_and_the_laws_are_as_many_as_the_readme_says() -> None:
    assert len(BUGS) >= 200
    assert sum(len(laws_of(kind)) for kind in KINDS.values()) >= 200
    assert {bug.kind for bug in BUGS} == set(KINDS), "every kind has its bugs"


def test_a_known_bug_is_recognised_as_itself() -> None:
    missed = []
    for bug in BUGS:
        nearest = certify(bug.plant(), bug.kind, shrink_seconds=0).nearest
        if nearest is None or nearest.share < 0.99:
            missed.append(f"{bug.kind}: {bug.name} taken for {nearest.bug.name if nearest else 'no bug'}")
    assert len(missed) <= len(BUGS) // 20, missed


def test_names_are_unique_within_a_kind_and_every_law_says_where_it_comes_from() -> None:
    assert not [key for key, n in Counter((bug.kind, bug.name) for bug in BUGS).items() if n > 1]
    for kind in KINDS.values():
        laws = laws_of(kind)
        assert len({law.name for law in laws}) == len(laws), kind.name
        assert all(law.statement and law.source for law in laws), kind.name


def test_a_bug_whose_text_is_not_in_its_specimen_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        BUGS[0]._replace(right="no such text").plant()
