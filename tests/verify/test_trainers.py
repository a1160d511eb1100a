"""Our trainers find the optimum of an enumerable language; wrong ones do not, and are told what is wrong.

The subjects are the functions that train GPT-2, on a table of logits (`our_trainers`). Each mutant is one
change of one line in them. At β = 1 the threshold lies a factor of ten above what a right PPO reaches.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minirlhf.objectives import advantages, divergence, policy
from minirlhf.objectives.advantages import AdvantageEstimate, discounted_return
from minirlhf.objectives.preference import ipo_summed_loss
from minirlhf.training import experience, group_experience, ppo_sampling, ppo_update
from minirlhf.training.experience import Experience
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO, GroupObjective
from minirlhf.training.pair_objectives import DPOConfig, IPOConfig, PairLogps, PairObjective, dpo, ipo
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.verify.goals import (
    Goal,
    dpo_population,
    ipo_population,
    ipo_summed_population,
    kl_regularised,
)
from minirlhf.verify.optima import optimal_law, point_mass
from minirlhf.verify.trainers import TrainerReport, certify_trainer, jensen_shannon, nearest
from minirlhf.verify.world import World, objective, response_logp, small_world, tabulate
from tests.verify.our_trainers import (
    PPO,
    certified,
    group_trainer,
    learned_scorer,
    population_comparisons,
    population_world,
    ppo_trainer,
    preference_trainer,
    reward_model_trainer,
)

UPDATES = 100

# PPO -----------------------------------------------------------------------------------------------------


def ppo_report(
    config: PPOConfig = PPO, *, prompts: int = 1, max_updates: int = UPDATES, patience: int = 50
) -> TrainerReport:
    goal = kl_regularised(small_world(prompts))
    return certified(ppo_trainer(goal.world, config), goal, max_updates=max_updates, patience=patience)


@pytest.mark.parametrize(
    ("prompts", "change"),
    [
        (1, {}),
        (2, {}),
        (1, {"temperature": 0.6}),
        (1, {"epochs": 2, "minibatches": 2, "micro_batch_size": 100, "value_clip": 0.5}),
    ],
    ids=["one_prompt", "two_prompts", "tempered", "minibatches"],
)
def test_ppo_finds_the_optimum_of_the_kl_regularised_objective(prompts: int, change: dict[str, Any]) -> None:
    report = ppo_report(replace(PPO, **change), prompts=prompts)
    assert report.reached, str(report)


def reward_on_first_token(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    first = mask.long().cumsum(1) == 1
    return torch.where(mask, -beta * kl, 0.0) + torch.where(first & mask, score[:, None], 0.0)


def reward_on_every_token(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    return torch.where(mask, score[:, None] - beta * kl, 0.0)


def ratio_inverted(logp: Tensor, old_logp: Tensor, *rest: Tensor, **clip: Any) -> Tensor:
    return policy.clipped_surrogate_loss(2 * old_logp - logp, old_logp, *rest, **clip)


def next_value_forgotten(
    reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> AdvantageEstimate:
    value = torch.where(mask, value, 0.0)
    advantage = discounted_return(reward - value, mask, gamma=gamma * lam)  # δ = r - V
    return AdvantageEstimate(advantage, advantage + value)


def advantage_on_last_token(advantage: Tensor, mask: Tensor) -> Tensor:
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(last, advantages.whiten(advantage, mask), 0.0)


collect, response_mask = experience.collect, experience.response_mask


def eos_in_no_loss(*models: Any, **settings: Any) -> Experience:
    whole = collect(*models, **settings)
    mask = whole.mask & (whole.tokens != 0)
    return whole._replace(mask=mask, advantage=advantages.whiten(whole.advantage, mask))


Plant = tuple[object, str, Callable[..., Any]]
PPO_MUTANTS: dict[str, tuple[Plant, str | None]] = {
    "ratio_inverted": ((ppo_update, "clipped_surrogate_loss", ratio_inverted), "objective_sign"),
    "advantage_sign": ((experience, "whiten", lambda *a: -advantages.whiten(*a)), "objective_sign"),
    "kl_sign": ((experience, "kl_k1", lambda *a: -divergence.kl_k1(*a)), "no_kl"),
    "no_kl": ((experience, "kl_k1", lambda *a: 0 * divergence.kl_k1(*a)), "no_kl"),
    "k3_in_reward": ((experience, "kl_k1", divergence.kl_k3), "no_kl"),
    "k2_in_reward": ((experience, "kl_k1", divergence.kl_k2), "no_kl"),
    "half_beta": ((experience, "kl_k1", lambda *a: divergence.kl_k1(*a) / 2), "half_beta"),
    "double_beta": ((experience, "kl_k1", lambda *a: divergence.kl_k1(*a) * 2), "double_beta"),
    "reward_on_every_token": (
        (experience, "kl_shaped_reward", reward_on_every_token),
        "reward_on_every_token",
    ),
    "reward_on_first_token": (
        (experience, "kl_shaped_reward", reward_on_first_token),
        "reward_on_first_token",
    ),
    "truncated_not_paid": (
        (
            experience,
            "penalised_score",
            lambda score, rollout, **_: score * (rollout.stop_reason != 2),
        ),
        "truncated_not_paid",
    ),
    "next_value_forgotten": ((experience, "gae", next_value_forgotten), "next_value_forgotten"),
    "advantage_on_last_token": ((experience, "whiten", advantage_on_last_token), None),
    "eos_in_no_loss": ((ppo_sampling, "collect", eos_in_no_loss), None),
    "response_ends_before_eos": (
        (experience, "response_mask", lambda rollout: response_mask(rollout) & (rollout.tokens != 0)),
        None,
    ),
}


@pytest.mark.parametrize("name", PPO_MUTANTS)
def test_a_wrong_ppo_is_rejected_and_its_mistake_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, mistake = PPO_MUTANTS[name]
    monkeypatch.setattr(*plant)
    assert_rejected(ppo_report(patience=15), mistake)


def test_a_discounting_ppo_is_rejected_and_its_mistake_named() -> None:
    assert_rejected(ppo_report(replace(PPO, gamma=0.9)), "gamma_0.9")


def assert_rejected(report: TrainerReport, mistake: str | None) -> None:
    """Rejected by its statistic, not by an error; and diagnosed, where the mistake's end is known."""
    assert not report.reached and report.outcome in ("stalled", "unfinished"), str(report)
    assert report.statistic > report.goal.threshold
    if mistake is None:
        assert report.diagnosis.startswith("no known mistake")
    else:
        assert report.diagnosis.startswith(f"nearest known mistake: {mistake}:"), str(report)


