"""SFT: what it learns, what it leaves alone, and what it reports."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from minirlhf.data.records import Example, join
from minirlhf.runs import InputError
from minirlhf.training import packed
from minirlhf.training.sft import SFTConfig, train
from tests.training import tiny
from tests.training.tiny import EOS, EXAMPLES, MODEL

CONFIG = SFTConfig(
    learning_rate=3e-3, epochs=2, batch_size=3, micro_batch_size=2, evaluate_every=2, log_every=1
)


def run(config: SFTConfig = CONFIG, *, seed: int = 0, examples: Any = EXAMPLES, **hooks: Any) -> Any:
    return train(MODEL, tiny.fresh(), examples, EXAMPLES[:3], config, generator=tiny.generator(seed), **hooks)


def test_one_example_is_learned_by_heart_from_its_first_token_to_eos() -> None:
    example = join([1, 2, 7], [4, 6, EOS])
    config = replace(CONFIG, learning_rate=3e-2, epochs=60, warmup_ratio=0.0, evaluate_every=60)
    result = train(MODEL, tiny.fresh(), [example], [example], config, generator=tiny.generator())
    found = tiny.token_logps(result.params, example)
    assert len(found) == 3 and min(found) > math.log(0.99)


def test_prompt_tokens_are_read_but_not_learned() -> None:
    example = join([1, 2, 7, 5], [4, EOS])
    prompt = Example(example.ids, [False, True, True, True, False, False], 1)
    config = replace(CONFIG, learning_rate=1e-2, epochs=30, evaluate_every=30)
    result = train(MODEL, tiny.fresh(), [example], [example], config, generator=tiny.generator())
    assert tiny.logp(result.params, example) > tiny.logp(tiny.fresh(), example) + 1
    assert tiny.logp(result.params, prompt) < tiny.logp(tiny.fresh(), prompt) + 1


def test_validation_metrics_are_token_means_over_the_trained_tokens() -> None:
    params, metrics = tiny.fresh(), run().history[0]
    logps, right, entropies = [], [], []
    for example in EXAMPLES[:3]:
        logps += tiny.token_logps(params, example)
        logits = (
            MODEL.hidden(params, torch.tensor([example.ids]))[0].double() @ params["wte"]["weight"].double().T
        )
        law = torch.softmax(logits, -1)
        for t, counts in enumerate(example.mask):
            if counts:
                row = law[t - 1].tolist()
                right.append(row.index(max(row)) == example.ids[t])
                entropies.append(-sum(p * math.log(p) for p in row))
    assert len(logps) == 1 + 4 + 2
    assert metrics["eval_loss"] == pytest.approx(-sum(logps) / 7, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(sum(right) / 7)
    assert metrics["eval_entropy"] == pytest.approx(sum(entropies) / 7, rel=1e-5)


def test_training_reports_trls_names_and_counts_every_token_read() -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    run(log=lambda step, metrics: logged.append((step, metrics)))
    steps = [(step, metrics) for step, metrics in logged if "loss" in metrics]
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    names = {"loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "num_tokens"}
    assert all(metrics.keys() == names | {*packed.METRICS} for _, metrics in steps)
    lengths = sum(len(example.ids) for example in EXAMPLES)
    assert steps[1][1]["num_tokens"] == lengths and steps[3][1]["num_tokens"] == 2 * lengths
    assert [step for step, metrics in logged if "eval_loss" in metrics] == [0, 2, 4]


def test_the_first_logged_loss_is_that_of_the_untrained_model_on_its_batch() -> None:
    logged: list[dict[str, float]] = []
    config = replace(CONFIG, batch_size=5, epochs=1)
    run(config, log=lambda step, metrics: logged.append(metrics))
    (first,) = [metrics for metrics in logged if "loss" in metrics]
    logps = [x for example in EXAMPLES for x in tiny.token_logps(tiny.fresh(), example)]
    assert first["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)


def test_training_lowers_the_validation_loss_and_leaves_the_callers_parameters_alone() -> None:
    params = tiny.fresh()
    before = tiny.snapshot(params)
    result = train(MODEL, params, EXAMPLES, EXAMPLES[:3], CONFIG, generator=tiny.generator())
    assert result.metrics["eval_loss"] < result.history[0]["eval_loss"]
    assert tiny.same_bits(tiny.leaves(params), before)
    assert result.best_step == 4


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    a, b, c = (tiny.leaves(run(seed=seed).params) for seed in (1, 1, 2))
    assert tiny.same_bits(a, b)
    assert not tiny.same_bits(a, c)


def test_the_micro_batch_size_does_not_change_what_is_learned() -> None:
    # A gradient that is zero but for rounding would be a full step under Adam's usual epsilon.
    config = replace(CONFIG, adam_epsilon=1e-3)
    results = [run(replace(config, micro_batch_size=size)).params for size in (1, 3)]
    tiny.assert_trees_close(*results)


def test_adams_first_step_is_the_step_size_in_every_embedding_that_was_used() -> None:
    config = replace(CONFIG, batch_size=5, epochs=1, warmup_ratio=0.0, learning_rate=1e-3, adam_epsilon=1e-12)
    moved = (run(config).params["ln_f"]["weight"] - tiny.fresh()["ln_f"]["weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"warmup_ratio": 0.5},
        {"epochs": 3},
        {"max_steps": 1},
        {"batch_size": 2},
        {"length_window": 2},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2},
        {"weight_decay": 0.5},
        {"adam_epsilon": 1e-2},
    ],
    ids=str,
)
def test_every_setting_of_the_optimiser_does_something(change: dict[str, Any]) -> None:
    base = replace(CONFIG, adam_epsilon=1e-2) if "max_grad_norm" in change else CONFIG
    changed = run(replace(base, **change)).params
    assert not tiny.same_bits(tiny.leaves(run(base).params), tiny.leaves(changed))


def test_unusable_examples_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(InputError, match="sft: expected at least one training example, got none"):
        run(examples=[])
    with pytest.raises(InputError, match="sft: expected at least one validation example, got none"):
        train(MODEL, tiny.fresh(), EXAMPLES, [], CONFIG, generator=tiny.generator())
    with pytest.raises(InputError, match="vocabulary"):
        run(examples=[join([1], [tiny.VOCAB])])
    with pytest.raises(InputError, match="counts"):
        run(examples=[Example([1, 2], [False, False], 1)])
