r"""Chats as data sets hold them <-> messages <-> the transcript in which people read them.

A transcript is Anthropic's, `\n\nHuman: ...\n\nAssistant: ...`, with our `\n\nSystem:`. A text that
contains a marker would forge a turn, so it has no transcript; therefore messages and transcripts say the
same, and each can be had from the other. What cannot be used raises `Unfit` with the reason; what is not a
chat at all is `malformed`.
"""

from collections.abc import Sequence
from typing import Any

from minirlhf.data.jsonl import Line, kind, malformed
from minirlhf.data.records import Demonstration, Message, Preference, Prompt

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
"""The turn markers of Anthropic's transcripts (`System:` is ours); we write chats with them too."""

_MARKERS = {"system": SYSTEM, "user": HUMAN, "assistant": ASSISTANT}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "environment")
_NAMES = {  # of ShareGPT's exports, which wrote what the page called the speaker
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}


class Unfit(Exception):
    """A record of the right shape that cannot be used; the text says why."""


def read_messages(line: Line, value: Any, name: str) -> tuple[Message, ...]:
    """The messages of [{"role", "content"}, ...]; content may be a list of {"type": "text"} parts.

    Raises:
        InputError: it is no such list, or a role is unknown.
        Unfit: a message of a tool, an image, null, or a turn that is forged.
    """
    entries = objects(line, value, name)
    return tuple(_message(line, entry, f" of message {i}", name) for i, entry in enumerate(entries))


def read_turns(line: Line, value: Any, name: str) -> tuple[Message, ...]:
    """The messages of ShareGPT's [{"from", "value"}, ...]; raises as `read_messages`."""
    return tuple(read_turn(line, turn, f" of turn {i}") for i, turn in enumerate(objects(line, value, name)))


def read_turn(line: Line, turn: dict[str, Any], where: str) -> Message:
    """One {"from", "value"}; raises as `read_messages`."""
    speaker = text(line, turn, "from", where=where)
    if speaker in _TOOL_ROLES:
        raise Unfit("a message of a tool")
    if speaker not in _NAMES:
        expected = f'"from"{where} in {list(_NAMES)}'
        malformed(line.place, expected=expected, found="another speaker")
    return _unforged(Message(_NAMES[speaker], text(line, turn, "value", where=where)))


def _message(line: Line, entry: dict[str, Any], where: str, name: str) -> Message:
    role = text(line, entry, "role", where=where)
    if role in _TOOL_ROLES or entry.get("tool_calls") or entry.get("function_call"):
        raise Unfit("a message of a tool")
    if role not in _MARKERS:
        expected = f'"role"{where} in {list(_MARKERS)}'
        malformed(line.place, expected=expected, found="another role")
    content = entry.get("content")
    if isinstance(content, list):
        content = "".join(_part(line, part, where) for part in objects(line, content, f"content{where}"))
        return _unforged(Message(role, content))
    return _unforged(Message(role, text(line, entry, "content", where=where)))


def _part(line: Line, part: dict[str, Any], where: str) -> str:
    if part.get("type") != "text":
        raise Unfit("a part of a message is not text")
    return text(line, part, "text", where=f" of a part{where}")


def _unforged(message: Message) -> Message:
    if any(marker in message.content for marker in _MARKERS.values()):
        raise Unfit("a message contains a turn marker")
    return message


def check_prompt(messages: Sequence[Message]) -> None:
    """That a prompt asks: a person begins, no turn of theirs is empty, the last word is not the model's.

    Raises:
        Unfit: it is not.
    """
    spoken = [message for message in messages if message.role != "system"]
    if not spoken:
        raise Unfit("no user turn")
    if spoken[0].role == "assistant":
        raise Unfit("the conversation begins with an assistant turn")
    if messages[-1].role == "assistant":
        raise Unfit("the prompt ends with an assistant turn")
    if any(message.role == "user" and not message.content.strip() for message in messages):
        raise Unfit("empty user turn")


def transcript(messages: Sequence[Message]) -> str:
    """The chat as people read it.

    >>> transcript([Message("user", "hi"), Message("assistant", "ho")])
    '\\n\\nHuman: hi\\n\\nAssistant: ho'
    """
    return "".join(f"{_MARKERS[role]} {content}" for role, content in messages)


def prompt_text(messages: Sequence[Message]) -> str:
    """The transcript up to the answer, which will begin with a space."""
    return transcript(messages) + ASSISTANT