def test_a_reference_at_another_temperature_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = experience.by_rows, []

    def second_read_untempered(law: Any, *rest: Any, **named: Any) -> Tensor:
        calls.append(law)
        if len(calls) % 3 == 2:  # policy, reference, critic are read in this order
            law.keywords["temperature"] = 1.0
        return read(law, *rest, **named)

    monkeypatch.setattr(experience, "by_rows", second_read_untempered)
    assert_rejected(ppo_report(replace(PPO, temperature=0.6), patience=15), None)


def test_a_sampler_at_another_temperature_raises_and_the_report_says_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        ppo_sampling, "tempered", lambda logits, *, temperature: torch.log_softmax(logits, dim=-1)
    )
    report = ppo_report(replace(PPO, temperature=0.6))
    assert report.outcome == "raised"
    assert "GuardError" in report.reason and "temperature is not the sampler's" in report.reason
    assert "guards.py" in report.reason


# Groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [RLOO, GROUP_NORMALISED], ids=lambda objective: objective.name)
def test_training_by_groups_finds_the_same_optimum(estimator: GroupObjective) -> None:
    goal = kl_regularised(small_world(2))
    report = certified(group_trainer(goal.world, estimator), goal, max_updates=UPDATES)
    assert report.reached, str(report)


@pytest.mark.parametrize(
    ("mistake", "wrong"),
    [("no_kl", lambda *a: 0 * divergence.kl_k1(*a)), ("half_beta", lambda *a: divergence.kl_k1(*a) / 2)],
)
@pytest.mark.parametrize("estimator", [RLOO, GROUP_NORMALISED], ids=lambda objective: objective.name)
def test_wrong_training_by_groups_is_rejected_and_its_mistake_named(
    estimator: GroupObjective, mistake: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_experience, "kl_k1", wrong)
    goal = kl_regularised(small_world())
    report = certified(group_trainer(goal.world, estimator), goal, max_updates=UPDATES, patience=15)
    assert_rejected(report, mistake)


# Preferences ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def population() -> World:
    return population_world()


def ipo_summed(tau: float) -> PairObjective:
    def losses(x: PairLogps) -> Tensor:
        return ipo_summed_loss(x.chosen, x.rejected, x.ref_chosen, x.ref_rejected, tau=tau)

    return PairObjective("ipo_summed", losses, dpo(DPOConfig(beta=tau)).rewards, 1 / (2 * tau) ** 2)


