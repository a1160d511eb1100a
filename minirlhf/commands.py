"""The commands as a user sees them: one frozen dataclass each, whose docstrings are its --help.

`cli` fills the fields from --config, flags and the recipe's defaults, and calls `run`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from minirlhf import pipeline
from minirlhf.commands_models import Flat, Import, Model
from minirlhf.data import world_files
from minirlhf.data.world_files import WorldConfig
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.evaluation.stage import evaluate
from minirlhf.recipes import RunConfig, bounded, demo
from minirlhf.runs import InputError, atomic_directory
from minirlhf.training import stages
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.reward_sources import open_reward, the_one_reward
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, Setting
from minirlhf.training.sft import SFTConfig
from minirlhf.training.workspace import refuse_existing
from minirlhf.verify.command import Verify

Device = Literal["auto", "cpu", "cuda", "mps"]
Estimator = Literal["rloo", "group-normalised"]
ESTIMATORS = {objective.name: objective for objective in (RLOO, GROUP_NORMALISED)}


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
    """The model to align: a directory, a .gguf file or a hub name (NAME, NAME@REVISION). Left out, a
    small one is pretrained on the embedded world."""
    preferences: Path | None = None
    """Real preferences (.jsonl, .jsonl.gz); SFT takes the chosen responses. Goes with --model."""
    reward: str | None = None
    """SOURCE of an existing reward, instead of training a reward model: a reward model's directory or name,
    module:function, or http(s)://host/path. Goes with --model."""
    judge: str | None = None
    """SOURCE of an existing judge, instead of training a second reward model. Goes with --model."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    max_steps: int | None = None
    """Most optimiser steps of each stage (PPO, group: iterations); None for the recipe's own numbers."""
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)
    recipe: Flat[RunConfig] = field(default_factory=demo)

    def run(self) -> None:
        """Runs the stages in order; the last thing printed is the table."""
        if (self.model is None) != (self.preferences is None):
            raise InputError("--model and --preferences go together: real data needs both")
        if self.model is None and (self.reward is not None or self.judge is not None):
            raise InputError("--reward and --judge go with --model: the embedded world has its own")
        config = bounded(self.recipe, self.max_steps)
        if self.model is not None and self.preferences is not None:
            pipeline.run_real(
                self.out,
                config,
                model=self.model,
                preferences=self.preferences,
                device=self.device,
                reward=self.reward,
                judge=self.judge,
                remote=self.remote,
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
class Pretrain(Common):
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
class SFT(Common):
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
class Reward(Common):
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
class OnPolicy(Common):
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
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)


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
class Preference(Common):
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


@dataclass(frozen=True)
class Evaluate:
    """Compares policies with the SFT model on the same held-out prompts: win rate, reward, KL, verdict."""

    policy: tuple[str, ...]
    """The policies, each as MODEL or LABEL=MODEL; a MODEL is a directory, a .gguf file or a hub name."""
    reference: Path
    """The SFT model (directory, .gguf, hub name): the other side of every comparison."""
    data: Path
    """Prompts: any of the known formats (.jsonl, .jsonl.gz); the test share of them is used."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    reward_model: Path | None = None
    """Directory of the reward model that the policies were trained against: the proxy. Or --reward."""
    reward: str | None = None
    """SOURCE of the proxy: a reward model's directory or name, module:function, or http(s)://host/path.
    Without one the table has no score, and no word on hacking."""
    judge: str | None = None
    """SOURCE of the judge, likewise; left out, the embedded world's gold judge."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of the sampled responses."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    reading: Flat[ReadingConfig] = field(default_factory=ReadingConfig)
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)
    evaluation: Flat[EvaluationConfig] = field(default_factory=EvaluationConfig)

    def run(self) -> None:
        """Samples, judges, and prints the table."""
        policies = {}
        for entry in self.policy:
            name, equals, directory = entry.partition("=")
            path = Path(directory if equals else entry)
            policies[name if equals else path.name] = path
        setting = Setting(self.seed, self.device, self.reading)
        proxy, judge = None, None
        if self.reward is not None or self.reward_model is not None:
            proxy = the_one_reward(self.reward_model, self.reward, setting, remote=self.remote)
        if self.judge is not None:
            judge = open_reward(self.judge, setting, remote=self.remote)
        evaluate(
            policies,
            self.reference,
            proxy,
            self.data,
            self.out,
            judge=judge,
            config=self.evaluation,
            setting=setting,
        )


COMMANDS: dict[str, type[Command]] = {
    "run": Run,
    "world": World,
    "model": Model,
    "import": Import,
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
