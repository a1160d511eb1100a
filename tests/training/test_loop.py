"""The shared loop: order, averages, evaluation, the best checkpoint, and what is left when a run stops."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.runs import InputError
from minirlhf.training.loop import (
    Stage,
    StageResult,
    Step,
    TrainConfig,
    longest_first,
    total_steps,
    train_loop,
)
from minirlhf.training.update import NonFiniteError
from tests.training import tiny

LENGTHS = torch.tensor([3, 9, 4, 9, 1, 7, 2])
CONFIG = TrainConfig(learning_rate=0.1, batch_size=2, warmup_ratio=0.0, evaluate_every=2, log_every=1)


class Recorder:
    """A stage on one parameter w, with loss Σ (w - target)² / K; it writes down its batches.

    poison: the number of the batch, from 1, at which the loss is NaN.
    """

    def __init__(self, *, poison: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.poison = poison

    def cut(self, index: Tensor) -> Step:
        self.batches.append(index.tolist())
        factor = math.nan if len(self.batches) == self.poison else 1.0
        size = torch.tensor(float(len(index)))
        return Step([LENGTHS[index] * factor], size, int(LENGTHS[index].sum()))

    def stage(self) -> Stage:
        def loss(params: Any, target: Tensor, normaliser: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            total = (params["w"] - target).square().sum() / normaliser
            return total, {"w": params["w"].detach().sum() * len(target) / normaliser}

        validation = Step([torch.tensor([5.0])], torch.tensor(1.0), 1)
        return Stage("toy", loss, LENGTHS, self.cut, validation, dict, ("loss",))


def run(
    config: TrainConfig = CONFIG, *, recorder: Recorder | None = None, seed: int = 0, **hooks: Any
) -> StageResult:
    stage = (recorder or Recorder()).stage()
    return train_loop({"w": torch.zeros(1)}, stage, config, generator=tiny.generator(seed), **hooks)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_epoch_reads_each_example_exactly_once_the_last_small_batch_included(window: int) -> None:
    recorder = Recorder()
    run(replace(CONFIG, epochs=3, length_window=window), recorder=recorder)
    assert sorted(len(batch) for batch in recorder.batches[:4]) == [1, 2, 2, 2]
    epochs = [recorder.batches[i : i + 4] for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(7))
    assert epochs[0] != epochs[1]


def test_a_length_window_puts_examples_of_like_length_together_and_one_does_not() -> None:
    def waste(window: int) -> int:
        recorder = Recorder()
        run(replace(CONFIG, epochs=20, length_window=window), recorder=recorder)
        return sum(int(LENGTHS[b].max()) * len(b) - int(LENGTHS[b].sum()) for b in recorder.batches)

    assert waste(4) == 20 * min(waste_of_sorted())
    assert waste(4) < waste(2) < waste(1)


def waste_of_sorted() -> list[int]:
    """Padding of one epoch in batches of two, longest first: 9 9 | 7 4 | 3 2 | 1."""
    return [3 + 1]


def test_longest_first_sorts_the_indices_by_length_and_keeps_ties_in_order() -> None:
    assert longest_first(LENGTHS, torch.tensor([4, 3, 0, 1])).tolist() == [3, 1, 0, 4]


def test_the_number_of_steps_counts_small_batches_and_is_bounded() -> None:
    assert total_steps(7, replace(CONFIG, epochs=3)) == 12
    assert total_steps(7, replace(CONFIG, epochs=3, max_steps=5)) == 5
    assert total_steps(7, replace(CONFIG, max_steps=50)) == 4
    recorder = Recorder()
    run(replace(CONFIG, epochs=3, max_steps=5), recorder=recorder)
    assert len(recorder.batches) == 5


def logged(config: TrainConfig) -> list[tuple[int, dict[str, float]]]:
    found: list[tuple[int, dict[str, float]]] = []
    run(config, log=lambda step, metrics: found.append((step, metrics)))
    return [(step, metrics) for step, metrics in found if "loss" in metrics]


def test_logged_metrics_are_means_over_the_steps_since_the_last_log() -> None:
    each = logged(replace(CONFIG, epochs=2))
    by_three = logged(replace(CONFIG, epochs=2, log_every=3))
    assert [step for step, _ in each] == list(range(1, 9))
    assert [step for step, _ in by_three] == [3, 6, 8]
    for (_, mean), steps in zip(by_three, (each[0:3], each[3:6], each[6:8]), strict=True):
        for name in ("loss", "grad_norm", "w"):
            expected = sum(metrics[name] for _, metrics in steps) / len(steps)
            assert mean[name] == pytest.approx(expected, rel=1e-6)
        for name in ("learning_rate", "num_tokens"):
            assert mean[name] == steps[-1][1][name]
    assert each[-1][1]["num_tokens"] == 2 * int(LENGTHS.sum())


def test_the_learning_rate_peaks_after_the_warmup_and_then_falls() -> None:
    rates = [metrics["learning_rate"] for _, metrics in logged(replace(CONFIG, epochs=2, warmup_ratio=0.25))]
    assert rates[2] == 0.1 == max(rates)
    assert rates[0] == pytest.approx(0.1 / 3) and rates[:3] == sorted(rates[:3])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0


def scripted(
    values: list[float], name: str, **changes: Any
) -> tuple[StageResult, list[tuple[float, float]], int]:
    """A run whose evaluations return `values`; what was kept, (metric, w); the number of evaluations."""
    script, kept, calls = iter(values), [], []

    def evaluate(params: Any) -> dict[str, float]:
        calls.append(float(params["w"]))
        return {name: next(script)}

    config = replace(CONFIG, epochs=3, metric_for_best_model=name, **changes)
    result = run(config, evaluate=evaluate, keep=lambda p, m: kept.append((m[name], p["w"])))
    assert [float(w) for _, w in kept] == [calls[values.index(value)] for value, _ in kept]
    assert float(result.params["w"]) == calls[values.index(result.metrics[name])]
    return result, [(value, float(w)) for value, w in kept], len(calls)


def test_the_best_checkpoint_is_kept_as_it_was_and_equal_is_not_better() -> None:
    result, kept, calls = scripted([0.2, 0.5, 0.4, 0.9, 0.9, 0.1, 0.3], "win_rate")
    assert calls == 7  # the start, and every second of 12 steps
    assert result.best_step == 6 and result.metrics["win_rate"] == 0.9
    assert [value for value, _ in kept] == [0.2, 0.5, 0.9]
    assert [metrics["step"] for metrics in result.history] == [0, 2, 4, 6, 8, 10, 12]


def test_a_metric_whose_name_ends_in_loss_is_minimised() -> None:
    result, kept, _ = scripted([3.0, 2.0, 2.5, 1.0, 1.5, 4.0, 5.0], "other_loss")
    assert result.best_step == 6
    assert [value for value, _ in kept] == [3.0, 2.0, 1.0]


def test_the_start_is_the_best_where_training_only_makes_it_worse() -> None:
    result, kept, _ = scripted([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "win_rate")
    assert result.best_step == 0 and [w for _, w in kept] == [0.0]


def test_patience_stops_after_so_many_evaluations_without_a_new_best() -> None:
    result, _, calls = scripted([0.5, 0.6, 0.1, 0.2, 0.9, 0.9, 0.9], "win_rate", patience=2)
    assert calls == 4 and result.best_step == 2
    _, _, calls = scripted([0.5, 0.6, 0.1, 0.7, 0.2, 0.3, 0.9], "win_rate", patience=2)
    assert calls == 6


def test_the_last_step_is_evaluated_even_where_it_is_not_due() -> None:
    steps = [metrics["step"] for metrics in run(replace(CONFIG, evaluate_every=3)).history]
    assert steps == [0, 3, 4]


def test_a_criterion_that_no_evaluation_gives_is_refused_before_the_first_step() -> None:
    recorder = Recorder()
    with pytest.raises(
        InputError, match="metric_for_best_model: expected one of eval_loss, eval_w, got 'accuracy'"
    ):
        run(replace(CONFIG, metric_for_best_model="accuracy"), recorder=recorder)
    assert not recorder.batches


def test_a_nan_stops_the_run_with_the_step_and_the_last_kept_checkpoint_is_finite() -> None:
    kept: list[float] = []
    with pytest.raises(NonFiniteError, match="step 4: not finite: loss = nan; gradient of w") as error:
        run(recorder=Recorder(poison=4), keep=lambda params, metrics: kept.append(float(params["w"])))
    assert error.value.step == 4
    assert len(kept) == 2 and all(math.isfinite(w) for w in kept) and kept[1] != 0.0


def test_a_criterion_that_is_not_finite_stops_the_run() -> None:
    values = iter([0.5, math.nan])
    config = replace(CONFIG, metric_for_best_model="win_rate")
    kept: list[float] = []
    with pytest.raises(NonFiniteError, match="step 2: not finite: win_rate = nan"):
        run(
            config,
            evaluate=lambda params: {"win_rate": next(values)},
            keep=lambda p, m: kept.append(m["win_rate"]),
        )
    assert kept == [0.5]


def test_a_validation_loss_that_is_not_finite_stops_the_run_whatever_the_criterion_is() -> None:
    config = replace(CONFIG, metric_for_best_model="win_rate")
    stage = Recorder().stage()._replace(validation=Step([torch.tensor([math.nan])], torch.tensor(1.0), 1))
    hooks: dict[str, Any] = {"generator": tiny.generator(), "evaluate": lambda params: {"win_rate": 1.0}}
    with pytest.raises(NonFiniteError, match="step 0: not finite: eval_loss = nan$"):
        train_loop({"w": torch.zeros(1)}, stage, config, **hooks)


def test_a_start_from_parameters_that_are_not_finite_names_them() -> None:
    start = {"w": torch.full((1,), math.nan)}
    with pytest.raises(NonFiniteError, match="step 0: not finite: eval_loss = nan; parameters w$"):
        train_loop(start, Recorder().stage(), CONFIG, generator=tiny.generator())


def test_an_interrupt_leaves_the_last_kept_checkpoint() -> None:
    kept: list[tuple[float, Tensor]] = []

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(log=interrupt, keep=lambda params, metrics: kept.append((float(params["w"]), params["w"])))
    assert len(kept) == 2
    assert all(float(tensor) == value for value, tensor in kept), "what was kept is never written to again"


def test_the_callers_parameters_and_the_result_share_nothing() -> None:
    params = {"w": torch.zeros(1)}
    result = train_loop(params, Recorder().stage(), CONFIG, generator=tiny.generator())
    assert params["w"].item() == 0.0 and result.params["w"].item() != 0.0


def test_patience_and_evaluations_do_not_change_what_is_trained() -> None:
    often, seldom = run(replace(CONFIG, evaluate_every=1)), run(replace(CONFIG, evaluate_every=99))
    assert often.history[-1]["eval_loss"] == seldom.history[-1]["eval_loss"]


@pytest.mark.parametrize(
    "name,value",
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("length_window", 0),
        ("evaluate_every", 0),
        ("log_every", 0),
        ("max_steps", 0),
        ("patience", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", -1.0),
        ("adam_epsilon", 0.0),
        ("warmup_ratio", 1.5),
        ("weight_decay", -0.1),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} must"):
        TrainConfig(**{name: value})
    assert name in {field.name for field in fields(TrainConfig)}
