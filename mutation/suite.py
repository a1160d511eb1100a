"""The tests as they are run against mutants: inside this process, one at a time, as fast as they go.

pytest collects them and its own protocol runs each, so fixtures, parameters and doctests are what they are
in `make test`. What differs: Hypothesis draws fewer examples, shrinks nothing and keeps nothing; a failure is
not explained; no fixture outlives its test.
"""

import contextlib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from _pytest.doctest import DoctestItem
from _pytest.runner import runtestprotocol
from hypothesis import Phase, Verbosity, settings

PROFILE = "mutation"
QUIET = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:logging",
    "-p",
    "no:randomly",
    "--assert=plain",
    "--capture=no",
]
Line = tuple[str, int]


class TimedOut(Exception):
    """A test ran much longer than it does on the unchanged code."""


class Outcome(NamedTuple):
    """One test, run once. lines: what it ran of the watched files, where that was recorded."""

    passed: bool
    skipped: bool
    seconds: float
    message: str
    lines: frozenset[Line] = frozenset()


class Test:
    """A collected test that can be run again and again."""

    def __init__(self, item: pytest.Item) -> None:
        self.name = item.nodeid
        self._item = item
        self._globals = dict(item.dtest.globs) if isinstance(item, DoctestItem) and item.dtest else None
        item.repr_failure = lambda excinfo, style=None: f"{excinfo.type.__name__}: {excinfo.value}"  # pyright: ignore

    def run(self, limit: float) -> Outcome:
        """Runs it once; more than `limit` seconds of processor time is a failure."""
        if "torch._dynamo" in sys.modules:  # it remembers what it compiled, and how often it compiled anew
            torch._dynamo.reset()
        if self._globals is not None:  # a doctest empties its namespace when it is done
            self._item.dtest.globs.update(self._globals)  # pyright: ignore[reportAttributeAccessIssue]
        start = time.perf_counter()
        with (
            _time_limit(limit),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            reports = runtestprotocol(self._item, log=False, nextitem=None)
        failed = [report for report in reports if report.failed]
        message = str(failed[0].longrepr) if failed else ""
        skipped = any(report.skipped for report in reports)
        return Outcome(not failed, skipped, time.perf_counter() - start, message)

    def run_recorded(self, files: frozenset[str], limit: float) -> Outcome:
        """Runs it once and says which lines of the files it ran."""
        lines: set[Line] = set()

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                lines.add((frame.f_code.co_filename, frame.f_lineno))
            return local

        def called(frame: FrameType, event: str, argument: Any) -> Any:
            return local if frame.f_code.co_filename in files else None

        before = sys.gettrace()
        sys.settrace(called)
        try:
            outcome = self.run(limit)
        finally:
            sys.settrace(before)
        return outcome._replace(lines=frozenset(lines))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimedOut in the block after that much processor time, and each second for whoever caught it."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimedOut(f"still running after {seconds:.1f} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


class _Plugin:
    """Lets pytest collect, and runs `body` in place of its loop."""

    def __init__(self, body: Callable[[Sequence[Test]], int], examples: int) -> None:
        self.result: int | None = None
        self.error: Exception | None = None
        self._body, self._examples = body, examples

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """After the suite's conftest has loaded its profile, and before any test is decorated with it."""
        settings.register_profile(
            PROFILE,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            max_examples=self._examples,
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
        )
        settings.load_profile(PROFILE)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not session.testsfailed:
            try:
                self.result = self._body([Test(item) for item in session.items])
            except Exception as error:  # pytest would print it as its own
                self.error = error
        return True


def with_tests(paths: Sequence[Path], body: Callable[[Sequence[Test]], int], *, examples: int) -> int | None:
    """Collects the tests of some files and folders and returns what `body` makes of them.

    None, and what pytest said on stderr, where they could not be collected.

    examples: how many Hypothesis draws for a test, unless the test itself asks for fewer.
    """
    plugin, said = _Plugin(body, examples), io.StringIO()
    with contextlib.redirect_stdout(said):
        pytest.main([*QUIET, *map(str, paths)], plugins=[plugin])
    if plugin.error is not None:
        raise plugin.error
    if plugin.result is None:
        sys.stderr.write(said.getvalue())
    return plugin.result
