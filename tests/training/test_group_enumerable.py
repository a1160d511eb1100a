"""Training by groups on a language that can be enumerated: both estimators must find π* ∝ π_ref e^(r/β).

The world has two prompts whose rewards differ by a constant, which is nobody's business but the prompt's: it
cancels within a group and swamps whatever compares across groups. At small β a trainer that forgets the KL
would pass too, so β is 1.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.objectives import divergence, policy
from minirlhf.training import group_experience, group_policy, group_update, ppo_update
from minirlhf.training.experience import logp_of
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import (
    GROUP_CENTRED,
    GROUP_NORMALISED,
    RLOO,
    GroupExperience,
    GroupObjective,
)
from minirlhf.training.ppo import Task
from minirlhf.training.update import gradient
from tests.training import tabular
from tests.training.tabular import World

BETA = 1.0
THRESHOLD = 0.005
CONFIG = GroupConfig(
    iterations=40,
    prompts_per_batch=64,
    samples_per_prompt=4,
    epochs=4,
    minibatches=1,
    micro_batch_size=256,
    max_response=3,
    temperature=1.0,
    missing_eos_penalty=0.0,
    kl_coefficient=BETA,
    learning_rate=0.07,
    max_grad_norm=100.0,
)
BRIEF = replace(CONFIG, iterations=24, learning_rate=0.1)  # long enough for the right ones
BOTH = pytest.mark.parametrize("objective", [RLOO, GROUP_NORMALISED], ids=lambda objective: objective.name)


@pytest.fixture(scope="module")
def small() -> World:
    return tabular.world(vocab_size=3, length=3)


@pytest.fixture(scope="module")
def shifted() -> World:
    """Two prompts, the rewards of the second 4 higher."""
    w = tabular.world(vocab_size=3, length=3, prompts=2)
    return w._replace(gold=w.gold + torch.tensor([[0.0], [4.0]]).double())


def regret_of(w: World, objective: GroupObjective, config: GroupConfig = CONFIG, *, seed: int = 0) -> float:
    """The regret fraction that the stage ends with, started at the reference."""
    reference = tabular.table_of(w.ref_logits)
    prompts = [[1 + x] for x in range(w.config.prompts)]
    model, scorer = tabular.bind(w.config), tabular.gold_scorer(w)
    result = group_policy.train(
        model, reference, reference, scorer, prompts, config, objective=objective, seed=seed
    )
    tempered = w._replace(ref_logits=w.ref_logits / config.temperature)
    logits = tabular.logits_of(result.params, w) / config.temperature
    return float(tabular.regret_fraction(logits, tempered, beta=BETA))


# They find it.


@pytest.mark.parametrize(
    "objective", [RLOO, GROUP_CENTRED, GROUP_NORMALISED], ids=lambda objective: objective.name
)
def test_it_finds_the_optimum_of_the_kl_regularised_objective(
    shifted: World, objective: GroupObjective
) -> None:
    assert regret_of(shifted, objective) <= THRESHOLD


@pytest.mark.parametrize(
    ("objective", "change"),
    [
        (RLOO, {"temperature": 0.6, "iterations": 60}),
        (GROUP_NORMALISED, {"temperature": 0.6, "iterations": 60}),
        (RLOO, {"prompts_per_batch": 128, "samples_per_prompt": 2}),
        (GROUP_NORMALISED, {"epochs": 2, "minibatches": 2, "micro_batch_size": 100}),
        (RLOO, {"epochs": 1, "iterations": 80}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_it_finds_it_tempered_in_pairs_in_minibatches_and_on_policy(
    small: World, objective: GroupObjective, change: dict[str, Any]
) -> None:
    assert regret_of(small, objective, replace(CONFIG, **change)) <= THRESHOLD


def test_normalised_advantages_need_a_falling_rate_and_leave_one_out_ones_do_not(small: World) -> None:
    constant = replace(CONFIG, final_rate=1.0)
    assert regret_of(small, RLOO, constant) <= THRESHOLD
    assert not regret_of(small, GROUP_NORMALISED, constant) <= 2 * THRESHOLD


# Why they do: the optimum is at rest, and the gradient is the right one.


def optimum(w: World) -> Tensor:
    """Logits [X, K, V] of π* ∝ π_ref e^(r/β), by summing over the responses below each prefix."""
    weight = tabular.response_logp(w.ref_logits, w) + w.gold / BETA
    logits = torch.full_like(w.ref_logits, -torch.inf)
    for i, response in enumerate(w.responses):
        for t, token in enumerate(response):
            k = tabular.prefix_number(list(response[:t]), w.config.vocab_size)
            logits[:, k, token] = torch.logaddexp(logits[:, k, token], weight[:, i])
    return logits


@BOTH
def test_at_the_optimum_no_sampled_group_has_anything_to_learn(
    shifted: World, objective: GroupObjective
) -> None:
    logits = optimum(shifted)
    assert float(tabular.regret_fraction(logits, shifted, beta=BETA)) == pytest.approx(0, abs=1e-12)
    start, reference = tabular.table_of(logits), tabular.table_of(shifted.ref_logits)
    task = Task(tabular.bind(shifted.config), reference, tabular.gold_scorer(shifted), [[1], [2]], [0])
    sampled = group_experience.sample(
        task.model,
        start,
        reference,
        task.scorer,
        task.prompts,
        CONFIG,
        objective,
        episode=0,
        seed=0,
        stop_ids=[0],
    )
    returns = sampled.experience.ret.view(-1, 4)
    assert float(returns.std(1).max()) < 1e-5
    log_z = tabular.response_logp(shifted.ref_logits, shifted).add(shifted.gold / BETA).logsumexp(1)
    assert torch.allclose(returns[:, 0].double(), BETA * log_z[sampled.prompt_index[::4]], atol=1e-5)
    assert float(sampled.experience.score.view(-1, 4).std(1).max()) > 0.5
    assert float(sampled.experience.advantage.abs().max()) < 0.02  # rounding over ε of the normalised one


def test_the_expected_update_of_leave_one_out_is_the_gradient_of_the_objective_exactly(small: World) -> None:
    """Over all pairs of responses, weighted by their probability: E Σᵢ Aᵢ ∇log π(yᵢ)/2 = ∇J."""
    model, logits = tabular.bind(small.config), 0.7 * small.ref_logits
    params = tabular.table_of(logits)
    law = tabular.response_logp(logits, small)[0]
    kl = law - tabular.response_logp(small.ref_logits, small)[0]
    ret, p = small.gold[0] - BETA * kl, law.exp()
    pair = torch.stack([x.expand(15, 15) for x in (ret[:, None], ret)], dim=-1).reshape(225, 2)
    advantage = RLOO.advantages(pair, torch.ones(225, 2).bool()).view(15, 15, 2)[..., 0]
    expected_advantage = p * (advantage @ p)  # of each response as one of the pair; both places are alike
    rows = _all_responses(small)
    rows = rows._replace(
        old_logp=logp_of(model, params, rows.tokens, rows.mask, temperature=1.0),
        advantage=expected_advantage.float()[:, None] * rows.mask,
    )
    config = replace(CONFIG, prompts_per_batch=5, samples_per_prompt=3)  # 15 rows
    loss = group_update.group_loss(model, config, tolerance=1e-4)
    found = gradient(params, [rows], rows.mask.sum(), loss=loss)[0]["table"].T[:-1]
    table = logits.clone().requires_grad_()
    _objective(table, small).backward()
    assert table.grad is not None
    assert torch.allclose(found.double() * -15 * 3, table.grad[0], atol=1e-6)  # rows · max_response
    assert float(table.grad.abs().max()) > 0.05


def _objective(logits: Tensor, w: World) -> Tensor:
    logp, ref = tabular.response_logp(logits, w), tabular.response_logp(w.ref_logits, w)
    return (logp.exp() * (w.gold - BETA * (logp - ref))).sum()


def _all_responses(w: World) -> GroupExperience:
    """Every response to prompt 0 as one row."""
    lengths = torch.tensor([1 + len(response) for response in w.responses])
    tokens = torch.zeros(len(w.responses), int(lengths.max())).long()
    for row, response in enumerate(w.responses):
        tokens[row, : int(lengths[row])] = torch.tensor([1, *response])
    position = torch.arange(tokens.shape[1])
    mask = (position >= 1) & (position < lengths[:, None])
    none = torch.zeros(tokens.shape)
    first = torch.ones_like(lengths)
    return GroupExperience(tokens, mask, first, lengths, none, none, none[:, 0], none[:, 0], none)


# Wrong ones do not find it.


@BOTH
def test_the_right_ones_find_it_in_the_time_that_the_wrong_ones_get(
    shifted: World, objective: GroupObjective
) -> None:
    assert regret_of(shifted, objective, BRIEF) <= THRESHOLD


def over_the_whole_batch(advantages: Callable[..., Tensor], reward: Tensor, mask: Tensor) -> Tensor:
    return advantages(reward.reshape(1, -1), mask.reshape(1, -1)).view_as(reward)


def negated(advantages: Callable[..., Tensor], reward: Tensor, mask: Tensor) -> Tensor:
    return -advantages(reward, mask)


def uncompared(advantages: Callable[..., Tensor], reward: Tensor, mask: Tensor) -> Tensor:
    return reward


@BOTH
@pytest.mark.parametrize("wrong", [over_the_whole_batch, negated, uncompared], ids=lambda f: f.__name__)
def test_wrong_advantages_do_not_find_it(
    shifted: World, objective: GroupObjective, wrong: Callable[..., Tensor]
) -> None:
    mutant = GroupObjective("mutant", partial(wrong, objective.advantages))
    assert not regret_of(shifted, mutant, BRIEF) <= 2 * THRESHOLD


def ratio_inverted(logp: Tensor, old_logp: Tensor, *rest: Tensor, **clip: Any) -> Tensor:
    return policy.clipped_surrogate_loss(2 * old_logp - logp, old_logp, *rest, **clip)


def mean_of_tokens(x: Tensor, mask: Tensor) -> Tensor:
    return x.sum(1) / mask.sum(1)


Mutant = tuple[object, str, Callable[..., Any]]
MUTANTS: dict[str, Mutant] = {
    "kl_sign": (group_experience, "kl_k1", lambda *a: -divergence.kl_k1(*a)),
    "no_kl": (group_experience, "kl_k1", lambda *a: 0 * divergence.kl_k1(*a)),
    "half_beta": (group_experience, "kl_k1", lambda *a: divergence.kl_k1(*a) / 2),
    "k3_in_reward": (group_experience, "kl_k1", divergence.kl_k3),
    "kl_per_token": (group_experience, "sequence_sum", mean_of_tokens),
    "samples_dealt_round": (group_experience, "grouped", lambda index, samples: index.repeat(samples)),
    "ratio_inverted": (ppo_update, "clipped_surrogate_loss", ratio_inverted),
    "truncated_not_paid": (
        group_experience,
        "penalised_score",
        lambda score, rollout, **_: score * (rollout.stop_reason != 2),
    ),
}


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        *((RLOO, name) for name in MUTANTS),
        *((GROUP_NORMALISED, name) for name in ("kl_sign", "no_kl", "samples_dealt_round")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_wrong_trainer_does_not_find_it(
    shifted: World, objective: GroupObjective, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(module, attribute, wrong)
    assert not regret_of(shifted, objective, BRIEF) <= 2 * THRESHOLD
