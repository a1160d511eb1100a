"""Compiled steps: the same losses, one graph for all shapes, and plain words where a compiler fails."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minirlhf.kernels import cpu
from minirlhf.models import gpt2
from minirlhf.models.recompute import recomputing
from minirlhf.runs import InputError
from minirlhf.training import compiling, gradients, group_update, loop, ppo, ppo_update, sft
from minirlhf.training.compiling import Compiler
from minirlhf.training.gradients import ComputeConfig, Work, differentiate_by
from minirlhf.training.update import Loss, TrainState, adamw, differentiated, gradient, init_state, update
from tests.training import ppo_setting, test_group_policy, test_stage_losses, tiny
from tests.training.test_ppo import experience as ppo_experience

CPU = torch.device("cpu")
experience = ppo_experience


def compiler(**named: Any) -> Compiler:
    """Traces as for inductor, and then runs what it traced operation by operation: seconds faster to make."""
    return Compiler(
        **({"name": "tiny", "needed": True, "tell": lambda line: None, "backend": "eager"} | named)
    )


def recomputing_loss(loss: Any) -> Loss:
    return partial(loss.func, **loss.keywords | {"model": recomputing(loss.keywords["model"])})


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ipo"])
def test_one_graph_serves_ragged_micro_batches_and_gives_their_gradients(name: str, recompute: bool) -> None:
    case, made = test_stage_losses.CASES[name](), compiler()
    loss = recomputing_loss(case.loss) if recompute else case.loss
    shapes = set()
    for rows, size in (
        ([0, 1, 2, 3, 4], 5),
        ([0, 1, 2], 3),
        ([3, 4, 1, 0], 2),
        ([2, 0], 2),
        ([4, 1, 2, 0], 4),
    ):
        step = case.cut(torch.tensor(rows), size)
        expected = gradient(case.params, step.micro_batches, step.normaliser, loss=case.loss)
        found = gradient(case.params, step.micro_batches, step.normaliser, loss=loss, differentiate=made)
        tiny.assert_trees_close(found[:2], expected[:2])
        for key, values in found[2].items():
            torch.testing.assert_close(values, expected[2][key], rtol=1e-5, atol=1e-6)
        shapes |= {getattr(batch, "rows", batch).tokens.shape for batch in step.micro_batches}
    assert len(shapes) >= 5 and made.graphs == 1


def test_a_single_row_has_a_graph_of_its_own_and_no_more() -> None:
    case, made = test_stage_losses.CASES["sft"](), compiler()
    for rows, size in (([0, 1, 2, 3, 4], 5), ([3], 1), ([1], 1), ([2, 4], 1)):
        step = case.cut(torch.tensor(rows), size)
        gradient(case.params, step.micro_batches, step.normaliser, loss=case.loss, differentiate=made)
    assert made.graphs == 2


def on_policy(name: str) -> tuple[Loss, Any]:
    """The loss as an iteration makes it anew."""
    setting, whole = ppo_setting, replace(test_group_policy.CONFIG, minibatches=1)
    if name == "critic":
        return ppo_update.critic_loss(setting.MODEL, setting.CONFIG), setting.moved(setting.CRITIC, by=0.1)
    if name == "group":
        return group_update.group_loss(setting.MODEL, whole, tolerance=1e-4), setting.POLICY
    return ppo_update.policy_loss(setting.MODEL, setting.CONFIG, tolerance=1e-4), setting.POLICY


@pytest.mark.parametrize("name", ["policy", "critic", "group"])
def test_a_loss_that_every_iteration_makes_anew_finds_its_graph(experience: Any, name: str) -> None:
    made = compiler()
    for sizes in ([12], [5, 7], [3, 9]):
        parts: Sequence[Any] = [
            ppo_setting.taken(experience, index) for index in torch.arange(12).split(sizes)
        ]
        loss, params = on_policy(name)
        tokens = experience.mask.sum()
        expected = gradient(params, parts, tokens, loss=loss)
        found = gradient(params, parts, tokens, loss=loss, differentiate=made)
        tiny.assert_trees_close(found[:2], expected[:2])
    assert made.graphs == 1


def test_losses_that_differ_in_a_number_have_graphs_of_their_own(experience: Any) -> None:
    made, config = compiler(), ppo_setting.CONFIG
    values = []
    for coefficient in (0.1, 0.4):
        loss = ppo_update.critic_loss(ppo_setting.MODEL, replace(config, value_coefficient=coefficient))
        tokens = experience.mask.sum()
        critic = ppo_setting.moved(ppo_setting.CRITIC, by=0.1)
        values.append(float(gradient(critic, [experience], tokens, loss=loss, differentiate=made)[1]))
    assert made.graphs == 2 and values[1] == pytest.approx(4 * values[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_losses_along_training_agree_with_the_uncompiled_ones() -> None:
    """The one test that runs what inductor makes."""
    made, case = compiler(backend="inductor"), test_stage_losses.CASES["sft"]()
    model = gpt2.bind(replace(tiny.MODEL.config, n_layer=1))
    params, loss = model.init(tiny.generator()), partial(sft.loss, model=model)

    def curve(state: TrainState, **named: Any) -> list[float]:
        losses = []
        for rows in ([0, 1, 2], [3, 4], [1, 2, 4], [0, 3]):
            step = case.cut(torch.tensor(rows), 3)
            state, metrics = update(
                state, step.micro_batches, step.normaliser, loss=loss, optimiser=adamw,
                learning_rate=1e-2, max_grad_norm=1.0, **named,
            )  # fmt: skip
            losses.append(float(metrics["loss"]))
        return losses

    plain = curve(init_state(params))
    assert curve(init_state(params), differentiate=made) == pytest.approx(plain, rel=1e-5)
    assert made.graphs == 1 and made.seconds > 0


def test_a_stage_says_what_it_compiled_and_ends_where_the_uncompiled_one_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(loop, "differentiate_by", partial(differentiate_by, tell=lines.append))
    monkeypatch.setattr(gradients, "Compiler", partial(Compiler, backend="eager"))

    def run(**changes: Any) -> Any:
        config = sft.SFTConfig(learning_rate=1e-2, epochs=2, batch_size=2, micro_batch_size=2, **changes)
        data = tiny.EXAMPLES[:4]
        return sft.train(tiny.MODEL, tiny.fresh(), data, data, config, generator=tiny.generator()).params

    plain = run()
    assert not lines
    tiny.assert_trees_close(run(activation_recomputation=True), plain)
    tiny.assert_trees_close(run(compile="on", activation_recomputation=True), plain, share=1e-5)
    assert len(lines) == 1 and re.fullmatch(r"sft: graph 1 of a step compiled in \d+\.\d s", lines[0])


def test_ppo_iterations_share_the_graphs_of_policy_and_critic() -> None:
    made, config = compiler(), replace(ppo_setting.CONFIG, iterations=2, micro_batch_size=2, compile="on")
    task = ppo_setting.TASK._replace(differentiate=made)
    state, other = (ppo.begin(ppo_setting.POLICY, ppo_setting.CRITIC, config) for _ in range(2))
    for _ in range(2):
        state = ppo.iteration(task, state, config, seed=3).state
        other = ppo.iteration(ppo_setting.TASK, other, config, seed=3).state
    tiny.assert_trees_close(state.learners.critic.params, other.learners.critic.params, share=1e-3)
    tiny.assert_trees_close(state.learners.policy.params, other.learners.policy.params, share=1e-3)
    assert made.graphs == 2


# What is decided, and said.

GPT2 = Work(entries=124_000_000, tensors=148, tokens=0, passes=100)


@pytest.mark.parametrize(
    "tokens,tiles,compiled", [(10_000, False, False), (100_000_000, False, True), (100_000_000, True, False)]
)
def test_auto_compiles_where_it_saves_more_than_it_costs_and_says_both(
    tokens: int, tiles: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_tiles", lambda: tiles)
    lines: list[str] = []
    chosen = differentiate_by("auto", GPT2._replace(tokens=tokens), CPU, name="sft", tell=lines.append)
    assert isinstance(chosen, Compiler) == compiled and (chosen is differentiated) == (not compiled)
    (line,) = lines
    said = re.search(r"saves about ([\d,]+) s and costs about ([\d,]+) s", line)
    assert said and line.startswith(f"sft: steps are {'compiled' if compiled else 'not compiled'}:")
    saves, costs = (float(each.replace(",", "")) for each in said.groups())
    assert (saves > costs) == compiled and costs > 60


def test_auto_does_not_guess_about_a_device_that_was_not_measured() -> None:
    lines: list[str] = []
    work, device = GPT2._replace(tokens=10**12), torch.device("meta")
    assert differentiate_by("auto", work, device, name="dpo", tell=lines.append) is differentiated
    assert lines == ["dpo: steps are not compiled: whether that pays is not known for meta"]


def test_off_says_nothing_and_another_word_is_refused() -> None:
    lines: list[str] = []
    assert differentiate_by("off", GPT2, CPU, name="sft", tell=lines.append) is differentiated
    assert not lines
    with pytest.raises(InputError, match="compile must be auto, on or off, got 'yes'"):
        ComputeConfig(compile="yes")  # pyright: ignore[reportArgumentType]


def failing(*args: Any) -> Any:
    raise RuntimeError("No working C++ compiler found")


def squares(params: Any, batch: Tensor, normaliser: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (batch @ params["w"]).square().sum() / normaliser, {}


GIVEN = {"w": torch.ones(3, 2)}, [torch.ones(4, 3)], torch.tensor(4.0)


def test_a_compiler_that_fails_is_an_error_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_backend", lambda name: failing)
    with pytest.raises(
        InputError, match=r"tiny: compile: the compiler failed; set compile to off.*No working C"
    ):
        gradient(*GIVEN, loss=squares, differentiate=compiler())


def test_a_compiler_that_fails_is_said_once_where_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_backend", lambda name: failing)
    lines: list[str] = []
    made = compiler(needed=False, tell=lines.append)
    for _ in range(2):
        found, value, _ = gradient(*GIVEN, loss=squares, differentiate=made)
        assert torch.equal(found["w"], gradient(*GIVEN, loss=squares)[0]["w"]) and value == 18
    assert len(lines) == 1 and "not compiled from here on" in lines[0] and "No working C++" in lines[0]
    assert made.graphs == 0


def test_an_error_of_the_loss_stays_what_it_is() -> None:
    def refusing(params: Any, batch: Tensor, normaliser: Tensor) -> Any:
        raise ValueError("expected states [B, T, D]")

    for needed in (True, False):
        with pytest.raises(ValueError, match=r"^expected states \[B, T, D\]$"):
            gradient(*GIVEN, loss=refusing, differentiate=compiler(needed=needed))


def test_ids_outside_the_vocabulary_are_an_error_in_a_compiled_step_too() -> None:
    case, made = test_stage_losses.CASES["sft"](), compiler()
    step = case.cut(torch.arange(3), 3)
    gradient(case.params, step.micro_batches, step.normaliser, loss=case.loss, differentiate=made)
    bad = [
        batch._replace(
            rows=batch.rows._replace(tokens=torch.where(batch.rows.mask, 99, batch.rows.tokens)), packing=None
        )
        for batch in step.micro_batches
    ]
    with pytest.raises((IndexError, RuntimeError), match="index|vocabulary"):
        gradient(case.params, bad, step.normaliser, loss=case.loss, differentiate=made)


def test_recomputation_and_accumulation_compose() -> None:
    case = test_stage_losses.CASES["dpo"]()
    params = tree_map(lambda x: x.double(), case.params)
    step = case.cut(torch.arange(5), 2)
    expected = gradient(params, step.micro_batches, step.normaliser, loss=case.loss)
    found = gradient(params, step.micro_batches, step.normaliser, loss=recomputing_loss(case.loss))
    tiny.assert_trees_close(found[:2], expected[:2], share=1e-12)
    assert math.isfinite(float(found[1]))
