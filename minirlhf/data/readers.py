"""Files -> text records. The format is detected from the first row, once, and said.

A later row of another shape is an error with file and line, never a guess. A row of the right shape that
cannot be used (an empty response, transcripts that differ before the last turn) is dropped, counted and
listed by line; with strict=True it stops the reading instead.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from minirlhf.data.formats import (
    ALPACA,
    CHAT,
    COMPLETION,
    PREFERENCE,
    PROMPT,
    SELF_INSTRUCT,
    TRANSCRIPTS,
    Format,
    Unusable,
)
from minirlhf.data.jsonl import Line, malformed, read_lines
from minirlhf.data.records import Demonstration, Preference, Prompt
from minirlhf.runs import InputError

Row = TypeVar("Row", Demonstration, Preference, Prompt)


class Loaded(NamedTuple, Generic[Row]):
    """What a file gave.

    Attributes:
        rows: the records, in file order.
        dropped: (line, why) of every record that cannot be used.
        format: name of the format that was detected.
        decision: one line that says what was detected, from what, and how it is read. Print it.
    """

    rows: list[Row]
    dropped: list[tuple[int, str]]
    format: str
    decision: str


def read_demonstrations(path: Path | str, *, strict: bool = False) -> Loaded[Demonstration]:
    """Texts to imitate: {"messages"}, {"prompt","completion"}, Alpaca, self-instruct.

    Of a file of preferences the chosen responses are taken; a pair that `read_preferences` drops is dropped.

    Raises:
        InputError: a malformed line (file, line, expected, found), no usable row, or strict and a bad one.
    """
    accepted = (CHAT, COMPLETION, ALPACA, SELF_INSTRUCT, PREFERENCE, TRANSCRIPTS)
    return _load(Path(path), accepted, _as_demonstration, strict=strict)


def read_preferences(path: Path | str, *, strict: bool = False) -> Loaded[Preference]:
    """Preferences: {"prompt","chosen","rejected"}, or transcripts {"chosen","rejected"} as of Anthropic's HH.

    Raises:
        InputError: as for `read_demonstrations`.
    """
    return _load(Path(path), (PREFERENCE, TRANSCRIPTS), lambda pair: pair, strict=strict)


def read_prompts(path: Path | str, *, strict: bool = False) -> Loaded[Prompt]:
    """The prompts of a file of any format, repeated where the file repeats them, with `facts` where given.

    Raises:
        InputError: as for `read_demonstrations`.
    """
    accepted = (PROMPT, CHAT, ALPACA, SELF_INSTRUCT, TRANSCRIPTS)
    return _load(Path(path), accepted, _as_prompt, strict=strict)


def describe_dropped(dropped: Sequence[tuple[int, str]], *, total: int) -> str:
    """What was dropped, in one line that says which and why.

    >>> describe_dropped([(7, "empty response"), (9, "empty response")], total=100)
    'dropped 2 of 100: empty response (lines 7, 9)'
    """
    if not dropped:
        return f"dropped 0 of {total}"
    reasons: dict[str, list[int]] = {}
    for line, why in dropped:
        reasons.setdefault(why, []).append(line)
    listed = [f"{why} ({_lines(at)})" for why, at in reasons.items()]
    return f"dropped {len(dropped)} of {total}: {'; '.join(listed)}"


def _lines(numbers: list[int], *, most: int = 20) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _load(
    path: Path, accepted: tuple[Format, ...], convert: Callable[[Any], Row], *, strict: bool
) -> Loaded[Row]:
    rows: list[Row] = []
    dropped: list[tuple[int, str]] = []
    lines = read_lines(path)
    first = next(lines)
    found = _detect(first, accepted)
    for line in itertools.chain([first], lines):
        _check_columns(line, found, first=first)
        for record in found.parse(line):
            if not isinstance(record, Unusable):
                rows.append(convert(record))
            elif strict:
                malformed(path, line.number, expected="a usable row (strict)", found=record.why)
            else:
                dropped.append((line.number, record.why))
    if not rows:
        told = describe_dropped(dropped, total=len(dropped))
        raise InputError(f"{path}: expected at least one usable row, found none; {told}")
    return Loaded(rows, dropped, found.name, _decision(first, found))


def _detect(line: Line, accepted: tuple[Format, ...]) -> Format:
    for candidate in accepted:
        if all(column in line.values for column in candidate.columns):
            return candidate
    known = " or ".join(_columns(candidate.columns) for candidate in accepted)
    malformed(line.path, line.number, expected=known, found=_columns(line.values))


def _decision(first: Line, found: Format) -> str:
    unread = [key for key in first.values if key not in (*found.columns, *found.optional)]
    ignored = f"; ignoring {_columns(unread)}" if unread else ""
    because = f"line {first.number} has {_columns(found.columns)}{ignored}"
    return f"{first.path}: read as {found.name}, because {because}; {found.meaning}"


def _check_columns(line: Line, format_: Format, *, first: Line) -> None:
    if not all(column in line.values for column in format_.columns):
        expected = f"{_columns(format_.columns)} as in line {first.number}"
        malformed(line.path, line.number, expected=expected, found=_columns(line.values))


def _columns(names: Iterable[str]) -> str:
    return "{" + ", ".join(json.dumps(name) for name in names) + "}"


def _as_demonstration(record: Demonstration | Preference) -> Demonstration:
    if isinstance(record, Preference):
        return Demonstration(record.prompt, ((record.chosen, True),), record.line)
    return record


def _as_prompt(record: Demonstration | Preference | Prompt) -> Prompt:
    return record if isinstance(record, Prompt) else Prompt(record.prompt, None, record.line)
