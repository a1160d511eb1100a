"""Which format a file is in: the first row decides, once; where two answers are possible, the user is asked.

A row with the columns of two formats is read as the one that reads more of them ({"prompt", "completion"}
is no list of prompts). Of what is left, readings that give the very same records are one reading.
Everything else stops with the question, and `--format NAME` is the answer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from minirlhf.data.conversation import ASSISTANT, Unfit, demonstration_of, prompt_of
from minirlhf.data.formats.chats import CHAT, IMPLICIT, SHAREGPT, SHAREGPT_PREFERENCE, ULTRAFEEDBACK
from minirlhf.data.formats.rows import (
    ALPACA,
    COMMON_PREFIX,
    COMPLETION,
    PREFERENCE,
    PROMPT,
    PROMPT_MESSAGES,
    PROMPT_OF_PAIR,
    SELF_INSTRUCT,
    TRANSCRIPTS,
    UNPAIRED,
    Format,
    Unusable,
)
from minirlhf.data.formats.trees import MESSAGE_TABLE, MESSAGE_TABLE_PREFERENCE, TREE, TREE_PREFERENCE
from minirlhf.data.jsonl import Line, malformed
from minirlhf.data.records import Demonstration, Preference, Prompt
from minirlhf.runs import InputError


class Purpose(NamedTuple):
    """What a reader is after: its name, the formats that it accepts, and what it takes of their records."""

    what: str
    formats: tuple[Format, ...]
    convert: Callable[[Any], Any]


_PAIRS = (PREFERENCE, ULTRAFEEDBACK, TRANSCRIPTS, IMPLICIT, COMMON_PREFIX, SHAREGPT_PREFERENCE)
_ANSWERED = (CHAT, COMPLETION, ALPACA, SELF_INSTRUCT, SHAREGPT, UNPAIRED)
_ASKED = (
    PROMPT,
    PROMPT_OF_PAIR,
    *(found for found in _ANSWERED if "prompt" not in found.columns),
    *_PAIRS[1:],
)
DEMONSTRATIONS = Purpose("demonstrations", (*_ANSWERED, *_PAIRS, TREE, MESSAGE_TABLE), demonstration_of)
PREFERENCES = Purpose("preferences", (*_PAIRS, TREE_PREFERENCE, MESSAGE_TABLE_PREFERENCE), lambda pair: pair)
PROMPTS = Purpose("prompts", (*_ASKED, TREE, MESSAGE_TABLE), prompt_of)

KEYS = tuple(dict.fromkeys(found.key for wanted in (DEMONSTRATIONS, PROMPTS) for found in wanted.formats))
"""Every name that `--format` takes, besides "auto"."""


def detect(first: Line, wanted: Purpose, *, choice: str = "auto") -> Format:
    """The format of a file, by its first row.

    Args:
        first: that row.
        wanted: what it is read for.
        choice: "auto", or the key of a format: then that one, or an error that says why it does not fit.

    Raises:
        InputError: no format fits, several do and say different things, or the chosen one does not.
    """
    if choice != "auto":
        return _chosen(first, wanted, choice)
    fitting = [found for found in wanted.formats if found.guessed and _fits(first, found)]
    if not fitting:  # what is null in the first row may be there in others
        fitting = [f for f in wanted.formats if f.guessed and _fits(first, f, null=True)]
    if not fitting:
        _refuse_unknown(first, wanted)
    fitting = [found for found in fitting if not any(_within(found, other) for other in fitting)]
    _ask_about_prompt(first, wanted)
    readings = [_read(first, found, wanted) for found in fitting]
    if any(reading != readings[0] for reading in readings):
        _ask(first, fitting)
    return fitting[0]


def decision(first: Line, found: Format, *, choice: str = "auto") -> str:
    """One line: which format, why, what of the row is not read, and how the rest is."""
    unread = [key for key in first.values if key not in (*found.columns, *found.optional)]
    ignored = f"; ignoring {columns(unread)}" if unread else ""
    because = f"{first.unit} {first.number} has {columns(found.columns)}"
    if choice != "auto":
        because = f"--format {choice} says so"
    return f"{first.path}: read as {found.name}, because {because}{ignored}; {found.meaning}"


def check_columns(line: Line, found: Format, *, first: Line) -> None:
    """That a later row has the columns of the format.

    Raises:
        InputError: one is missing.
    """
    if not all(column in line.values for column in found.columns):
        expected = f"{columns(found.columns)} as in {first.unit} {first.number}"
        malformed(line.place, expected=expected, found=columns(line.values))


def columns(names: Iterable[str]) -> str:
    """Names as a set of JSON keys, readable whatever they hold.

    >>> columns(["a", "b"])
    '{"a", "b"}'
    """
    return "{" + ", ".join(json.dumps(name) for name in names) + "}"


def parse(line: Line, found: Format) -> Sequence[Demonstration | Preference | Prompt | Unusable]:
    """The records of a row; one that is unfit as a whole is one `Unusable`.

    Raises:
        InputError: the row is not of this format.
    """
    try:
        return found.parse(line)
    except Unfit as unfit:
        return [Unusable(str(unfit))]


def _chosen(first: Line, wanted: Purpose, choice: str) -> Format:
    named = [found for found in wanted.formats if found.key == choice]
    if not named:
        keys = ", ".join(found.key for found in wanted.formats)
        what = "gives none" if choice in KEYS else "is no format"
        raise InputError(f"--format {choice}: expected a format of {wanted.what} ({keys}), and that {what}")
    (found,) = named
    values = first.values
    if not all(column in values for column in found.columns):
        expected = f"{columns(found.columns)} for --format {choice}"
        malformed(first.place, expected=expected, found=columns(values))
    if not found.fits(values):
        expected = f"{columns(found.columns)} of the kinds that --format {choice} reads"
        kinds = {key: _kind_of(values[key]) for key in found.columns}
        malformed(first.place, expected=expected, found=json.dumps(kinds))
    return found


def _kind_of(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _fits(line: Line, found: Format, *, null: bool = False) -> bool:
    """Whether a row has the columns; a null one is how table files say that a row has none."""
    values = line.values
    there = all(column in values if null else values.get(column) is not None for column in found.columns)
    return there and found.fits(values)


def _within(found: Format, other: Format) -> bool:
    return found is not other and set(found.columns) < set(other.columns)


def _read(line: Line, found: Format, wanted: Purpose) -> list[Any]:
    """What a format makes of a row, for comparison with what another makes of it."""
    if found.gather is not None:
        return [found.key]
    try:
        records = parse(line, found)
    except InputError:
        return [found.key]
    return [record if isinstance(record, Unusable) else wanted.convert(record) for record in records]


def _refuse_unknown(first: Line, wanted: Purpose) -> None:
    values = first.values
    if any(key in values for key in ("text", "spans")) and wanted is not PROMPTS:
        found = f"{columns(values)}: plain text has no prompt; `minirlhf pretrain` trains on it"
        malformed(first.place, expected=f"rows of {wanted.what}", found=found)
    if UNPAIRED in DEMONSTRATIONS.formats and wanted is PREFERENCES and _fits(first, UNPAIRED):
        found = f"{columns(values)}, which are unpaired; `minirlhf sft` trains on those labelled true"
        malformed(first.place, expected="two responses to each prompt", found=found)
    known = " or ".join(dict.fromkeys(columns(found.columns) for found in wanted.formats if found.guessed))
    for found in wanted.formats:
        if found.guessed and all(column in values for column in found.columns):
            kinds = json.dumps({key: _kind_of(values[key]) for key in found.columns})
            malformed(first.place, expected=f"{known}, of text or messages", found=kinds)
    malformed(first.place, expected=known, found=columns(values))


def _ask(first: Line, fitting: Sequence[Format]) -> None:
    readings = "; ".join(
        f"--format {found.key} reads {columns(found.columns)} ({found.meaning})" for found in fitting
    )
    raise InputError(
        f"{first.place}: expected columns of one format, found those of {len(fitting)} that "
        f"say different things; which is meant? {readings}"
    )


def _ask_about_prompt(first: Line, wanted: Purpose) -> None:
    """The questions that columns alone do not raise: does a text repeat its prompt, is it a transcript?"""
    values, accepted = first.values, [found.key for found in wanted.formats]
    if "text" in values and isinstance(values["text"], str) and _fits(first, CHAT) and CHAT.key in accepted:
        raise InputError(
            f'{first.place}: expected one of "text" and "messages", found both; which is meant? '
            '--format messages trains the assistant turns; for the text take the column "messages" out and '
            "use `minirlhf pretrain`"
        )
    prompt, sides = values.get("prompt"), [values.get("chosen"), values.get("rejected")]
    if not all(isinstance(side, str) for side in sides):
        return
    texts = [side for side in sides if isinstance(side, str)]
    if isinstance(prompt, str) and PROMPT_MESSAGES not in values and says_again(prompt, texts):
        raise InputError(
            f'{first.place}: expected "chosen" and "rejected" to be responses alone, found that '
            'both say "prompt" again; which is meant? --format transcripts takes them as whole transcripts '
            'and does not read "prompt"; --format preferences takes them as responses that say it again'
        )
    if prompt is None:
        marked = [ASSISTANT in t for t in texts]
        if not all(marked) and TRANSCRIPTS.key in accepted:
            which = "one of them" if any(marked) else "neither"
            raise InputError(
                f'{first.place}: expected "chosen" and "rejected" to be transcripts with an '
                f"{ASSISTANT.strip()!r} turn, found no such turn in {which}; what is the prompt? "
                '--format common-prefix takes what both texts begin with; otherwise add a column "prompt"'
            )


def says_again(prompt: str, responses: Iterable[str]) -> bool:
    """Whether every response begins with the prompt, or is a transcript in which it stands.

    >>> says_again("hi", ["hi ho", "hi no"]), says_again("hi", ["ho", "hi no"])
    (True, False)
    """
    return bool(prompt.strip()) and all(
        text.startswith(prompt.rstrip()) or (ASSISTANT in text and prompt.strip() in text)
        for text in responses
    )
