"""Each law as one test in the user's own suite."""

from collections.abc import Callable
from functools import cache
from typing import Any

from minirlhf.verify.catalogue import kind_named, laws_of
from minirlhf.verify.certify import certify
from minirlhf.verify.report import ABSENT, BROKEN, Report
from minirlhf.verify.subject import SubjectError


def certify_test(fn: Callable[..., Any], kind: str, **adapter: Any) -> Callable[[str], None]:
    """A pytest test with one case for each law: assign it to a name that pytest collects.

        test_my_dpo = certify_test(my_dpo_loss, "dpo", beta="kl_weight")

    A broken law fails with its counter-example; a law about a feature that the subject lacks is skipped. The
    subject is certified once, when the first case runs.

    Args:
        fn, kind, adapter: as for `certify`, its other keywords included.

    Raises:
        SubjectError: there is no such kind.
        ImportError: pytest is not installed.
    """
    import pytest  # of the user's environment: the suite itself runs without it

    @cache
    def report() -> Report | str:
        try:
            return certify(fn, kind, **adapter)
        except SubjectError as error:
            return str(error)

    @pytest.mark.parametrize("law", [law.name for law in laws_of(kind_named(kind))])
    def test(law: str) -> None:
        found = report()
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        finding = next(finding for finding in found.findings if finding.law.name == law)
        if finding.status == ABSENT:
            pytest.skip(f"{found.subject} lacks {finding.lacks}")
        if finding.status == BROKEN:
            pytest.fail(f"{found.subject} breaks {law}: {found.explained(finding)}", pytrace=False)

    return test
