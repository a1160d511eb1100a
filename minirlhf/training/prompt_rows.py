"""Prompts with their text and facts, once each, as they are kept and as they are written to disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from minirlhf.data.readers import Dropped
from minirlhf.data.records import Message, Prompt
from minirlhf.data.spool import Codec


class PromptRow(NamedTuple):
    """A prompt that fits: its ids, and its text and facts as they were read."""

    ids: list[int]
    row: Prompt


def without_repeats(rows: Iterable[Prompt | Dropped]) -> Iterator[Prompt | Dropped]:
    """Each different prompt where it stands first; prompts are told apart by 128 bits of a hash."""
    seen: set[bytes] = set()
    for row in rows:
        if not isinstance(row, Dropped):
            key = hashlib.blake2b(row.prompt.encode(), digest_size=16).digest()
            if key in seen:
                continue
            seen.add(key)
        yield row


def _pack(values: Any) -> bytes:
    return json.dumps(values).encode()


def _fields(row: Prompt) -> list[Any]:
    return [row.prompt, row.facts, row.line, row.messages]


def _prompt(fields: list[Any]) -> Prompt:
    prompt, facts, line, messages = fields
    return Prompt(prompt, facts, line, messages and tuple(Message(*message) for message in messages))


PROMPTS = Codec(lambda row: _pack(_fields(row)), lambda packed: _prompt(json.loads(packed)))
PROMPT_ROWS = Codec(
    lambda prompt: _pack([prompt.ids, _fields(prompt.row)]),
    lambda packed: PromptRow((both := json.loads(packed))[0], _prompt(both[1])),
)
