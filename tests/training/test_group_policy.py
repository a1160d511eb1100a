"""Training by groups: what is sampled, compared and learned, and that what is logged is true."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.models.interface import Params
from minirlhf.objectives.group_advantages import rloo_advantage
from minirlhf.rollout import weights
from minirlhf.rollout.sampler import Rollout, generate, response_mask
from minirlhf.runs import InputError
from minirlhf.training import group_experience, group_policy, group_update, ppo_sampling
from minirlhf.training.experience import logp_of
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import (
    GROUP_CENTRED,
    GROUP_NORMALISED,
    RLOO,
    GroupExperience,
    GroupObjective,
    GroupSampled,
)
from minirlhf.training.group_metrics import METRICS
from minirlhf.training.guards import GuardError
from minirlhf.training.ppo import Task
from minirlhf.training.rewards import text_scorer
from minirlhf.training.update import NonFiniteError, gradient, init_state
from tests.training.ppo_setting import (
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

GROUPS, SAMPLES = 3, 4
CONFIG = GroupConfig(
    iterations=3,
    prompts_per_batch=GROUPS,
    samples_per_prompt=SAMPLES,
    epochs=2,
    minibatches=3,
    micro_batch_size=5,
    max_response=6,
    temperature=0.7,
    kl_coefficient=0.3,
    missing_eos_penalty=0.8,
    learning_rate=1e-2,
    evaluate_every=1,
)
TIMINGS = {"eps", "perf/tokens_per_second"}


def sampled(*, task: Task = TASK, objective: GroupObjective = RLOO, **changes: Any) -> GroupSampled:
    config = replace(CONFIG, **changes)
    return group_experience.sample(
        task.model,
        POLICY,
        task.reference,
        task.scorer,
        task.prompts,
        config,
        objective,
        episode=0,
        seed=3,
        stop_ids=task.stop_ids,
    )


@pytest.fixture(scope="module")
def experience() -> GroupExperience:
    return sampled().experience


def one(*, objective: GroupObjective = RLOO, seed: int = 3, **changes: Any) -> group_policy.GroupIteration:
    config = replace(CONFIG, **changes)
    return group_policy.iteration(TASK, group_policy.begin(POLICY), config, objective, seed=seed)


def learn(
    experience: GroupExperience, *, rate: float = 1.0, order: int = 0, **changes: Any
) -> tuple[Any, list[dict[str, float]]]:
    generator = torch.Generator().manual_seed(order)
    config = replace(CONFIG, **changes)
    return group_update.optimise(
        MODEL, init_state(POLICY), experience, config, rate=rate, generator=generator
    )


def by_group(values: Tensor) -> list[list[float]]:
    return [values[g * SAMPLES : (g + 1) * SAMPLES].tolist() for g in range(GROUPS)]


# What is sampled, and how it is compared.


def test_the_samples_of_a_prompt_stand_side_by_side_with_streams_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def spy(*args: Any, **named: Any) -> Rollout:
        seen.append((named["prompt_index"].tolist(), named["sample_index"].tolist()))
        assert args[2] == [PROMPTS[row] for row in named["prompt_index"].tolist()]
        return generate(*args, **named)

    monkeypatch.setattr(ppo_sampling, "generate", spy)
    state = one().state
    group_policy.iteration(TASK, state, CONFIG, RLOO, seed=3)
    first, second = seen
    for prompts, _ in seen:
        assert all(len(set(prompts[start : start + SAMPLES])) == 1 for start in range(0, 12, SAMPLES))
    assert first[1] == list(range(12)) and second[1] == list(range(12, 24))
    order = [prompts[start] for prompts, _ in seen for start in range(0, 12, SAMPLES)]
    assert sorted(order[:5]) == [0, 1, 2, 3, 4]  # every prompt once before any comes again
    assert order == ppo_sampling.prompts_of(torch.arange(6), 5, seed=3).tolist()


def test_the_samples_of_a_prompt_are_not_all_alike() -> None:
    tokens = sampled().experience.tokens.view(GROUPS, SAMPLES, -1)
    assert all(len({tuple(row.tolist()) for row in group}) > 1 for group in tokens)


def test_the_return_is_the_score_less_penalty_less_beta_times_the_log_ratio() -> None:
    prompt_index, rollout, e, _ = sampled()
    raw = TASK.scorer(rollout, prompt_index).tolist()
    unfinished = 0
    for b in range(12):
        span = range(int(e.prompt_lengths[b]), int(e.lengths[b]))
        ended = int(e.tokens[b, span[-1]]) == EOS
        unfinished += not ended
        score = raw[b] - (0 if ended else 0.8)
        log_ratio = sum(float(e.old_logp[b, t] - e.ref_logp[b, t]) for t in span)
        assert float(e.score[b]) == pytest.approx(score, abs=1e-6)
        assert float(e.ret[b]) == pytest.approx(score - 0.3 * log_ratio, abs=1e-5)
    assert 0 < unfinished < 12 and len({int(length) for length in e.lengths}) > 1
    for params, logp in ((POLICY, e.old_logp), (REFERENCE, e.ref_logp)):
        assert torch.allclose(logp, logp_of(MODEL, params, e.tokens, e.mask, temperature=0.7), atol=1e-5)


@pytest.mark.parametrize("objective", [RLOO, GROUP_CENTRED, GROUP_NORMALISED], ids=lambda o: o.name)
def test_every_token_has_the_advantage_of_its_response_over_its_own_group(objective: GroupObjective) -> None:
    e = sampled(objective=objective).experience
    for g, returns in enumerate(by_group(e.ret)):
        mean = sum(returns) / SAMPLES
        spread = math.sqrt(sum((r - mean) ** 2 for r in returns) / (SAMPLES - 1))
        for i, r in enumerate(returns):
            others = (sum(returns) - r) / (SAMPLES - 1)
            expected = {
                "rloo": r - others,
                "group-centred": r - mean,
                "group-normalised": (r - mean) / (spread + 1e-4),
            }[objective.name]
            row = g * SAMPLES + i
            on_tokens = e.advantage[row][e.mask[row]].tolist()
            assert on_tokens == pytest.approx([expected] * len(on_tokens), abs=1e-5)
    assert bool((e.advantage[~e.mask] == 0).all())
    assert float(e.advantage.abs().max()) > 0.1


def test_a_constant_on_the_scores_of_one_prompt_changes_no_advantage() -> None:
    def shifted(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        return TASK.scorer(rollout, prompt_index) + 4.0 * (prompt_index == prompt_index[0])

    there = sampled(task=TASK._replace(scorer=shifted)).experience
    here = sampled().experience
    assert float((there.score - here.score).max()) == pytest.approx(4)
    assert torch.allclose(there.advantage, here.advantage, atol=1e-5)


def test_a_rule_that_checks_the_answer_sees_each_rows_own_prompt_and_facts() -> None:
    class Digits:
        def decode(self, ids: Any, /) -> str:
            return "".join(map(str, ids))

    seen: list[tuple[str, str, Any]] = []

    def rule(prompts: Any, responses: Any, facts: Any) -> Tensor:
        seen.extend(zip(prompts, responses, facts, strict=True))
        return torch.tensor(
            [float(str(fact["answer"]) in text) for text, fact in zip(responses, facts, strict=True)]
        )

    names = [f"prompt {i}" for i in range(5)]
    scorer = text_scorer(rule, Digits(), names, [{"answer": i} for i in range(5)])
    index, rollout, e, _ = sampled(task=TASK._replace(scorer=scorer), missing_eos_penalty=0.0)
    assert [prompt for prompt, _, _ in seen] == [names[i] for i in index.tolist()]
    expected = [float(str(i) in text) for i, (_, text, _) in zip(index.tolist(), seen, strict=True)]
    assert e.score.tolist() == expected and len(set(expected)) == 2


def test_scores_that_are_not_finite_or_too_few_stop_the_iteration() -> None:
    def nan(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        return torch.full((12,), torch.nan)

    with pytest.raises(InputError, match="the score of response 0 is nan"):
        sampled(task=TASK._replace(scorer=nan))
    with pytest.raises(InputError, match="expected the score of 12 responses"):
        sampled(task=TASK._replace(scorer=lambda rollout, index: torch.zeros(3)))


def test_a_reference_and_advantages_that_are_not_finite_stop_the_iteration() -> None:
    poisoned = {**REFERENCE, "ln_f": {**REFERENCE["ln_f"], "bias": REFERENCE["ln_f"]["bias"] * torch.nan}}
    with pytest.raises(InputError, match="the reference gives nan at row 0"):
        sampled(task=TASK._replace(reference=poisoned))
    undefined = GroupObjective("z-score", lambda table, scored: (table - table) / (table - table))
    with pytest.raises(ValueError, match="z-score gives response 0 the advantage nan"):
        sampled(objective=undefined)


# The loss and its reduction.


def test_the_loss_is_a_sum_over_tokens_a_mean_over_rows_over_the_longest_length(
    experience: GroupExperience,
) -> None:
    e, there = experience, moved(POLICY, by=0.02)
    loss = group_update.group_loss(MODEL, replace(CONFIG, minibatches=1), tolerance=1e-4)
    total, aux = loss(there, e, e.mask.sum())
    logp = logp_of(MODEL, there, e.tokens, e.mask, temperature=0.7)
    expected, clipped = 0.0, 0
    for b, t in e.mask.nonzero().tolist():
        a, r = float(e.advantage[b, t]), math.exp(float(logp[b, t] - e.old_logp[b, t]))
        expected -= min(r * a, min(max(r, 0.8), 1.2) * a)
        clipped += (a > 0 and r > 1.2) or (a < 0 and r < 0.8)
    assert float(total) == float(aux["group/loss_avg"]) == pytest.approx(expected / (12 * 6), rel=1e-4)
    assert float(aux["loss/policy_avg"]) == pytest.approx(expected / int(e.mask.sum()), rel=1e-4)
    assert float(aux["policy/clipfrac_avg"]) == pytest.approx(clipped / int(e.mask.sum()), rel=1e-4)
    assert clipped > 0


def test_the_gradient_at_the_old_policy_is_that_of_advantage_times_the_responses_log_prob(
    experience: GroupExperience,
) -> None:
    e = experience
    loss = group_update.group_loss(MODEL, replace(CONFIG, minibatches=1), tolerance=1e-4)
    found, _, _ = gradient(POLICY, [e], e.mask.sum(), loss=loss)
    advantage = e.advantage.sum(1) / e.mask.sum(1)  # [N], of the response

    def vanilla(params: Params) -> Tensor:
        logp = logp_of(MODEL, params, e.tokens, e.mask, temperature=CONFIG.temperature)
        return -(advantage * logp.sum(1)).mean() / CONFIG.max_response

    expected = torch.func.grad(vanilla)(POLICY)
    assert distance(found, expected) < 1e-5
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(expected)) > 1e-3


def test_minibatches_weigh_every_response_alike_so_that_their_mean_is_the_whole(
    experience: GroupExperience,
) -> None:
    e, whole = experience, replace(CONFIG, minibatches=1)
    expected, _, _ = gradient(
        POLICY, [e], e.mask.sum(), loss=group_update.group_loss(MODEL, whole, tolerance=1e-4)
    )
    loss = group_update.group_loss(MODEL, CONFIG, tolerance=1e-4)
    cut = list(group_update.minibatches(e, CONFIG, generator=torch.Generator().manual_seed(1)))[:3]
    assert len({int(minibatch.tokens) for minibatch in cut}) > 1  # a mean of token means would be another
    parts = [tree_leaves(gradient(POLICY, m.micro_batches, m.tokens, loss=loss)[0]) for m in cut]
    mean = [(a + b + c) / 3 for a, b, c in zip(*parts, strict=True)]
    assert distance({"tree": mean}, {"tree": tree_leaves(expected)}) < 1e-6


def test_the_rate_scales_the_step(experience: GroupExperience) -> None:
    full, tenth = (learn(experience, epochs=1, minibatches=1, rate=rate)[0].params for rate in (1.0, 0.1))
    assert distance(tenth, POLICY) == pytest.approx(0.1 * distance(full, POLICY), rel=1e-3)


def taught(metrics: dict[str, float]) -> dict[str, float]:
    """All of them but how the rows were laid out, which is what another cut changes."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_micro_batches_give_the_minibatch_exactly_however_they_are_cut(experience: GroupExperience) -> None:
    whole, history = learn(experience, micro_batch_size=12, epochs=1, minibatches=1)
    for size in (1, 5, 7):
        cut, other = learn(experience, micro_batch_size=size, epochs=1, minibatches=1)
        assert taught(other[0]) == pytest.approx(taught(history[0]), rel=1e-4, abs=1e-6)
        assert distance(cut.exp_avg, whole.exp_avg) < 1e-6


