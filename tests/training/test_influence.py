"""Influence is a derivative, pair by pair; the noise scale is what its definition says."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from minirlhf.data.records import PairExample
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training import influence as page
from minirlhf.training import preference, reward_model
from minirlhf.training.influence import influence, noise_scale, pair_gradients
from minirlhf.training.loop import Step, measure
from minirlhf.training.pair_objectives import DPOConfig, dpo
from minirlhf.training.pairs import PairRows, cut_all, cut_pairs, pair_rows
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.update import NonFiniteError, gradient
from tests.training import tiny
from tests.training.tiny import MODEL, PAIRS

CPU = torch.device("cpu")


def double(params: Params) -> Params:
    return pytree.tree_map(lambda leaf: leaf.double(), params)


def of_reward() -> tuple[Params, PairRows, Any]:
    loss = partial(reward_model.loss, model=MODEL, label_smoothing=None, center_rewards_coefficient=None)
    return double(tiny.fresh_reward()), pair_rows(PAIRS, name="training", model=MODEL), loss


def of_dpo() -> tuple[Params, PairRows, Any]:
    reference = double(tiny.fresh(1))
    rows = pair_rows(PAIRS, name="training", model=MODEL)
    rows = preference.with_reference(MODEL, reference, rows, micro_batch_size=2)
    return (
        double(tiny.fresh()),
        rows,
        partial(preference.loss, model=MODEL, objective=dpo(DPOConfig(beta=0.4))),
    )


BOTH = pytest.mark.parametrize("subject", [of_reward, of_dpo])
Subject = Callable[[], tuple[Params, PairRows, Any]]


def held_out(pairs: PairRows) -> Step:
    return cut_pairs(pairs, torch.tensor([1, 3]), micro_batch_size=1, device=CPU)


def alone(params: Params, pairs: PairRows, number: int, loss: Any) -> Params:
    step = cut_pairs(pairs, torch.tensor([number]), micro_batch_size=1, device=CPU)
    return gradient(params, step.micro_batches, step.normaliser, loss=loss)[0]


@BOTH
def test_the_gradient_of_each_pair_of_a_ragged_batch_is_that_of_the_pair_alone(subject: Subject) -> None:
    params, pairs, loss = subject()
    index = torch.tensor([4, 0, 3, 2])
    together, losses = pair_gradients(params, pairs, index, loss=loss)
    for place, number in enumerate(index.tolist()):
        tiny.assert_trees_close(
            pytree.tree_map(lambda leaf, place=place: leaf[place], together),
            alone(params, pairs, number, loss),
            share=1e-10,
        )
        step = cut_pairs(pairs, torch.tensor([number]), micro_batch_size=1, device=CPU)
        assert float(losses[place]) == pytest.approx(float(measure(params, step, loss=loss)["loss"]))


@BOTH
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_small_step_on_a_pair_lowers_the_held_out_loss_by_its_influence(
    subject: Subject, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, pairs, loss = subject()
    size = sum(leaf.nbytes for leaf in pytree.tree_leaves(params))
    monkeypatch.setattr(page, "GRADIENT_MEMORY", at_once * size)
    validation = held_out(pairs)
    measured = influence(params, pairs, validation, loss=loss)
    before = float(measure(params, validation, loss=loss)["loss"])
    for number in range(len(PAIRS)):
        step, eta = alone(params, pairs, number, loss), 1e-6
        moved = pytree.tree_map(lambda leaf, by, eta=eta: leaf - eta * by, params, step)
        gained = (before - float(measure(moved, validation, loss=loss)["loss"])) / eta
        assert gained == pytest.approx(float(measured.influence[number]), rel=1e-3, abs=1e-7)
        norm = math.sqrt(sum(float(leaf.square().sum()) for leaf in pytree.tree_leaves(step)))
        assert norm == pytest.approx(float(measured.gradient_norm[number]))
    target = gradient(params, validation.micro_batches, validation.normaliser, loss=loss)[0]
    length = math.sqrt(sum(float(leaf.square().sum()) for leaf in pytree.tree_leaves(target)))
    torch.testing.assert_close(measured.cosine, measured.influence / measured.gradient_norm / length)
    assert measured.cosine.abs().max() <= 1


@BOTH
def test_the_noise_scale_is_that_of_the_pairs_gradients(subject: Subject) -> None:
    params, pairs, loss = subject()
    measured = influence(params, pairs, held_out(pairs), loss=loss)
    flat = torch.stack(
        [
            torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(alone(params, pairs, number, loss))])
            for number in range(len(PAIRS))
        ]
    )
    variance = float(flat.var(0, correction=1).sum())
    signal = float(flat.mean(0).square().sum()) - variance / len(PAIRS)
    assert measured.noise.variance == pytest.approx(variance)
    assert measured.noise.signal == pytest.approx(signal)
    assert measured.noise.scale == pytest.approx(variance / signal if signal > 0 else math.inf)


def test_the_noise_scale_is_unbiased() -> None:
    mean, sd, count = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([1.0, 3.0, 0.1]).double(), 5
    draws = mean + sd * torch.randn(40_000, count, 3, dtype=torch.float64, generator=tiny.generator())
    found = [
        noise_scale(float(each.square().sum(1).mean()), float(each.mean(0).square().sum()), count)
        for each in draws[:4000]
    ]
    variance, signal = float(sd.square().sum()), float(mean.square().sum())
    assert sum(each.variance for each in found) / 4000 == pytest.approx(variance, rel=0.05)
    assert sum(each.signal for each in found) / 4000 == pytest.approx(signal, rel=0.05)


def test_equal_gradients_have_no_noise_and_opposite_ones_no_signal() -> None:
    assert noise_scale(3.0, 3.0, 7) == (0.0, 3.0, 0.0)
    assert noise_scale(1.0, 0.0, 2).scale == math.inf
    with pytest.raises(ValueError, match="at least two of them, got 1"):
        noise_scale(1.0, 1.0, 1)
    with pytest.raises(ValueError, match="below the square of the mean"):
        noise_scale(1.0, 2.0, 5)


def test_pairs_with_a_flipped_label_pull_against_the_rest() -> None:
    draw = tiny.generator()

    def pair(flipped: bool) -> PairExample:
        prompt = torch.randint(4, 11, (3,), generator=draw).tolist()
        good, bad = tiny.join(prompt, [1, tiny.EOS]), tiny.join(prompt, [2, tiny.EOS])
        return PairExample(bad, good) if flipped else PairExample(good, bad)

    flipped = [number % 5 == 0 for number in range(40)]
    train, validation = [pair(each) for each in flipped], [pair(False) for _ in range(10)]
    config = RewardConfig(learning_rate=1e-2, max_steps=5, batch_size=40, evaluate_every=5, log_every=5)
    start = tiny.fresh_reward()
    trained = reward_model.train(MODEL, start, train, validation, config, generator=tiny.generator()).params
    loss = partial(reward_model.loss, model=MODEL, label_smoothing=None, center_rewards_coefficient=None)
    rows = [pair_rows(part, name="pairs", model=MODEL) for part in (train, validation)]
    measured = influence(trained, rows[0], cut_all(rows[1], micro_batch_size=4, device=CPU), loss=loss)
    worst = set(measured.influence.argsort()[: sum(flipped)].tolist())
    assert worst == {number for number, each in enumerate(flipped) if each}
    assert (measured.influence < 0).sum() == sum(flipped)


def test_too_few_pairs_and_broken_gradients_are_named() -> None:
    params, pairs, loss = of_reward()
    one = pair_rows(PAIRS[:1], name="training", model=MODEL)
    with pytest.raises(InputError, match="at least two training pairs, got 1"):
        influence(params, one, held_out(pairs), loss=loss)
    broken = pytree.tree_map(lambda leaf: leaf * math.nan, params)
    with pytest.raises(NonFiniteError, match="the validation pairs' gradient of .* more"):
        influence(broken, pairs, held_out(pairs), loss=loss)
    margins = torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0])
    with pytest.raises(NonFiniteError, match="the gradient of training pair 2"):
        influence(params, pairs._replace(extra={"margin": margins}), held_out(pairs), loss=loss)
