"""Files -> text records. The format is detected from the first row, once, and said (see `formats.detect`).

A later row of another shape is an error with file and line, never a guess. A row of the right shape that
cannot be used (an empty response, transcripts that differ before the last turn) is dropped, counted and
listed by line; with strict=True it stops the reading instead. `open_*` read row by row as they are asked,
`read_*` the whole source; `row_of` turns a record back into a row.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from minirlhf.data.account import Account
from minirlhf.data.conversation import asked
from minirlhf.data.formats.detect import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    Purpose,
    check_columns,
    decision,
    detect,
    parse,
    says_again,
)
from minirlhf.data.formats.rows import PROMPT_MESSAGES, Format, Unusable
from minirlhf.data.jsonl import Line, malformed
from minirlhf.data.records import Demonstration, Message, Preference, Prompt
from minirlhf.data.source import read_rows
from minirlhf.runs import InputError

Row = TypeVar("Row", Demonstration, Preference, Prompt)


class Loaded(NamedTuple, Generic[Row]):
    """What a source gave.

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


class Dropped(NamedTuple):
    """A record of the right shape that cannot be used: where it stands, and why."""

    line: int
    why: str


class Opened(NamedTuple, Generic[Row]):
    """A source whose first row has been looked at, and whose rows are read as they are asked for.

    Attributes:
        rows: the records and the dropped ones, in file order; raises InputError where a line is malformed,
            or at the end where none was usable. It can be walked through once.
        format: name of the format that was detected.
        decision: one line that says what was detected, from what, and how it is read. Print it.
    """

    rows: Iterator[Row | Dropped]
    format: str
    decision: str


def open_demonstrations(
    path: Path | str, *, strict: bool = False, format: str = "auto"
) -> Opened[Demonstration]:
    """Texts to imitate, one at a time; of preferences the chosen responses.

    Args:
        path: where the rows are, as `source.read_rows` takes it.
        strict: whether a row that cannot be used stops the reading.
        format: "auto", or which of `formats.detect.KEYS` the rows are in.

    Raises:
        InputError: the first row is malformed, of no known format or of several; or the chosen format does
            not fit. `Opened.rows` raises for later rows.
    """
    return _open(path, DEMONSTRATIONS, strict=strict, choice=format)


def open_preferences(path: Path | str, *, strict: bool = False, format: str = "auto") -> Opened[Preference]:
    """Preferences, one at a time; arguments and errors as of `open_demonstrations`."""
    return _open(path, PREFERENCES, strict=strict, choice=format)


def open_prompts(path: Path | str, *, strict: bool = False, format: str = "auto") -> Opened[Prompt]:
    """The prompts of any format, one at a time; arguments and errors as of `open_demonstrations`."""
    return _open(path, PROMPTS, strict=strict, choice=format)


def read_demonstrations(
    path: Path | str, *, strict: bool = False, format: str = "auto"
) -> Loaded[Demonstration]:
    """All that `open_demonstrations` gives.

    Of a file of preferences the chosen responses are taken; a pair that `read_preferences` drops is dropped.

    Raises:
        InputError: a malformed line (file, line, expected, found), no usable row, or strict and a bad one.
    """
    return _collect(open_demonstrations(path, strict=strict, format=format))


def read_preferences(path: Path | str, *, strict: bool = False, format: str = "auto") -> Loaded[Preference]:
    """All that `open_preferences` gives; raises as `read_demonstrations`."""
    return _collect(open_preferences(path, strict=strict, format=format))


def read_prompts(path: Path | str, *, strict: bool = False, format: str = "auto") -> Loaded[Prompt]:
    """All prompts of a file of any format, repeated where it repeats them, with `facts` where given.

    Raises:
        InputError: as for `read_demonstrations`.
    """
    return _collect(open_prompts(path, strict=strict, format=format))


def row_of(record: Demonstration | Preference | Prompt) -> dict[str, Any]:
    """The JSON object from which the same record is read again, but for its line number.

    Raises:
        ValueError: a demonstration of several segments that is no chat; no format says that.

    >>> row_of(Preference("p", "c", "r", 7))
    {'prompt': 'p', 'chosen': 'c', 'rejected': 'r'}
    """
    row: dict[str, Any] = {"prompt": record.prompt}
    messages = record.messages
    if isinstance(record, Preference):
        row |= {"chosen": record.chosen, "rejected": record.rejected}
        if messages is None and says_again(record.prompt, (record.chosen, record.rejected)):
            return row | {PROMPT_MESSAGES: None}  # somebody has answered what detection would ask
    elif isinstance(record, Prompt):
        row |= {} if record.facts is None else {"facts": record.facts}
    elif len(record.segments) == 1:
        row["completion"] = record.segments[0][0]
        messages = None if messages is None else messages[:-1]
    elif messages is None:
        raise ValueError("expected a demonstration of one segment, or one with messages")
    else:
        end = len(asked(record) or ())
        return {"prompt": _json(messages[:end]), "completion": _json(messages[end:])}
    return row if messages is None else row | {PROMPT_MESSAGES: _json(messages)}


def describe_dropped(dropped: Sequence[tuple[int, str]], *, total: int) -> str:
    """What was dropped, in one line that says which and why.

    >>> describe_dropped([(7, "empty response"), (9, "empty response")], total=100)
    'dropped 2 of 100: empty response (lines 7, 9)'
    """
    account = Account()
    for line, why in dropped:
        account.add(line, why)
    return account.told(total=total)


def _open(path: Path | str, purpose: Purpose, *, strict: bool, choice: str) -> Opened[Any]:
    lines = read_rows(path)
    first = next(lines)
    found = detect(first, purpose, choice=choice)
    rows = _rows(itertools.chain([first], lines), first, found, purpose.convert, strict=strict)
    return Opened(rows, found.name, decision(first, found, choice=choice))


def _rows(
    lines: Iterator[Line], first: Line, found: Format, convert: Callable[[Any], Row], *, strict: bool
) -> Iterator[Row | Dropped]:
    usable, dropped = False, []
    checked = _checked(lines, found, first)
    for line in checked if found.gather is None else found.gather(checked):
        for record in parse(line, found):
            if not isinstance(record, Unusable):
                usable = True
                yield convert(record)
            elif strict:
                malformed(line.place, expected="a usable row (strict)", found=record.why)
            else:
                if not usable:  # what is told if there is none at all
                    dropped.append((line.number, record.why))
                yield Dropped(line.number, record.why)
    if not usable:
        told = describe_dropped(dropped, total=len(dropped))
        raise InputError(f"{first.path}: expected at least one usable row, found none; {told}")


def _checked(lines: Iterator[Line], found: Format, first: Line) -> Iterator[Line]:
    for line in lines:
        check_columns(line, found, first=first)
        yield line


def _collect(opened: Opened[Row]) -> Loaded[Row]:
    rows: list[Row] = []
    dropped: list[tuple[int, str]] = []
    for record in opened.rows:
        if isinstance(record, Dropped):
            dropped.append((record.line, record.why))
        else:
            rows.append(record)
    return Loaded(rows, dropped, opened.format, opened.decision)


def _json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]
