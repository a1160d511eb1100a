"""The commands as a user sees them: one frozen dataclass each, whose docstrings are its --help.

`cli` fills the fields from --config, flags and the recipe's defaults, and calls `run`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

import tyro

from minirlhf import pipeline
from minirlhf.data import world_files
from minirlhf.data.world_files import WorldConfig
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.evaluation.stage import evaluate
from minirlhf.recipes import RunConfig, bounded, demo
from minirlhf.runs import InputError, atomic_directory
from minirlhf.training import stages
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.group_rewards import the_one_reward
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, Setting, ShapeConfig
from minirlhf.training.sft import SFTConfig
from minirlhf.training.workspace import refuse_existing
from minirlhf.verify.command import Verify

Device = Literal["auto", "cpu", "cuda", "mps"]
Estimator = Literal["rloo", "group-normalised"]
ESTIMATORS = {objective.name: objective for objective in (RLOO, GROUP_NORMALISED)}
Config = TypeVar("Config")
Flat = Annotated[Config, tyro.conf.arg(name="")]  # `--learning-rate`, not `--settings.learning-rate`


class Command(Protocol):
    """What main asks of a command."""

    def run(self) -> int | None:
        """Does it; an exit code, where there is more to say than that it is done."""
        ...


@dataclass(frozen=True)
class Common:
    """What every stage that trains takes."""

    out: Path
    """Directory to write; must not exist, or be empty."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of everything random."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    reading: Flat[ReadingConfig] = field(default_factory=ReadingConfig)

    @property
    def setting(self) -> Setting:
        """What the stage is told besides its files and its own config."""
        return Setting(self.seed, self.device, self.reading)


@dataclass(frozen=True)
class Run:
    """The whole pipeline: data, base model, SFT, reward model, PPO, DPO, IPO, evaluation, one table.

    Without arguments on the embedded world; with --model and --preferences on real data.
    """

    out: Path = Path("runs/demo")
    """Run directory to write; must not exist, or be empty."""
    model: Path | None = None
    """Directory of the model to align; left out, a small one is pretrained on the embedded world."""
    preferences: Path | None = None
    """Real preferences (.jsonl, .jsonl.gz); SFT takes the chosen responses. Goes with --model."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    max_steps: int | None = None
    """Most optimiser steps of each stage (PPO, group: iterations); None for the recipe's own numbers."""
    recipe: Flat[RunConfig] = field(default_factory=demo)

    def run(self) -> None:
        """Runs the stages in order; the last thing printed is the table."""
        if (self.model is None) != (self.preferences is None):
            raise InputError("--model and --preferences go together: real data needs both")
        config = bounded(self.recipe, self.max_steps)
        if self.model is not None and self.preferences is not None:
            pipeline.run_real(
                self.out, config, model=self.model, preferences=self.preferences, device=self.device
            )
        else:
            pipeline.run_world(self.out, config, device=self.device)


@dataclass(frozen=True)
class World:
    """Writes the embedded world's data: text, demonstrations, preferences, prompts, and its tokenizer."""

    out: Path
    """Directory to write; must not exist, or be empty."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of everything random."""
    world: Flat[WorldConfig] = field(default_factory=lambda: demo().world)

    def run(self) -> None:
        """Writes it and says what it wrote."""
        refuse_existing(self.out)
        with atomic_directory(self.out) as folder:
            world_files.write(folder, config=self.world, seed=self.seed)
        print(f"wrote {', '.join(sorted(path.name for path in self.out.iterdir()))} to {self.out}")


@dataclass(frozen=True)
class Model:
    """Makes a GPT-2 directory with random weights, by GPT-2's own recipe."""

    tokenizer: Path
    """tokenizer.json, or a directory that holds one; gives the vocabulary."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of the weights."""
    shape: Flat[ShapeConfig] = field(default_factory=lambda: demo().shape)

    def run(self) -> None:
        """Writes it and says its size."""
        print(stages.new_model(self.tokenizer, self.out, shape=self.shape, seed=self.seed))


@dataclass(frozen=True)
class Pretrain(Common):
    """Trains a model on plain text, every token of it: {"text"} rows."""

    policy: Path = field(kw_only=True)
    """Directory of the model to start from."""
    data: Path = field(kw_only=True)
    """Text rows (.jsonl, .jsonl.gz)."""
    base: Flat[SFTConfig] = field(default_factory=SFTConfig)

    def run(self) -> None:
        """Trains and says the losses."""
        stages.pretrain(self.policy, self.data, self.out, config=self.base, setting=self.setting)


@dataclass(frozen=True)
class SFT(Common):
    """Supervised fine-tuning: the policy learns to imitate demonstrations; prompts are read, not learned."""

    policy: Path = field(kw_only=True)
    """Directory of the model to start from."""
    data: Path = field(kw_only=True)
    """Demonstrations, or preferences whose chosen responses are imitated (.jsonl, .jsonl.gz)."""
    sft: Flat[SFTConfig] = field(default_factory=SFTConfig)

    def run(self) -> None:
        """Trains and says the losses."""
        stages.sft(self.policy, self.data, self.out, config=self.sft, setting=self.setting)


