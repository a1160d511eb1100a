"""Settings: frozen dataclasses of scalars, tuples of them and further frozen dataclasses; TOML on disk."""

import contextlib
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from minirlhf.runs.files import InputError

Config = TypeVar("Config")


def load_config(path: Path, cls: type[Config]) -> Config:
    """The config that a TOML file describes: fields that it does not name keep their defaults.

    A field that may be None is off when it is written as "none": TOML has no null.

    Raises:
        InputError: no such file, not TOML, an unknown key (the nearest known one is named), a missing key, a
            value of another type (key, expected and found are named), or one that the config itself refuses.
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
