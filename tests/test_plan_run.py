"""`minirlhf run --dry-run`: the plans that the run itself makes stage by stage, and nothing else."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf import cli
from minirlhf.evaluation import memory as evaluation_memory
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.evaluation.divergence import KL_ROWS, kl_of_tokens
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params, with_scalar_head
from minirlhf.recipes import RunConfig
from minirlhf.runs import dump_config
from minirlhf.training import run_directory
from minirlhf.training.live_memory import _Counter
from minirlhf.training.memory_plan import Entry, Phase, Plan, after, bytes_of
from minirlhf.training.plan_table import summary_of
from minirlhf.training.rewards import reader_of
from tests.miniature import write_files
from tests.models.tiny import CONFIG
from tests.test_cli import POLICIES, tiny

CPU = torch.device("cpu")


def small() -> RunConfig:
    """The miniature with room for its rows, one step a stage, and an option of each kind."""
    config, replace = tiny(), dataclasses.replace
    return replace(
        config,
        policies=("ppo", "dpo", "group"),
        sft=replace(config.sft, precision="bf16"),
        reward=replace(config.reward, adapter_rank=2),
        ppo=replace(config.ppo, adapter_rank=3),
        dpo=replace(config.dpo, activation_recomputation=True),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/, and the file small.toml."""
    root = tmp_path_factory.mktemp("planned-run")
    write_files(root / "data", rows=40)
    shape = ("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--n-positions", "48")
    tokenizer = str(root / "data/tokenizer.json")
    assert cli.main(["model", "--tokenizer", tokenizer, "--out", str(root / "model"), *shape]) == 0
    (root / "small.toml").write_text(dump_config(small()))
    return root


def real(made: Path, out: Path) -> list[str]:
    files = ["--model", str(made / "model"), "--preferences", str(made / "data/preferences.jsonl")]
    return ["run", "--config", str(made / "small.toml"), *files, "--out", str(out), "--max-steps", "1"]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; torch has a folder of its own there."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "scratch"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan of a run, as its stage made it."""
    found: list[Plan] = []

    def noting(plan: Plan, former: Sequence[Plan]) -> Plan:
        found.append(plan)
        return after(plan, former)

    monkeypatch.setattr(run_directory, "after", noting)
    return found


def peaks(said: str) -> list[tuple[str, float]]:
    """(Stage, GB) of every line that says a peak."""
    return [(name, float(gb)) for name, gb in re.findall(r"^(\S+): planned peak .* ([\d.]+) GB", said, re.M)]