@dataclass(frozen=True)
class Reward(Common):
    """A Bradley-Terry reward model from the SFT model, normalised on the SFT model's own responses."""

    policy: Path = field(kw_only=True)
    """Directory of the SFT model: the backbone, and what the scores are normalised on."""
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
class PPO(Common):
    """PPO with KL control: the policy learns what the reward model prefers, near the reference."""

    policy: Path = field(kw_only=True)
    """Directory of the model to train, usually the SFT model."""
    reward_model: Path = field(kw_only=True)
    """Directory of the reward model; the critic starts from it."""
    data: Path = field(kw_only=True)
    """Prompts: any of the known formats (.jsonl, .jsonl.gz)."""
    reference: Path | None = None
    """Directory of the model to stay near; left out, the policy as it starts."""
    max_steps: int | None = None
    """Most iterations, whatever the other settings say; None: no bound."""
    ppo: Flat[PPOConfig] = field(default_factory=PPOConfig)

    def run(self) -> None:
        """Trains and says score and KL."""
        stages.ppo(
            self.policy,
            self.reference or self.policy,
            self.reward_model,
            self.data,
            self.out,
            config=bounded(self.ppo, self.max_steps),
            setting=self.setting,
        )


@dataclass(frozen=True)
class Group(Common):
    """Several samples per prompt, each judged by the others: policy gradient without a critic."""

    policy: Path = field(kw_only=True)
    """Directory of the model to train, usually the SFT model."""
    data: Path = field(kw_only=True)
    """Prompts: any of the known formats (.jsonl, .jsonl.gz)."""
    reward_model: Path | None = None
    """Directory of the reward model; this or --reward."""
    reward: str | None = None
    """module:function, a rule (prompts, responses, facts) -> tensor [B], higher is better, such as one that
    checks the answer; modules in the working directory are found. This or --reward-model."""
    estimator: Estimator = "rloo"
    """Advantage of a response over its group: rloo, less the mean of the others; group-normalised, less the
    mean of all, over their standard deviation."""
    reference: Path | None = None
    """Directory of the model to stay near; left out, the policy as it starts."""
    max_steps: int | None = None
    """Most iterations, whatever the other settings say; None: no bound."""
    group: Flat[GroupConfig] = field(default_factory=GroupConfig)

    def run(self) -> None:
        """Trains and says score and KL."""
        stages.group(
            self.policy,
            self.reference or self.policy,
            the_one_reward(self.reward_model, self.reward, self.setting),
            self.data,
            self.out,
            config=bounded(self.group, self.max_steps),
            objective=ESTIMATORS[self.estimator],
            setting=self.setting,
            name=self.estimator,
        )


@dataclass(frozen=True)
class Preference(Common):
    """What DPO and IPO take."""

    policy: Path = field(kw_only=True)
    """Directory of the model to train, usually the SFT model."""
    data: Path = field(kw_only=True)
    """Preferences (.jsonl, .jsonl.gz)."""
    reference: Path | None = None
    """Directory of the reference; left out, the policy as it starts."""


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


@dataclass(frozen=True)
class Evaluate:
    """Compares policies with the SFT model on the same held-out prompts: win rate, reward, KL, verdict."""

    policy: tuple[str, ...]
    """Directories of the policies, each as DIR or NAME=DIR."""
    reference: Path
    """Directory of the SFT model: the other side of every comparison."""
    reward_model: Path
    """Directory of the reward model that the policies were trained against: the proxy."""
    data: Path
    """Prompts: any of the known formats (.jsonl, .jsonl.gz); the test share of them is used."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    judge: Path | None = None
    """Directory of a second reward model that judges; left out, the embedded world's gold judge does."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of the sampled responses."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    reading: Flat[ReadingConfig] = field(default_factory=ReadingConfig)
    evaluation: Flat[EvaluationConfig] = field(default_factory=EvaluationConfig)

    def run(self) -> None:
        """Samples, judges, and prints the table."""
        policies = {}
        for entry in self.policy:
            name, equals, directory = entry.partition("=")
            path = Path(directory if equals else entry)
            policies[name if equals else path.name] = path
        evaluate(
            policies,
            self.reference,
            self.reward_model,
            self.data,
            self.out,
            judge=self.judge,
            config=self.evaluation,
            setting=Setting(self.seed, self.device, self.reading),
        )


COMMANDS: dict[str, type[Command]] = {
    "run": Run,
    "world": World,
    "model": Model,
    "pretrain": Pretrain,
    "sft": SFT,
    "reward": Reward,
    "ppo": PPO,
    "group": Group,
    "dpo": DPO,
    "ipo": IPO,
    "evaluate": Evaluate,
    "verify": Verify,
}
