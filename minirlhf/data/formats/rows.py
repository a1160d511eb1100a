"""The formats of instruction and preference data: one function each, one JSON object -> text records.

Here are those whose rows hold plain text, or either text or messages; chats are in `chats`, trees in
`trees`, and `detect` says which of them a file is in. To add a format, write its `parse` and
name it there. A parse function refuses a wrong shape (`malformed`: the file is not what it seems) and returns
`Unusable`, or raises `Unfit`, where the shape is right but the record teaches nothing (an empty response).
Text is kept exactly: the response of an HH transcript begins with the space that follows `Assistant:`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from minirlhf.data.conversation import (
    ASSISTANT,
    HUMAN,
    Unfit,
    check_prompt,
    content_of,
    demonstration,
    messages_of,
    objects,
    preference,
    prompt_text,
    read_messages,
    text,
)
from minirlhf.data.jsonl import Line, kind, malformed
from minirlhf.data.records import Demonstration, Message, Preference, Prompt

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


PROMPT_MESSAGES = "prompt_messages"
"""Column of our own files: the messages of which "prompt" is the transcript, so that both survive exactly."""


class Unusable(NamedTuple):
    """A record of the right shape that cannot be used, and why."""

    why: str


class Format(NamedTuple):
    """A known shape of row.

    Attributes:
        key: its name as a choice, `--format KEY`.
        name: what messages call it.
        columns: a row of this format has all of them.
        optional: columns that it reads where they are given.
        meaning: how it is read, for the printed decision.
        parse: one object -> its records, several where one row holds several.
        fits: whether the values of a row with these columns are of the kind that it reads.
        guessed: whether it may be detected; one that may not must be chosen by its key.
        gather: for a format of which a record is spread over rows: all rows -> rows that `parse` reads.
    """

    key: str
    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    meaning: str
    parse: Callable[[Line], Sequence[Demonstration | Preference | Prompt | Unusable]]
    fits: Callable[[dict[str, Any]], bool] = lambda values: True
    guessed: bool = True
    gather: Callable[[Iterator[Line]], Iterator[Line]] | None = None


def parse_completion(line: Line) -> list[Demonstration | Unusable]:
    """{"prompt", "completion"}, both texts or both lists of messages; of messages, the completion's train."""
    if isinstance(line.values["prompt"], list):
        prompt, answer = (read_messages(line, line.values[key], key) for key in ("prompt", "completion"))
        check_prompt(prompt)
        answers = sum(message.role == "assistant" for message in answer)
        if answers == 0:
            raise Unfit("no assistant turn")
        return [demonstration(prompt + answer, line.number, answers=answers)]
    prompt, completion = (text(line, line.values, name) for name in ("prompt", "completion"))
    row = _demonstration(line, prompt, completion)
    messages = _prompt_messages(line, prompt)
    if messages is None or isinstance(row, Unusable):
        return [row]
    answer = Message("assistant", content_of(completion))
    return [Demonstration(row.prompt, row.segments, row.line, (*messages, answer))]


def parse_unpaired(line: Line) -> list[Demonstration | Unusable]:
    """{"prompt", "completion", "label"}: completions that somebody approved of train, the others do not."""
    label = line.values["label"]
    if label is None:
        raise Unfit('null "label"')
    if not isinstance(label, bool):
        malformed(line.place, expected='"label" to be true or false', found=kind(label))
    return parse_completion(line) if label else [Unusable("labelled false")]


def parse_preference(line: Line) -> list[Preference | Unusable]:
    """{"prompt", "chosen", "rejected"}, where chosen and rejected are the responses alone.

    All three are texts, or all three lists of messages; a prompt that both sides repeat is read once.
    """
    names = ("prompt", "chosen", "rejected")
    if isinstance(line.values["prompt"], list):
        prompt, chosen, rejected = (read_messages(line, line.values[name], name) for name in names)
        if all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return [preference(prompt, chosen, rejected, line.number)]
    prompt, chosen, rejected = (text(line, line.values, name) for name in names)
    return [_preference(line, prompt, chosen, rejected, messages=_prompt_messages(line, prompt))]


def parse_transcripts(line: Line) -> list[Preference | Unusable]:
    """{"chosen", "rejected"} as of HH: what both share up to and with the last `Assistant:` is the prompt."""
    parts = []
    for column in ("chosen", "rejected"):
        head, marker, response = text(line, line.values, column).rpartition(ASSISTANT)
        if not marker:
            expected = f'"{column}" to be a transcript with an {ASSISTANT.strip()!r} turn'
            malformed(line.place, expected=expected, found="no such turn")
        parts.append((head + marker, response))
    (prompt, chosen), (other_prompt, rejected) = parts
    if prompt != other_prompt:
        return [Unusable("the transcripts differ before the last assistant turn")]
    if HUMAN in chosen or HUMAN in rejected:
        return [Unusable("a human turn follows the last assistant turn")]
    return [_preference(line, prompt, chosen, rejected, messages=messages_of(prompt))]


