"""The commands that make a model directory, of random weights or of what exists."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minirlhf.commands.common import Flat
from minirlhf.models.adapter_files import is_adapter, open_adapter
from minirlhf.models.checkpoint import save_language_model, save_scalar_model
from minirlhf.models.encoder_files import is_encoder
from minirlhf.models.families import family_of
from minirlhf.models.gguf import convert_gguf
from minirlhf.models.interface import Params
from minirlhf.models.sources import resolve_model
from minirlhf.models.tensor_files import named, read_json
from minirlhf.recipes import demo
from minirlhf.runs import InputError, atomic_directory
from minirlhf.training import stages
from minirlhf.training.setting import ReadingConfig, Setting, ShapeConfig
from minirlhf.training.text_rewards import load_encoder_reward
from minirlhf.training.workspace import Checkpoint, load_policy, load_reward_model, refuse_existing


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
class Import:
    """Makes a model directory from a hub name, a GGUF file or another directory, and checks it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|GGUF|DIR")]
    """What to import: NAME or NAME@REVISION on the hub, a .gguf file, or a directory."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    tokenizer: Path | None = None
    """The model's own tokenizer.json, for a GGUF file whose tokenizer we cannot rebuild."""

    def run(self) -> None:
        """Writes it and says in one line what it is."""
        refuse_existing(self.out)
        file = Path(self.source).expanduser()
        is_gguf = file.is_file() and file.suffix.lower() == ".gguf"
        if self.tokenizer is not None and not is_gguf:
            raise InputError(f"--tokenizer is for a GGUF file, got {self.source}, whose tokenizer is its own")
        with atomic_directory(self.out) as folder:
            if is_gguf:
                convert_gguf(file, folder, tokenizer=self.tokenizer)
            words = _import(folder if is_gguf else resolve_model(self.source), folder)
        print(f"{words}; from {self.source}, written to {self.out}")


def _import(source: Path, folder: Path) -> str:
    """Reads a directory as every stage does, and writes what was read; returns what it is."""
    setting = Setting(0, "cpu", ReadingConfig())
    if is_encoder(source):  # read, never written: so the files as they are
        encoder = load_encoder_reward(source, setting)
        config = encoder.model.config
        for pattern in ("config.json", "model*.safetensors*", "tokenizer*.json", "special_tokens_map.json"):
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        return (
            f"reward model, an encoder: {_parameters(encoder.params)}, "
            f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}, "
            f"context {config.n_positions:,}"
        )
    if _is_reward_model(source):
        loaded = load_reward_model(source, setting)
        model, params, normalisation = loaded.model, loaded.params, loaded.normalisation
        text = loaded.tokenizer.path
        save_scalar_model(folder, model, params, tokenizer=text, normalisation=normalisation)
        return f"reward model, {_described(loaded)}"
    loaded = load_policy(source, setting)
    save_language_model(folder, loaded.model, loaded.params, tokenizer=loaded.tokenizer.path)
    return _described(loaded)


def _is_reward_model(source: Path) -> bool:
    if is_adapter(source):
        return open_adapter(source).scalar
    architectures = read_json(source / "config.json").get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def _described(loaded: Checkpoint) -> str:
    config, tokenizer = loaded.model.config, loaded.tokenizer
    layers = loaded.model.cache.layers
    return (
        f"{family_of(loaded.model).to_huggingface(config)['model_type']}: {_parameters(loaded.params)}, "
        f"{layers} layers, vocabulary {config.vocab_size:,}, context {config.n_positions:,}, "
        f"{'no' if tokenizer.template is None else 'a'} chat template, "
        f"responses end with {tokenizer.backend.id_to_token(tokenizer.eos_id)}"
    )


def _parameters(params: Params) -> str:
    return f"{sum(tensor.numel() for tensor in named(params).values()):,} parameters"