def test_groups_without_an_advantage_move_nothing(experience: GroupExperience) -> None:
    still = experience._replace(advantage=torch.zeros_like(experience.advantage))
    assert identical(learn(still)[0].params, POLICY)


def test_better_responses_become_more_probable(experience: GroupExperience) -> None:
    state, _ = learn(experience, learning_rate=1e-3, epochs=1, minibatches=1)
    logp = logp_of(MODEL, state.params, experience.tokens, experience.mask, temperature=0.7)
    change, sign = (logp - experience.old_logp).sum(1), experience.advantage.sum(1).sign()
    assert float((change * experience.advantage.sum(1)).sum()) > 0
    assert float(change[sign > 0].mean()) > float(change[sign < 0].mean())


@pytest.mark.parametrize(
    "change",
    [
        {"clip_low": 0.01},
        {"clip_high": 0.01},
        {"learning_rate": 1e-3},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2},
        {"epochs": 1},
        {"minibatches": 2},
    ],
    ids=str,
)
def test_every_option_of_the_update_does_something(
    experience: GroupExperience, change: dict[str, Any]
) -> None:
    base = {name: value for name, value in change.items() if name == "adam_epsilon" and len(change) > 1}
    assert not identical(learn(experience, **base)[0].params, learn(experience, **change)[0].params)


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coefficient": 0.9},
        {"missing_eos_penalty": 0.1},
        {"temperature": 0.9},
        {"max_response": 4},
        {"samples_per_prompt": 2},
        {"prompts_per_batch": 6},
    ],
    ids=str,
)
def test_every_option_of_the_experience_does_something(
    experience: GroupExperience, change: dict[str, Any]
) -> None:
    other = sampled(**change).experience
    same_shape = other.advantage.shape == experience.advantage.shape
    assert not same_shape or not torch.equal(other.advantage, experience.advantage)


