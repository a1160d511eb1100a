"""The reward model: where it reads, what it learns, its metrics, its normalisation and the length probe."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from minirlhf.data.records import PairExample, collate, join
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.sampler import Rollout
from minirlhf.runs import InputError
from minirlhf.training import packed
from minirlhf.training.reward_model import (
    RewardConfig,
    accuracy,
    adversarial_probe,
    normalise_reward,
    scores,
    train,
)
from tests.training import tiny
from tests.training.tiny import EXAMPLES, MODEL, PAIRS

CONFIG = RewardConfig(learning_rate=3e-3, batch_size=5, micro_batch_size=2, evaluate_every=1, log_every=1)


def run(config: RewardConfig = CONFIG, *, pairs: Any = PAIRS, **hooks: Any) -> Any:
    generator = tiny.generator()
    return train(MODEL, tiny.fresh_reward(), pairs, PAIRS[:3], config, generator=generator, **hooks)


def gap(params: Any) -> float:
    """Mean reward of chosen less rejected, by one row at a time."""
    return sum(tiny.reward(params, p.chosen) - tiny.reward(params, p.rejected) for p in PAIRS) / len(PAIRS)


def test_scores_are_the_head_on_the_state_after_the_last_token_in_the_order_given() -> None:
    params = tiny.fresh_reward()
    found = scores(MODEL, params, collate(EXAMPLES), micro_batch_size=2)
    assert found.tolist() == pytest.approx(
        [tiny.reward(params, example) for example in EXAMPLES], rel=1e-4, abs=1e-6
    )


def test_one_step_widens_the_gap_between_chosen_and_rejected() -> None:
    result = run(replace(CONFIG, metric_for_best_model="eval_loss", learning_rate=1e-3))
    assert result.best_step == 1
    assert gap(result.params) > gap(tiny.fresh_reward()) + 1e-3


def test_pairs_are_learned_by_heart() -> None:
    config = replace(CONFIG, epochs=30, learning_rate=1e-2, evaluate_every=30)
    result = train(MODEL, tiny.fresh_reward(), PAIRS, PAIRS, config, generator=tiny.generator())
    assert result.metrics["eval_accuracy"] == 1.0 == accuracy(MODEL, result.params, PAIRS)
    assert gap(result.params) > 1


def test_metrics_are_trls_formulas_over_both_sides() -> None:
    params = tiny.fresh_reward()
    chosen = [tiny.reward(params, pair.chosen) for pair in PAIRS]
    rejected = [tiny.reward(params, pair.rejected) for pair in PAIRS]
    logged: list[dict[str, float]] = []
    run(log=lambda step, metrics: logged.append(metrics))
    (first,) = [metrics for metrics in logged if "loss" in metrics]
    losses = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    expected = {
        "loss": sum(losses) / 5,
        "accuracy": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 5,
        "margin": (sum(chosen) - sum(rejected)) / 5,
        "min_reward": min(chosen + rejected),
        "mean_reward": sum(chosen + rejected) / 10,
        "max_reward": max(chosen + rejected),
        "num_tokens": float(sum(len(side.ids) for pair in PAIRS for side in pair)),
        "learning_rate": CONFIG.learning_rate,
    }
    assert first.keys() == expected.keys() | {"grad_norm", *packed.METRICS}
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert logged[0].keys() == {f"eval_{n}" for n in expected.keys() - {"num_tokens", "learning_rate"}}


def test_margins_smoothing_and_centring_enter_the_loss_as_their_papers_say() -> None:
    params = tiny.fresh_reward()
    margins = [0.5, -1.0, 0.0, 2.0, 1.0]
    config = replace(CONFIG, label_smoothing=0.2, center_rewards_coefficient=0.3)
    logged: list[dict[str, float]] = []
    run(config, margins=torch.tensor(margins), log=lambda step, metrics: logged.append(metrics))
    expected = 0.0
    for pair, margin in zip(PAIRS, margins, strict=True):
        c, r = tiny.reward(params, pair.chosen), tiny.reward(params, pair.rejected)
        ranked, flipped = math.log1p(math.exp(-(c - r - margin))), math.log1p(math.exp(-(r - c - margin)))
        expected += 0.8 * ranked + 0.2 * flipped + 0.3 * (c + r) ** 2
    (loss,) = [metrics["loss"] for metrics in logged if "loss" in metrics]
    assert loss == pytest.approx(expected / 5, rel=1e-5)


def test_the_best_reward_model_has_the_highest_held_out_accuracy_unless_told_otherwise() -> None:
    config = replace(CONFIG, epochs=8, learning_rate=1e-2)
    result = run(config)
    accuracies = [metrics["eval_accuracy"] for metrics in result.history]
    assert result.best_step == accuracies.index(max(accuracies))
    assert result.metrics["eval_accuracy"] == accuracy(MODEL, result.params, PAIRS[:3])
    by_loss = run(replace(config, metric_for_best_model="eval_loss"))
    losses = [metrics["eval_loss"] for metrics in by_loss.history]
    assert by_loss.best_step == losses.index(min(losses))


def rollouts() -> Rollout:
    rows = collate(EXAMPLES)
    nothing = torch.zeros(rows.tokens.shape)
    codes = torch.zeros(len(EXAMPLES), dtype=torch.int64)
    return Rollout(rows.tokens, rows.prompt_lengths, rows.lengths, nothing, nothing, codes, torch.tensor(0))


def test_normalised_rewards_have_mean_zero_and_variance_one_on_the_rollouts() -> None:
    params = tiny.fresh_reward()
    shift, scale = normalise_reward(MODEL, params, rollouts())
    found = [(tiny.reward(params, example) - shift) / scale for example in EXAMPLES]
    assert sum(found) / 5 == pytest.approx(0, abs=1e-5)
    assert sum(x * x for x in found) / 5 == pytest.approx(1, rel=1e-4)


def test_rewards_that_are_all_equal_cannot_be_normalised() -> None:
    params = {**tiny.fresh(), "score": {"weight": torch.zeros(1, 16)}}
    with pytest.raises(
        ValueError, match="expected rollouts of different rewards to normalise by, got 5 of 0"
    ):
        normalise_reward(MODEL, params, rollouts())


def by_length(sign: float) -> tuple[LanguageModel, Params]:
    """A reward of `sign` times the number of tokens."""
    model = MODEL._replace(
        states=lambda params, tokens, at, attend: at.float().expand(tokens.shape)[..., None]
    )
    return model, {"score": {"weight": torch.tensor([[sign]])}}


def test_a_reward_for_length_fails_the_adversarial_probe_and_a_reward_for_brevity_passes() -> None:
    assert adversarial_probe(*by_length(1.0), PAIRS) == 0.0
    assert adversarial_probe(*by_length(-1.0), PAIRS) == 1.0


def test_the_probe_looks_at_short_chosen_responses_only_and_equal_rewards_are_wrong() -> None:
    long_good = [pair for pair in PAIRS if len(pair.chosen.ids) >= len(pair.rejected.ids)]
    with pytest.raises(InputError, match="needs pairs whose chosen response is the shorter one, got none"):
        adversarial_probe(*by_length(-1.0), long_good)
    assert len(long_good) == 3
    assert accuracy(*by_length(0.0), PAIRS) == 0.0
    assert accuracy(*by_length(1.0), PAIRS) == pytest.approx(2 / 5)


def test_unusable_pairs_and_margins_are_refused() -> None:
    with pytest.raises(InputError, match="expected at least one training pair, got none"):
        run(pairs=[])
    same = join([1], [2, tiny.EOS])
    with pytest.raises(InputError, match="same"):
        run(pairs=[PairExample(same, same)])
    with pytest.raises(InputError, match=r"expected 5 margins, got shape \[4\]"):
        run(margins=torch.zeros(4))
    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"the margin of pair 3 is {wrong}, not a finite number"):
            run(margins=torch.tensor([0.0, 1.0, 0.5, wrong, wrong]))


def test_rollouts_with_a_reward_that_is_not_finite_are_no_scale() -> None:
    params = tiny.fresh_reward()
    params["score"]["weight"] = params["score"]["weight"] * math.nan
    with pytest.raises(InputError, match="the reward model gives rollout 0 the reward nan"):
        normalise_reward(MODEL, params, rollouts())


@pytest.mark.parametrize("change", [{"label_smoothing": 0.2}, {"center_rewards_coefficient": 0.1}], ids=str)
def test_every_option_of_the_loss_does_something(change: dict[str, Any]) -> None:
    by_loss = replace(CONFIG, metric_for_best_model="eval_loss")
    assert not tiny.same_bits(
        tiny.leaves(run(by_loss).params), tiny.leaves(run(replace(by_loss, **change)).params)
    )
