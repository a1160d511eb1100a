"""`minirlhf verify` as a user meets it: tables, exit codes, messages without a traceback of ours."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.verify.catalogue import KINDS, laws_of
from minirlhf.verify.command import markdown_table

SUBJECTS = Path(__file__).parent / "subjects.py"


def verify(*arguments: str) -> int:
    return cli.main(["verify", *arguments])


def test_a_wrong_function_in_a_file_is_exit_code_1_with_verdict_and_counter_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify(f"{SUBJECTS}:reference_forgotten", "--kind", "dpo") == 1
    out = capsys.readouterr().out
    assert "DEFECTIVE" in out and "nearest known bug: reference forgotten" in out
    assert "from subjects import reference_forgotten" in out and "assert_close" in out


def test_a_right_function_of_a_module_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("minirlhf.objectives.preference:dpo_loss", "--kind", "dpo", "--require", "all") == 0
    assert "CERTIFIED" in capsys.readouterr().out


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(f"{SUBJECTS}:reference_forgotten", "--kind", "dpo", "--json") == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "defective"


def test_what_a_subject_prints_is_not_part_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talkative.py"
    file.write_text(
        "print('imported')\n"
        "def loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):\n"
        "    print('called')\n    return chosen_logp\n"
    )
    assert verify(f"{file}:loss", "--kind", "dpo", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "defective"
    assert "imported" in captured.err and "called" in captured.err


def test_names_and_constants_are_given_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    order = ["beta", "ref_chosen_logp", "ref_rejected_logp", "chosen_logp", "rejected_logp"]
    assert verify(f"{SUBJECTS}:reordered", "--kind", "dpo", "--order", *order) == 0
    assert verify(f"{SUBJECTS}:with_extra", "--kind", "dpo", "--fix", "device=cpu") == 0
    swapped = ["chosen_logp=rejected_logp", "rejected_logp=chosen_logp"]
    assert verify(f"{SUBJECTS}:with_extra", "--kind", "dpo", "--fix", "device=cpu", "--rename", *swapped) == 1
    assert verify(f"{SUBJECTS}:summed_dpo", "--kind", "dpo", "--output", "0") == 0
    assert verify(f"{SUBJECTS}:summed_dpo", "--kind", "dpo", "--output", "1") == 1


@pytest.mark.parametrize(
    "source, message",
    [
        ("def dpo(:\n", "SyntaxError"),
        ("import torch\n\nimport not_installed_anywhere\n", "ModuleNotFoundError.*line 3"),
        ("raise SystemExit('no')\n", "SystemExit: no"),
        ("x = 1 / 0\n", "ZeroDivisionError.*line 1"),
    ],
)
def test_a_file_that_does_not_import_is_one_line_and_exit_code_2(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    assert verify(f"{file}:dpo", "--kind", "dpo") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert str(file) in captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected a subject and its kind"),
        ([f"{SUBJECTS}:reference_forgotten"], "expected a subject and its kind"),
        (["nowhere.py:f", "--kind", "dpo"], "nowhere.py: no such file"),
        (["not_a_module:f", "--kind", "dpo"], "importing not_a_module failed"),
        ([f"{SUBJECTS}:nothing", "--kind", "dpo"], "has no 'nothing'"),
        ([f"{SUBJECTS}", "--kind", "dpo"], "expected module:function"),
        ([f"{SUBJECTS}:always_raises", "--kind", "dpo"], "raises on every input: KeyError"),
        ([f"{SUBJECTS}:exits", "--kind", "dpo"], "raises on every input: SystemExit"),
        ([f"{SUBJECTS}:with_extra", "--kind", "dpo"], "asks for device"),
        ([f"{SUBJECTS}:with_extra", "--kind", "dpo", "--fix", "device"], "--fix: expected NAME=VALUE"),
        ([f"{SUBJECTS}:with_extra", "--kind", "doo"], "no kind 'doo'"),
        ([f"{SUBJECTS}:with_extra", "--kind", "dpo", "--rename", "order=x"], "dpo has no argument 'order'"),
    ],
)
def test_what_could_not_run_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert "Traceback" not in captured.err


def test_the_list_names_every_kind_with_its_signature(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in KINDS)
    assert "chosen_logp [B]" in out
    words = "".join(re.sub("[│┃]", " ", out).split())
    titles = ["".join(kind.title.split()) for kind in KINDS.values()]
    assert any("[" in title for title in titles), "brackets are markup to the table"
    assert "Implicitreward,β[logπ" in words


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_of_one_kind_names_its_arguments_and_laws(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("--list", "--kind", kind) == 0
    words = "".join(capsys.readouterr().out.split())  # long names are folded
    assert all(argument.name in words or len(argument.name) > 12 for argument in KINDS[kind].arguments)
    assert "law" in words and "knownbug" in words


def test_the_table_counts_every_law() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == len(KINDS) + 3
    total = int(rows[-1].split("|")[-3])
    assert total == sum(len(laws_of(kind)) for kind in KINDS.values())


def test_a_neighbour_of_the_file_can_be_imported_and_the_path_is_restored(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("from minirlhf.objectives.preference import dpo_loss\n")
    (tmp_path / "mine.py").write_text("from neighbour import dpo_loss\n")
    before = list(sys.path)
    assert verify(f"{tmp_path / 'mine.py'}:dpo_loss", "--kind", "dpo") == 0
    assert sys.path == before


def test_each_law_is_one_test_in_a_users_own_suite(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from subjects import reference_forgotten, scalar_dpo\n"
        "from minirlhf.verify import certify_test\n"
        "test_right = certify_test(scalar_dpo, 'dpo')\n"
        "test_wrong = certify_test(reference_forgotten, 'dpo')\n"
    )
    (tmp_path / "subjects.py").write_text(SUBJECTS.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed and all("test_wrong" in line for line in failed)
    laws = len(laws_of(KINDS["dpo"]))
    summary = done.stdout.splitlines()[-1].split(" in ")[0]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
    assert sum(counts.values()) == 2 * laws
    assert counts["skipped"] > 0 and "nearest known bug: reference forgotten" in done.stdout


TRAINERS = """
from types import SimpleNamespace
import torch
from minirlhf.verify.world import objective, small_world

def ascent(beta):
    step = torch.func.grad(objective)
    return SimpleNamespace(
        begin=lambda w: w.ref_logits,
        update=lambda logits: logits + 2 * step(logits, small_world(), beta=beta),
        policy=lambda logits: logits,
    )

right, wrong = ascent(1.0), ascent(0.5)
"""


@pytest.fixture
def trainers(tmp_path: Path) -> Path:
    file = tmp_path / "my_trainers.py"
    file.write_text(TRAINERS)
    return file


def test_a_trainer_is_certified_by_where_it_ends(trainers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(f"{trainers}:right", "--kind", "trainer-kl") == 0
    assert "reached: regret fraction" in capsys.readouterr().out
    assert verify(f"{trainers}:wrong", "--kind", "trainer-kl", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "stalled" and found["neighbours"][0]["name"] == "half_beta"


def test_what_is_no_trainer_is_told_what_one_has(trainers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(f"{trainers}:ascent", "--kind", "trainer-kl") == 2
    assert verify(f"{trainers}:torch", "--kind", "trainer-kl") == 2
    assert "lacks begin, update, policy" in capsys.readouterr().err
    assert verify(f"{trainers}:right", "--kind", "trainer-kl", "--max-updates", "3") == 1
