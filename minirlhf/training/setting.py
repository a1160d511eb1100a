"""What a stage is told besides its files and its own config: seed, device, how to read and cut the data."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from minirlhf.data.batches import Overlong
from minirlhf.data.formats.detect import KEYS
from minirlhf.runs import InputError
from minirlhf.training.memory_plan import Plan

ChatTemplate = Literal["auto", "none"]
Log = Callable[[int, str, dict[str, float]], None]
"""`log(step, stage, metrics)`: where a run collects the metrics of all its stages."""


@dataclass(frozen=True)
class ShapeConfig:
    """Size of a fresh GPT-2; the vocabulary is its tokenizer's."""

    n_layer: int = 4
    """Blocks."""
    n_embd: int = 128
    """Width of the residual stream; a multiple of n_head."""
    n_head: int = 4
    """Attention heads per block."""
    n_positions: int = 128
    """Context: most tokens of prompt and response together."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; GPT-2's is 0.02, copying is learned sooner from 0.06."""


@dataclass(frozen=True)
class NormaliseConfig:
    """The SFT responses on which a reward model's scores have mean 0 and variance 1."""

    rollouts: int = 512
    """Responses sampled."""
    max_response: int = 53
    """Most tokens per response; as in PPO, or a score of 1 means something else there."""
    temperature: float = 0.7
    """Divides the logits when sampling; as in PPO."""

    def __post_init__(self) -> None:
        if self.rollouts < 2 or self.max_response < 1 or not self.temperature > 0:
            raise InputError(
                "expected at least 2 rollouts, a max_response of at least 1 and a positive temperature, got "
                f"{self.rollouts}, {self.max_response} and {self.temperature}"
            )


@dataclass(frozen=True)
class ReadingConfig:
    """How a stage reads its data; the same for all stages, so that no test prompt is ever trained on."""

    overlong: Overlong = "error"
    """What happens to an example that does not fit the context; a prompt is never cut, only dropped."""
    max_length: int | None = None
    """Most tokens of prompt and response together; None for the model's context."""
    strict: bool = False
    """Stop at a pair that cannot be used, instead of dropping, counting and listing it."""
    validation: float = 0.1
    """Share of the prompts that early stopping and checkpoint choice use."""
    test: float = 0.1
    """Share of the prompts that is only reported on."""
    split_seed: int = 0
    """Of the cut by prompt; keep it from stage to stage."""
    chat_template: ChatTemplate = "auto"
    """How conversations are written: auto, by the checkpoint's own template where it has one; none, as
    transcripts with Human: and Assistant: whatever it has. Keep it from stage to stage."""
    format: str = "auto"
    """Which format the rows are in, where detection asks; its question names the possible answers."""

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise InputError(
                f"validation and test must be positive shares below 1 together, got {self.validation} and "
                f"{self.test}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length must be at least 2, got {self.max_length}")
        if self.format not in ("auto", *KEYS):
            raise InputError(f"format must be one of auto, {', '.join(KEYS)}, got {self.format!r}")

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return 1 - self.validation - self.test, self.validation, self.test


def _alone(plan: Plan) -> Plan:
    return plan


class Setting(NamedTuple):
    """What a stage is told besides files and config.

    seed: of everything random. device: by name. reading: as above.
    show: prints one line. log: the run's metrics, beside the stage's own.
    dry_run: read files and shapes, say the memory plan, and stop before anything is written.
    offload: reference and reward model wait on the CPU between uses (CUDA alone).
    planned: a stage's memory plan -> what is said of it; several stages in one process know what the others
        left.
    """

    seed: int
    device: str
    reading: ReadingConfig
    show: Callable[[object], None] = print
    log: Log | None = None
    dry_run: bool = False
    offload: bool = False
    planned: Callable[[Plan], Plan] = _alone


def seed_for(setting: Setting, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two parts of a run draw the same numbers.

    >>> setting = Setting(0, "cpu", ReadingConfig())
    >>> seed_for(setting, "sft") == seed_for(setting, "dpo")
    False
    """
    digest = hashlib.sha256(f"{setting.seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def generator_for(setting: Setting, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(setting, purpose))
