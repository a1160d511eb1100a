"""Rollouts of an 8-bit copy: what is weighted, by how much, and that full precision is left exactly alone."""

from dataclasses import replace

import pytest
import torch

from minirlhf.objectives.advantages import gae, whiten
from minirlhf.objectives.policy import clipped_surrogate_loss
from minirlhf.rollout import weights
from minirlhf.training import mismatch, ppo, ppo_sampling
from minirlhf.training.guards import GuardError
from minirlhf.training.mismatch import mismatch_metrics, weighted
from minirlhf.training.ppo_config import PPOConfig
from tests.training.ppo_setting import CONFIG, CRITIC, POLICY, TASK

EIGHT = replace(CONFIG, rollout_precision="int8")


def run(config: PPOConfig = CONFIG) -> ppo.Iteration:
    return ppo.iteration(TASK, ppo.begin(POLICY, CRITIC, config), config, seed=3)


MASK = torch.tensor([[False, True, True, True], [False, True, True, False]])
OLD = torch.tensor([[9.0, -1.0, -2.0, -0.5], [9.0, -3.0, -0.1, 9.0]])
SAMPLED = torch.tensor([[7.0, -1.2, -3.5, -0.5], [7.0, -2.0, -0.1, torch.nan]])


def test_the_weight_is_the_ratio_of_trainer_to_sampler_cut_at_the_cap() -> None:
    advantage = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 4.0, 5.0, 0.0]])
    got = weighted(advantage, OLD, SAMPLED, MASK, precision="int8", cap=2.0)
    ratios = torch.tensor([[0.0, 0.2, 1.5, 0.0], [0.0, -1.0, 0.0, 0.0]]).exp().clamp(max=2.0)
    torch.testing.assert_close(got, torch.where(MASK, advantage * ratios, 0.0))


def test_weighting_the_advantage_is_weighting_the_clipped_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, advantage = (torch.randn(2, 4, generator=generator) for _ in range(2))
    logp = logp * 0.3 + torch.where(MASK, OLD, 0.0)
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    for dual in (None, 3.0):
        plain = clipped_surrogate_loss(logp, OLD, advantage, MASK, **clip, dual_clip=dual)
        weight = weighted(torch.ones(2, 4), OLD, SAMPLED, MASK, precision="int8", cap=2.0)
        moved = weighted(advantage, OLD, SAMPLED, MASK, precision="int8", cap=2.0)
        got = clipped_surrogate_loss(logp, OLD, moved, MASK, **clip, dual_clip=dual)
        torch.testing.assert_close(got, plain * weight)


def test_at_full_precision_the_advantage_is_the_same_tensor() -> None:
    advantage = torch.randn(2, 4)
    assert weighted(advantage, OLD, SAMPLED, MASK, precision="full", cap=2.0) is advantage


def test_the_metrics_are_those_of_their_formulas() -> None:
    got = mismatch_metrics(OLD, SAMPLED, MASK)
    log_ratio = torch.tensor([0.2, 1.5, 0.0, -1.0, 0.0], dtype=torch.float64)
    ratio = log_ratio.exp()
    assert float(got["sampler/kl"]) == pytest.approx(float((ratio - 1 - log_ratio).mean()), rel=1e-5)
    assert float(got["sampler/largest_ratio"]) == pytest.approx(float(ratio.max()), rel=1e-5)
    share = ratio.sum() ** 2 / (5 * (ratio**2).sum())
    assert float(got["sampler/effective_share"]) == pytest.approx(float(share), rel=1e-5)


def test_importance_weights_recover_the_trainers_expectation_from_the_samplers_tokens() -> None:
    """E_sampler[w f] = E_trainer[f] for one token, summed over the vocabulary; no weight is cut."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainer, sampler = torch.log_softmax(logits * 0.5, -1)
    value = torch.arange(6.0, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    moved = weighted(value[None], trainer[None], sampler[None], mask, precision="int8", cap=1e9)
    assert float((sampler.exp() * moved[0]).sum()) == pytest.approx(float((trainer.exp() * value).sum()))


def test_at_full_precision_sampler_and_trainer_are_one_law() -> None:
    metrics = run().metrics
    assert 0 <= metrics["sampler/kl"] < 1e-9
    assert metrics["sampler/largest_ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["sampler/effective_share"] == pytest.approx(1, abs=1e-6)


def test_8_bit_rollouts_train_with_a_mismatch_that_is_logged_and_corrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    metrics = run(EIGHT).metrics
    assert 1e-9 < metrics["sampler/kl"] < 0.05
    assert metrics["sampler/largest_ratio"] > 1.0001 and 0.9 < metrics["sampler/effective_share"] < 1
    assert metrics["guard/sampler_gap"] > 1e-4, "the guard would have stopped it at full precision"
    assert metrics["guard/off_policy_tokens"] == 0, "old log-probs are still the trainer's own"


def test_8_bit_weights_that_the_trainer_is_not_told_of_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    monkeypatch.setitem(mismatch.WEIGHTS, "full", weights.int8)
    with pytest.raises(GuardError, match="the sampler recorded log-prob"):
        run()


def test_what_an_8_bit_iteration_learns_from_is_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    got = ppo_sampling.sample(
        TASK.model, POLICY, TASK.reference, CRITIC, TASK.scorer, TASK.prompts, EIGHT, kl_coefficient=0.3,
        episode=0, seed=3, stop_ids=TASK.stop_ids,
    )  # fmt: skip
    e, rollout = got.experience, got.rollout
    plain = whiten(gae(e.reward, e.old_value, e.mask, gamma=EIGHT.gamma, lam=EIGHT.lam).advantage, e.mask)
    ratios = (e.old_logp - rollout.sampled_logp).exp().clamp(max=EIGHT.importance_cap)
    torch.testing.assert_close(e.advantage, torch.where(e.mask, plain * ratios, 0.0))
    assert not torch.allclose(e.advantage, plain, rtol=1e-4, atol=0)


def test_a_policy_is_evaluated_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("an 8-bit copy was evaluated")

    monkeypatch.setattr(weights.Int8, "prepare", never)
    evaluate = ppo_sampling.objective_on(
        TASK.model, TASK.reference, TASK.scorer, TASK.prompts, EIGHT, seed=5, stop_ids=TASK.stop_ids
    )
    assert "validation/objective" in evaluate(POLICY)
