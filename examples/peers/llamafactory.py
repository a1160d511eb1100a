"""LLaMA-Factory: the losses that it adds to TRL's trainer, and its sequence log-probs."""

from typing import Any

from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

_UNUSED = ("llamafactory.model", "llamafactory.hparams", "llamafactory.train.callbacks")
DPO = Page("llamafactory.train.dpo.trainer", _UNUSED, ("llamafactory.train", "llamafactory.train.dpo"))
HELPERS = Page("llamafactory.train.trainer_utils", _UNUSED, ("llamafactory.train",))


def odds_ratio_loss(chosen_logp: Tensor, rejected_logp: Tensor, weight: float) -> Tensor:
    """ORPO, of averaged log-probs."""
    theirs = load(DPO).CustomDPOTrainer.odds_ratio_loss
    return theirs(with_attributes(beta=weight), chosen_logp, rejected_logp)


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO, of averaged log-probs."""
    theirs = load(DPO).CustomDPOTrainer.simpo_loss
    return theirs(with_attributes(beta=beta, simpo_gamma=gamma), chosen_logp, rejected_logp)


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("llamafactory", function, kind, page, call, adapter)


SUBJECTS = (
    _subject("CustomDPOTrainer.odds_ratio_loss", "orpo", DPO, odds_ratio_loss),
    _subject("CustomDPOTrainer.simpo_loss", "simpo", DPO, simpo_loss),
    _subject("get_batch_logps", "sequence_logp", HELPERS),
)
