"""The formats of instruction and preference data: one function each, one JSON object -> text records.

To add a format, write its `parse` and name it in the reader that should accept it. A parse function refuses
a wrong shape (`malformed`: the file is not what it seems) and returns `Unusable` where the shape is right but
the record teaches nothing (an empty response). Text is kept exactly: the response of an HH transcript begins
with the space that follows `Assistant:`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minirlhf.data.jsonl import Line, kind, malformed
from minirlhf.data.records import Demonstration, Preference, Prompt

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
"""The turn markers of Anthropic's transcripts (`System:` is ours); we write chats with them too."""

_TURNS = {"system": SYSTEM, "user": HUMAN, "assistant": ASSISTANT}

# Stanford Alpaca's two templates, letter by letter (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT).
_PLAIN_TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Unusable(NamedTuple):
    """A record of the right shape that cannot be used, and why."""

    why: str


class Format(NamedTuple):
    """A known shape of row.

    Attributes:
        name: what messages call it.
        columns: a row of this format has all of them.
        optional: columns that it reads where they are given.
        meaning: how it is read, for the printed decision.
        parse: one object -> its records, several where one row holds several.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    meaning: str
    parse: Callable[[Line], Sequence[Demonstration | Preference | Prompt | Unusable]]


def parse_completion(line: Line) -> list[Demonstration | Unusable]:
    """{"prompt", "completion"}."""
    prompt, completion = (_text(line, line.values, name) for name in ("prompt", "completion"))
    return [_demonstration(line, prompt, completion)]


def parse_preference(line: Line) -> list[Preference | Unusable]:
    """{"prompt", "chosen", "rejected"}, where chosen and rejected are the responses alone."""
    prompt, chosen, rejected = (_text(line, line.values, name) for name in ("prompt", "chosen", "rejected"))
    return [_preference(line, prompt, chosen, rejected)]


def parse_transcripts(line: Line) -> list[Preference | Unusable]:
    """{"chosen", "rejected"} as of HH: what both share up to and with the last `Assistant:` is the prompt."""
    parts = []
    for column in ("chosen", "rejected"):
        head, marker, response = _text(line, line.values, column).rpartition(ASSISTANT)
        if not marker:
            expected = f'"{column}" to be a transcript with an {ASSISTANT.strip()!r} turn'
            malformed(line.path, line.number, expected=expected, found="no such turn")
        parts.append((head + marker, response))
    (prompt, chosen), (other_prompt, rejected) = parts
    if prompt != other_prompt:
        return [Unusable("the transcripts differ before the last assistant turn")]
    if HUMAN in chosen or HUMAN in rejected:
        return [Unusable("a human turn follows the last assistant turn")]
    return [_preference(line, prompt, chosen, rejected)]


def parse_alpaca(line: Line) -> list[Demonstration | Unusable]:
    """{"instruction", "output"}, with or without "input"."""
    given = _text(line, line.values, "input") if "input" in line.values else ""
    prompt = _alpaca_prompt(_text(line, line.values, "instruction"), given)
    return [_demonstration(line, prompt, _text(line, line.values, "output"))]


def parse_self_instruct(line: Line) -> list[Demonstration | Unusable]:
    """{"instruction", "instances": [{"input", "output"}]}: one record per instance."""
    instruction = _text(line, line.values, "instruction")
    records = []
    for i, instance in enumerate(_objects(line, "instances")):
        where = f" of instance {i}"
        prompt = _alpaca_prompt(instruction, _text(line, instance, "input", where=where))
        records.append(_demonstration(line, prompt, _text(line, instance, "output", where=where)))
    return records


def parse_messages(line: Line) -> list[Demonstration | Unusable]:
    """{"messages": [{"role", "content"}]}: assistant turns train, all before them is read."""
    segments: list[tuple[str, bool]] = []
    read = ""
    for i, message in enumerate(_objects(line, "messages")):
        where = f" of message {i}"
        role, content = (_text(line, message, key, where=where) for key in ("role", "content"))
        if role not in _TURNS:
            malformed(
                line.path, line.number, expected=f'"role"{where} in {list(_TURNS)}', found="another role"
            )
        if any(marker in content for marker in _TURNS.values()):
            return [Unusable("a message contains a turn marker")]  # it would forge a turn
        read += _TURNS[role]
        if role != "assistant":
            read += " " + content
        elif not content.strip():
            return [Unusable("empty assistant turn")]
        else:
            segments += [(read, False), (" " + content, True)]
            read = ""
    if not segments:
        return [Unusable("no assistant turn")]
    return [Demonstration(segments[0][0], tuple(segments[1:]), line.number)]


def parse_prompt(line: Line) -> list[Prompt | Unusable]:
    """{"prompt"}, with or without "facts": an object that a judge understands."""
    prompt, facts = _text(line, line.values, "prompt"), line.values.get("facts")
    if facts is not None and not isinstance(facts, dict):
        malformed(line.path, line.number, expected='"facts" to be an object or null', found=kind(facts))
    return [Prompt(prompt, facts, line.number) if prompt else Unusable("empty prompt")]


CHAT = Format(
    name="chat",
    columns=("messages",),
    optional=(),
    meaning=r"assistant turns train, written as HH transcripts (\n\nHuman: ... \n\nAssistant: ...)",
    parse=parse_messages,
)
COMPLETION = Format(
    name="prompt and completion",
    columns=("prompt", "completion"),
    optional=(),
    meaning="the completion trains",
    parse=parse_completion,
)
ALPACA = Format(
    name="Alpaca",
    columns=("instruction", "output"),
    optional=("input",),
    meaning="the output trains, after Alpaca's own template",
    parse=parse_alpaca,
)
SELF_INSTRUCT = Format(
    name="self-instruct",
    columns=("instruction", "instances"),
    optional=(),
    meaning="every instance is a row; its output trains, after Alpaca's own template",
    parse=parse_self_instruct,
)
PREFERENCE = Format(
    name="preferences",
    columns=("prompt", "chosen", "rejected"),
    optional=(),
    meaning="the prompt is explicit",
    parse=parse_preference,
)
TRANSCRIPTS = Format(
    name="HH transcripts",
    columns=("chosen", "rejected"),
    optional=(),
    meaning=r"the common prefix up to the last \n\nAssistant: is the prompt",
    parse=parse_transcripts,
)
PROMPT = Format(
    name="prompts",
    columns=("prompt",),
    optional=("facts",),
    meaning="the prompt alone is used",
    parse=parse_prompt,
)


def _demonstration(line: Line, prompt: str, response: str) -> Demonstration | Unusable:
    if not prompt:
        return Unusable("empty prompt")
    if not response.strip():
        return Unusable("empty response")
    return Demonstration(prompt, ((response, True),), line.number)


def _preference(line: Line, prompt: str, chosen: str, rejected: str) -> Preference | Unusable:
    if not prompt:
        return Unusable("empty prompt")
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            return Unusable(f"empty {side} response")
    if chosen == rejected:
        return Unusable("chosen and rejected are the same text")
    return Preference(prompt, chosen, rejected, line.number)


def _alpaca_prompt(instruction: str, given: str) -> str:
    if not instruction.strip():
        return ""
    return (_INPUT_TEMPLATE if given.strip() else _PLAIN_TEMPLATE).format(
        instruction=instruction, input=given
    )


def _text(line: Line, values: dict[str, Any], key: str, *, where: str = "") -> str:
    value = values.get(key)
    expected = f'"{key}"{where} to be a string'
    if not isinstance(value, str):
        malformed(
            line.path, line.number, expected=expected, found=kind(value) if key in values else "no such key"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        malformed(line.path, line.number, expected=expected, found="half a surrogate pair in it")
    return value


def _objects(line: Line, column: str) -> list[dict[str, Any]]:
    values, expected = line.values[column], f'"{column}" to be a list of objects'
    if not isinstance(values, list) or not values:
        found = "an empty list" if isinstance(values, list) else kind(values)
        malformed(line.path, line.number, expected=expected, found=found)
    for i, entry in enumerate(values):
        if not isinstance(entry, dict):
            malformed(line.path, line.number, expected=expected, found=f"{kind(entry)} at index {i}")
    return values
