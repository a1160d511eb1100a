"""The formats whose rows hold chats: TRL's conversational forms, ShareGPT, UltraFeedback (see `formats`)."""

from minirlhf.data.conversation import (
    Unfit,
    demonstration,
    objects,
    preference,
    read_messages,
    read_turn,
    read_turns,
    text,
)
from minirlhf.data.formats.rows import Format
from minirlhf.data.jsonl import Line
from minirlhf.data.records import Demonstration, Message, Preference


def parse_messages(line: Line) -> list[Demonstration]:
    """{"messages": [{"role", "content"}]}: assistant turns train, all before them is read."""
    return [demonstration(read_messages(line, line.values["messages"], "messages"), line.number)]


def parse_sharegpt(line: Line) -> list[Demonstration]:
    """{"conversations": [{"from", "value"}]}, with or without a "system" text beside it."""
    return [demonstration(_conversation(line), line.number)]


def parse_sharegpt_preference(line: Line) -> list[Preference]:
    """{"conversations": [...], "chosen": {"from", "value"}, "rejected": {"from", "value"}}."""
    chosen, rejected = ((_reply(line, name),) for name in ("chosen", "rejected"))
    return [preference(_conversation(line), chosen, rejected, line.number)]


def parse_implicit(line: Line) -> list[Preference]:
    """{"chosen": [messages], "rejected": [messages]}: the messages that both begin with are the prompt."""
    return [_of_chats(line)]


def parse_ultrafeedback(line: Line) -> list[Preference]:
    """{"prompt": text, "chosen": [messages], "rejected": [messages]}; the prompt is a user turn of theirs."""
    record, prompt = _of_chats(line), text(line, line.values, "prompt")
    asked = [message.content.strip() for message in record.messages or () if message.role == "user"]
    if prompt.strip() not in asked:
        raise Unfit("the prompt is none of the user turns that both sides begin with")
    return [record]


def _of_chats(line: Line) -> Preference:
    chosen, rejected = (read_messages(line, line.values[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Unfit("chosen and rejected are the same text")
    pairs = list(zip(chosen, rejected, strict=False))
    end = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    return preference(chosen[:end], chosen[end:], rejected[end:], line.number)


def _conversation(line: Line) -> tuple[Message, ...]:
    messages = read_turns(line, line.values["conversations"], "conversations")
    if line.values.get("system") is None or line.values["system"] == "":
        return messages
    return read_turn(line, {"from": "system", "value": text(line, line.values, "system")}, ""), *messages


def _reply(line: Line, name: str) -> Message:
    (turn,) = objects(line, [line.values[name]], name)
    return read_turn(line, turn, f' of "{name}"')


CHAT = Format(
    key="messages",
    name="chat",
    columns=("messages",),
    optional=(),
    meaning="assistant turns train, what follows the last one is left out",
    parse=parse_messages,
)
SHAREGPT = Format(
    key="sharegpt",
    name="ShareGPT",
    columns=("conversations",),
    optional=("system",),
    meaning="assistant turns train, what follows the last one is left out",
    parse=parse_sharegpt,
)
SHAREGPT_PREFERENCE = Format(
    key="sharegpt-preferences",
    name="ShareGPT preferences",
    columns=("conversations", "chosen", "rejected"),
    optional=("system",),
    meaning="the conversation is the prompt",
    parse=parse_sharegpt_preference,
)
IMPLICIT = Format(
    key="implicit",
    name="preferences with an implicit prompt",
    columns=("chosen", "rejected"),
    optional=(),
    meaning="the messages that both sides begin with are the prompt",
    parse=parse_implicit,
    fits=lambda values: isinstance(values["chosen"], list),
)
ULTRAFEEDBACK = Format(
    key="ultrafeedback",
    name="UltraFeedback",
    columns=("prompt", "chosen", "rejected"),
    optional=(),
    meaning="the messages that both sides begin with are the prompt, and the prompt text is one of them",
    parse=parse_ultrafeedback,
    fits=lambda values: isinstance(values["prompt"], str) and isinstance(values["chosen"], list),
)
