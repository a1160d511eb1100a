"""Strict reading of JSON, plain or gzipped: complaints say file, line, what was expected, what was found.

Rows are the lines of a file (JSONL), or the elements of its one array, as Alpaca's and ShareGPT's files are.
Stricter than `json.loads`: a key given twice, NaN, an infinite number and half a surrogate pair are errors,
because each of them would otherwise change the data without a word. Found text is described, never quoted.
"""

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn, cast

from minirlhf.runs import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


class Line(NamedTuple):
    """One JSON object and the place where it stands.

    Attributes:
        path: the file, the directory, or the data set by its name.
        number: of the line, element or row in it, counted from 1.
        values: the object.
        unit: what `number` counts.
    """

    path: Path
    number: int
    values: dict[str, Any]
    unit: Literal["line", "element", "row"] = "line"

    @property
    def place(self) -> str:
        """Where it stands, as complaints begin.

        >>> Line(Path("a.jsonl"), 7, {}).place, Line(Path("a.json"), 7, {}, "element").place
        ('a.jsonl:7', 'a.json, element 7')
        """
        return (
            f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}, {self.unit} {self.number}"
        )


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
            place = f"{path}:{number}"
            with _strictly(place, expected="one JSON object"):
                value = _DECODER.decode(raw.rstrip(b"\r\n").decode("utf-8"))
            yield Line(path, number, _checked(value, place))
    if not found:
        raise InputError(f"{path}: expected JSON lines, found an empty file")


def read_array(path: Path) -> Iterator[Line]:
    """The objects of a file that holds one JSON array, one at a time, in the memory of the largest of them.

    Raises:
        InputError: the file is missing, unreadable, or not a strict JSON array of one object or more.
    """
    text = _Window(path)
    if text.take() != "[":
        malformed(f"{path}", expected="a JSON array", found="something else")
    if text.peek() == "]":
        malformed(f"{path}", expected="an array of at least one object", found="an empty one")
    number, mark = 0, ","
    while mark == ",":
        number += 1
        place = f"{path}, element {number}"
        with _strictly(place, expected="one JSON object"):
            value = text.value()
        yield Line(path, number, _checked(value, place), "element")
        mark = text.take()
    if mark != "]":
        malformed(f"{path}", expected=f"a comma or the array's end after element {number}", found="neither")
    if text.take():
        malformed(f"{path}", expected="nothing after the array", found="something")


class _Window:
    """The part of a file's text that is being parsed; grows where a value does not end in it."""

    def __init__(self, path: Path) -> None:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        self._pieces = (decode(piece) for piece in _raw_pieces(path))
        self._place, self._text, self._at = f"{path}", "", 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """Takes that character."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> Any:
        """Takes the next value."""
        self.peek()
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise ValueError(f"a syntax error ({error.msg})") from None
            else:
                return value

    def _more(self) -> bool:
        """Drops what was taken and doubles the rest, so that no value is parsed often; False at the end."""
        left = self._text[self._at :]
        pieces, length = [left], 0
        with _strictly(self._place, expected="a JSON array"):
            while length <= len(left) and (piece := next(self._pieces, None)) is not None:
                pieces.append(piece)
                length += len(piece)
        self._text, self._at = "".join(pieces), 0
        return length > 0


def holds_array(path: Path) -> bool:
    """Whether a JSON file holds one array, by its first character, rather than an object on each line.

    Raises:
        InputError: the file is missing or unreadable.
    """
    return next((piece.strip()[:1] == b"[" for piece in _raw_pieces(path) if piece.strip()), False)


def malformed(place: str, *, expected: str, found: str) -> NoReturn:
    """Stops at a place (`Line.place`): FILE:LINE: expected ..., found ..."""
    raise InputError(f"{place}: expected {expected}, found {found}")


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
    with _opened(path, lambda: f"{path}:{number + 1}") as file:
        for raw in file:
            number += 1
            yield number, raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw


def _raw_pieces(path: Path, *, size: int = 1 << 20) -> Iterator[bytes]:
    with _opened(path, lambda: f"{path}") as file:
        piece = file.read(size).removeprefix(_BYTE_ORDER_MARK)
        while piece:
            yield piece
            piece = file.read(size)


@contextmanager
def _opened(path: Path, place: Callable[[], str]) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; what goes wrong while they are read is said, with the place reached."""
    try:
        with path.open("rb") as probe:
            # By content, not by name: downloads lose their .gz, and browsers unpack without renaming.
            zipped = probe.read(2) == _GZIP_MAGIC
        with gzip.open(path) if zipped else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        malformed(place(), expected="a whole gzip file", found=f"a damaged one ({error})")
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {error.strerror or error}") from None


@contextmanager
def _strictly(place: str, *, expected: str) -> Iterator[None]:
    """Says what is not strict JSON, and where."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        malformed(place, expected="UTF-8 text", found=f"another encoding at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        found = f"a syntax error at {line}column {error.colno} ({error.msg})"
        malformed(place, expected=expected, found=found)
    except RecursionError:
        malformed(place, expected=expected, found="nesting too deep to read")
    except ValueError as error:
        malformed(place, expected="strict JSON", found=str(error))


def _checked(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        malformed(place, expected="one JSON object", found=kind(value))
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


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