def test_the_worlds_run_is_planned_in_order_without_a_weight_read_or_a_file_left(
    tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a dry run reads no tensor")

    monkeypatch.setattr("minirlhf.training.workspace.read_tensors", refused)
    (tmp_path / "tiny.toml").write_text(dump_config(tiny()))
    given = ["run", "--config", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "deep/run")]
    assert cli.main([*given, "--policies", *POLICIES, "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "tiny.toml"]
    assert not list(scratch.glob("minirlhf-*"))
    said = capsys.readouterr().out
    *stages, (last, whole) = peaks(said)
    names = ["drills", "pretrain", "sft", "reward", *POLICIES, "evaluation"]
    assert [name for name, _ in stages] == names
    assert last == "run" and whole == max(gb for _, gb in stages)
    assert said.count("counted for") >= len(names) and said.count("policy: moments") == len(names) - 1
    assert f"{tmp_path / 'deep/run'}/data/prompts.jsonl: train" in said and str(scratch) not in said


def test_a_dry_run_of_real_data_plans_what_the_run_plans_when_it_comes_to_it(
    made: Path, tmp_path: Path, scratch: Path, plans: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*real(made, tmp_path / "run"), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists() and not list(scratch.glob("minirlhf-*"))
    before = {plan.stage: plan for plan in plans}
    assert list(before) == ["sft", "reward", "ppo", "dpo", "group", "judge", "evaluation"]
    plans.clear()
    said = capsys.readouterr().out
    assert cli.main(real(made, tmp_path / "run")) == 0
    assert [plan.stage for plan in plans] == list(before)[:-1]
    for plan in plans:
        assert plan.phases == before[plan.stage].phases, plan.stage
        assert plan.assumed == before[plan.stage].assumed
    sizes = {
        entry.owner: entry.size for entry in before["evaluation"].phases[1].entries if entry.what == "start"
    }
    model = (tmp_path / "run/sft/model.safetensors").stat().st_size
    assert sizes.keys() == {"sft", "ppo", "dpo", "group", "reward model", "judge"}
    assert all(size == pytest.approx(model, rel=0.1) for size in sizes.values())
    assert said.count("computing in bf16") == 1 and said.count("activations computed again") == 1
    assert (
        said.count("adapters of rank 2") == 2 and said.count("adapters of rank 3") == 1
    )  # reward, judge; ppo
    printed = capsys.readouterr()
    assert [name for name, _ in peaks(printed.err)] == list(before)[:-1]
    assert "planned peak" not in printed.out


def test_a_given_reward_and_judge_are_planned_and_not_trained(
    made: Path, tmp_path: Path, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule_of_the_plan.py").write_text(
        "import torch\ndef short(p, r, f):\n    return -torch.tensor([float(len(x)) for x in r])\n"
    )
    reward = tmp_path / "reward"
    shape = gpt2.GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=0)
    _write_reward(reward, gpt2.bind(shape), made / "data/tokenizer.json")
    given = ["--reward", str(reward), "--judge", "rule_of_the_plan:short", "--policies", "ppo"]
    assert cli.main([*real(made, tmp_path / "run"), *given, "--dry-run"]) == 0
    assert [plan.stage for plan in plans] == ["sft", "ppo", "evaluation"]
    sizes = {entry.owner: entry.size for entry in plans[-1].phases[1].entries if entry.what == "start"}
    assert sizes.keys() == {"sft", "ppo", "reward model"} and sizes["reward model"] < sizes["sft"]


def _write_reward(folder: Path, model: LanguageModel, tokenizer: Path) -> None:
    from minirlhf.models.checkpoint import Normalisation, save_scalar_model

    generator = torch.Generator().manual_seed(0)
    params = with_scalar_head(model, model.init(generator), generator=generator)
    save_scalar_model(folder, model, params, tokenizer=tokenizer, normalisation=Normalisation())


def plan_of(stage: str, *sizes: int, back: int = 0, device: str = "cpu") -> Plan:
    """One phase a size; the last has `back` more, which the system gets back."""
    phases = [Phase(f"{i}", (Entry("policy", "start", size),)) for i, size in enumerate(sizes)]
    last = phases[-1]._replace(
        entries=(*phases[-1].entries, Entry("policy", "KV cache", back, returned=True))
    )
    return Plan(stage, torch.device(device), 100, (*phases[:-1], last))


def test_a_stage_finds_the_heap_of_the_fullest_stage_before_it() -> None:
    first, second, third = plan_of("a", 10, 70, back=500), plan_of("b", 10, 30, back=50), plan_of("c", 90)
    assert (first.peak, first.heap, second.peak, second.heap) == (670, 70, 180, 30)
    alone, then = after(first, []), after(second, [first])
    assert alone == first
    assert (then.totals, then.heap) == ([170, 220], 70)
    assert after(third, [first, then]).totals == [190]
    elsewhere = [plan_of("a", 10, 70, device="cuda"), plan_of("b", 10, 30, device="cuda")]
    assert after(elsewhere[1], elsewhere[:1]).totals == elsewhere[1].totals == [110, 130]


def test_the_summary_names_the_fullest_stage_and_its_phase() -> None:
    said = summary_of([plan_of("one", 10**9), plan_of("two", 10**9, 3 * 10**9), plan_of("three", 2 * 10**9)])
    assert said.splitlines()[-1] == "run: planned peak of memory 3.00 GB on cpu (two: 1)"
    assert [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")] == [
        "one", "two", "three",
    ]  # fmt: skip


def test_an_evaluation_holds_all_policies_and_reads_with_two_at_a_time() -> None:
    model = gpt2.bind(CONFIG)
    params: Params = model.init(torch.Generator().manual_seed(0))
    judge = with_scalar_head(model, params, generator=torch.Generator().manual_seed(1))
    config, size = EvaluationConfig(prompts=40, samples=3, max_response=6), bytes_of(params)
    plan = evaluation_memory.evaluation_plan(
        model, params, {"ppo": params, "dpo": params}, {"judge": reader_of(model, judge)},
        [[1, 2, 3, 4]] * 40, config, device=CPU,
    )  # fmt: skip
    by_name = {phase.name: phase for phase in plan.phases}
    assert list(by_name) == ["load", "sample", "KL", "score"]
    for phase in plan.phases:
        starts = {entry.owner: entry.size for entry in phase.entries if entry.what == "start"}
        assert starts == {"sft": size, "ppo": size, "dpo": size, "judge": bytes_of(judge)}
    activations = next(entry for entry in by_name["KL"].entries if entry.what == "activations")
    tokens, place = torch.ones(KL_ROWS, 10, dtype=torch.int64), torch.arange(KL_ROWS * 6) % 9 + 1
    counter = _Counter((params, tokens, place))
    with counter:
        found = kl_of_tokens(model, params, params, tokens, place)
    del found
    assert activations.size == pytest.approx(counter.peak, rel=0.02)
    rooms = {entry.what for entry in by_name["KL"].entries if entry.returned}
    assert "KV cache" in rooms  # the next rollout takes it over


def mistakes(made: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name of a mistake -> (arguments besides those of a right run, what its line must say)."""
    (folder / "few.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("mine")
    return {
        "existing": (["--out", str(folder / "full")], "expected a new or empty directory"),
        "rank": (["--sft.adapter-rank", "99"], r"adapter_rank must lie in 1\.\.16"),
        "targets": (["--ppo.adapter-targets", "c_atn"], "no linear layer of the blocks is called 'c_atn'"),
        "context": (["--reading.max-length", "99"], "max_length of 99 tokens exceeds the context of 48"),
        "response": (["--ppo.max-response", "48"], "max_response of 48 .* context of 48"),
        "none fits": (
            ["--reading.max-length", "3", "--reading.overlong", "drop"],
            f"{folder.parent}/run/data/demonstrations.jsonl: expected",
        ),
        "few": (["--preferences", str(folder / "few.jsonl")], "expected|at least"),
        "no model": (["--model", str(folder / "no")], "no: no such model directory"),
        "no device": (["--device", "cuda"], "--device cuda: this machine"),
        "no reward": (["--reward", str(folder / "no")], "reward: expected"),
        "judge": (["--judge", "no.such.module:f"], "no.such.module"),
    }


def test_every_mistake_is_one_line_exit_code_2_and_leaves_nothing(
    made: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, folder = [], tmp_path / "files"
    folder.mkdir()
    for name, (more, expected) in mistakes(made, folder).items():
        if name == "no device" and torch.cuda.is_available():
            continue
        code = cli.main([*real(made, tmp_path / "run"), *more, "--dry-run"])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minirlhf: ")]
        if code != 2 or len(lines) != 1 or not re.search(expected, lines[0]) or str(scratch) in lines[0]:
            wrong.append(f"{name}: exit code {code}, {lines}")
        if (tmp_path / "run").exists() or list(scratch.glob("minirlhf-*")):
            wrong.append(f"{name}: left something")
    assert not wrong, "\n".join(wrong)


def test_without_a_place_for_the_data_that_is_said(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no"))
    assert cli.main([*real(made, tmp_path / "run"), "--dry-run"]) == 2
    assert re.search("TMPDIR: expected a folder to write to: No such file", capsys.readouterr().err)
