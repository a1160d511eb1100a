"""The benchmarks tell what they do, refuse in one line what they cannot do, and compare what is the same."""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import tyro

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = ("rollout", "logprobs", "train_step", "train_curves", "memory_plan")
MACHINE = {"name": "a machine", "threads": 1, "dtype": "float32", "gflops": 1.0, "gbytes": 1.0}


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """They import each other by their bare names, which nothing else in the suite may get to see."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: import_module(name) for name in (*SCRIPTS, "record", "harness")}
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_what_a_benchmark_does_and_what_each_option_is(
    modules: dict[str, ModuleType], script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = modules[script]
    with pytest.raises(SystemExit) as ended:
        tyro.cli(module.Options, description=module.__doc__, args=["--help"])
    assert ended.value.code == 0
    assert (module.__doc__ or "").split(".")[0] in " ".join(capsys.readouterr().out.split())
    for owner in (module.Options, modules["record"].Output):
        body = ast.parse(inspect.getsource(owner)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:] + [ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{script}: {ast.unparse(field)} is not explained"


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("rollout", {"systems": ("vLMM",)}, "--systems: expected any of 'minirlhf', "),
        ("rollout", {"skewed_batches": (0,)}, "--skewed-batches: expected at least 1, got (0,)"),
        ("rollout", {"device": "cuda:99"}, "--device cuda:99: torch "),
        ("logprobs", {"rows": ()}, "--rows: expected at least 1, got ()"),
        ("logprobs", {"masked": (1.0,)}, "--masked: expected shares of at least 0 and below 1, got (1.0,)"),
        ("logprobs", {"device": "gpu"}, "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ("train_step", {"times": 0}, "--times: expected at least 1, got 0"),
        ("train_step", {"ppo_trl": Path("/nowhere")}, "--ppo-trl /nowhere: there is no trl in this folder"),
        ("train_curves", {"systems": ("TRL",)}, "--systems: expected 'minirlhf' among them, "),
        ("memory_plan", {"stages": ("sfft",)}, "--stages: expected any of 'sft', "),
    ],
)
def test_a_wrong_option_is_refused_in_one_line_before_any_work(
    modules: dict[str, ModuleType], script: str, options: dict[str, Any], said: str
) -> None:
    module = modules[script]
    with pytest.raises(SystemExit) as ended:
        module.main(module.Options(**options))
    assert said in str(ended.value) and "\n" not in str(ended.value)


def test_a_missing_competitor_is_said_and_left_out(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modules["harness"], "version", lambda package: None)
    module = modules["logprobs"]
    options = module.Options(systems=("naive", "TRL", "Liger"), rows=(8,), masked=(0.0,))
    rows = list(module._rows(options))
    assert [row.labels["system"] for row in rows] == ["naive"]
    said = capsys.readouterr().out.splitlines()
    assert said == ["TRL: trl is not installed, left out", "Liger: needs CUDA, left out"]


def test_logits_that_do_not_fit_the_memory_are_not_computed(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modules["logprobs"]
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(module, "available", lambda device: 10**6)
    options = modules["harness"].for_worker(module.Options(vocabulary=1000, width=1, times=1))
    got = module.worker("naive", 1000, 0.0, options)
    assert got == {"failed": "not run: needs about 0.0 GB, 0.0 are available"}


def test_the_systems_whose_log_probs_are_compared_agree(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = import_module("logprobs_systems")
    monkeypatch.setattr(systems.passes, "KEPT", systems.passes.KEPT)  # one of them sets it
    draw = torch.Generator().manual_seed(0)
    states, unembedding = (torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in (12, 30))
    ids, mask = torch.randint(30, (12,), generator=draw), torch.rand(12, generator=draw) < 0.5
    leaves = [states.requires_grad_(), unembedding.requires_grad_()]
    found = {}
    for name, system in systems.SYSTEMS.items():
        if system.needs is None:
            values = system.work(*leaves, ids, mask)
            found[name] = (values, *torch.autograd.grad(values.square().sum(), leaves))
    assert len(found) == 4
    for got in found.values():
        for ours, naive in zip(got, found["naive"], strict=True):
            torch.testing.assert_close(ours, naive, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_a_batch_is_cut_into_as_many_micro_batches_as_its_row_says(modules: dict[str, ModuleType]) -> None:
    ours = import_module("train_ours")
    assert [ours._parts(8, ours.Setting(parts=parts)) for parts in (1, 3, 4, 8)] == [8, 3, 2, 1]
    with pytest.raises(SystemExit, match="4 rows cannot be cut into 3 micro-batches"):
        ours._parts(4, ours.Setting(parts=3))


def _benchmark(record: ModuleType) -> Any:
    return record.Benchmark(
        packages=("torch",),
        report=lambda record: record_table(record),
        said=lambda row: f"{row['seconds']} s",
        picture="logprobs_picture",
        choices=("rows",),
    )


def record_table(record: dict[str, Any]) -> str:
    return "".join(f"{row['rows']} {row.get('seconds', row.get('failed'))}\n" for row in record["results"])


def _rows(record: ModuleType, found: dict[int, float | str]) -> list[Any]:
    def got(seconds: float | str) -> dict[str, Any]:
        if isinstance(seconds, str):
            return {"failed": seconds}
        return {"seconds": seconds, "extra_mb": 1.0, "machine": MACHINE}

    return [
        record.Row({"system": "naive", "rows": rows, "masked": 0.0}, lambda seconds=seconds: got(seconds))
        for rows, seconds in found.items()
    ]


def test_rows_become_a_record_a_table_and_a_picture_and_can_be_added_to(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    record, options = modules["record"], modules["logprobs"].Options(out=tmp_path, name="a", rows=(1, 2))
    record.run(options, _rows(record, {1: 0.5, 2: "failed: no memory"}), _benchmark(record))
    assert (tmp_path / "a.md").read_text() == "1 0.5\n2 failed: no memory\n"
    assert (tmp_path / "a.png").stat().st_size > 1000
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["options"]["rows"] == [1, 2] and kept["versions"]["torch"] == torch.__version__
    assert capsys.readouterr().out.endswith("1 0.5\n2 failed: no memory\n")

    more = modules["logprobs"].Options(out=tmp_path, name="a", rows=(2, 3), add=True)
    record.run(more, _rows(record, {2: 0.7, 3: 0.9}), _benchmark(record))
    assert (tmp_path / "a.md").read_text() == "1 0.5\n2 0.7\n3 0.9\n"  # the one that had failed is measured

    other = modules["logprobs"].Options(out=tmp_path, name="a", add=True, times=9)
    with pytest.raises(SystemExit, match="are of --times 3, not 9"):
        record.run(other, _rows(record, {4: 1.0}), _benchmark(record))


def test_where_no_row_can_be_measured_what_was_there_stays(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    record, options = modules["record"], modules["logprobs"].Options(out=tmp_path, name="a")
    (tmp_path / "a.json").write_text("earlier")
    with pytest.raises(SystemExit, match="no row could be measured; nothing is written"):
        record.run(options, _rows(record, {1: "failed: killed by SIGKILL"}), _benchmark(record))
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "earlier"


def test_a_process_that_fails_says_how(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    in_a_process = modules["harness"].in_a_process
    script.write_text("import sys, json; print('noise'); print(json.dumps({'got': json.loads(sys.argv[2])}))")
    assert in_a_process(str(script), [1, "a"]) == {"got": [1, "a"]}
    script.write_text("raise SystemExit('the file a.json: expected a list')")
    assert in_a_process(str(script), []) == {"failed": "failed: the file a.json: expected a list"}
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert in_a_process(str(script), []) == {"failed": "failed: killed by SIGKILL"}


@pytest.mark.parametrize(
    ("script", "start"),
    [
        ("rollout", "rollout"),
        ("logprobs", "logprobs"),
        ("train_step", "train-step"),
        ("train_curves", "train-curves"),
        ("memory_plan", "memory_plan"),
    ],
)
def test_the_tables_that_are_kept_say_what_their_json_says(
    modules: dict[str, ModuleType], script: str, start: str
) -> None:
    files = sorted((BENCHMARKS / "results").glob(f"{start}-*.json"))
    assert files
    for file in files:
        assert modules[script].report(json.loads(file.read_text())) == file.with_suffix(".md").read_text()
