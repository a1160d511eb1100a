"""What goes into training by groups: the samples of one prompt are each other's baseline."""

from dataclasses import dataclass

from minirlhf.runs import InputError
from minirlhf.training.ppo_config import OnPolicyConfig


@dataclass(frozen=True)
class GroupConfig(OnPolicyConfig):
    """Knobs of training with several samples per prompt and without a critic.

    The defaults are those with which TRL's RLOO was run on TL;DR with the models of N+ (1 B parameters, a
    million episodes); what is not named here is PPO's. A small model wants a larger rate and a larger β.
    """

    prompts_per_batch: int = 128
    """Different groups per iteration: one prompt each."""
    samples_per_prompt: int = 4
    """G: responses to each prompt of an iteration, which are compared with each other; 2 or more."""
    epochs: int = 2
    """Passes over an iteration's episodes."""
    minibatches: int = 2
    """Optimiser steps per pass; must divide the episodes of an iteration, groups need not stay together."""
    kl_coefficient: float = 0.03
    """β: score units per nat of log π/π_ref (k1), summed over the response and subtracted from its score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("prompts_per_batch")
        if self.samples_per_prompt < 2:
            raise InputError(
                "samples_per_prompt must be at least 2 (the other samples of a prompt are the baseline of "
                f"each), got {self.samples_per_prompt}"
            )
        if self.batch_size % self.minibatches:
            raise InputError(
                f"minibatches must divide prompts_per_batch · samples_per_prompt, got {self.minibatches} and "
                f"{self.prompts_per_batch} · {self.samples_per_prompt}"
            )

    @property
    def batch_size(self) -> int:
        """Episodes per iteration."""
        return self.prompts_per_batch * self.samples_per_prompt
