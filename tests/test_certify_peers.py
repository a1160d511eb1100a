"""The example that certifies other libraries: it runs where there are none, and reports what it is given."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minirlhf.verify.binding import bind
from minirlhf.verify.catalogue import kind_named

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LIBRARIES = {
    "areal": "areal",
    "liger-kernel": "liger_kernel",
    "llamafactory": "llamafactory",
    "openrlhf": "openrlhf",
    "skyrl": "skyrl",
    "tinker_cookbook": "tinker_cookbook",
    "torchrl": "torchrl",
    "torchtune": "torchtune",
    "trl": "trl",
    "verl": "verl",
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, freshly imported, in an environment without any of the libraries."""
    before = dict(sys.modules)
    for name in [*LIBRARIES.values(), "peers", "certify_peers"]:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
    for package in LIBRARIES.values():
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("certify_peers")
    for module in set(sys.modules) - set(before):
        del sys.modules[module]
    sys.modules.update(before)


def write_library(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of these files, which can be imported from now on."""
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(folder)
    for package in {Path(path).parts[0] for path in files}:
        monkeypatch.delitem(sys.modules, package)


def test_without_any_library_each_is_a_row_and_ours_are_certified(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([]) == 0
    out = capsys.readouterr().out
    for library in LIBRARIES:
        assert any(library in line and "not installed" in line for line in out.splitlines())
    assert out.count(" certified ") == len(importlib.import_module("peers.ours").SUBJECTS)
    assert "DEFECTIVE" not in out and "Traceback" not in out


def test_a_defective_control_is_the_exit_code(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from minirlhf.objectives import masked

    ours = importlib.import_module("peers.ours")
    chosen = [subject for subject in ours.SUBJECTS if subject.function == "token_mean"]
    monkeypatch.setattr(ours, "SUBJECTS", chosen)
    assert example.main(["--only", "minirlhf"]) == 0
    monkeypatch.setattr(masked, "token_mean", lambda x, mask: x.mean())
    assert example.main(["--only", "minirlhf"]) == 1


def test_a_library_that_does_not_import_is_a_row_with_its_complaint(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = {"torchtune/__init__.py": "print('hello')\nraise RuntimeError('[gpu] wanted')\n"}
    write_library(tmp_path, broken, monkeypatch)
    assert example.main(["--only", "torchtune"]) == 0
    out = capsys.readouterr().out
    assert "RuntimeError:" in out and "[gpu] wanted" in out
    assert "hello" not in out and "Traceback" not in out


_INVERTED = """
def masked_mean(x, mask, dim=None):
    return (x * mask).sum(dim=dim) / (mask.sum(dim=dim) + 1e-8)


def whiten(x, mask, shift_mean=True):
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    whitened = (x - mean) * (var + 1e-8).rsqrt()
    return whitened + mean if shift_mean else whitened
"""


@pytest.fixture
def torchtune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType) -> ModuleType:
    """The example beside a library with one right and one wrong function, and nothing else."""
    write_library(tmp_path, {"torchtune/__init__.py": "", "torchtune/rlhf.py": _INVERTED}, monkeypatch)
    return example


def test_a_defect_is_shown_with_its_counter_example(
    torchtune: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torchtune.main(["--show", "torchtune whiten"]) == 0
    out = capsys.readouterr().out
    assert "from torchtune.rlhf import whiten" in out
    assert "DEFECTIVE" in out and "CERTIFIED" in out, "shift_mean=False is right"
    assert "mean_zero" in out


def test_the_table_the_file_and_the_summary_say_the_same(
    torchtune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "peers.json"
    torchtune.main(["--only", "torchtune", "--json", str(file)])
    table = capsys.readouterr().out
    torchtune.main(["--only", "torchtune", "--markdown"])
    summary = capsys.readouterr().out
    entries = {entry["function"]: entry for entry in json.loads(file.read_text())}
    assert entries["whiten"]["verdict"] == "defective"
    assert any(law.get("counter_example") for law in entries["whiten"]["laws"])
    assert entries["masked_mean"]["verdict"] == "certified" == entries["whiten shift_mean=False"]["verdict"]
    assert entries["estimate_advantages"]["verdict"] == "not in this release"
    assert table.count("DEFECTIVE") == 1 and table.count(" certified ") == 3
    assert "epsilon: 1e-08, built in" in table, "a convention that is not ours"
    assert "unbiased" not in table, "one that is"
    assert "NaN-safe mask" in table and "3 more" not in table
    assert "| torchtune | 4 | 3 | 1 |" in summary and "`whiten` | `whiten` | formula" in summary


def test_a_page_is_loaded_without_its_package_and_what_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "openrlhf/__init__.py": "",
        "openrlhf/models/__init__.py": "import flash_attn_that_nobody_has\n",
        "openrlhf/models/utils.py": "import deepspeed\n" + _INVERTED,
    }
    write_library(tmp_path, files, monkeypatch)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    example.main(["--show", "openrlhf masked_mean"])
    out = capsys.readouterr().out
    assert out.count("CERTIFIED") == 2 and "DEFECTIVE" not in out
    assert "deepspeed" not in sys.modules, "it only stood in while the page was loaded"


def test_what_stands_in_has_every_name_and_gives_way_again(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = importlib.import_module("peers.frame")
    real = ModuleType("deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", real)
    with frame._standing_in(("deepspeed",)):
        stand_in = importlib.import_module("deepspeed")
        assert stand_in is not real and stand_in.ZeRO is object
        assert not hasattr(stand_in, "__version__")
    assert sys.modules["deepspeed"] is real


def test_what_another_release_has_is_said_to_be_in_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"trl/__init__.py": "", "trl/trainer/__init__.py": "", "trl/trainer/utils.py": ""}
    write_library(tmp_path, files, monkeypatch)
    example.main(["--only", "trl"])
    out = capsys.readouterr().out
    assert "not in this release" in out
    assert "not installed" not in out and "does not import" not in out


def test_a_function_that_cannot_be_tried_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = "def masked_mean(x, mask, dim=None):\n    raise KeyError('no such shard')\n"
    write_library(tmp_path, {"torchtune/__init__.py": "", "torchtune/rlhf.py": hopeless}, monkeypatch)
    assert example.main(["--only", "torchtune", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "Not certified: torchtune: masked_mean (" in out and "no such shard" in out
    assert "estimate_advantages" not in out, "it is of another release, which is nothing to complain about"


def test_laws_that_only_met_an_exception_are_counted_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    picky = _INVERTED.replace("    return (x", "    assert mask.sum() > 1\n    return (x")
    write_library(tmp_path, {"torchtune/__init__.py": "", "torchtune/rlhf.py": picky}, monkeypatch)
    example.main(["--only", "torchtune", "--markdown"])
    assert "raises AssertionError:  (in " in capsys.readouterr().out


def test_every_adapter_fits_its_kind(example: ModuleType) -> None:
    tried = 0
    for page in example.PAGES:
        names = [(subject.function, subject.kind) for subject in page.SUBJECTS]
        assert len(set(names)) == len(names), f"{page.__name__} has two subjects of one name and kind"
        for subject in page.SUBJECTS:
            adapter = {"order": None, "fixed": None, "derived": None, "output": None, **subject.adapter}
            ways = {name: adapter.pop(name) for name in ("order", "fixed", "derived", "output")}
            if subject.call is not None:
                bind(subject.call, kind_named(subject.kind), **ways, renamed=adapter)
                tried += 1
    assert tried >= 100


def test_listed_rewards_go_back_to_their_prompt_and_sample(example: ModuleType) -> None:
    frame = importlib.import_module("peers.frame")
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    seen = []

    def estimate(listed: torch.Tensor, ones: torch.Tensor, prompt: object) -> torch.Tensor:
        seen.append((listed.flatten().tolist(), torch.as_tensor(prompt).tolist()))
        return 10 * listed * ones

    assert frame.by_group(estimate, reward, mask).tolist() == [[10, 0, 30], [0, 50, 60]]
    assert seen == [([1.0, 3.0, 5.0, 6.0], [0, 0, 1, 1])]


def test_a_score_is_placed_on_the_last_token_and_rows_are_aligned_there(example: ModuleType) -> None:
    frame = importlib.import_module("peers.frame")
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    placed = frame.placed_on_last(torch.tensor([5.0, 7.0]), mask)
    assert placed.tolist() == [[0, 0, 5, 0], [7, 0, 0, 0]]
    to, back = frame.right_aligned(mask)
    assert to(placed)[:, -1].tolist() == [5, 7]
    assert torch.equal(back(to(placed)), placed)
