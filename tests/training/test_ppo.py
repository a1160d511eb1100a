"""The update and the iteration of PPO: what must change, what must not, and that what is logged is true."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.kernels.logprob import token_logp_and_entropy
from minirlhf.models.interface import Params, aligned
from minirlhf.runs import InputError
from minirlhf.training import ppo, ppo_update
from minirlhf.training.experience import Experience, logp_of, value_of
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_metrics import METRICS
from minirlhf.training.update import NonFiniteError, gradient, init_state
from tests.training.ppo_setting import (
    CONFIG,
    CRITIC,
    EOS,
    MODEL,
    POLICY,
    PROMPTS,
    REFERENCE,
    TASK,
    distance,
    identical,
    moved,
)

TIMINGS = {"eps", "perf/tokens_per_second"}


def start(**changes: Any) -> tuple[PPOConfig, ppo.PPOState]:
    config = replace(CONFIG, **changes)
    return config, ppo.begin(POLICY, CRITIC, config)


def experience_of(**changes: Any) -> Experience:
    config, state = start(**changes)
    return ppo._sample(TASK, state, config, seed=3).experience


@pytest.fixture(scope="module")
def experience() -> Experience:
    return experience_of()


def learn(
    experience: Experience, *, policy: Params = POLICY, rate: float = 1.0, order: int = 0, **changes: Any
) -> tuple[ppo_update.Learners, list[dict[str, float]], bool]:
    learners = ppo_update.Learners(init_state(policy), init_state(CRITIC))
    generator = torch.Generator().manual_seed(order)
    config = replace(CONFIG, **changes)
    return ppo_update.optimise(MODEL, learners, experience, config, rate=rate, generator=generator)


def mean_entropy(params: Params, e: Experience) -> float:
    states = aligned(MODEL.hidden(params, e.tokens))
    _, entropy = token_logp_and_entropy(
        states, MODEL.unembedding(params), e.tokens, e.mask, temperature=CONFIG.temperature
    )
    return float(entropy.sum() / e.mask.sum())


# What the first minibatch, the gradient and the split must be.


def test_the_first_minibatch_is_on_policy_and_later_ones_are_not(experience: Experience) -> None:
    _, history, _ = learn(experience)
    assert len(history) == CONFIG.epochs * CONFIG.minibatches
    first, last = history[0], history[-1]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert first["policy/clipfrac_avg"] == first["guard/off_policy_tokens"] == 0
    assert last["policy/approxkl_avg"] > 1e-4
    assert last["guard/off_policy_tokens"] > 0.5


def test_the_policy_gradient_at_the_old_policy_is_that_of_advantage_times_logp(
    experience: Experience,
) -> None:
    e, tokens = experience, experience.mask.sum()
    loss = ppo_update.policy_loss(MODEL, CONFIG, tolerance=1e-4)
    found, _, _ = gradient(POLICY, [e], tokens, loss=loss)

    def vanilla(params: Params) -> Tensor:
        logp = logp_of(MODEL, params, e.tokens, e.mask, temperature=CONFIG.temperature)
        return -(e.advantage * logp).sum() / tokens

    expected = torch.func.grad(vanilla)(POLICY)
    assert distance(found, expected) < 1e-5
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(expected)) > 1e-3


def taught(metrics: dict[str, float]) -> dict[str, float]:
    """All of them but how the rows were laid out, which is what another cut changes."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_micro_batches_give_the_minibatch_exactly_however_they_are_cut(experience: Experience) -> None:
    whole, history, _ = learn(experience, micro_batch_size=12, epochs=1, minibatches=1)
    for size in (1, 5, 7):
        cut, other, _ = learn(experience, micro_batch_size=size, epochs=1, minibatches=1)
        assert taught(other[0]) == pytest.approx(taught(history[0]), rel=1e-4, abs=1e-6)
        # Adam's moments are linear and quadratic in the gradient; the parameters may differ by sign(0) steps.
        assert distance(cut.policy.exp_avg, whole.policy.exp_avg) < 1e-6
        assert distance(cut.critic.exp_avg, whole.critic.exp_avg) < 1e-6


