"""The command that finds the pairs which help and harm."""

from dataclasses import dataclass, field
from pathlib import Path

from minirlhf.commands.common import Common
from minirlhf.runs import InputError
from minirlhf.training import stages


@dataclass(frozen=True)
class Influence(Common):
    """Ranks preference pairs by their influence on the held-out loss, and says how noisy gradients are."""

    data: Path = field(kw_only=True)
    """Preferences (.jsonl, .jsonl.gz); the training share is ranked, the validation share is held out."""
    reward_model: Path | None = None
    """Rank for this reward model's loss (directory, hub name)."""
    policy: Path | None = None
    """Or for this policy's DPO loss (directory, .gguf, hub name)."""
    reference: Path | None = None
    """Of the DPO loss (directory, .gguf, hub name); left out, the policy itself."""
    beta: float = 0.1
    """β of the DPO loss."""
    top: int = 10
    """Pairs shown at either end; the file has all of them."""

    def run(self) -> None:
        """Ranks, shows the extremes, writes the file."""
        if (self.reward_model is None) == (self.policy is None):
            raise InputError("expected either --reward-model or --policy, got both or neither")
        if self.top < 1:
            raise InputError(f"top must be at least 1, got {self.top}")
        if self.reward_model is not None:
            if self.reference is not None:
                raise InputError("--reference belongs to --policy, got it beside --reward-model")
            stages.influence_on_reward_model(
                self.reward_model, self.data, self.out, top=self.top, setting=self.setting
            )
        elif self.policy is not None:
            stages.influence_on_policy(
                self.policy,
                self.reference or self.policy,
                self.data,
                self.out,
                beta=self.beta,
                top=self.top,
                setting=self.setting,
            )
