"""The on-policy guards fire on what they are for, say what is wrong, and stay silent on honest runs."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minirlhf.models.interface import Attend, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.training import ppo, ppo_sampling
from minirlhf.training.experience import Experience
from minirlhf.training.guards import (
    GuardError,
    check_first_minibatch,
    check_sampler,
    measure_for,
    tolerance_for,
)
from minirlhf.training.ppo import PPOState
from tests.training.ppo_setting import CONFIG, CRITIC, MODEL, POLICY, TASK, moved


def run(task: ppo.Task = TASK) -> ppo.Iteration:
    return ppo.iteration(task, ppo.begin(POLICY, CRITIC, CONFIG), CONFIG, seed=3)


def test_an_honest_iteration_passes_with_a_measured_gap() -> None:
    metrics = run().metrics
    assert 0 <= metrics["guard/sampler_gap"] < 2e-5
    assert metrics["guard/off_policy_tokens"] == 0


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_sampler_at_another_temperature_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ppo_sampling.tempered

    def wrong(logits: Tensor, *, temperature: float) -> Tensor:
        return right(logits, temperature=temperature * factor)

    monkeypatch.setattr(ppo_sampling, "tempered", wrong)
    with pytest.raises(GuardError, match="temperature is not the sampler's"):
        run()


def test_a_filtered_sampler_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def filtered(logits: Tensor, *, temperature: float) -> Tensor:
        return sampling_law(logits, temperature=temperature, top_k=5)

    monkeypatch.setattr(ppo_sampling, "tempered", filtered)
    with pytest.raises(GuardError, match="top-k"):
        run()


def test_parameters_that_are_not_those_that_sampled_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = ppo_sampling.generate

    def stale(model: Any, params: Params, *rest: Any, **named: Any) -> Any:
        return generate(model, moved(params, by=1e-3), *rest, **named)

    monkeypatch.setattr(ppo_sampling, "generate", stale)
    with pytest.raises(GuardError, match="parameters changed between sampling and training"):
        run()


def test_dropout_in_the_training_pass_is_caught() -> None:
    noise, calls = torch.Generator().manual_seed(0), 0

    def with_dropout(params: Params, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        nonlocal calls
        training = attend.__module__ != "minirlhf.rollout.attention"  # and not the sampler's
        calls += training
        hidden = MODEL.states(params, tokens, positions, attend)
        if (
            not training or calls <= 9
        ):  # 3 chunks of rows for each of policy, reference and critic: still clean
            return hidden
        return hidden * (torch.rand(hidden.shape, generator=noise) > 0.1) / 0.9

    with pytest.raises(GuardError, match="dropout"):
        run(TASK._replace(model=MODEL._replace(states=with_dropout)))


def test_a_policy_that_moved_before_its_first_minibatch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ppo._sample

    def sample_then_move(task: ppo.Task, state: PPOState, *rest: Any, **named: Any) -> Any:
        sampled = sample(task, state, *rest, **named)
        state.learners.policy.params["wte"]["weight"].mul_(1.01)
        return sampled

    monkeypatch.setattr(ppo, "_sample", sample_then_move)
    with pytest.raises(GuardError, match=r"val/ratio = .* instead of 1"):
        run()


def test_rows_permuted_apart_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ppo._sample

    def permuted(*args: Any, **named: Any) -> Any:
        sampled = sample(*args, **named)
        e: Experience = sampled.experience
        return sampled._replace(experience=e._replace(old_logp=e.old_logp.flip(0)))

    monkeypatch.setattr(ppo, "_sample", permuted)
    with pytest.raises(GuardError, match="permuted or trimmed apart"):
        run()


MASK = torch.tensor([[False, True, True], [False, True, False]])


def test_the_sampler_gap_is_the_largest_over_counted_tokens_and_names_the_place() -> None:
    recorded = torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, torch.nan]])
    close = torch.tensor([[0.0, -1.00004, -2.0], [0.0, -3.00002, 0.0]])
    assert check_sampler(recorded, close, MASK, tolerance=1e-4) == pytest.approx(4e-5, rel=0.1)
    far = close.clone()
    far[1, 1] = -2.5
    with pytest.raises(
        GuardError, match=r"row 1, position 1; the trainer computes -2\.5.*\(largest gap 0\.5"
    ):
        check_sampler(recorded, far, MASK, tolerance=1e-4)
    not_a_number = close.clone()
    not_a_number[0, 2] = torch.nan
    with pytest.raises(GuardError, match="row 0, position 2.*computes nan"):
        check_sampler(recorded, not_a_number, MASK, tolerance=1.0)


def test_in_16_bits_a_tail_of_rounding_is_honest_and_a_token_off_by_nats_is_not() -> None:
    half = tree_map(lambda leaf: leaf.bfloat16(), POLICY)
    mask = torch.ones(8, 32, dtype=torch.bool)
    mask[:, :4] = False
    recorded, held = torch.full((8, 32), -2.0), {"tolerance": 3e-2, "measure": measure_for(half)}
    rounded = recorded.clone()
    rounded[::4, 10] += 0.1  # one token in a hundred
    assert check_sampler(recorded, rounded, mask, **held) == pytest.approx(0.1)
    with pytest.raises(GuardError, match="tolerance of the largest gap"):
        check_sampler(recorded, rounded, mask, tolerance=3e-2, measure=measure_for(POLICY))
    # Another temperature; the first token of every response.
    for wrong in (recorded * 1.02, torch.where(torch.arange(32) == 4, -2.5, recorded)):
        with pytest.raises(GuardError, match="tolerance of the root_mean_square gap"):
            check_sampler(recorded, wrong, mask, **held)
    rounded[0, 9] = torch.nan
    with pytest.raises(GuardError):
        check_sampler(recorded, rounded, mask, **held)


@pytest.mark.parametrize(("share", "passes"), [(0.04, True), (0.06, False)])
def test_in_16_bits_few_tokens_may_be_off_by_rounding_at_the_first_minibatch(
    share: float, passes: bool
) -> None:
    metrics = CLEAN | {"guard/off_policy_tokens": share}
    with pytest.raises(GuardError, match="off_policy_tokens"):
        check_first_minibatch(metrics, tolerance=1e-4)
    with nullcontext() if passes else pytest.raises(GuardError, match="off_policy_tokens"):
        check_first_minibatch(metrics, tolerance=3e-2)


CLEAN = {
    "guard/off_policy_tokens": 0.0,
    "val/ratio": 1.0,
    "policy/approxkl_avg": 0.0,
    "policy/clipfrac_avg": 0.0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guard/off_policy_tokens", 1e-3),
        ("val/ratio", 1.001),
        ("val/ratio", 0.999),
        ("policy/approxkl_avg", 1e-6),
        ("policy/clipfrac_avg", 1e-3),
        ("val/ratio", torch.nan),
    ],
)
def test_each_identity_of_the_first_minibatch_is_checked_and_named(name: str, value: float) -> None:
    check_first_minibatch(CLEAN, tolerance=1e-4)
    with pytest.raises(GuardError, match=f"{name} = .*Usual causes"):
        check_first_minibatch(CLEAN | {name: value}, tolerance=1e-4)


def test_sixteen_bit_parameters_are_allowed_their_rounding() -> None:
    assert tolerance_for(POLICY) == 1e-4
    half = {"a": torch.zeros(1), "b": [torch.zeros(1, dtype=torch.bfloat16)]}
    assert tolerance_for(half) == 3e-2


def test_the_guard_runs_at_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, epochs=1)
    first = ppo.iteration(TASK, ppo.begin(POLICY, CRITIC, config), config, seed=3)
    sample = ppo._sample

    def shifted(*args: Any, **named: Any) -> Any:
        sampled = sample(*args, **named)
        e: Experience = sampled.experience
        return sampled._replace(experience=e._replace(old_logp=e.old_logp - 1e-3 * e.mask))

    monkeypatch.setattr(ppo, "_sample", shifted)
    with pytest.raises(GuardError, match="guard/off_policy_tokens = 1 instead of 0"):
        ppo.iteration(TASK, first.state, config, seed=3)
