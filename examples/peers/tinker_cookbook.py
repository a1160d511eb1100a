"""Tinker's cookbook: DPO's loss and the advantages of groups."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

DPO = Page("tinker_cookbook.preference.train_dpo")
DATA = Page("tinker_cookbook.rl.data_processing")


def compute_advantages(reward: Tensor, mask: Tensor) -> Tensor:
    """Centred rewards of each group; unscored samples are not in it."""
    groups = [
        with_attributes(get_total_rewards=row[kept].tolist) for row, kept in zip(reward, mask, strict=True)
    ]
    advantage = torch.zeros_like(reward)
    for row, kept, theirs in zip(advantage, mask, load(DATA).compute_advantages(groups), strict=True):
        row[kept] = theirs.to(reward.dtype)
    return advantage


def compute_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """DPO of lists of summed log-probs."""
    lists = (list(x) for x in (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp))
    return load(DPO).compute_dpo_loss(*lists, beta)[0]


def _subject(function: str, kind: str, page: Page, call: Any) -> Subject:
    return Subject("tinker_cookbook", function, kind, page, call)


SUBJECTS = (
    _subject("compute_dpo_loss", "dpo", DPO, compute_dpo_loss),
    _subject("compute_advantages", "group_centred", DATA, compute_advantages),
)
