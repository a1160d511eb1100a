"""Model directories in, one model directory out: what every stage does around its page.

A stage's directory appears whole or not at all. Only when training is interrupted, or a loss stops being
finite, after a checkpoint was kept does it appear with that checkpoint, and its manifest says so.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minirlhf.data.source import fingerprint
from minirlhf.data.templates.source import find_template
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, no_template
from minirlhf.models.adapter_files import is_adapter, open_adapter, read_language_model, read_scalar_model
from minirlhf.models.checkpoint import TOKENIZER, Normalisation, Read
from minirlhf.models.families import with_stop_ids
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.sources import resolve_model
from minirlhf.models.tensor_files import read_tensors, without_memory
from minirlhf.runs import (
    InputError,
    MetricsWriter,
    atomic_directory,
    dump_config,
    manifest,
    write_json_atomic,
    write_text_atomic,
)
from minirlhf.training.device import move, resolve
from minirlhf.training.guards import GuardError
from minirlhf.training.setting import Setting
from minirlhf.training.update import NonFiniteError

Save = Callable[[Path, Params], None]
"""Writes a model directory."""


class Checkpoint(NamedTuple):
    """A model directory, read: parameters on the device. normalisation: of a reward model's raw score."""

    path: Path
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    normalisation: Normalisation


_TEMPLATE_OF = {"auto": find_template, "none": no_template}


def load_policy(path: Path, setting: Setting) -> Checkpoint:
    """Reads a language model and its tokenizer: a directory, a GGUF file or a name on the hub.

    An adapter's directory is its base with the adapter merged. Its tokenizer is the base's, where
    it holds none itself.

    Raises:
        InputError: there is no such model, or its tokenizer knows ids that it has no row for.
    """
    device, path = resolve(setting.device), resolve_model(path)
    model, params = read_language_model(path, read=_reader(setting))
    return _loaded(path, model, params, Normalisation(0.0, 1.0), device, setting)


def load_reward_model(path: Path, setting: Setting) -> Checkpoint:
    """Reads a reward model, its normalisation and its tokenizer; raises as `load_policy` does."""
    device, path = resolve(setting.device), resolve_model(path)
    model, params, normalisation = read_scalar_model(path, read=_reader(setting))
    return _loaded(path, model, params, normalisation, device, setting)


def _loaded(
    path: Path,
    model: LanguageModel,
    params: Params,
    normalisation: Normalisation,
    device: torch.device,
    setting: Setting,
) -> Checkpoint:
    template_of = _TEMPLATE_OF[setting.reading.chat_template]
    lent = is_adapter(path) and not (path / TOKENIZER).is_file()
    tokenizer = load_tokenizer(open_adapter(path).base if lent else path, template_of=template_of)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its model a vocabulary of only "
            f"{model.config.vocab_size}"
        )
    # The tokenizer ends responses by its chat template's terminator, which need not be the config's first id.
    # An id beyond the vocabulary (a family's default in a small model) cannot be drawn.
    ends = [end for end in (tokenizer.eos_id, *model.stop_ids) if end < model.config.vocab_size]
    bound = with_stop_ids(model, tuple(dict.fromkeys(ends)))
    here = params if setting.dry_run else move(params, device)
    return Checkpoint(path, bound, here, tokenizer, normalisation)


def _reader(setting: Setting) -> Read:
    """A dry run has shapes enough."""
    return without_memory if setting.dry_run else read_tensors


def load_reference(path: Path, policy: Checkpoint, setting: Setting) -> Checkpoint:
    """Reads what a policy is compared with; where that is the policy, its tensors are shared.

    Raises:
        InputError: it is another kind of model (`require_same_model`); or see `load_policy`.
    """
    if resolve_model(path).resolve() == policy.path.resolve():
        return policy
    reference = load_policy(path, setting)
    require_same_model(policy, reference)
    return reference


def require_same_model(first: Checkpoint, second: Checkpoint) -> None:
    """Two directories whose parameters one model's functions can read, and whose ids mean the same tokens.

    Raises:
        InputError: they differ; names the first field and both values.
    """
    ours, theirs = dataclasses.asdict(first.model.config), dataclasses.asdict(second.model.config)
    for name in ours:
        if ours[name] != theirs.get(name):
            raise InputError(
                f"expected {second.path} to have the shape of {first.path}, got {name} {theirs.get(name)} "
                f"and {ours[name]}"
            )
    if first.tokenizer.backend.get_vocab() != second.tokenizer.backend.get_vocab():
        raise InputError(
            f"expected {second.path} to have the tokenizer of {first.path}, got another vocabulary"
        )


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten: `out` may be missing or an empty directory."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "a directory with files in it" if out.is_dir() else "a file"
        raise InputError(f"{out}: expected a new or empty directory, found {what}; choose another --out")


class Stage(NamedTuple):
    """An open stage directory.

    folder: where files go; becomes `out` when the stage ends.
    best: the model directory in it, which `keep` writes and whose files move up into `out` at the end.
    log: (step, metrics) -> metrics.jsonl here and, if there is one, the run's.
    keep: (params, metrics) -> `best`.
    """

    folder: Path
    best: Path
    log: Callable[[int, dict[str, float]], None]
    keep: Callable[[Params, dict[str, float]], None]


@contextmanager
def open_stage(
    out: Path,
    name: str,
    save: Save,
    config: Any,
    setting: Setting,
    *,
    data: Mapping[str, Path | Mapping[str, str]],
    weights: dict[str, Path],
) -> Iterator[Stage]:
    """The directory of one stage: the best model, metrics.jsonl, stage.toml and manifest.json.

    Args:
        out: as `refuse_existing` wants it.
        name: of the stage, in the metrics.
        save: how its kind of model is written.
        config: the stage's config; goes into stage.toml.
        setting: seed, device and the run's log.
        data, weights: what it reads; hashed into the manifest. What is no file comes with its own record.

    Raises:
        KeyboardInterrupt, NonFiniteError, GuardError: as they came, and now saying where the checkpoint is.
    """
    failure: BaseException | None = None
    files = {name: fingerprint(each) if isinstance(each, Path) else each for name, each in data.items()}
    record = manifest(config, setting.seed, files, weights, device=str(resolve(setting.device)))
    with atomic_directory(out) as folder, MetricsWriter(folder / "metrics.jsonl") as writer:

        def log(step: int, metrics: dict[str, float]) -> None:
            writer.write(step, name, metrics)
            if setting.log is not None:
                setting.log(step, name, metrics)

        best = folder / "best"
        try:
            yield Stage(folder, best, log, lambda params, metrics: save(best, params))
        except (KeyboardInterrupt, NonFiniteError, GuardError) as error:
            if not best.exists():
                raise
            failure = error
        for file in best.iterdir():
            file.replace(folder / file.name)
        best.rmdir()
        ended = "completed" if failure is None else f"stopped early: {_reason(failure)}"
        write_text_atomic(folder / "stage.toml", dump_config(config))
        write_json_atomic(folder / "manifest.json", {**record, "stage": name, "ended": ended})
    if failure is not None:
        failure.args = (f"{_reason(failure)}; the best checkpoint until then is in {out}",)
        raise failure


def _reason(failure: BaseException) -> str:
    return str(failure) or "interrupted"
