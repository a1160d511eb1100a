"""The memory plan: exact where it can be counted by hand, and within 15 % of what a process really took."""

import gc
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf import cli
from minirlhf.data.records import Sequences, join
from minirlhf.kernels import cpu, memory, passes
from minirlhf.kernels.logprob import token_logp
from minirlhf.kernels.workspace import workspace
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import LanguageModel, Params, with_scalar_head
from minirlhf.models.opened import opened
from minirlhf.models.tensor_files import template
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.footprint import footprint
from minirlhf.rollout.sampler import generate
from minirlhf.training import plan_table, preference, sft
from minirlhf.training.live_memory import _Counter, live_memory, without_gradient
from minirlhf.training.memory_plan import Entry, Phase, Plan, bytes_of
from minirlhf.training.packed import PackedRows
from minirlhf.training.plan_phases import learner
from minirlhf.training.plan_table import announce, table_of
from minirlhf.training.samples import sample_watcher
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.sft import SFTConfig
from minirlhf.training.stage_plans import sft_plan
from minirlhf.training.stages import preference as preference_stage
from minirlhf.training.update import gradient
from minirlhf.training.workspace import load_policy
from tests.miniature import write_files
from tests.models.cases import CASES, Case, tiny_model
from tests.models.tiny import CONFIG

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def rows_of(count: int, tokens: int) -> PackedRows:
    ids, lengths = torch.zeros(count, tokens, dtype=torch.int64), torch.full((count,), tokens)
    return PackedRows(Sequences(ids, torch.ones(count, tokens, dtype=torch.bool), lengths, lengths))


