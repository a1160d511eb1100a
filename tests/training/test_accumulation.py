"""Any split into micro-batches has the gradient of the batch: for the losses of PPO and of groups.

Those of the other stages are in test_stage_losses.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minirlhf.training import group_update, ppo_update
from minirlhf.training.experience import Experience
from minirlhf.training.update import Loss, gradient
from tests.training import test_group_policy, tiny
from tests.training.ppo_setting import CONFIG, CRITIC, MODEL, POLICY, moved, taken
from tests.training.test_ppo import experience as ppo_experience

ROWS = CONFIG.batch_size
GROUPS = replace(test_group_policy.CONFIG, minibatches=1)

# Away from the old policy and the old values: ratios, clipping and value clipping all take part.
CASES: dict[str, tuple[Loss, Any]] = {
    "ppo policy": (
        ppo_update.policy_loss(
            MODEL, replace(CONFIG, entropy_coefficient=0.1, dual_clip=3.0), tolerance=1e-4
        ),
        moved(POLICY, by=0.05),
    ),
    "ppo critic": (ppo_update.critic_loss(MODEL, CONFIG), moved(CRITIC, by=0.2)),
    "group": (group_update.group_loss(MODEL, GROUPS, tolerance=1e-4), moved(POLICY, by=0.05)),
}

experience = ppo_experience


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[1, 11], [5, 7], [2, 9, 1], [3, 4, 5], [1] * ROWS], ids=str)
def test_any_split_has_the_gradient_loss_and_metrics_of_the_batch(
    experience: Experience, name: str, sizes: list[int]
) -> None:
    loss, params = CASES[name]
    assert len(set(experience.mask.sum(1).tolist())) > 1  # ragged: a mean of means would be another
    parts = [taken(experience, index) for index in torch.randperm(ROWS).split(sizes)]
    tokens = experience.mask.sum()
    whole, value, aux = gradient(params, [experience], tokens, loss=loss)
    split, split_value, split_aux = gradient(params, parts, tokens, loss=loss)
    tiny.assert_trees_close(split, whole)
    assert max(float(leaf.abs().max()) for leaf in tiny.leaves(whole)) > 1e-3
    torch.testing.assert_close(split_value, value, rtol=1e-6, atol=1e-7)
    for key, found in split_aux.items():
        torch.testing.assert_close(found, aux[key], rtol=1e-5, atol=1e-6)
