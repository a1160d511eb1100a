"""What the commands share: a frozen dataclass each, whose docstrings are its --help.

`cli` fills the fields from --config, flags and the recipe's defaults, and calls `run`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

import tyro

from minirlhf.training.setting import ReadingConfig, Setting

Device = Literal["auto", "cpu", "cuda", "mps"]
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
class Training(Common):
    """What every stage takes that changes parameters."""

    dry_run: bool = False
    """Read the files and the shapes, print what each part of the run would need of memory, and stop: nothing
    is trained, nothing is written."""

    @property
    def setting(self) -> Setting:
        """What the stage is told besides its files and its own config."""
        return super().setting._replace(dry_run=self.dry_run)