DPO = dpo(DPOConfig(beta=1.0))
Goals = Callable[[World, Tensor], Goal]
PREFERENCE: dict[str, tuple[Goals, PairObjective]] = {
    "dpo": (dpo_population, DPO),
    "ipo_summed": (lambda w, data: ipo_summed_population(w, data, tau=0.5), ipo_summed(0.5)),
    "ipo": (lambda w, data: ipo_population(w, data, tau=0.5), ipo(IPOConfig(tau=0.5))),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_training_finds_the_population_optimum(population: World, name: str) -> None:
    goal_of, loss = PREFERENCE[name]
    goal = goal_of(population, population_comparisons(population))
    report = certified(preference_trainer(population, loss), goal, max_updates=300)
    assert report.reached and report.statistic <= 1e-6, str(report)


def test_dpo_of_bradley_terry_data_and_the_kl_regularised_objective_have_one_optimum(
    population: World,
) -> None:
    goal = dpo_population(population, population_comparisons(population))
    torch.testing.assert_close(goal.optimum, optimal_law(population, beta=1.0), rtol=1e-9, atol=1e-9)


def with_inputs(change: Callable[[PairLogps], PairLogps]) -> PairObjective:
    return DPO._replace(losses=lambda x: DPO.losses(change(x)))


def averaged(x: PairLogps) -> PairLogps:
    chosen, rejected = x.chosen_length, x.rejected_length
    return x._replace(
        chosen=x.chosen / chosen,
        rejected=x.rejected / rejected,
        ref_chosen=x.ref_chosen / chosen,
        ref_rejected=x.ref_rejected / rejected,
    )


def swapped(x: PairLogps) -> PairLogps:
    return PairLogps(x.rejected, x.chosen, x.ref_rejected, x.ref_chosen, x.rejected_length, x.chosen_length)


PREFERENCE_MUTANTS: dict[str, tuple[str, PairObjective]] = {
    "half_beta": ("dpo", dpo(DPOConfig(beta=0.5))),
    "double_beta": ("dpo", dpo(DPOConfig(beta=2.0))),
    "reference_forgotten": (
        "dpo",
        with_inputs(lambda x: x._replace(ref_chosen=0 * x.chosen, ref_rejected=0 * x.rejected)),
    ),
    "reference_sign": (
        "dpo",
        with_inputs(lambda x: x._replace(ref_chosen=-x.ref_chosen, ref_rejected=-x.ref_rejected)),
    ),
    "averaged": ("dpo", with_inputs(averaged)),
    "swapped": ("dpo", with_inputs(swapped)),
    "label_smoothing_0.1": (
        "dpo",
        DPO._replace(losses=lambda x: 0.9 * DPO.losses(x) + 0.1 * DPO.losses(swapped(x))),
    ),
    "chosen_imitated": ("dpo", DPO._replace(losses=lambda x: -x.chosen)),
    "ipo": ("dpo", ipo_summed(1.0)),
    "target_doubled": ("ipo", ipo(IPOConfig(tau=0.25))),
    "target_halved": ("ipo_summed", ipo_summed(1.0)),
    "summed": ("ipo", ipo_summed(0.5)),
    "dpo": ("ipo_summed", dpo(DPOConfig(beta=0.5))),
}


@pytest.mark.parametrize("mistake", PREFERENCE_MUTANTS)
def test_a_wrong_preference_loss_is_rejected_and_its_mistake_named(population: World, mistake: str) -> None:
    name, loss = PREFERENCE_MUTANTS[mistake]
    goal = PREFERENCE[name][0](population, population_comparisons(population))
    report = certified(preference_trainer(population, loss), goal, max_updates=150, patience=60)
    assert_rejected(report, mistake)
    assert report.neighbours[0].distance < 0.02 * report.distance, str(report)


def test_a_reward_model_and_the_best_policy_for_it_find_the_optimum(population: World) -> None:
    goal = dpo_population(population, population_comparisons(population))
    report = certified(reward_model_trainer(population), goal, max_updates=300)
    assert report.reached and report.statistic <= 1e-6, str(report)


def test_ppo_on_the_trained_reward_model_finds_the_optimum_of_the_gold_reward(population: World) -> None:
    trainer = reward_model_trainer(population)
    state = trainer.begin(population)
    for _ in range(150):
        state = trainer.update(state)
    goal = kl_regularised(population)
    subject = ppo_trainer(population, scorer=learned_scorer(population, state))
    report = certified(subject, goal, max_updates=UPDATES)
    assert report.reached, str(report)


# certify_trainer itself ----------------------------------------------------------------------------------


SMALL = kl_regularised(small_world())


def along(path: Callable[[int], Tensor], **limits: Any) -> TrainerReport:
    """A trainer whose policy after n updates is path(n)."""
    return certify_trainer(lambda n: n + 1, SMALL, begin=lambda w: 0, policy=path, **limits)


def tilted_by(t: float) -> Tensor:
    """π_ref e^(t r): the optimum at t = 1, on the way to all reward at t > 1."""
    w = SMALL.world
    return tabulate(torch.log_softmax(response_logp(w.ref_logits, w) + t * w.gold, dim=1), w)


def test_a_trainer_that_converges_is_reached_and_stopped_soon_after() -> None:
    report = along(lambda n: tilted_by(1 - 0.5**n))
    assert report.outcome == "reached" and report.reached
    assert report.checks[-1].update < 20
    assert report.statistic <= SMALL.threshold and report.checks[0].statistic == pytest.approx(1)
    assert report.neighbours == () and report.diagnosis == "no mistake"


def test_a_trainer_that_passes_the_optimum_and_goes_on_is_not_reached() -> None:
    """What a trainer without a KL term does, however slowly it goes."""
    for pace in (0.2, 0.05, 0.01, 0.004):
        report = along(lambda n, pace=pace: tilted_by(pace * n))
        assert min(check.statistic for check in report.checks) < SMALL.threshold / 10
        assert report.outcome == "stalled", str(report)
        assert report.statistic > SMALL.threshold


def test_a_trainer_that_dips_below_the_threshold_now_and_then_is_not_reached() -> None:
    report = along(lambda n: tilted_by(1.0 if n % 10 else 1.2), max_updates=200)
    assert report.outcome == "stalled" and "met at times, but not held" in report.reason


def test_a_trainer_that_improves_now_and_then_has_not_stalled() -> None:
    def path(n: int) -> Tensor:
        return tilted_by(1 - 0.8**n) if n % 4 == 0 else SMALL.world.ref_logits

    assert along(path, max_updates=16, patience=5).outcome == "unfinished"


def test_a_trainer_that_does_nothing_has_stalled_and_is_told_so() -> None:
    report = along(lambda n: SMALL.world.ref_logits, patience=7)
    assert report.outcome == "stalled"
    assert [check.update for check in report.checks] == list(range(8))
    assert "not improving for 7 looks" in report.reason
    assert "nearest known mistake: unmoved: the policy is still the reference" in report.diagnosis


def test_a_slow_trainer_is_unfinished_and_the_nearest_wrong_end_is_no_diagnosis() -> None:
    report = along(lambda n: tilted_by(n / 100), max_updates=70)
    assert report.outcome == "unfinished" and report.checks[-1].update == 70
    assert report.diagnosis.startswith("no known mistake")


def test_the_goal_met_too_late_to_be_held_is_said() -> None:
    report = along(lambda n: tilted_by(1 - 0.5**n), max_updates=6)
    assert report.outcome == "unfinished"
    assert "met since update 4 but not yet held: allow more updates" in report.reason


def test_a_policy_that_is_not_finite_is_a_verdict() -> None:
    report = along(lambda n: tilted_by(1.0) * (torch.nan if n == 4 else 2.0))
    assert report.outcome == "not finite" and report.checks[-1].update == 4
    assert report.diagnosis == "no known mistake: the policy is not finite"
    assert report.as_dict()["checks"][-1]["statistic"] is None
    assert "not finite" in str(report)


def test_a_trainer_that_raises_is_a_verdict_with_the_place_of_the_error() -> None:
    def update(n: int) -> int:
        if n == 3:
            raise OverflowError("too large")
        return n + 1

    report = certify_trainer(update, SMALL, begin=lambda w: 0, policy=lambda n: tilted_by(0.1 * n))
    assert report.outcome == "raised"
    assert (
        report.reason.startswith("after update 3, OverflowError: too large (") and __file__ in report.reason
    )
    assert len(report.checks) == 4


def test_the_policy_is_looked_at_every_so_many_updates() -> None:
    report = along(lambda n: tilted_by(n / 100), max_updates=20, check_every=8)
    assert [check.update for check in report.checks] == [0, 8, 16, 20]
    for check in report.checks:
        assert check.statistic == pytest.approx(float(SMALL.statistic(tilted_by(check.update / 100))))


def test_a_policy_in_buffers_that_the_trainer_writes_to_is_copied() -> None:
    logits = SMALL.world.ref_logits.clone()

    def update(state: Tensor) -> Tensor:
        return state.mul_(1.5)

    report = certify_trainer(update, SMALL, begin=lambda w: logits, policy=lambda x: x, max_updates=3)
    before = report.logits.clone()
    update(logits)
    assert torch.equal(report.logits, before)


def test_what_is_no_trainer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"policy must return logits of shape .* \[1, 7, 3\], got \[7, 3\]"):
        along(lambda n: tilted_by(1.0)[0])
    with pytest.raises(ValueError, match=r"policy must return logits .*, got list"):
        along(lambda n: [])  # pyright: ignore
    for name in ("max_updates", "check_every", "hold", "patience"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            along(lambda n: tilted_by(1.0), **{name: 0})


def test_the_report_is_a_table_a_text_and_json() -> None:
    report = along(lambda n: tilted_by(0.02 * n), max_updates=100, patience=1000)
    text = str(report)
    for expected in (
        "KL-regularised optimum at β = 1",
        "regret fraction",
        "0.005",
        "half_beta",
        "unfinished",
    ):
        assert expected in text
    assert report.table().row_count == 12
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert data["outcome"] == "unfinished" and data["reached"] is False
    assert data["threshold"] == 0.005 and len(data["checks"]) == 101
    assert data["checks"][0] == {
        "update": 0,
        "statistic": pytest.approx(1),
        "kl_to_optimum": pytest.approx(report.checks[0].divergence),
    }
    assert data["neighbours"][0]["name"] == "half_beta" and data["neighbours"][0]["distance"] == 0


def test_progress_is_shown_where_asked_for() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    along(lambda n: tilted_by(0.1 * n), max_updates=5, console=console)
    assert "regret fraction" in out.getvalue()


def test_the_divergence_in_a_check_is_from_the_optimum_to_the_policy() -> None:
    report = along(lambda n: tilted_by(2.0), max_updates=1)
    best, law = SMALL.optimum, response_logp(tilted_by(2.0), SMALL.world)
    assert report.checks[0].divergence == pytest.approx(float((best.exp() * (best - law)).sum()))


def test_jensen_shannon_is_symmetric_and_between_zero_and_log_two() -> None:
    w = SMALL.world
    ref, far = response_logp(w.ref_logits, w), point_mass(w.gold)
    assert jensen_shannon(ref, ref) == pytest.approx(0, abs=1e-15)
    assert jensen_shannon(ref, far) == pytest.approx(jensen_shannon(far, ref))
    assert jensen_shannon(point_mass(w.gold), point_mass(-w.gold)) == pytest.approx(math.log(2))


GOALS = [
    SMALL,
    kl_regularised(small_world(2), beta=0.5),
    *(of(population_world(), population_comparisons(population_world())) for of, _ in PREFERENCE.values()),
]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_the_statistic_of_a_goal_is_zero_at_its_optimum_alone(goal: Goal) -> None:
    logits = tabulate(goal.optimum, goal.world)
    assert float(goal.statistic(logits)) == pytest.approx(0, abs=1e-12)
    assert nearest(logits, goal)[0] == pytest.approx(0, abs=1e-12)
    assert float(goal.statistic(goal.world.ref_logits)) > 100 * goal.threshold
    torch.testing.assert_close(goal.optimum.exp().sum(1), torch.ones(len(goal.optimum)).double())


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_no_known_wrong_end_would_pass_and_each_is_recognised(goal: Goal) -> None:
    ref = response_logp(goal.world.ref_logits, goal.world)
    assert len({wrong.name for wrong in goal.wrong}) == len(goal.wrong)
    for wrong in goal.wrong:
        law = wrong.law(ref)
        torch.testing.assert_close(law.exp().sum(1), torch.ones(len(law)).double())
        logits = tabulate(law, goal.world).clamp(min=-50)  # a softmax reaches no 0
        assert float(goal.statistic(logits)) > goal.threshold, wrong.name
        assert nearest(logits, goal)[1][0].name == wrong.name


def test_the_trainer_in_the_documentation_is_at_rest_at_the_optimum() -> None:
    slope = torch.func.grad(objective)(tabulate(SMALL.optimum, SMALL.world), SMALL.world, beta=1.0)
    assert float(slope.abs().max()) < 1e-12