def test_a_loss_is_the_mean_over_the_tokens_of_the_minibatch(experience: Experience) -> None:
    e, tokens = experience, experience.mask.sum()
    there = moved(POLICY, by=0.02)
    _, aux = ppo_update.policy_loss(MODEL, CONFIG, tolerance=1e-4)(there, e, tokens)
    critic = moved(CRITIC, by=0.2)
    value_total, value_aux = ppo_update.critic_loss(MODEL, CONFIG)(critic, e, tokens)
    logp = logp_of(MODEL, there, e.tokens, e.mask, temperature=CONFIG.temperature)
    value = value_of(MODEL, critic, e.tokens, e.mask)
    sums: dict[str, float] = dict.fromkeys(
        ("policy", "k2", "k3", "clip", "ratio", "off", "value", "value_clip"), 0.0
    )
    for b, t in e.mask.nonzero().tolist():
        log_ratio, a = float(logp[b, t] - e.old_logp[b, t]), float(e.advantage[b, t])
        r = math.exp(log_ratio)
        sums["policy"] -= min(r * a, min(max(r, 0.8), 1.2) * a)
        sums["k2"] += 0.5 * log_ratio**2
        sums["k3"] += r - 1 - log_ratio
        sums["clip"] += (a > 0 and r > 1.2) or (a < 0 and r < 0.8)
        sums["ratio"] += r
        sums["off"] += abs(log_ratio) > 1e-4
        v, old, target = float(value[b, t]), float(e.old_value[b, t]), float(e.ret[b, t])
        near = min(max(v, old - 0.2), old + 0.2)
        sums["value"] += 0.5 * max((v - target) ** 2, (near - target) ** 2)
        sums["value_clip"] += (near - target) ** 2 > (v - target) ** 2
    names = {
        "loss/policy_avg": "policy",
        "policy/approxkl_avg": "k2",
        "policy/approxkl_k3_avg": "k3",
        "policy/clipfrac_avg": "clip",
        "val/ratio": "ratio",
        "guard/off_policy_tokens": "off",
        "loss/value_avg": "value",
        "val/clipfrac_avg": "value_clip",
    }
    found = {**aux, **value_aux}
    for name, key in names.items():
        assert float(found[name]) == pytest.approx(sums[key] / int(tokens), rel=1e-3, abs=1e-6), name
    assert sums["clip"] > 0 and sums["value_clip"] > 0
    assert float(aux["policy/entropy_avg"]) == pytest.approx(mean_entropy(there, e), rel=1e-5)
    assert float(value_total) == pytest.approx(CONFIG.value_coefficient * float(value_aux["loss/value_avg"]))


# What each term does.


def test_without_advantage_and_entropy_bonus_the_policy_does_not_move_at_all(experience: Experience) -> None:
    still = experience._replace(advantage=torch.zeros_like(experience.advantage))
    learners, _, _ = learn(still)
    assert identical(learners.policy.params, POLICY)
    assert not identical(learners.critic.params, CRITIC)


def test_a_critic_that_is_right_already_does_not_move(experience: Experience) -> None:
    right = experience._replace(ret=value_of(MODEL, CRITIC, experience.tokens, experience.mask))
    learners, history, _ = learn(right, epochs=1, minibatches=1, micro_batch_size=12)
    assert history[0]["loss/value_avg"] < 1e-10
    assert distance(learners.critic.exp_avg, CRITIC) > 0
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(learners.critic.exp_avg)) < 1e-6


def test_the_entropy_bonus_alone_raises_the_exact_entropy(experience: Experience) -> None:
    still = experience._replace(advantage=torch.zeros_like(experience.advantage))
    learners, _, _ = learn(still, entropy_coefficient=0.1, learning_rate=1e-3)
    assert mean_entropy(learners.policy.params, experience) > mean_entropy(POLICY, experience) + 1e-3


