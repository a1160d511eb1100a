"""The table of an enumerable world as a model, and PPO's whole stage on it.

What one iteration after another leads to, and what wrong ones lead to, is in tests/verify/test_trainers.py.
"""

import pytest
import torch

from minirlhf.data.records import collate
from minirlhf.models.interface import scalar
from minirlhf.training import ppo
from minirlhf.training.experience import logp_of
from minirlhf.training.ppo_config import PPOConfig
from tests.training import tabular

STANDARD = tabular.world(vocab_size=4, length=4, prompts=2)
ROWS = collate([([1 + x], response) for x in range(2) for response in STANDARD.responses], pad_id=3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_table_as_a_model_has_the_log_probs_of_its_enumeration(temperature: float) -> None:
    model, params = tabular.bind(STANDARD.config), tabular.table_of(STANDARD.ref_logits)
    logp = logp_of(model, params, ROWS.tokens, ROWS.mask, temperature=temperature).sum(1)
    exact = tabular.response_logp(STANDARD.ref_logits / temperature, STANDARD)
    torch.testing.assert_close(logp.double().view_as(exact), exact, rtol=0, atol=1e-5)
    assert torch.equal(tabular.logits_of(params, STANDARD), STANDARD.ref_logits.float().double())


def test_the_table_of_rewards_as_a_model_has_a_reward_of_its_own_for_every_response() -> None:
    model, params = tabular.bind_reader(STANDARD.config), tabular.zero_rewards(STANDARD)
    params["score"]["weight"][0] = torch.arange(params["score"]["weight"].numel())
    rewards = scalar(params, model.hidden(params, ROWS.tokens))[torch.arange(242), ROWS.lengths - 1]
    assert rewards.tolist() == list(range(242))


def test_the_whole_stage_finds_the_optimum_of_the_kl_regularised_objective() -> None:
    w = tabular.world(vocab_size=3, length=3, prompts=2)
    reference = tabular.table_of(w.ref_logits)
    config = PPOConfig(
        iterations=40,
        batch_size=256,
        epochs=2,
        minibatches=2,
        micro_batch_size=100,
        max_response=3,
        temperature=1.0,
        missing_eos_penalty=0.0,
        kl_coefficient=1.0,
        value_clip=0.5,
        value_coefficient=1.0,
        learning_rate=0.07,
        critic_learning_rate=0.1,
        critic_pretraining=3,
        max_grad_norm=100.0,
    )
    model, critic, scorer = tabular.bind(w.config), tabular.zero_critic(w), tabular.gold_scorer(w)
    result = ppo.train(model, reference, reference, critic, scorer, [[1], [2]], config, seed=0)
    assert float(tabular.regret_fraction(tabular.logits_of(result.params, w), w, beta=1.0)) <= 0.005
