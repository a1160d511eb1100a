"""Every kind and every known bug, in the order in which they are listed."""

from minirlhf.verify.bugs import preference as preference_bugs
from minirlhf.verify.families import preference
from minirlhf.verify.kinds import Kind
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.zoo import Bug

KINDS: dict[str, Kind] = {kind.name: kind for family in (preference,) for kind in family.KINDS}
BUGS: tuple[Bug, ...] = tuple(bug for page in (preference_bugs,) for bug in page.BUGS)


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        SubjectError: there is none; the nearest names are given.
    """
    if name not in KINDS:
        raise SubjectError(f"no kind {name!r}; expected one of {', '.join(KINDS)}")
    return KINDS[name]
