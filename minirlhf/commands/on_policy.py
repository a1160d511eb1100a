"""The commands that learn from the policy's own samples."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minirlhf.commands.common import Device, Flat, Training
from minirlhf.recipes import bounded
from minirlhf.training import stages
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.reward_sources import the_one_reward
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.stages.own_pairs import OwnPairsConfig, own_pairs

Estimator = Literal["rloo", "group-normalised"]
ESTIMATORS = {objective.name: objective for objective in (RLOO, GROUP_NORMALISED)}


@dataclass(frozen=True)
class OnPolicy(Training):
    """What PPO and groups take."""

    policy: Path = field(kw_only=True)
    """The model to train, usually the SFT model: a directory, a .gguf file or a hub name."""
    data: Path = field(kw_only=True)
    """Prompts: any of the known formats (.jsonl, .jsonl.gz)."""
    reward_model: Path | None = None
    """Directory of the reward model; this or --reward, which takes it, too."""
    reward: str | None = None
    """SOURCE of the reward: a reward model's directory or name; module:function, a rule (prompts, responses,
    facts) -> tensor [B], higher is better, such as one that checks the answer (modules in the working
    directory are found); or http(s)://host/path."""
    reference: Path | None = None
    """The model to stay near (directory, .gguf, hub name); left out, the policy as it starts."""
    max_steps: int | None = None
    """Most iterations, whatever the other settings say; None: no bound."""
    offload: bool = False
    """CUDA: reference and reward model wait on the CPU between uses, which costs two copies an iteration. A
    reward model that reads text stays on the device."""
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)

    @property
    def setting(self) -> Setting:
        """What the stage is told besides its files and its own config."""
        return super().setting._replace(offload=self.offload)


@dataclass(frozen=True)
class PPO(OnPolicy):
    """PPO with KL control: the policy learns what the reward prefers, near the reference.

    The critic starts from a reward model of the policy's shape and tokenizer, else from the policy itself.
    """

    ppo: Flat[PPOConfig] = field(default_factory=PPOConfig)

    def run(self) -> None:
        """Trains and says score and KL."""
        stages.ppo(
            self.policy,
            self.reference or self.policy,
            the_one_reward(self.reward_model, self.reward, self.setting, remote=self.remote),
            self.data,
            self.out,
            config=bounded(self.ppo, self.max_steps),
            setting=self.setting,
        )


@dataclass(frozen=True)
class Group(OnPolicy):
    """Several samples per prompt, each judged by the others: policy gradient without a critic."""

    estimator: Estimator = "rloo"
    """Advantage of a response over its group: rloo, less the mean of the others; group-normalised, less the
    mean of all, over their standard deviation."""
    group: Flat[GroupConfig] = field(default_factory=GroupConfig)

    def run(self) -> None:
        """Trains and says score and KL."""
        stages.group(
            self.policy,
            self.reference or self.policy,
            the_one_reward(self.reward_model, self.reward, self.setting, remote=self.remote),
            self.data,
            self.out,
            config=bounded(self.group, self.max_steps),
            objective=ESTIMATORS[self.estimator],
            setting=self.setting,
            name=self.estimator,
        )


@dataclass(frozen=True)
class Pairs:
    """Makes preferences of the policy's own responses: the best and the worst of several, by any reward."""

    policy: Path
    """The model that responds: a directory, a .gguf file or a hub name."""
    data: Path
    """Prompts, of which the test share is left alone: any of the known formats."""
    out: Path
    """File to write (.jsonl); must not exist."""
    reward_model: Path | None = None
    """Directory of the reward model; this or --reward, which takes it, too."""
    reward: str | None = None
    """SOURCE of the reward: a reward model's directory or name, module:function, or http(s)://host/path."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of the responses."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    reading: Flat[ReadingConfig] = field(default_factory=ReadingConfig)
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)
    pairs: Flat[OwnPairsConfig] = field(default_factory=OwnPairsConfig)

    def run(self) -> None:
        """Samples, writes the file, and says how DPO should read it."""
        setting = Setting(self.seed, self.device, self.reading)
        reward = the_one_reward(self.reward_model, self.reward, setting, remote=self.remote)
        made = own_pairs(self.policy, reward, self.data, self.out, config=self.pairs, setting=setting)
        if made.max_length is not None:
            print(
                "some rejected responses were stopped by the length limit; so that DPO does not read an end "
                f"behind them, give it --max-length {made.max_length} --overlong truncate"
            )
