"""DPO and IPO: they start at the reference, move away from it in the right direction, and never touch it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from minirlhf.data.records import PairExample, collate
from minirlhf.runs import InputError
from minirlhf.training import packed, preference
from minirlhf.training.guards import GuardError
from minirlhf.training.pair_objectives import (
    ConservativeDPOConfig,
    DPOConfig,
    IPOConfig,
    PairObjective,
    PreferenceConfig,
    dpo,
)
from minirlhf.training.preference import train, train_conservative_dpo, train_dpo, train_ipo
from tests.training import tiny
from tests.training.tiny import EXAMPLES, MODEL, PAIRS

SHORT: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 5,
    "micro_batch_size": 2,
    "evaluate_every": 1,
    "log_every": 1,
}
STAGES: dict[str, tuple[Any, PreferenceConfig, float]] = {
    "dpo": (train_dpo, DPOConfig(beta=0.3, **SHORT), math.log(2)),
    "cdpo": (
        train_conservative_dpo,
        ConservativeDPOConfig(beta=0.3, label_smoothing=0.2, **SHORT),
        math.log(2),
    ),
    "ipo": (train_ipo, IPOConfig(tau=0.4, **SHORT), (1 / 0.8) ** 2),
}
each_stage = pytest.mark.parametrize("name", list(STAGES))


def run(name: str, *, start: int = 0, reference: int = 0, seed: int = 0, **changes: Any) -> Any:
    entry, config, _ = STAGES[name]
    hooks = {key: changes.pop(key) for key in ("evaluate", "log", "keep") if key in changes}
    models = (MODEL, tiny.fresh(start), tiny.fresh(reference))
    return entry(
        *models, PAIRS, PAIRS[:3], replace(config, **changes), generator=tiny.generator(seed), **hooks
    )


def margin(params: Any, pairs: Any = PAIRS, *, averaged: bool = False) -> float:
    """Mean of h over the pairs against the fresh model, one row at a time."""
    ref = tiny.fresh()

    def ratio(side: Any) -> float:
        return (tiny.logp(params, side) - tiny.logp(ref, side)) / (sum(side.mask) if averaged else 1)

    return sum(ratio(pair.chosen) - ratio(pair.rejected) for pair in pairs) / len(pairs)


def test_reference_logps_are_summed_over_the_response_and_keep_their_order() -> None:
    found = preference.reference_logps(MODEL, tiny.fresh(), collate(EXAMPLES), micro_batch_size=2)
    assert found.tolist() == pytest.approx([tiny.logp(tiny.fresh(), e) for e in EXAMPLES], rel=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_reference_with_a_log_prob_that_is_not_finite_is_named_with_pair_and_side(side: str) -> None:
    reference = tiny.fresh()
    reference["wpe"]["weight"][5] = math.nan  # a position that only the longer response reaches
    short, long = PAIRS[1]
    second = PairExample(long, short) if side == "chosen" else PairExample(short, long)
    config = DPOConfig(micro_batch_size=1)
    said = f"pair 1: the reference gives its {side} response the log-prob nan, not a finite number"
    with pytest.raises(InputError, match=said):
        train_dpo(
            MODEL, tiny.fresh(), reference, [PAIRS[0], second], PAIRS, config, generator=tiny.generator()
        )


@each_stage
def test_before_the_first_step_the_margin_is_zero_and_the_loss_is_known(name: str) -> None:
    first = run(name).history[0]
    assert first["eval_loss"] == pytest.approx(STAGES[name][2], rel=1e-4)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["eval_rewards/chosen"] == pytest.approx(0, abs=1e-5)


@each_stage
def test_one_step_raises_the_margin_over_the_reference(name: str) -> None:
    result = run(name)
    assert result.best_step == 1
    assert margin(result.params, averaged=name == "ipo") > 1e-3


@each_stage
def test_the_reference_is_neither_written_to_nor_shared(name: str) -> None:
    entry, config, _ = STAGES[name]
    params = tiny.fresh()
    before = tiny.snapshot(params)
    result = entry(MODEL, params, params, PAIRS, PAIRS[:3], config, generator=tiny.generator())
    assert tiny.same_bits(tiny.leaves(params), before)
    theirs = {leaf.data_ptr() for leaf in tiny.leaves(params)}
    assert not theirs & {leaf.data_ptr() for leaf in tiny.leaves(result.params)}
    assert not tiny.same_bits(tiny.leaves(result.params), before)


def test_the_reference_stays_that_of_the_start_after_many_steps() -> None:
    result = run("dpo", epochs=6, metric_for_best_model="eval_rewards/margins")
    assert result.best_step == 6
    beta = STAGES["dpo"][1].beta  # pyright: ignore[reportAttributeAccessIssue]
    assert result.metrics["eval_rewards/margins"] == pytest.approx(
        beta * margin(result.params, PAIRS[:3]), rel=1e-3
    )


def test_dpos_margin_grows_past_ipos_target_where_ipo_stops() -> None:
    pair = PAIRS[4:]
    shared = {**SHORT, "learning_rate": 2e-2, "epochs": 120, "evaluate_every": 120, "warmup_ratio": 0.0}
    models = (MODEL, tiny.fresh(), tiny.fresh(), pair, pair)
    stopped = train_ipo(*models, IPOConfig(tau=0.5, **shared), generator=tiny.generator())
    driven = train_dpo(*models, DPOConfig(beta=0.1, **shared), generator=tiny.generator())
    assert margin(stopped.params, pair, averaged=True) == pytest.approx(1.0, abs=0.05)
    assert margin(driven.params, pair, averaged=True) > 2.0


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_metrics_are_trls_formulas_over_pairs(name: str) -> None:
    logged: list[dict[str, float]] = []
    run(
        name, start=0, reference=9, start_at_reference=False, log=lambda step, metrics: logged.append(metrics)
    )
    (first,) = [metrics for metrics in logged if "loss" in metrics]
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    logps: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for pair in PAIRS:
        for side, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            logp = tiny.logp(tiny.fresh(), example)
            ratio = logp - tiny.logp(tiny.fresh(9), example)
            logps[side].append(logp)
            rewards[side].append(0.3 * ratio if name == "dpo" else 0.4 * ratio / sum(example.mask))
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    losses = {
        "dpo": [math.log1p(math.exp(-m)) for m in margins],
        "ipo": [(m / 0.4 - 1 / 0.8) ** 2 for m in margins],
    }[name]
    expected = {
        "loss": sum(losses) / 5,
        "rewards/chosen": sum(rewards["chosen"]) / 5,
        "rewards/rejected": sum(rewards["rejected"]) / 5,
        "rewards/margins": sum(margins) / 5,
        "rewards/accuracies": sum(m > 0 for m in margins) / 5,
        "logps/chosen": sum(logps["chosen"]) / 5,
        "logps/rejected": sum(logps["rejected"]) / 5,
        "num_tokens": float(sum(len(side.ids) for pair in PAIRS for side in pair)),
        "learning_rate": 1e-3,
    }
    assert first.keys() == expected.keys() | {"grad_norm", *packed.METRICS}
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert 0 < first["rewards/accuracies"] < 1


@each_stage
def test_another_reference_is_refused_unless_it_is_meant(name: str) -> None:
    with pytest.raises(
        GuardError, match=f"{name}: before the first step the policy is not the reference: log-probs"
    ):
        run(name, reference=1)
    assert run(name, reference=1, start_at_reference=False).history


def test_a_loss_on_the_wrong_scale_is_refused_before_the_first_step() -> None:
    right = dpo(DPOConfig())
    wrong = PairObjective("odd", lambda x: 2 * right.losses(x), right.rewards, right.loss_at_reference)
    models = (MODEL, tiny.fresh(), tiny.fresh())
    with pytest.raises(
        GuardError, match="odd: policy and reference agree, so the loss must be 0.693147, not 1.38629"
    ):
        train(*models, PAIRS, PAIRS, DPOConfig(**SHORT), wrong, generator=tiny.generator())


@each_stage
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    a, b = (run(name, batch_size=2, seed=3).params for _ in range(2))
    c = run(name, batch_size=2, seed=4).params
    assert tiny.same_bits(tiny.leaves(a), tiny.leaves(b))
    assert not tiny.same_bits(tiny.leaves(a), tiny.leaves(c))


@pytest.mark.parametrize(
    "name,change",
    [
        ("dpo", {"beta": 2.0}),
        ("cdpo", {"label_smoothing": 0.45}),
        ("cdpo", {"beta": 2.0}),
        ("ipo", {"tau": 0.1}),
    ],
    ids=str,
)
def test_every_option_of_the_losses_does_something(name: str, change: dict[str, Any]) -> None:
    # Adam's first step hides the scale of a gradient, so two steps and a large epsilon.
    visible = {
        "epochs": 2,
        "adam_epsilon": 1e-2,
        "max_grad_norm": math.inf,
        "metric_for_best_model": "eval_loss",
    }
    assert not tiny.same_bits(
        tiny.leaves(run(name, **visible).params), tiny.leaves(run(name, **visible, **change).params)
    )


def test_conservative_dpo_without_smoothing_is_dpo() -> None:
    plain, smoothed = run("dpo", epochs=2), run("cdpo", epochs=2, label_smoothing=0.0)
    tiny.assert_trees_close(plain.params, smoothed.params)


def test_an_evaluation_passed_in_can_choose_the_best_checkpoint() -> None:
    rates = iter([0.5, 0.7, 0.6, 0.9, 0.8])
    kept: list[dict[str, float]] = []

    def win_rate(params: Any) -> dict[str, float]:
        assert torch.isfinite(tiny.leaves(params)[0]).all()
        return {"win_rate": next(rates)}

    result = run(
        "dpo",
        epochs=4,
        evaluate=win_rate,
        metric_for_best_model="win_rate",
        keep=lambda params, metrics: kept.append(metrics),
    )
    assert result.best_step == 3 and result.metrics["win_rate"] == 0.9
    assert [metrics["win_rate"] for metrics in kept] == [0.5, 0.7, 0.9]
