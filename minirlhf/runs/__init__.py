"""The run directory, the one layout that every room reads, and how files come to stand in it.

    RUN/{config.toml, manifest.json, metrics.jsonl, data/, base/, sft/, reward/, ppo/, dpo/, ipo/,
         evaluation/}

Each file or directory appears whole or not at all. Nothing here knows what the stages do.
"""

from dataclasses import dataclass
from pathlib import Path

from minirlhf.runs.allocator import keep_freed_memory, tell_malloc
from minirlhf.runs.config import dump_config, load_config
from minirlhf.runs.files import InputError, atomic_directory, sha256_of, write_json_atomic, write_text_atomic
from minirlhf.runs.manifest import manifest
from minirlhf.runs.metrics import MetricsWriter, read_metrics

__all__ = [
    "InputError",
    "MetricsWriter",
    "RunLayout",
    "atomic_directory",
    "dump_config",
    "keep_freed_memory",
    "load_config",
    "manifest",
    "read_metrics",
    "sha256_of",
    "tell_malloc",
    "write_json_atomic",
    "write_text_atomic",
]


@dataclass(frozen=True)
class RunLayout:
    """Where things stand in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The settings of the run, as TOML."""
        return self.root / "config.toml"

    @property
    def manifest(self) -> Path:
        """What the run was made from: see `manifest`."""
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step of every stage."""
        return self.root / "metrics.jsonl"

    @property
    def data(self) -> Path:
        """The files that the run generated or split for itself."""
        return self.root / "data"

    @property
    def evaluation(self) -> Path:
        """The table, the samples and the learning curves."""
        return self.root / "evaluation"

    def model(self, name: str) -> Path:
        """The Hugging Face directory of one model: base, sft, reward, ppo, dpo, ipo."""
        return self.root / name
