"""The whole pipeline, and the embedded world's files alone."""

from dataclasses import dataclass, field
from pathlib import Path

from minirlhf import pipeline
from minirlhf.commands.common import Device, Flat
from minirlhf.data import world_files
from minirlhf.data.world_files import WorldConfig
from minirlhf.recipes import RunConfig, bounded, demo
from minirlhf.runs import InputError, atomic_directory
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.workspace import refuse_existing


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
    dry_run: bool = False
    """Read or make the data, print what each part of each stage would need of memory, and the peak over all,
    and stop: nothing is trained, nothing is written (the data lie in TMPDIR meanwhile)."""
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
                dry_run=self.dry_run,
            )
        else:
            pipeline.run_world(self.out, config, device=self.device, dry_run=self.dry_run)


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
