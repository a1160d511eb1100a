"""The preference losses as objects that one loop can train on, each with the config that belongs to it.

h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)]

DPO                -log σ(β h)                              Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7
conservative DPO   -(1 - ε) log σ(β h) - ε log σ(-β h)      Mitchell 2023
IPO                (h̄ - 1/(2τ))², h̄ per token               Azar et al. 2023 (arXiv:2310.12036), Eq. 17
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from minirlhf.objectives.preference import conservative_dpo_loss, dpo_loss, implicit_reward, ipo_loss
from minirlhf.training.loop import TrainConfig


@dataclass(frozen=True)
class PreferenceConfig(TrainConfig):
    """What DPO, conservative DPO and IPO share."""

    learning_rate: float = 1e-6
    """Peak step size of AdamW. A model of 1 M parameters wants about 3e-4."""
    start_at_reference: bool = True
    """Refuse to start where the policy's log-probs are not the reference's; off, to go on from a checkpoint
    that has left its reference."""


@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Direct Preference Optimization."""

    beta: float = 0.1
    """β, reward units per nat of log π/π_ref summed over the response: larger stays nearer the reference."""


@dataclass(frozen=True)
class ConservativeDPOConfig(DPOConfig):
    """DPO that takes a share of the labels for flipped."""

    label_smoothing: float = 0.1
    """ε, that share, in [0, 0.5)."""


@dataclass(frozen=True)
class IPOConfig(PreferenceConfig):
    """Identity Preference Optimization on log-probs averaged per token."""

    tau: float = 0.5
    """τ: the margin aimed at is 1/(2τ) nats per *token*, so 1 by default, which e to 1 odds at each token
    reach. It is no β: DPO's 0.1 would ask for 5 nats per token, which no policy near its reference has."""


class PairLogps(NamedTuple):
    """What a pair loss reads, each [b]: log-probs summed over the response in nats, and response tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


class PairObjective(NamedTuple):
    """A preference loss and what goes with it.

    name: of the stage.
    losses: -> [b], unreduced.
    rewards: -> the implicit rewards of chosen and rejected, [b] each, for the metrics.
    loss_at_reference: the loss of every pair where policy and reference agree.
    """

    name: str
    losses: Callable[[PairLogps], Tensor]
    rewards: Callable[[PairLogps], tuple[Tensor, Tensor]]
    loss_at_reference: float


def dpo(config: DPOConfig) -> PairObjective:
    """DPO at the config's β."""

    def losses(x: PairLogps) -> Tensor:
        return dpo_loss(x.chosen, x.rejected, x.ref_chosen, x.ref_rejected, beta=config.beta)

    return PairObjective("dpo", losses, partial(_summed_rewards, beta=config.beta), math.log(2))


def conservative_dpo(config: ConservativeDPOConfig) -> PairObjective:
    """DPO at the config's β and share of flipped labels."""

    def losses(x: PairLogps) -> Tensor:
        logps = (x.chosen, x.rejected, x.ref_chosen, x.ref_rejected)
        return conservative_dpo_loss(*logps, beta=config.beta, label_smoothing=config.label_smoothing)

    return PairObjective("cdpo", losses, partial(_summed_rewards, beta=config.beta), math.log(2))


def ipo(config: IPOConfig) -> PairObjective:
    """IPO on averaged log-probs at the config's τ."""

    def losses(x: PairLogps) -> Tensor:
        return ipo_loss(*x, tau=config.tau)

    at_reference = (1 / (2 * config.tau)) ** 2
    return PairObjective("ipo", losses, partial(_averaged_rewards, tau=config.tau), at_reference)


def _summed_rewards(logps: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    return (
        implicit_reward(logps.chosen, logps.ref_chosen, beta=beta),
        implicit_reward(logps.rejected, logps.ref_rejected, beta=beta),
    )


def _averaged_rewards(logps: PairLogps, *, tau: float) -> tuple[Tensor, Tensor]:
    chosen, rejected = _summed_rewards(logps, beta=tau)
    return chosen / logps.chosen_length, rejected / logps.rejected_length
