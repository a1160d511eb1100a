"""Every kind and every known bug, in the order in which they are listed."""

from minirlhf.verify.bugs import preference as preference_bugs
from minirlhf.verify.families import preference
from minirlhf.verify.kinds import Kind, Law
from minirlhf.verify.laws import DESCENDING
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.zoo import Bug

_FAMILIES = [
    preference,
]
_ZOO = [
    preference_bugs,
]
KINDS: dict[str, Kind] = {kind.name: kind for family in _FAMILIES for kind in family.KINDS}
BUGS: tuple[Bug, ...] = tuple(bug for page in _ZOO for bug in page.BUGS)


def bugs_of(kind: str) -> tuple[Bug, ...]:
    """The known bugs of a kind."""
    return tuple(bug for bug in BUGS if bug.kind == kind)


def laws_of(kind: Kind) -> tuple[Law, ...]:
    """All laws of a kind, the one that only signed kinds have included."""
    return (*kind.laws, DESCENDING) if kind.signed else kind.laws


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        SubjectError: there is none; the nearest names are given.
    """
    if name not in KINDS:
        raise SubjectError(f"no kind {name!r}; expected one of {', '.join(KINDS)}")
    return KINDS[name]
