"""The stages as a user runs them: read data and model directories, call the stage's page, write a directory.

Every function returns the metrics of the checkpoint that it wrote. The equations and loops are on the pages
sft, reward_model, ppo, group_policy and preference.
"""

from minirlhf.training.stages.on_policy import group, ppo
from minirlhf.training.stages.preference import dpo, ipo
from minirlhf.training.stages.reward import reward
from minirlhf.training.stages.supervised import new_model, pretrain, sft

__all__ = ["dpo", "group", "ipo", "new_model", "ppo", "pretrain", "reward", "sft"]