def test_a_step_makes_rewarded_tokens_more_probable(experience: Experience) -> None:
    sign = torch.where(experience.tokens == 4, 1.0, -1.0) * experience.mask
    learners, _, _ = learn(experience._replace(advantage=sign), learning_rate=1e-3)
    logp = logp_of(
        MODEL, learners.policy.params, experience.tokens, experience.mask, temperature=CONFIG.temperature
    )
    change = (logp - experience.old_logp)[experience.mask]
    rewarded = (experience.tokens == 4)[experience.mask]
    assert float(change[rewarded].mean()) > 0.01
    assert float(change[~rewarded].mean()) < 0


@pytest.mark.parametrize(
    "change",
    [
        {"clip_low": 0.01},
        {"clip_high": 0.01},
        {"dual_clip": 1.05},
        {"value_clip": None},
        {"value_clip": 0.01},
        {"value_coefficient": 0.9, "adam_epsilon": 1e-2},
        {"entropy_coefficient": 0.1},
        {"temperature": 0.9},
        {"learning_rate": 1e-3},
        {"critic_learning_rate": 1e-3},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2},
        {"epochs": 1},
        {"minibatches": 2},
    ],
    ids=str,
)
def test_every_option_of_the_update_does_something(experience: Experience, change: dict[str, Any]) -> None:
    def end(**changes: Any) -> ppo_update.Learners:
        e = experience_of(**changes) if "temperature" in changes else experience
        return learn(e, **changes)[0]

    base = {name: value for name, value in change.items() if name == "adam_epsilon" and len(change) > 1}
    one, other = end(**base), end(**change)
    moved_policy = not identical(one.policy.params, other.policy.params)
    moved_critic = not identical(one.critic.params, other.critic.params)
    assert moved_policy or moved_critic


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coefficient": 0.9},
        {"missing_eos_penalty": 0.1},
        {"gamma": 0.5},
        {"lam": 0.2},
        {"max_response": 4},
    ],
    ids=str,
)
def test_every_option_of_the_experience_does_something(change: dict[str, Any]) -> None:
    one, other = experience_of(), experience_of(**change)
    assert one.advantage.shape != other.advantage.shape or not torch.equal(one.advantage, other.advantage)


def test_the_rate_scales_the_steps_of_policy_and_critic_alike(experience: Experience) -> None:
    one, _, _ = learn(experience, epochs=1, minibatches=1)
    tenth, _, _ = learn(experience, epochs=1, minibatches=1, rate=0.1)
    for full, small, start_params in (
        (one.policy.params, tenth.policy.params, POLICY),
        (one.critic.params, tenth.critic.params, CRITIC),
    ):
        assert distance(small, start_params) == pytest.approx(0.1 * distance(full, start_params), rel=1e-3)


def test_every_row_is_learned_from_once_per_epoch_in_a_new_order(experience: Experience) -> None:
    marked = experience._replace(score=torch.arange(12.0))
    cut = list(ppo_update.minibatches(marked, CONFIG, generator=torch.Generator().manual_seed(0)))
    assert len(cut) == 6
    rows = [[int(s) for part in minibatch.micro_batches for s in part.score] for minibatch in cut]
    first, second = sum(rows[:3], []), sum(rows[3:], [])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    for minibatch, numbers in zip(cut, rows, strict=True):
        assert int(minibatch.tokens) == int(experience.mask[numbers].sum())


def test_the_target_kl_skips_the_remaining_minibatches_and_is_counted(experience: Experience) -> None:
    _, history, stopped = learn(experience, target_kl=1e-3)
    assert stopped and 1 < len(history) < 6
    assert history[-1]["policy/approxkl_k3_avg"] > 1e-3
    assert all(entry["policy/approxkl_k3_avg"] <= 1e-3 for entry in history[:-1])
    _, history, stopped = learn(experience, target_kl=1e3)
    assert not stopped and len(history) == 6
    config, state = start(target_kl=1e-3)
    one = ppo.iteration(TASK, state, config, seed=3)
    two = ppo.iteration(TASK, one.state, config, seed=3)
    assert (one.metrics["policy/early_stops"], two.metrics["policy/early_stops"]) == (1, 2)
    assert one.metrics["policy/updates"] < 6


