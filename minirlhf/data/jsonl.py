"""Strict reading of JSONL, plain or gzipped: complaints say file, line, what was expected, what was found.

Stricter than `json.loads`: a key given twice, NaN, an infinite number and half a surrogate pair are errors,
because each of them would otherwise change the data without a word. Found text is described, never quoted.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minirlhf.runs import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One JSON object and the place where it stands."""

    path: Path
    number: int
    values: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """The JSON objects of a file, one at a time. Blank lines are skipped, and counted as lines.

    Lines end at a line feed only: U+2028 and its kind may stand inside a JSON string.

    Raises:
        InputError: the file is missing, unreadable, empty, or one of its lines is not a strict JSON object.
    """
    found = False
    for number, raw in _raw_lines(path):
        if raw.strip():
            found = True
            yield Line(path, number, _parse(path, number, raw))
    if not found:
        raise InputError(f"{path}: expected JSON lines, found an empty file")


def malformed(path: Path, number: int, *, expected: str, found: str) -> NoReturn:
    """Stops on a line: FILE:LINE: expected ..., found ..."""
    raise InputError(f"{path}:{number}: expected {expected}, found {found}")


def kind(value: object) -> str:
    """What a JSON value is, in the words of JSON, without quoting it.

    >>> kind(None), kind([1]), kind(True), kind("secret")
    ('null', 'a list', 'a boolean', 'a string')
    """
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with path.open("rb") as probe:
            # By content, not by name: downloads lose their .gz, and browsers unpack without renaming.
            zipped = probe.read(2) == _GZIP_MAGIC
        with gzip.open(path) if zipped else path.open("rb") as file:
            for raw in file:
                number += 1
                yield number, raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        malformed(path, number + 1, expected="a whole gzip file", found=f"a damaged one ({error})")
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {error.strerror or error}") from None


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            raw.rstrip(b"\r\n").decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        malformed(path, number, expected="UTF-8 text", found=f"another encoding at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        found = f"a syntax error at column {error.colno} ({error.msg})"
        malformed(path, number, expected="one JSON object", found=found)
    except RecursionError:
        malformed(path, number, expected="one JSON object", found="nesting too deep to read")
    except ValueError as error:
        malformed(path, number, expected="strict JSON", found=str(error))
    if not isinstance(value, dict):
        malformed(path, number, expected="one JSON object", found=kind(value))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number too large for a float")
    return number