# The guards.


def test_an_honest_iteration_passes_the_guards_with_a_measured_gap() -> None:
    metrics = one().metrics
    assert 0 <= metrics["guard/sampler_gap"] < 2e-5
    assert metrics["guard/off_policy_tokens"] == 0


def test_a_sampler_at_another_temperature_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ppo_sampling.tempered
    monkeypatch.setattr(
        ppo_sampling, "tempered", lambda logits, *, temperature: right(logits, temperature=1.1 * temperature)
    )
    with pytest.raises(GuardError, match="temperature is not the sampler's"):
        one()


def test_an_off_policy_first_minibatch_is_stopped(experience: GroupExperience) -> None:
    with pytest.raises(GuardError, match="old_logp was not computed"):
        learn(experience._replace(old_logp=experience.old_logp - 0.01 * experience.mask))


def test_a_loss_that_is_not_finite_stops_with_what_it_was(experience: GroupExperience) -> None:
    broken = experience.advantage.masked_fill(experience.mask, torch.nan)
    with pytest.raises((NonFiniteError, GuardError)):
        learn(experience._replace(advantage=broken))


# The iteration and the stage.


def test_an_iteration_logs_every_metric_of_the_glossary_and_no_other() -> None:
    metrics = one().metrics
    assert metrics.keys() == METRICS.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_metrics_of_the_groups_are_recomputed_from_their_rows() -> None:
    def coarse(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        even = response_mask(rollout).sum(1) % 2 == 0
        return torch.where(prompt_index == prompt_index[0], 1.0, even.float())

    task = TASK._replace(scorer=coarse)
    config = replace(CONFIG, missing_eos_penalty=0.0)
    metrics, (_, _, e, _) = group_policy.iteration(task, group_policy.begin(POLICY), config, RLOO, seed=3)[1:]

    def mean_std(values: Tensor) -> float:
        spreads = []
        for group in by_group(values):
            mean = sum(group) / SAMPLES
            spreads.append(math.sqrt(sum((x - mean) ** 2 for x in group) / (SAMPLES - 1)))
        return sum(spreads) / GROUPS

    equal = sum(len(set(group)) == 1 for group in by_group(e.score))
    assert 1 <= equal < GROUPS
    kl = [float((e.old_logp - e.ref_logp)[b][e.mask[b]].sum()) for b in range(12)]
    expected = {
        "group/no_spread": equal / GROUPS,
        "group/score_std": mean_std(e.score),
        "group/return_std": mean_std(e.ret),
        "objective/kl": sum(kl) / 12,
        "objective/scores": float(e.score.sum()) / 12,
        "objective/rlhf_reward": float(e.ret.sum()) / 12,
        "objective/kl_coefficient": 0.3,
        "response/length_mean": int(e.mask.sum()) / 12,
        "policy/updates": 6,
        "episode": 12,
        "lr": config.learning_rate,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_iteration_is_repeatable_from_its_seed_and_writes_to_nobody_elses_parameters() -> None:
    before = [{"tree": [leaf.clone() for leaf in tree_leaves(p)]} for p in (POLICY, REFERENCE)]
    a, b, other = one(), one(), one(seed=4)
    assert {k: v for k, v in a.metrics.items() if k not in TIMINGS} == {
        k: v for k, v in b.metrics.items() if k not in TIMINGS
    }
    assert identical(a.state.policy.params, b.state.policy.params)
    assert not identical(a.state.policy.params, POLICY)
    assert other.metrics["objective/kl"] != a.metrics["objective/kl"]
    for old, params in zip(before, (POLICY, REFERENCE), strict=True):
        assert identical(old, {"tree": tree_leaves(params)})


def test_each_iteration_cuts_its_minibatches_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []

    def spy(*args: Any, generator: torch.Generator, **named: Any) -> Any:
        copy = torch.Generator().set_state(generator.get_state())
        orders.append(torch.randperm(12, generator=copy).tolist())
        return group_update.optimise(*args, generator=generator, **named)

    monkeypatch.setattr(group_policy, "optimise", spy)
    group_policy.iteration(TASK, one().state, CONFIG, RLOO, seed=3)
    assert len(orders) == 2 and orders[0] != orders[1]


def train(config: GroupConfig = CONFIG, **named: Any) -> group_policy.StageResult:
    named = {"objective": RLOO, "stop_ids": [EOS]} | named
    return group_policy.train(MODEL, POLICY, REFERENCE, TASK.scorer, PROMPTS, config, seed=3, **named)


def test_the_stage_keeps_the_best_policy_by_its_criterion_and_logs_every_iteration() -> None:
    marks = iter([0.0, 3.0, 2.0, 3.0])
    kept, logged, shown, seen = [], [], [], []

    def evaluate(params: Params) -> dict[str, float]:
        seen.append([leaf.clone() for leaf in tree_leaves(params)])
        return {"validation/objective": next(marks)}

    result = train(
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


def test_the_rate_falls_linearly_and_evaluations_come_when_they_are_due() -> None:
    logged: dict[int, dict[str, float]] = {}
    shown: list[int] = []
    config = replace(CONFIG, iterations=4, final_rate=0.2, evaluate_every=3)
    result = train(config, log=logged.__setitem__, show=lambda step, _: shown.append(step))
    assert [logged[n]["lr"] for n in (1, 2, 3, 4)] == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3])
    assert shown == [3, 4]
    assert result.best_step == 4 and result.history == [] and result.metrics == logged[4]
    assert logged[4]["episode"] == 48


def test_the_two_entries_are_the_loop_with_their_own_advantages() -> None:
    arguments = (MODEL, POLICY, REFERENCE, TASK.scorer, PROMPTS, replace(CONFIG, iterations=1))
    for entry, objective in (
        (group_policy.train_rloo, RLOO),
        (group_policy.train_group_normalised, GROUP_NORMALISED),
    ):
        found = entry(*arguments, seed=3, stop_ids=[EOS]).params
        assert identical(found, one(objective=objective).state.policy.params)
    assert not identical(one().state.policy.params, one(objective=GROUP_NORMALISED).state.policy.params)


def test_by_default_the_models_own_end_of_text_ends_a_response() -> None:
    config = replace(CONFIG, iterations=1)
    assert identical(train(config).params, train(config, stop_ids=None).params)


def test_prompts_that_do_not_fit_stop_before_the_first_iteration() -> None:
    for prompts, said in (
        ([], "no prompts"),
        ([[1], [1] * 11], "prompt 1 has 11 tokens"),
        ([[]], "prompt 0"),
    ):
        with pytest.raises(InputError, match=said):
            group_policy.train_rloo(MODEL, POLICY, POLICY, TASK.scorer, prompts, CONFIG, seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 .*, got 1"),
        ({"prompts_per_batch": 0}, "prompts_per_batch must be at least 1, got 0"),
        ({"minibatches": 5}, "minibatches must divide .*, got 5 and 3 · 4"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"slots": 0}, "slots must be positive, or left out"),
        ({"importance_cap": 0.0}, "importance_cap must be positive, got 0.0"),
        ({"final_rate": 1.5}, "final_rate must lie in 0..1"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(CONFIG, **change)


def test_there_are_no_knobs_of_a_critic_and_none_that_filters_samples() -> None:
    names = {field.name for field in fields(GroupConfig)}
    assert not names & {"critic_learning_rate", "critic_pretraining", "gamma", "lam", "value_clip"}
    assert not names & {"top_k", "top_p", "min_p"}
    assert CONFIG.batch_size == GROUPS * SAMPLES


def test_what_an_8_bit_iteration_learns_from_is_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    got = sampled(rollout_precision="int8")
    e = got.experience
    plain = rloo_advantage(e.ret.view(GROUPS, SAMPLES), torch.ones(GROUPS, SAMPLES, dtype=torch.bool))
    ratios = (e.old_logp - got.rollout.sampled_logp).exp().clamp(max=CONFIG.importance_cap)
    torch.testing.assert_close(e.advantage, torch.where(e.mask, plain.view(-1, 1) * ratios, 0.0))
    assert bool(((ratios - 1).abs()[e.mask] > 1e-4).any()), "the copy sampled from another law"