# The iteration and the stage.


def test_an_iteration_logs_every_metric_of_the_glossary_and_no_other() -> None:
    config, state = start()
    metrics = ppo.iteration(TASK, state, config, seed=3).metrics
    assert metrics.keys() == METRICS.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_metrics_of_the_rollout_are_recomputed_from_its_rows() -> None:
    config, state = start()
    metrics, (index, rollout, e, _) = ppo.iteration(TASK, state, config, seed=3)[1:]
    raw = TASK.scorer(rollout, index).tolist()
    kl, surprise, scores, eos, unfinished, length = [], [], [], 0, 0, []
    for b in range(12):
        span = range(int(e.prompt_lengths[b]), int(e.lengths[b]))
        kl.append(sum(float(e.old_logp[b, t] - e.ref_logp[b, t]) for t in span))
        surprise.append(sum(-float(e.old_logp[b, t]) for t in span))
        ended = int(e.tokens[b, span[-1]]) == EOS
        scores.append(raw[b] - (0 if ended else config.missing_eos_penalty))
        eos += sum(int(e.tokens[b, t]) == EOS for t in span)
        unfinished += not ended
        length.append(len(span))
    mean_kl, mean_score = sum(kl) / 12, sum(scores) / 12
    expected = {
        "objective/kl": mean_kl,
        "objective/entropy": sum(surprise) / 12,
        "objective/non_score_reward": -0.3 * mean_kl,
        "objective/rlhf_reward": mean_score - 0.3 * mean_kl,
        "objective/scores": mean_score,
        "objective/kl_coefficient": 0.3,
        "val/num_eos_tokens": eos,
        "response/missing_eos": unfinished / 12,
        "response/length_mean": sum(length) / 12,
        "policy/updates": 6,
        "episode": 12,
        "lr": config.learning_rate,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ret, old = e.ret[e.mask].double(), e.old_value[e.mask].double()
    explained = 1 - float((ret - old).var() / ret.var())
    assert metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert metrics["guard/sampler_gap"] == pytest.approx(
        float((rollout.sampled_logp - e.old_logp).abs()[e.mask].max()), abs=1e-9
    )


def test_metrics_of_the_update_are_means_over_its_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[dict[str, float]]] = []

    def spy(*args: Any, **named: Any) -> Any:
        result = ppo_update.optimise(*args, **named)
        kept.append(result[1])
        return result

    monkeypatch.setattr(ppo, "optimise", spy)
    config, state = start()
    metrics = ppo.iteration(TASK, state, config, seed=3).metrics
    for name in kept[0][0]:
        values = torch.tensor([entry[name] for entry in kept[0]]).double()
        expected = values[0] if name == "guard/off_policy_tokens" else values.mean()
        assert metrics[name] == pytest.approx(float(expected), rel=1e-6), name
        if name == "val/ratio":
            assert metrics["val/ratio_var"] == pytest.approx(float(values.var()), rel=1e-4)
    single, state = start(epochs=1, minibatches=1)
    assert ppo.iteration(TASK, state, single, seed=3).metrics["val/ratio_var"] == 0


def test_an_iteration_is_repeatable_from_its_seed_and_writes_to_nobody_elses_parameters() -> None:
    before = [{"tree": [leaf.clone() for leaf in tree_leaves(p)]} for p in (POLICY, REFERENCE, CRITIC)]
    config, state = start()
    one = ppo.iteration(TASK, state, config, seed=3)
    config, state = start()
    other = ppo.iteration(TASK, state, config, seed=3)
    assert {k: v for k, v in one.metrics.items() if k not in TIMINGS} == {
        k: v for k, v in other.metrics.items() if k not in TIMINGS
    }
    assert identical(one.state.learners.policy.params, other.state.learners.policy.params)
    assert not identical(one.state.learners.policy.params, POLICY)
    config, state = start()
    changed = ppo.iteration(TASK, state, config, seed=4)
    assert changed.metrics["objective/kl"] != one.metrics["objective/kl"]
    for old, params in zip(before, (POLICY, REFERENCE, CRITIC), strict=True):
        assert identical(old, {"tree": tree_leaves(params)})


