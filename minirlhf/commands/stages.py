"""The commands that train on data: plain text, demonstrations, preferences."""

from dataclasses import dataclass, field
from pathlib import Path

from minirlhf.commands.common import Flat, Training
from minirlhf.training import stages
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import NormaliseConfig
from minirlhf.training.sft import SFTConfig


@dataclass(frozen=True)
class Pretrain(Training):
    """Trains a model on plain text, every token of it: {"text"} rows."""

    policy: Path = field(kw_only=True)
    """The model to start from: a directory, a .gguf file or a hub name."""
    data: Path = field(kw_only=True)
    """Text rows (.jsonl, .jsonl.gz)."""
    base: Flat[SFTConfig] = field(default_factory=SFTConfig)

    def run(self) -> None:
        """Trains and says the losses."""
        stages.pretrain(self.policy, self.data, self.out, config=self.base, setting=self.setting)


@dataclass(frozen=True)
class SFT(Training):
    """Supervised fine-tuning: the policy learns to imitate demonstrations; prompts are read, not learned."""

    policy: Path = field(kw_only=True)
    """The model to start from: a directory, a .gguf file or a hub name."""
    data: Path = field(kw_only=True)
    """Demonstrations, or preferences whose chosen responses are imitated (.jsonl, .jsonl.gz)."""
    sft: Flat[SFTConfig] = field(default_factory=SFTConfig)

    def run(self) -> None:
        """Trains and says the losses."""
        stages.sft(self.policy, self.data, self.out, config=self.sft, setting=self.setting)


@dataclass(frozen=True)
class Reward(Training):
    """A Bradley-Terry reward model from the SFT model, normalised on the SFT model's own responses."""

    policy: Path = field(kw_only=True)
    """The SFT model (directory, .gguf, hub name): the backbone, and what the scores are normalised on."""
    data: Path = field(kw_only=True)
    """Preferences (.jsonl, .jsonl.gz)."""
    probe: Path | None = None
    """Adversarial preferences to report accuracy on, never trained on: short good against long bad."""
    reward: Flat[RewardConfig] = field(default_factory=RewardConfig)
    normalise: Flat[NormaliseConfig] = field(default_factory=NormaliseConfig)

    def run(self) -> None:
        """Trains and says the accuracies."""
        stages.reward(
            self.policy,
            self.data,
            self.out,
            probe=self.probe,
            config=self.reward,
            normalise=self.normalise,
            setting=self.setting,
        )


@dataclass(frozen=True)
class Preference(Training):
    """What DPO and IPO take."""

    policy: Path = field(kw_only=True)
    """The model to train, usually the SFT model: a directory, a .gguf file or a hub name."""
    data: Path = field(kw_only=True)
    """Preferences (.jsonl, .jsonl.gz)."""
    reference: Path | None = None
    """The reference (directory, .gguf, hub name); left out, the policy as it starts."""


@dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimisation: the policy learns from pairs, without reward model or sampling."""

    dpo: Flat[DPOConfig] = field(default_factory=DPOConfig)

    def run(self) -> None:
        """Trains and says loss, accuracy and margin."""
        stages.dpo(
            self.policy,
            self.reference or self.policy,
            self.data,
            self.out,
            config=self.dpo,
            setting=self.setting,
        )


@dataclass(frozen=True)
class IPO(Preference):
    """Identity preference optimisation: pairs again, but the margin has a target and stops there."""

    ipo: Flat[IPOConfig] = field(default_factory=IPOConfig)

    def run(self) -> None:
        """Trains and says loss, accuracy and margin."""
        stages.ipo(
            self.policy,
            self.reference or self.policy,
            self.data,
            self.out,
            config=self.ipo,
            setting=self.setting,
        )