def parse_common_prefix(line: Line) -> list[Preference | Unusable]:
    """{"chosen", "rejected"}, plain texts that begin alike: that beginning, less a last space, is the prompt.

    This is TRL's `extract_prompt`. Responses that begin alike lose their common beginning to the prompt, so
    it is never guessed.
    """
    chosen, rejected = (text(line, line.values, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        return [Unusable("chosen and rejected are the same text")]
    pairs = zip(chosen, rejected, strict=False)
    end = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    end -= chosen[:end].endswith(" ")
    return [_preference(line, chosen[:end], chosen[end:], rejected[end:], messages=None)]


def parse_alpaca(line: Line) -> list[Demonstration | Unusable]:
    """{"instruction", "output"}, with or without "input"."""
    given = "" if line.values.get("input") is None else text(line, line.values, "input")
    prompt = _alpaca_prompt(text(line, line.values, "instruction"), given)
    return [_demonstration(line, prompt, text(line, line.values, "output"))]


def parse_self_instruct(line: Line) -> list[Demonstration | Unusable]:
    """{"instruction", "instances": [{"input", "output"}]}: one record per instance."""
    instruction = text(line, line.values, "instruction")
    records: list[Demonstration | Unusable] = []
    for i, instance in enumerate(objects(line, line.values["instances"], "instances")):
        where = f" of instance {i}"
        try:
            prompt = _alpaca_prompt(instruction, text(line, instance, "input", where=where))
            records.append(_demonstration(line, prompt, text(line, instance, "output", where=where)))
        except Unfit as unfit:
            records.append(Unusable(str(unfit)))
    return records


def parse_prompt(line: Line) -> list[Prompt | Unusable]:
    """{"prompt"}, text or messages, with or without "facts": an object that a judge understands."""
    facts = line.values.get("facts")
    if facts is not None and not isinstance(facts, dict):
        malformed(line.place, expected='"facts" to be an object or null', found=kind(facts))
    if isinstance(line.values["prompt"], list):
        messages = read_messages(line, line.values["prompt"], "prompt")
        check_prompt(messages)
        return [Prompt(prompt_text(messages), facts, line.number, messages)]
    prompt = text(line, line.values, "prompt")
    if not prompt:
        return [Unusable("empty prompt")]
    return [Prompt(prompt, facts, line.number, _prompt_messages(line, prompt))]


COMPLETION = Format(
    key="completion",
    name="prompt and completion",
    columns=("prompt", "completion"),
    optional=(PROMPT_MESSAGES,),
    meaning="the completion trains",
    parse=parse_completion,
)
ALPACA = Format(
    key="alpaca",
    name="Alpaca",
    columns=("instruction", "output"),
    optional=("input",),
    meaning="the output trains, after Alpaca's own template",
    parse=parse_alpaca,
)
SELF_INSTRUCT = Format(
    key="self-instruct",
    name="self-instruct",
    columns=("instruction", "instances"),
    optional=(),
    meaning="every instance is a row; its output trains, after Alpaca's own template",
    parse=parse_self_instruct,
)
PREFERENCE = Format(
    key="preferences",
    name="preferences",
    columns=("prompt", "chosen", "rejected"),
    optional=(PROMPT_MESSAGES,),
    meaning="the prompt is explicit",
    parse=parse_preference,
    fits=lambda values: isinstance(values["prompt"], list) or not isinstance(values["chosen"], list),
)
TRANSCRIPTS = Format(
    key="transcripts",
    name="HH transcripts",
    columns=("chosen", "rejected"),
    optional=(),
    meaning=r"the common prefix up to the last \n\nAssistant: is the prompt",
    parse=parse_transcripts,
    fits=lambda values: not isinstance(values["chosen"], list),
)
COMMON_PREFIX = Format(
    key="common-prefix",
    name="preferences with a common beginning",
    columns=("chosen", "rejected"),
    optional=(),
    meaning="what both texts begin with is the prompt, a space at its end belongs to the responses",
    parse=parse_common_prefix,
    guessed=False,
)
UNPAIRED = Format(
    key="unpaired",
    name="unpaired",
    columns=("prompt", "completion", "label"),
    optional=(),
    meaning="completions labelled true train, those labelled false are dropped",
    parse=parse_unpaired,
)
PROMPT = Format(
    key="prompts",
    name="prompts",
    columns=("prompt",),
    optional=("facts", PROMPT_MESSAGES),
    meaning="the prompt alone is used",
    parse=parse_prompt,
    fits=lambda values: not isinstance(values["prompt"], dict),
)
PROMPT_OF_PAIR = PREFERENCE._replace(
    optional=PROMPT.optional, meaning="the prompt alone is used", parse=parse_prompt
)


def _demonstration(line: Line, prompt: str, response: str) -> Demonstration | Unusable:
    if not prompt:
        return Unusable("empty prompt")
    if not response.strip():
        return Unusable("empty response")
    return Demonstration(prompt, ((response, True),), line.number)


def _preference(
    line: Line, prompt: str, chosen: str, rejected: str, *, messages: tuple[Message, ...] | None
) -> Preference | Unusable:
    if not prompt:
        return Unusable("empty prompt")
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            return Unusable(f"empty {side} response")
    if chosen == rejected:
        return Unusable("chosen and rejected are the same text")
    return Preference(prompt, chosen, rejected, line.number, messages)


def _alpaca_prompt(instruction: str, given: str) -> str:
    if not instruction.strip():
        return ""
    return (_INPUT_TEMPLATE if given.strip() else _PLAIN_TEMPLATE).format(
        instruction=instruction, input=given
    )


def _prompt_messages(line: Line, prompt: str) -> tuple[Message, ...] | None:
    """The messages of a prompt whose row says that it is a transcript of them, as our own files do."""
    if line.values.get(PROMPT_MESSAGES) is None:
        return None
    stated = line.values[PROMPT_MESSAGES]
    messages = messages_of(prompt)
    if messages is None or [message._asdict() for message in messages] != stated:
        expected = f'"{PROMPT_MESSAGES}" to be the messages of the transcript in "prompt"'
        malformed(line.place, expected=expected, found="others")
    return messages