def messages_of(prompt: str) -> tuple[Message, ...] | None:
    """The messages of a transcript that ends where the answer begins; None for a text that is none.

    >>> messages_of("\\n\\nHuman: hi\\n\\nAssistant:")
    (Message(role='user', content='hi'),)
    """
    if not prompt.endswith(ASSISTANT):
        return None
    roles = {marker: role for role, marker in _MARKERS.items()}
    messages, rest = [], prompt.removesuffix(ASSISTANT)
    while rest:
        marker = next((marker for marker in roles if rest.startswith(marker)), None)
        if marker is None:
            return None
        rest = rest.removeprefix(marker)
        end = min((at for at in map(rest.find, roles) if at >= 0), default=len(rest))
        messages.append(Message(roles[marker], rest[:end].removeprefix(" ")))
        rest = rest[end:]
    return tuple(messages) or None


def content_of(response: str) -> str:
    """What a message of this response says: the space after `Assistant:` belongs to the transcript."""
    return response.removeprefix(" ")


def demonstration(messages: Sequence[Message], line: int, *, answers: int | None = None) -> Demonstration:
    """A chat to imitate in its last `answers` assistant turns (None: all); later turns are left out.

    Raises:
        Unfit: there is no answer, an answer is empty, or the chat begins with one.
    """
    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not places:
        raise Unfit("no assistant turn")
    trained = places[len(places) - answers :] if answers else places
    if any(not messages[i].content.strip() for i in trained):
        raise Unfit("empty assistant turn")
    if next(message.role for message in messages if message.role != "system") == "assistant":
        raise Unfit("the conversation begins with an assistant turn")
    check_prompt(messages[: trained[0]])
    segments: list[tuple[str, bool]] = []
    for before, at in zip([trained[0], *trained], trained, strict=False):
        if at > before:
            segments.append((prompt_text(messages[before + 1 : at]), False))
        segments.append((" " + messages[at].content, True))
    if any(message.role == "user" and not message.content.strip() for message in messages[: trained[-1]]):
        raise Unfit("empty user turn")
    prompt = prompt_text(messages[: trained[0]])
    return Demonstration(prompt, tuple(segments), line, tuple(messages[: trained[-1] + 1]))


def preference(
    prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], line: int
) -> Preference:
    """Two answers, each one assistant message, to one chat.

    Raises:
        Unfit: a side is not one answer, is empty, or both are the same; or the prompt is no question.
    """
    check_prompt(prompt)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if [message.role for message in answer] != ["assistant"]:
            raise Unfit(f"the {side} side is not one assistant turn after the common ones")
        if not answer[0].content.strip():
            raise Unfit(f"empty {side} response")
    if chosen[0].content == rejected[0].content:
        raise Unfit("chosen and rejected are the same text")
    sides = (" " + chosen[0].content, " " + rejected[0].content)
    return Preference(prompt_text(prompt), *sides, line, tuple(prompt))


def demonstration_of(record: Demonstration | Preference) -> Demonstration:
    """The demonstration that a record is, or holds: of a preference, the chosen response."""
    if isinstance(record, Demonstration):
        return record
    messages = record.messages
    if messages is not None:
        messages = (*messages, Message("assistant", content_of(record.chosen)))
    return Demonstration(record.prompt, ((record.chosen, True),), record.line, messages)


def prompt_of(record: Demonstration | Preference | Prompt) -> Prompt:
    """The prompt that a record is, or answers."""
    if isinstance(record, Prompt):
        return record
    messages = asked(record) if isinstance(record, Demonstration) else record.messages
    return Prompt(record.prompt, None, record.line, messages)


def asked(record: Demonstration) -> tuple[Message, ...] | None:
    """The messages before the first answer that trains; None where it is no chat."""
    if record.messages is None:
        return None
    answers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
    trained = sum(trained for _, trained in record.segments)
    return record.messages[: answers[-trained]]


def text(line: Line, values: dict[str, Any], key: str, *, where: str = "") -> str:
    """A string of a JSON object.

    Raises:
        InputError: there is no such key, or it holds something else than text.
        Unfit: it is null.
    """
    value = values.get(key)
    expected = f'"{key}"{where} to be a string'
    if value is None and key in values:
        raise Unfit(f'null "{key}"')
    if not isinstance(value, str):
        found = kind(value) if key in values else "no such key"
        malformed(line.place, expected=expected, found=found)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        malformed(line.place, expected=expected, found="half a surrogate pair in it")
    return value


def objects(line: Line, value: Any, name: str) -> list[dict[str, Any]]:
    """A non-empty list of JSON objects.

    Raises:
        InputError: it is something else.
        Unfit: it is null.
    """
    if value is None:
        raise Unfit(f'null "{name}"')
    expected = f'"{name}" to be a list of objects'
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else kind(value)
        malformed(line.place, expected=expected, found=found)
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            malformed(line.place, expected=expected, found=f"{kind(entry)} at index {i}")
    return value