def test_each_iteration_cuts_its_minibatches_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []

    def spy(*args: Any, generator: torch.Generator, **named: Any) -> Any:
        orders.append(
            torch.randperm(12, generator=torch.Generator().set_state(generator.get_state())).tolist()
        )
        return ppo_update.optimise(*args, generator=generator, **named)

    monkeypatch.setattr(ppo, "optimise", spy)
    config, state = start()
    ppo.iteration(TASK, ppo.iteration(TASK, state, config, seed=3).state, config, seed=3)
    assert len(orders) == 2 and orders[0] != orders[1]


@pytest.mark.parametrize(("target", "rises"), [(1e-3, True), (1e3, False)])
def test_the_adaptive_controller_moves_beta_and_the_next_iteration_uses_it(
    target: float, rises: bool
) -> None:
    config, state = start(kl_target=target, kl_horizon=60)
    one = ppo.iteration(TASK, state, config, seed=3)
    two = ppo.iteration(TASK, one.state, config, seed=3)
    assert one.metrics["objective/kl"] > 1e-3
    beta = 0.3 * (1 + (0.2 if rises else -0.2) * 12 / 60)
    assert one.metrics["objective/kl_coefficient"] == pytest.approx(0.3)
    assert two.metrics["objective/kl_coefficient"] == pytest.approx(beta)
    assert two.metrics["objective/non_score_reward"] == pytest.approx(-beta * two.metrics["objective/kl"])
    e = two.sampled.experience
    expected = e.score - beta * (e.old_logp - e.ref_logp).sum(1)
    assert torch.allclose(e.reward.sum(1), expected, atol=1e-5)


def test_beta_stays_what_it_is_without_a_target() -> None:
    config, state = start()
    after = ppo.iteration(TASK, state, config, seed=3).state
    assert float(after.controller.coefficient) == pytest.approx(0.3)
    assert after.episode == 12


def test_critic_pretraining_moves_the_critic_alone_and_makes_it_better() -> None:
    config, state = start(value_clip=1e-6, epochs=8)
    found = []
    for _ in range(3):
        before = state.episode
        state, metrics, _ = ppo.pretrain_critic(TASK, state, config, seed=3)
        found.append(metrics["value/explained_variance"])
        assert state.episode == before + 12
        assert metrics.keys() <= METRICS.keys()
    assert identical(state.learners.policy.params, POLICY)
    assert not identical(state.learners.critic.params, CRITIC)
    assert found[-1] > found[0] + 0.05


def test_critic_pretraining_does_not_clip_the_value() -> None:
    after = []
    for clip in (1e-6, None):
        config, state = start(value_clip=clip)
        after.append(ppo.pretrain_critic(TASK, state, config, seed=3).state.learners.critic.params)
    assert identical(*after)


def train(config: PPOConfig, **named: Any) -> ppo.StageResult:
    return ppo.train(
        MODEL, POLICY, REFERENCE, CRITIC, TASK.scorer, PROMPTS, config, seed=3, stop_ids=[EOS], **named
    )


