"""The gate passes where the tests refuse every mutant, and says what is wrong where it does not pass."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mutation.allowed import ALLOWED
from mutation.mutants import mutants_of
from mutation.run import EXAMPLES, PAGES, ROOMS, ROOT, TESTS, modules

Results = dict[str, tuple[int | str, str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutation.scenarios", str(tmp_path_factory.mktemp("scenarios"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_passes_where_every_mutant_is_killed(results: Results) -> None:
    code, text = results["strong"]
    assert code == 0
    assert re.search(r"(\d+) of \1 mutants killed \(100.0%\)", text)
    assert "survived strong_page.py" not in text


def test_a_survivor_is_shown_with_its_place_operator_and_difference_and_fails(results: Results) -> None:
    code, text = results["weak"]
    assert code == 1
    assert "weak_page.py:2 smaller [comparison], 1 tests pass" in text
    assert "  - return a < b\n  + return a <= b\n" in text
    assert text.count("\n  + ") == 1, "the others were killed"


def test_an_allowed_survivor_passes_and_the_reason_is_said(results: Results) -> None:
    code, text = results["allowed"]
    assert code == 0
    assert "allowed   1  a tie: Nobody promised anything on a tie." in text


def test_a_class_that_lets_nothing_through_is_stale_and_fails_unless_only_a_part_was_tried(
    results: Results,
) -> None:
    code, text = results["stale"]
    assert code == 1 and "'a ghost' lets nothing through" in text
    code, text = results["part"]
    assert code == 0 and "ghost" not in text


def test_nothing_is_tried_from_a_red_baseline(results: Results) -> None:
    code, text = results["red"]
    assert code == 2
    assert "test_red.py::test_red: AssertionError: three" in text
    assert "1 of 2 tests fail on the unchanged code: nothing was tried" in text
    assert "killed" not in text


def test_tests_that_cannot_be_collected_are_no_tests(results: Results) -> None:
    code, text = results["broken"]
    assert code == 2 and "could not be collected: nothing was tried" in text


def test_an_endless_loop_is_a_kill(results: Results) -> None:
    code, text = results["endless"]
    assert code == 0 and "100.0%" in text


def test_a_line_that_no_test_runs_is_said_to_be_one(results: Results) -> None:
    code, text = results["unseen"]
    assert code == 1
    assert re.search(r"unseen_page.py:3 shy \[arithmetic\], no test runs this line", text)


def test_a_mutant_that_ends_the_process_is_killed_and_counted_apart(results: Results) -> None:
    code, text = results["crash"]
    assert code == 0 and "2 killed by ending a process that hung or crashed" in text


def test_a_mutant_that_leaves_traces_stops_the_gate(results: Results) -> None:
    code, _ = results["soiled"]
    assert isinstance(code, str) and "a mutant has left its traces" in code and "test_soiled" in code


def test_no_mutants_at_all_are_no_success(results: Results) -> None:
    code, text = results["none"]
    assert code == 2 and "no mutants" in text


def test_the_modules_are_all_of_the_mathematics_and_the_tests_exist() -> None:
    names = modules()
    pages = [page for room in ROOMS for page in (ROOT / room).glob("*.py") if page.name != "__init__.py"]
    assert len(names) == len(pages) + len(PAGES) and len(set(names)) == len(names)
    assert {"minirlhf.objectives.sampling", "minirlhf.kernels.logprob", "minirlhf.rollout.draw"} <= set(names)
    assert modules(["objectives/value.py"]) == modules(["objectives.value"]) == ["minirlhf.objectives.value"]
    assert all((ROOT / path).exists() for path in TESTS)
    assert EXAMPLES >= 10


def test_the_readme_says_how_many_mutants_there_are() -> None:
    (said,) = re.findall(
        r"There are about ([\d,]+) of them", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    count = sum(len(mutants_of(name)) for name in modules())
    assert abs(int(said.replace(",", "")) - count) <= 0.1 * count, f"there are {count}"


def test_every_class_of_the_allow_list_has_one_sentence_as_its_reason() -> None:
    assert len({each.name for each in ALLOWED}) == len(ALLOWED) <= 20
    for each in ALLOWED:
        assert each.reason.endswith(".") and each.reason.count(". ") == 0, each.name


def test_the_command_says_which_modules_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mutation", "nowhere.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "there are minirlhf.objectives.advantages" in done.stderr


def test_the_folder_of_the_gate_stays_readable() -> None:
    for page in sorted(Path(ROOT / "mutation").glob("*.py")):
        assert page.read_text().count("\n") <= 400, page
