"""The run directory, the one layout that every room reads, and how files come to stand in it: whole or not at all.

    RUN/{config.toml, manifest.json, metrics.jsonl, data/, base/, sft/, reward/, ppo/, dpo/, ipo/, evaluation/}

A config is a frozen dataclass whose fields are scalars, tuples of them or further frozen dataclasses; on disk it
is TOML. Nothing here knows what the stages do.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
import tomllib
import types
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch

from minirlhf import __version__

Config = TypeVar("Config")
Report = Callable[[str], None]


class InputError(ValueError):
    """A mistake of the user's: a file, flag, column or checkpoint. The command line prints it as one line."""


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


# --- files, whole or not at all ---------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path`, which takes the place of `path` when the block ends well.

    When the block raises, `path` is as it was before and nothing is left beside it. When the process is killed,
    `path` is still as it was (or, in the instant between two renames, stands beside it as `.NAME.old-…`).

    Raises:
        InputError: `path` is a file, holds the working directory, or its parent cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a directory to write, found a file")
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path}: would replace the working directory or one above it; name a new directory")
    missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        _replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if still empty
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a UTF-8 file under another name and renames it, so that no reader ever sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of indented JSON. A number that is not finite is an error: JSON has none."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    os.rename(target, old)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


# --- metrics ----------------------------------------------------------------------------------------------------


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class MetricsWriter:
    """Appends one JSON line per call, flushed, so that a run which is cut off loses at most its last line."""

    def __init__(self, path: Path, *, report: Report = _to_stderr) -> None:
        """Goes on where the file ends; a half-written last line of an earlier run is reported and removed."""
        self.path = Path(path)
        _drop_half_line(self.path, report)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Writes {"step", "stage", metric: number, …}; NaN and infinity as the strings "nan", "inf", "-inf"."""
        clash = {"step", "stage"} & metrics.keys()
        if clash:
            raise ValueError(f"metrics must not be called {', '.join(sorted(clash))}")
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "stage": stage, **line}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path, *, report: Report = _to_stderr) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order. A half-written last line is reported and left out.

    Raises:
        InputError: there is no such file, or a line before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last newline: nothing, or half a line
            if line:
                report(f"{path}:{number}: left out a half-written line: {line.decode(errors='replace')}")
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            text = line[:80].decode(errors="replace")
            raise InputError(f"{path}:{number}: expected a JSON object, found {text!r}")
        rows.append({name: _number(name, value) for name, value in row.items()})
    return rows


def _number(name: str, value: Any) -> Any:
    return float(value) if name != "stage" and value in ("nan", "inf", "-inf") else value


def _drop_half_line(path: Path, report: Report) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        half = content[kept:].decode(errors="replace")
        report(f"{path}:{content.count(bytes([10])) + 1}: removed a half-written line: {half}")
        with path.open("r+b") as file:
            file.truncate(kept)


# --- manifest ---------------------------------------------------------------------------------------------------

_VERSIONED = ("torch", "numpy", "safetensors", "tokenizers", "rich", "tyro")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, or of a directory: of its files' relative names and digests, in sorted order."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def manifest(
    config: Any, seed: int, data: Mapping[str, Path], weights: Mapping[str, Path], *, device: str = "cpu"
) -> dict[str, Any]:
    """What a run was made from and on: everything that one would have to set equal to make it again.

    Args:
        config: the frozen dataclass of the run's settings.
        seed: that every generator of the run was derived from.
        data: files that were read, by name; each is recorded with its SHA-256.
        weights: model files or directories, likewise.
        device: what the tensors lived on, as torch names it.
    """
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "seed": seed,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "data": {name: {"path": str(p), "sha256": sha256_of(p)} for name, p in data.items()},
        "weights": {name: {"path": str(p), "sha256": sha256_of(p)} for name, p in weights.items()},
        "versions": {
            "minirlhf": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _VERSIONED},
        },
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- configs ----------------------------------------------------------------------------------------------------


def load_config(path: Path, cls: type[Config]) -> Config:
    """The config that a TOML file describes: fields that it does not name keep their defaults.

    A field that may be None is off when it is written as "none": TOML has no null.

    Raises:
        InputError: no such file, not TOML, an unknown key (the nearest known one is named), a missing key, a value
            of another type (key, expected and found are named), or a value that the config itself refuses.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # both bad UTF-8 and bad TOML
        raise InputError(f"{path}: not a TOML file: {error}") from error
    return _from_table(table, cls, str(path), "")


def dump_config(config: Any) -> str:
    """The TOML text that `load_config` reads back as an equal config; every field is written."""
    return "\n".join(_table_lines(config, "")) + "\n"


def _from_table(table: Mapping[str, Any], cls: type[Config], file: str, prefix: str) -> Config:
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            hint = f"; the nearest known key is {prefix}{near[0]}" if near else ""
            raise InputError(f"{file}: unknown key {prefix}{key}{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise InputError(f"{file}: missing key {prefix}{name}, expected {_describe(hints[name])}")
    values = {key: _convert(value, hints[key], file, prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:
        where = f" in [{prefix[:-1]}]" if prefix else ""
        raise InputError(f"{file}{where}: {error}") from error


def _convert(value: Any, hint: Any, file: str, key: str) -> Any:
    """`value`, as TOML gave it, as a value of the annotated type."""
    wrong = InputError(f"{file}: {key}: expected {_describe(hint)}, found {_show(value)}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, file, key, wrong)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise wrong
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) != len(value):
            raise wrong
        return tuple(
            _convert(v, h, file, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong
        return _from_table(value, typing.cast(Any, hint), file, f"{key}.")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:  # not isinstance: True is no int here
        return value
    raise wrong


def _convert_union(value: Any, members: tuple[Any, ...], file: str, key: str, wrong: InputError) -> Any:
    if type(None) in members and value == "none":
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1 and dataclasses.is_dataclass(members[0]):
        return _convert(value, members[0], file, key)  # its own, more exact complaint
    for exact in (True, False):  # 1 is an int before it is a float
        for member in members:
            if exact and type(value) is not member:
                continue
            with contextlib.suppress(InputError):
                return _convert(value, member, file, key)
    raise wrong


def _table_lines(config: Any, prefix: str) -> list[str]:
    fields = [f for f in dataclasses.fields(config) if f.init]
    nested = [f.name for f in fields if dataclasses.is_dataclass(getattr(config, f.name))]
    lines = [f"{f.name} = {_toml(getattr(config, f.name))}" for f in fields if f.name not in nested]
    for name in nested:  # TOML wants a table's own keys before its sub-tables
        lines += ["", f"[{prefix}{name}]", *_table_lines(getattr(config, name), f"{prefix}{name}.")]
    return lines


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back as the same number; inf and nan are TOML's too
    if isinstance(value, str | Path):
        if value == "none":
            raise ValueError('the text "none" stands for None in a config file; name it otherwise')
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    raise ValueError(f"a config holds scalars, tuples and dataclasses, got {type(value).__name__}")


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join('"none"' if a is type(None) else _describe(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        inner = arguments[:1] if arguments[1:] == (...,) else arguments
        return "a list of " + ", ".join(_describe(a) for a in inner)
    if dataclasses.is_dataclass(hint):
        return "a table"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


def _show(value: Any) -> str:
    return "a table" if isinstance(value, dict) else repr(value)