def test_the_stage_keeps_the_best_policy_by_its_criterion_and_logs_every_iteration() -> None:
    marks = iter([0.0, 3.0, 2.0, 3.0])
    kept, logged, shown, seen = [], [], [], []

    def evaluate(params: Params) -> dict[str, float]:
        seen.append([leaf.clone() for leaf in tree_leaves(params)])
        return {"validation/objective": next(marks)}

    result = train(
        CONFIG,
        evaluate=evaluate,
        keep=lambda params, metrics: kept.append(metrics["validation/objective"]),
        log=lambda step, metrics: logged.append((step, metrics)),
        show=lambda step, sampled: shown.append((step, len(sampled.prompt_index))),
    )
    assert kept == [0.0, 3.0]
    assert result.best_step == 1 and result.metrics == {"validation/objective": 3.0}
    assert identical({"tree": seen[1]}, {"tree": tree_leaves(result.params)})
    assert [entry["step"] for entry in result.history] == [0, 1, 2, 3]
    assert [step for step, _ in logged] == [0, 1, 2, 3]
    assert shown == [(1, 12), (2, 12), (3, 12)]
    assert logged[0][1] == {"validation/objective": 0.0}
    assert logged[2][1]["validation/objective"] == 2.0 and "objective/kl" in logged[2][1]


def test_rates_fall_linearly_and_pretraining_comes_first() -> None:
    logged: dict[int, dict[str, float]] = {}
    config = replace(CONFIG, critic_pretraining=2, iterations=4, final_rate=0.2, evaluate_every=3)
    shown: list[int] = []
    result = train(config, log=logged.__setitem__, show=lambda step, _: shown.append(step))
    assert "lr" not in logged[1] and "lr" not in logged[2]
    assert [logged[n]["lr"] for n in (3, 4, 5, 6)] == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3])
    assert shown == [5, 6]
    assert result.best_step == 6 and result.history == [] and result.metrics == logged[6]
    assert logged[6]["episode"] == 72


def test_a_criterion_that_is_missing_or_not_finite_stops_the_stage() -> None:
    with pytest.raises(InputError, match=r"expected one of a, got 'validation/objective'"):
        train(CONFIG, evaluate=lambda _: {"a": 1.0})
    with pytest.raises(NonFiniteError, match="validation/objective = nan"):
        train(CONFIG, evaluate=lambda _: {"validation/objective": math.nan})


def test_a_loss_that_is_not_finite_stops_with_what_it_was(experience: Experience) -> None:
    broken = experience._replace(ret=experience.ret.masked_fill(experience.mask, torch.nan))
    with pytest.raises(NonFiniteError, match="loss = nan"):
        learn(broken)


def test_prompts_that_do_not_fit_stop_before_the_first_iteration() -> None:
    for prompts, said in (
        ([], "no prompts"),
        ([[1], [1] * 11], "prompt 1 has 11 tokens"),
        ([[]], "prompt 0"),
    ):
        with pytest.raises(InputError, match=said):
            ppo.train(MODEL, POLICY, POLICY, CRITIC, TASK.scorer, prompts, CONFIG, seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minibatches": 5}, "minibatches must divide batch_size, got 5 and 12"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"target_kl": 0.0}, "target_kl must be positive, or left out"),
        ({"final_rate": 1.5}, "final_rate must lie in 0..1"),
        ({"critic_pretraining": -1}, "critic_pretraining must not be negative"),
        ({"kl_target": 6.0, "kl_horizon": 2}, "batch_size must be less than 5"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(CONFIG, **change)


def test_defaults_are_those_of_the_n_plus_reproduction() -> None:
    config = PPOConfig()
    assert (config.kl_coefficient, config.clip_low, config.clip_high, config.value_clip) == (
        0.05,
        0.2,
        0.2,
        0.2,
    )
    assert (config.value_coefficient, config.gamma, config.lam, config.epochs) == (0.1, 1.0, 0.95, 4)
    assert (config.temperature, config.max_response, config.adam_epsilon) == (0.7, 53, 1e-5)
    assert (config.learning_rate, config.missing_eos_penalty, config.minibatches) == (3e-6, 1.0, 1)


def test_ppo_cannot_be_told_to_filter_its_samples() -> None:
    assert not {"top_k", "top_p", "min_p"} & {field.name for field in fields(PPOConfig)}
    assert "top-k" in (PPOConfig.__doc__ or "")