def test_a_chain_of_three_operators_is_counted_by_hand() -> None:
    # x w and its tanh stand together, then x w is let go and exp comes: twice two tables.
    n, width = 50, 20
    x, w = torch.zeros(n, 4), torch.zeros(4, width)
    table = 4 * n * width

    def work(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        y = torch.tanh(y)
        return torch.exp(y)

    found = live_memory(without_gradient(work), x, w, device=CPU)
    assert (found.peak, found.kept, found.kept_at_peak, found.inside) == (2 * table, table, 0, 0)


def test_arguments_views_and_work_in_place_cost_nothing() -> None:
    def work(x: Tensor) -> Tensor:
        return x.view(-1).add_(1).view(5, 20).t()

    assert live_memory(work, torch.zeros(10, 10), device=CPU).peak == 0


def test_what_is_let_go_is_not_counted_with_what_comes_later() -> None:
    def work(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 2
        return x

    assert live_memory(work, torch.zeros(100), device=CPU).peak == 2 * 400


def saved_by_autograd(model: LanguageModel, params: Params, batch: PackedRows) -> int:
    """Bytes that torch's own autograd keeps for the backward pass, the parameters left out."""
    leaves = {leaf.requires_grad_().untyped_storage().data_ptr() for leaf in tree_leaves(params)}
    given = {leaf.untyped_storage().data_ptr() for leaf in batch.rows}
    kept: dict[int, int] = {}

    def pack(leaf: Tensor) -> Tensor:
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in leaves | given:
            kept[storage.data_ptr()] = storage.nbytes()
        return leaf

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda leaf: leaf):
        value, _ = sft.loss(params, batch, torch.tensor(1.0), model=model)
    del value
    return sum(kept.values())


def test_a_gradients_activations_are_what_autograd_saves() -> None:
    config = gpt2.GPT2Config(vocab_size=61, n_positions=256, n_embd=32, n_layer=6, n_head=4, eos_token_id=0)
    model = gpt2.bind(config)
    params, batch = model.init(torch.Generator().manual_seed(0)), rows_of(4, 256)
    work = partial(gradient, loss=partial(sft.loss, model=model))
    live = live_memory(work, params, [batch], torch.tensor(1.0), device=CPU)
    saved = saved_by_autograd(model, params, batch)
    # And what one operator of the backward pass makes: of a linear layer also its input, made again.
    assert saved < live.passing < 1.2 * saved
    assert live.kept == pytest.approx(bytes_of(params), rel=0.02)  # and two metrics


def test_a_second_micro_batch_adds_the_gradient_that_waits_and_a_third_nothing() -> None:
    model = gpt2.bind(CONFIG)
    params, work = template(model.init), partial(gradient, loss=partial(sft.loss, model=model))
    one, two, three = (
        live_memory(work, params, [rows_of(3, 20)] * count, torch.tensor(1.0), device=CPU).peak
        for count in (1, 2, 3)
    )
    assert two - one == pytest.approx(bytes_of(params), rel=0.05)
    assert three == pytest.approx(two, rel=0.001)  # a few scalars


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_family_can_be_planned_without_a_number_being_computed(case: Case) -> None:
    model, _ = tiny_model(case)
    params, work = template(model.init), partial(gradient, loss=partial(sft.loss, model=model))
    live = live_memory(work, params, [rows_of(2, 6)], torch.tensor(1.0), device=CPU)
    assert live.kept >= bytes_of(params)
    assert live.passing > 0


@pytest.mark.parametrize("keep", [200, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_probs_workspace_is_what_its_passes_hold(
    keep: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PIECE", 4 * 200 * 300)  # 300 of 2,000 tokens at a time
    states, matrix = torch.randn(200, 32).to(dtype), torch.randn(2000, 32).to(dtype)
    ids, mask = torch.randint(2000, (200,)), torch.ones(200, dtype=torch.bool)
    mask[::7] = False
    forward: Any = (states, matrix, ids, mask, 0.7, True, keep)
    logp, entropy, lse, _, kept = passes.forward_pass(*forward)
    backward = (states, matrix, ids, mask, entropy, lse, kept, torch.ones(200), torch.ones(200), 0.7)
    calls: list[tuple[Any, Any, Any]] = [
        (torch.ops.minirlhf.log_prob.default, passes.forward_pass, forward),
        (torch.ops.minirlhf.log_prob_gradient.default, passes.backward_pass, (*backward, True, True)),
    ]
    for operator, work, given in calls:
        taken = _held_really(work, given)
        returned = sum(leaf.nbytes for leaf in work(*given))
        planned = workspace(operator, given) + returned
        assert 0.85 * taken <= planned <= 1.35 * taken, (operator, taken, planned)


def test_the_peak_contains_what_the_log_prob_holds_inside() -> None:
    states, matrix = torch.zeros(1, 400, 8), torch.zeros(passes.KEPT // 800, 8)  # too large to be kept
    ids = torch.zeros(1, 400, dtype=torch.int64)
    live = live_memory(without_gradient(token_logp), states, matrix, ids, ids.bool(), device=CPU)
    assert passes.PIECE // 2 < live.inside < 2 * passes.PIECE + 8 * passes.PIECE * (not cpu.available())
    assert live.inside < live.peak < live.inside + 20 * ids.nbytes


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_stage_is_planned_for_its_longest_rows_and_the_gradients_it_sums(batches: int) -> None:
    model = gpt2.bind(CONFIG)
    params = model.init(torch.Generator().manual_seed(0))
    examples = [join([i + 1], [2] * length) for i, length in enumerate([3] * 20 + [19] * 12)]
    config = SFTConfig(batch_size=4 * batches, micro_batch_size=4)
    plan = sft_plan("sft", model, params, examples, examples[:2], [], config, device=CPU)
    phase = next(phase for phase in plan.phases if phase.name == "gradient")
    work = partial(gradient, loss=partial(sft.loss, model=model))
    one = live_memory(work, params, [rows_of(4, 20)], torch.tensor(1.0), device=CPU)
    # start, parameters, two moments, best checkpoint; and from the second on the sum so far
    owned = (5 if batches == 1 else 6) * bytes_of(params)
    assert phase.size == pytest.approx(owned + one.peak, rel=0.001)
    assert "4 rows of 20 tokens" in plan.assumed[0]


def _planned(config: SFTConfig) -> Plan:
    shape = gpt2.GPT2Config(vocab_size=61, n_positions=64, n_embd=64, n_layer=6, n_head=4, eos_token_id=0)
    model = gpt2.bind(shape)
    examples = [join([i + 1], [2] * 40) for i in range(8)]
    return sft_plan("sft", model, template(model.init), examples, examples[:2], [[1, 2]], config, device=CPU)


def _sizes(plan: Plan, name: str) -> dict[str, int]:
    phase = next(phase for phase in plan.phases if phase.name == name)
    return {entry.what: entry.size for entry in phase.entries}


def test_adapters_take_at_most_a_quarter_of_the_gradients_and_moments_of_full_training() -> None:
    full, adapted = (_sizes(_planned(SFTConfig(adapter_rank=rank)), "step") for rank in (None, 2))
    for sizes in (full, adapted):
        assert sizes["gradients"] == pytest.approx(sizes["moments"] / 2, rel=0.02)
    assert adapted["gradients"] + adapted["moments"] <= (full["gradients"] + full["moments"]) / 4
    assert adapted["start"] == full["start"]
    merged = _sizes(_planned(SFTConfig(adapter_rank=2)), "show samples")["merged weights"]
    assert merged == 4 * 6 * (64 * 3 * 64 + 64 * 64 + 2 * 4 * 64 * 64)  # the blocks' matrices, in fp32


def test_recomputed_activations_are_one_blocks_and_the_stream_between_blocks() -> None:
    kept, recomputed = (
        _sizes(_planned(SFTConfig(activation_recomputation=on)), "gradient")["activations"]
        for on in (False, True)
    )
    stream = 4 * 8 * 41 * 64  # one [B, T, D] in fp32
    assert kept > 6 * 10 * stream  # a block of GPT-2 keeps more than ten tables of that size
    assert recomputed < kept / 2
    assert recomputed > (6 + 10) * stream


def test_bf16_halves_the_activations_for_one_copy_of_what_is_trained() -> None:
    wide, half = (_sizes(_planned(SFTConfig(precision=each)), "gradient") for each in ("fp32", "bf16"))
    assert half["copy in bf16"] == half["parameters"] / 2 == wide["parameters"] / 2
    assert wide["copy in bf16"] == 0
    # Of one micro-batch, the bf16 gradients of the copy count as activations until they are widened.
    assert half["activations"] < 0.5 * wide["activations"] + 1.1 * half["copy in bf16"]


def test_compiled_steps_are_counted_as_if_they_were_not_and_that_is_said() -> None:
    assert len(_planned(SFTConfig()).assumed) == 1
    assert "not compiled" in _planned(SFTConfig(compile="auto")).assumed[1]


def test_a_plan_of_real_parameters_makes_no_copy_of_them_and_leaves_the_random_state() -> None:
    model = gpt2.bind(CONFIG)
    params, before = model.init(torch.Generator().manual_seed(0)), torch.get_rng_state()
    policy = learner("policy", model, params, SFTConfig(adapter_rank=2, precision="bf16"))
    assert all(leaf.is_meta for leaf in opened((policy.trained, policy.computing, policy.kept)).tensors)
    assert torch.equal(before, torch.get_rng_state())


def test_the_reference_that_adapters_share_with_the_policy_costs_nothing_in_bf16() -> None:
    model = gpt2.bind(CONFIG)
    params = template(model.init)
    size = bytes_of(params)
    for rank, other, made in ((2, None, 0), (2, params, size // 2), (None, None, size // 2)):
        policy = learner("policy", model, params, SFTConfig(adapter_rank=rank, precision="bf16"))
        assert policy.frozen(other)[1] == made
        assert learner("policy", model, params, SFTConfig(adapter_rank=rank)).frozen(other)[1] == 0


def _held_really(work: Any, given: tuple[Any, ...]) -> int:
    """The same count on tensors that have memory, inside the operator."""
    counter = _Counter(given)
    with counter:
        result = work(*given)
    del result
    return counter.peak


def test_the_footprint_has_the_cache_that_a_rollout_takes() -> None:
    model = gpt2.bind(replace(CONFIG, n_positions=256))
    params = model.init(torch.Generator().manual_seed(0))
    prompts = [[1] * 40 + [2]] * 3 + [[1] * 33 + [4] * 50, [1] * 35]
    index = torch.arange(len(prompts))
    rollout = generate(
        model, params, prompts, law=partial(tempered, temperature=1.0), max_new_tokens=30, stop_ids=(),
        seed=0, prompt_index=index, sample_index=index, slots=4,
    )  # fmt: skip
    assert rollout.cache is not None
    expected = footprint(model, params, prompts, max_new_tokens=30, device=CPU, slots=4)
    assert expected.cache == rollout.cache.allocated * rollout.cache.page_bytes
    assert (expected.slots, expected.tokens) == (4, 83 - 32)


@pytest.mark.parametrize("most", [40, 8192])
def test_the_footprint_has_room_for_the_largest_pass(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("engine", "footprint"):
        monkeypatch.setattr(f"minirlhf.rollout.{where}.PREFILL_TOKENS", most)
    model, read = gpt2.bind(CONFIG), []
    params = model.init(torch.Generator().manual_seed(0))

    def states(params, tokens, *rest):
        read.append(tokens.numel())
        return model.states(params, tokens, *rest)

    prompts, index = [[1 + n] * n for n in (5, 17, 3, 9, 11, 20, 21)], torch.arange(7)
    generate(
        model._replace(states=states), params, prompts, law=partial(tempered, temperature=1.0),
        max_new_tokens=3, stop_ids=(), seed=0, prompt_index=index, sample_index=index, slots=5,
    )  # fmt: skip
    expected = footprint(model, params, prompts, max_new_tokens=3, device=CPU, slots=5)
    assert max(read) <= expected.rows * expected.tokens <= max(read) + 21 + 5


def plan_of(*phases: Phase, device: str = "cpu") -> Plan:
    return Plan("sft", torch.device(device), 100, phases)


def test_the_heap_keeps_its_largest_size_and_what_is_returned_comes_on_top() -> None:
    phases = (
        Phase("load", (Entry("policy", "start", 10), Entry("data", "file", 50, returned=True))),
        Phase("gradient", (Entry("policy", "start", 10), Entry("policy", "activations", 70))),
        Phase("sample", (Entry("policy", "start", 10), Entry("policy", "KV cache", 5, returned=True))),
    )
    assert plan_of(*phases).totals == [160, 180, 185]
    assert plan_of(*phases).fullest.name == "sample"
    # The second sample comes after the first gradient, whatever the order of the first ones.
    again = plan_of(phases[0], phases[2], phases[1])
    assert (again.totals, again.fullest.name) == ([160, 185, 180], "sample")
    assert plan_of(*phases[:2]).fullest.name == "gradient"
    elsewhere = plan_of(*phases, device="cuda")._replace(base=0)
    assert elsewhere.totals == [60, 80, 15]


def test_moments_belong_to_what_is_trained_and_not_to_the_base_it_starts_from() -> None:
    model = gpt2.bind(CONFIG)
    params, config = template(model.init), SFTConfig(adapter_rank=2, precision="bf16")
    sizes = {entry.what: entry.size for entry in learner("policy", model, params, config).held()}
    width = CONFIG.n_embd
    layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    adapters = 4 * 2 * CONFIG.n_layer * sum(inside + out for inside, out in layers)
    assert sizes["parameters"] == sizes["best checkpoint"] == sizes["moments"] / 2 == adapters
    assert sizes["start"] == 2 * sizes["base in bf16"] == bytes_of(params)


def test_a_machine_with_less_is_told_what_to_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    setting = Setting(0, "cpu", ReadingConfig(), show=lambda line: said.append(str(line)))
    plan = plan_of(Phase("gradient", (Entry("policy", "activations", 10**9),)))
    monkeypatch.setattr(plan_table, "available", lambda device: 10**12)
    assert not announce(plan, setting)
    assert not said and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(plan_table, "available", lambda device: None)  # not known: nothing is claimed
    assert not announce(plan, setting)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(plan_table, "available", lambda device: 10**8)
    assert announce(plan, setting._replace(dry_run=True))
    assert len(said) == 3 and "--micro-batch-size" in said[-1] and "0.10 GB" in said[-1]
    options = ("--adapter-rank", "--activation-recomputation")
    assert not any(option in said[-1] for option in options)  # they are in use
    announce(plan._replace(remedies=_planned(SFTConfig()).remedies), setting._replace(dry_run=True))
    assert all(option in said[-1] for option in options)


def test_the_table_has_every_entry_and_the_peak() -> None:
    phases = (
        Phase("load", (Entry("policy", "start", 7_000_000),)),
        Phase("gradient", (Entry("policy", "gradients", 3_000_000), Entry("reference", "start", 9_000_000))),
    )
    table = table_of(plan_of(*phases)._replace(base=1_000_000))
    for words in ("policy: start", "policy: gradients", "reference: start", "load", "gradient", "12", "13"):
        assert words in table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    write_files(folder)
    shape = gpt2.GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
    _write_models(folder, gpt2.bind(shape))
    return folder


def _write_models(folder: Path, model: LanguageModel) -> None:
    generator, text = torch.Generator().manual_seed(0), folder / "tokenizer.json"
    params = model.init(generator)
    save_language_model(folder / "policy", model, params, tokenizer=text)
    head = with_scalar_head(model, params, generator=generator)
    save_scalar_model(folder / "reward", model, head, tokenizer=text, normalisation=Normalisation())


COMMANDS = {
    "pretrain": ("plain", []),
    "sft": ("demonstrations", []),
    "reward": ("preferences", ["--rollouts", "8", "--max-response", "8"]),
    "dpo": ("preferences", []),
    "ipo": ("preferences", []),
    "ppo": ("prompts", ["--reward-model", "{}/reward", "--batch-size", "8", "--max-response", "8"]),
    "group": ("prompts", ["--reward-model", "{}/reward", "--prompts-per-batch", "2", "--max-response", "8"]),
}


def arguments(name: str, made: Path, out: Path) -> list[str]:
    data, more = COMMANDS[name]
    files = ["--policy", str(made / "policy"), "--data", str(made / f"{data}.jsonl"), "--out", str(out)]
    return [name, *files, "--device", "cpu", *(each.format(made) for each in more)]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_dry_run_reads_no_weights_writes_nothing_and_says_the_peak(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a dry run reads no tensor")

    monkeypatch.setattr("minirlhf.training.workspace.read_tensors", refused)
    out = tmp_path / "out"
    assert cli.main([*arguments(name, made, out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "planned peak of memory" in said and "policy: moments" in said
    assert "gradient" in said and "counted for" in said


def test_what_shown_samples_took_goes_back_before_the_next_step(made: Path, tmp_path: Path) -> None:
    start = load_policy(made / "policy", Setting(0, "cpu", ReadingConfig()))
    watch = sample_watcher(start.model, start.tokenizer, [[1, 2, 3]], tmp_path, stage="sft", seed=0)
    watch(start.params)
    assert not memory._idle


def test_a_run_says_its_peak_in_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments("dpo", made, tmp_path / "out"), "--max-steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.err.count("planned peak of memory") == 1 and "policy: moments" not in said.err
    assert "planned peak" not in said.out  # which is the same twice


def test_the_reference_of_dpo_is_gone_when_training_begins(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made / "other"
    if not other.exists():
        _copy(made / "policy", other)
    seen: list[weakref.ref[Tensor]] = []
    refer, train = preference.refer, preference.train_referred

    def watched(model: Any, ref_params: Params, *rest: Any, **more: Any) -> Any:
        seen.extend(weakref.ref(leaf) for leaf in tree_leaves(ref_params))
        return refer(model, ref_params, *rest, **more)

    def begun(*given: Any, **more: Any) -> Any:
        gc.collect()
        assert seen and not [ref for ref in seen if ref() is not None]
        return train(*given, **more)

    monkeypatch.setattr(preference, "refer", watched)
    monkeypatch.setattr(preference, "train_referred", begun)
    assert preference_stage.preference_page is preference
    given = [*arguments("dpo", made, tmp_path / "out"), "--max-steps", "1", "--reference", str(other)]
    assert cli.main(given) == 0


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


_RUN = """
import sys
from minirlhf.cli import main
from minirlhf.training.memory_plan import most_resident
code = main(sys.argv[1:])
print("most resident:", most_resident())
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_planned_peak_is_within_15_percent_of_what_the_process_took(tmp_path: Path) -> None:
    write_files(tmp_path)
    shape = gpt2.GPT2Config(vocab_size=300, n_positions=64, n_embd=512, n_layer=7, n_head=8, eos_token_id=0)
    _write_models(tmp_path, gpt2.bind(shape))  # 22 M parameters
    given = arguments("sft", tmp_path, tmp_path / "out")
    given += ["--batch-size", "4", "--micro-batch-size", "2", "--max-steps", "1"]
    said = []
    for more in (["--dry-run"], []):
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *given, *more], capture_output=True, text=True, cwd=ROOT, check=True
        )
        said.append(done.stdout)
    planned = float(re.findall(r"planned peak of memory ([\d.]+) GB", said[0])[0]) * 1e9
    taken = int(re.findall(r"most resident: (\d+)", said[1])[0])
    assert planned == pytest.approx(taken, rel=0.15)
