"""The stages as a user runs them: read data and model directories, call the stage's page, write a directory.

A stage returns the metrics of the checkpoint that it wrote. The equations and loops are on the pages
sft, reward_model, ppo, group_policy and preference.
"""

from minirlhf.training.stages.influence import of_policy as influence_on_policy
from minirlhf.training.stages.influence import of_reward_model as influence_on_reward_model
from minirlhf.training.stages.on_policy import group, ppo
from minirlhf.training.stages.preference import dpo, ipo
from minirlhf.training.stages.reward import reward
from minirlhf.training.stages.supervised import new_model, pretrain, sft

__all__ = [
    "dpo",
    "group",
    "influence_on_policy",
    "influence_on_reward_model",
    "ipo",
    "new_model",
    "ppo",
    "pretrain",
    "reward",
    "sft",
]
