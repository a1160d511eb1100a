"""PPO, the stage that trains GPT-2, on a language that can be enumerated: it must find the optimum.

At β = 1 the optimum π* ∝ π_ref e^r is known exactly; at small β a trainer that forgets the KL would pass too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.objectives import advantages, divergence, policy
from minirlhf.training import experience, ppo, ppo_sampling, ppo_update
from minirlhf.training.experience import logp_of
from minirlhf.training.ppo_config import PPOConfig
from tests.training import tabular
from tests.training.tabular import World

BETA = 1.0
THRESHOLD = 0.005
CONFIG = PPOConfig(
    iterations=40,
    batch_size=256,
    micro_batch_size=256,
    max_response=3,
    temperature=1.0,
    missing_eos_penalty=0.0,
    kl_coefficient=BETA,
    value_clip=None,
    value_coefficient=1.0,
    learning_rate=0.07,
    critic_learning_rate=0.1,
    max_grad_norm=100.0,
)


@pytest.fixture(scope="module")
def small() -> World:
    return tabular.world(vocab_size=3, length=3)


def regret_of_ppo(w: World, config: PPOConfig, *, seed: int = 0) -> float:
    """The regret fraction that the stage ends with, started at the reference."""
    reference = tabular.table_of(w.ref_logits)
    prompts = [[1 + x] for x in range(w.config.prompts)]
    model, critic, scorer = tabular.bind(w.config), tabular.zero_critic(w), tabular.gold_scorer(w)
    result = ppo.train(model, reference, reference, critic, scorer, prompts, config, seed=seed)
    logits = tabular.logits_of(result.params, w)
    return tabular.regret_fraction(logits, w, beta=BETA, temperature=config.temperature)


def test_the_world_has_its_published_constants(small: World) -> None:
    assert len(small.responses) == 15
    assert tabular.best_objective(small, beta=1.0) == pytest.approx(1.0619373206795808, rel=1e-12)
    assert tabular.best_objective(small, beta=0.3) == pytest.approx(1.5444693764848674, rel=1e-12)
    assert tabular.objective(small.ref_logits, small, beta=1.0) == pytest.approx(
        0.6605679064980368, rel=1e-12
    )
    standard = tabular.world(vocab_size=4, length=4, prompts=2)
    assert tabular.best_objective(standard, beta=0.3) == pytest.approx(1.4022126332831828, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_table_as_a_model_has_the_log_probs_of_its_enumeration(temperature: float) -> None:
    w = tabular.world(vocab_size=4, length=4, prompts=2)
    exact = tabular.response_logp(w.ref_logits, w, temperature=temperature)
    assert torch.allclose(exact.exp().sum(1), torch.ones(2).double(), rtol=1e-12)
    model, params = tabular.bind(w.config), tabular.table_of(w.ref_logits)
    for x in range(2):
        for i in range(0, len(w.responses), 7):
            tokens = torch.tensor([[1 + x, *w.responses[i]]])
            mask = torch.arange(tokens.shape[1])[None] > 0
            logp = logp_of(model, params, tokens, mask, temperature=temperature).sum()
            assert float(logp) == pytest.approx(float(exact[x, i]), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ppo_finds_the_optimum_of_the_kl_regularised_objective(small: World, temperature: float) -> None:
    config = replace(CONFIG, temperature=temperature, iterations=40 if temperature == 1 else 60)
    assert regret_of_ppo(small, config) <= THRESHOLD


def test_ppo_finds_the_optimum_with_minibatches_micro_batches_and_a_clipped_value(small: World) -> None:
    config = replace(
        CONFIG, epochs=2, minibatches=2, micro_batch_size=100, value_clip=0.5, critic_pretraining=3
    )
    assert regret_of_ppo(small, config) <= THRESHOLD


def reward_on_first_token(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    first = mask.long().cumsum(1) == 1
    return torch.where(mask, -beta * kl, 0.0) + torch.where(first & mask, score[:, None], 0.0)


def reward_on_every_token(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    return torch.where(mask, score[:, None] - beta * kl, 0.0)


def ratio_inverted(logp: Tensor, old_logp: Tensor, *rest: Tensor, **clip: Any) -> Tensor:
    return policy.clipped_surrogate_loss(2 * old_logp - logp, old_logp, *rest, **clip)


Mutant = tuple[object, str, Callable[..., Any]]
MUTANTS: dict[str, Mutant] = {
    "kl_sign": (experience, "kl_k1", lambda *a: -divergence.kl_k1(*a)),
    "no_kl": (experience, "kl_k1", lambda *a: 0 * divergence.kl_k1(*a)),
    "k3_in_reward": (experience, "kl_k1", divergence.kl_k3),
    "half_beta": (experience, "kl_k1", lambda *a: divergence.kl_k1(*a) / 2),
    "advantage_sign": (experience, "whiten", lambda *a: -advantages.whiten(*a)),
    "reward_on_first_token": (experience, "kl_shaped_reward", reward_on_first_token),
    "reward_on_every_token": (experience, "kl_shaped_reward", reward_on_every_token),
    "ratio_inverted": (ppo_update, "clipped_surrogate_loss", ratio_inverted),
    "truncated_not_paid": (
        experience,
        "penalised_score",
        lambda score, rollout, **_: score * (rollout.stop_reason != 2),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_ppo_does_not_find_it(small: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(module, attribute, wrong)
    assert not regret_of_ppo(small, CONFIG) <= 2 * THRESHOLD


def test_a_reference_at_another_temperature_does_not_find_it(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, temperature=0.6)
    read, calls = experience.by_rows, []

    def second_read_untempered(law: Any, *rest: Any, **named: Any) -> Tensor:
        calls.append(law)
        if len(calls) % 3 == 2:  # policy, reference, critic are read in this order
            law.keywords["temperature"] = 1.0
        return read(law, *rest, **named)

    monkeypatch.setattr(experience, "by_rows", second_read_untempered)
    assert not regret_of_ppo(small, config) <= 2 * THRESHOLD


def test_a_sampler_at_another_temperature_is_stopped_by_the_guard(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ppo_sampling, "tempered", lambda logits, *, temperature: torch.log_softmax(logits, dim=-1)
    )
    with pytest.raises(RuntimeError, match="temperature is not the sampler's"):
        regret_of_ppo(small, replace(CONFIG, temperature=0.6))
