"""A conversation -> where a chat template puts each message, so that a user's text stays text.

The template is rendered twice: with marks in place of the contents, and with the contents. The first says
which characters are the template's own; only among those are special tokens recognised. The second must be
the first with the contents put in, whole or without the whitespace around them as the template has it, or
the template rewrites what people said, and then nobody could say which characters are whose.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from minirlhf.data.conversation import Unfit
from minirlhf.data.records import Message
from minirlhf.data.templates.sandbox import Refused
from minirlhf.data.templates.source import Template
from minirlhf.runs import InputError

MARK = "\U0010fffd"
"""A private-use character that stands around the numbers of marks; a text that holds it is not used."""
_EDGE = "\x1e"  # a separator: whitespace for str.strip, and in no template
_SLOT = re.compile(f"({_EDGE}?){MARK}([0-9]+){MARK}({_EDGE}?)")


class Slot(NamedTuple):
    """A message in a layout: its text as the template leaves it, and the characters that stand for it."""

    message: int
    content: str
    start: int
    end: int


class Layout(NamedTuple):
    """A rendering with marks for contents; every index is of `marked`.

    Attributes:
        marked: the template's own text, with a mark for each message.
        slots: the messages in the order in which they stand there.
    """

    marked: str
    slots: list[Slot]

    def parts(self, start: int, end: int) -> list[tuple[str, bool]]:
        """The text between two places: pieces, each with whether it is the template's own."""
        pieces, at = [], start
        for slot in self.slots:
            if start <= slot.start and slot.end <= end:
                pieces += [(self.marked[at : slot.start], True), (slot.content, False)]
                at = slot.end
        return [*pieces, (self.marked[at:end], True)]

    def text(self) -> str:
        """The rendering with the contents put in."""
        return "".join(piece for piece, _ in self.parts(0, len(self.marked)))


def lay_out(template: Template, messages: Sequence[Message], *, add_generation_prompt: bool) -> Layout:
    """Where the template puts each message.

    Raises:
        Unfit: the template refuses the conversation, leaves a message out, says one twice, or rewrites one;
            or a message holds the mark.
        InputError: the template fails.
    """
    if any(MARK in message.content for message in messages):
        raise Unfit("a message holds U+10FFFD, by which this package marks places")
    marked = [
        message._replace(content=f"{_EDGE}{MARK}{i}{MARK}{_EDGE}") for i, message in enumerate(messages)
    ]
    try:
        with_marks = template.render(marked, add_generation_prompt)
        rendered = template.render(messages, add_generation_prompt)
    except Refused as refused:
        raise Unfit(f"the chat template refuses it: {refused}") from None
    layout = _find_slots(with_marks, messages)
    if layout.text() != rendered:
        raise Unfit("the chat template rewrites a message")
    return layout


def _find_slots(with_marks: str, messages: Sequence[Message]) -> Layout:
    slots, text, at = [], "", 0
    for found in _SLOT.finditer(with_marks):
        left, number, right = found.groups()
        said = messages[int(number)].content
        # The whitespace at an edge of the mark is gone where the template takes it away.
        said = said if left else said.lstrip()
        said = said if right else said.rstrip()
        text += with_marks[at : found.start()]
        slots.append(Slot(int(number), said, len(text), len(text) + len(f"{MARK}{number}{MARK}")))
        text += f"{MARK}{number}{MARK}"
        at = found.end()
    text += with_marks[at:]
    written = [slot.message for slot in slots]
    for i, message in enumerate(messages):
        if written.count(i) != 1:
            times = "leaves out" if i not in written else f"writes {written.count(i)} times"
            raise Unfit(f"the chat template {times} a message of the {message.role}")
    return Layout(text, slots)


class Turn(NamedTuple):
    """What is read before an answer, and the answer, as places in a layout.

    Attributes:
        start: where the last turn ended.
        answer: where this answer begins: the end of its generation prompt.
        end: where it ends, behind its terminator.
        closed: whether the template writes the terminator; else it is put there.
    """

    start: int
    answer: int
    end: int
    closed: bool


def turns(
    template: Template,
    messages: Sequence[Message],
    layout: Layout,
    *,
    controls: re.Pattern[str],
    terminator: str,
) -> dict[int, Turn]:
    """The assistant messages of a conversation, by their index.

    An answer begins where the generation prompt of the messages before it ends; one that is not to be found
    there is no turn, and must not be trained.

    Raises:
        InputError: the template fails.
    """
    found: dict[int, Turn] = {}
    start = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        try:
            asked = lay_out(template, messages[:i], add_generation_prompt=True)
        except Unfit:
            continue
        slot = next(slot for slot in layout.slots if slot.message == i)
        answer = len(asked.marked)
        if not layout.marked.startswith(asked.marked) or not start <= answer <= slot.start:
            continue
        after = min((s.start for s in layout.slots if s.start >= slot.end), default=len(layout.marked))
        control = controls.search(layout.marked, slot.end, after)
        closed = control is not None and control.group() == terminator
        found[i] = Turn(start, answer, control.end() if control and closed else slot.end, closed)
        start = found[i].end
    return found


def probe(template: Template, controls: re.Pattern[str]) -> tuple[set[str], str | None]:
    """What a template makes of a question and its answer.

    Returns:
        the special tokens that it writes, and the first of them behind the answer, None where there is none.

    Raises:
        InputError: the template cannot write that, rewrites it, or its generation prompt is not the beginning
            of what it writes for the answer.
    """
    chat = (Message("user", "What is it?"), Message("assistant", "A cat."))
    try:
        layout = lay_out(template, chat, add_generation_prompt=False)
        asked = lay_out(template, chat[:1], add_generation_prompt=True)
    except Unfit as unfit:
        raise InputError(
            f"{template.path}: expected a template that writes a question and its answer, found that {unfit}"
        ) from None
    require_prefix(template, asked, layout)
    if [slot.message for slot in layout.slots] != [0, 1] or len(asked.marked) > layout.slots[1].start:
        raise InputError(
            f"{template.path}: expected the answer behind its generation prompt, found it elsewhere"
        )
    control = controls.search(layout.marked, layout.slots[1].end)
    return set(controls.findall(layout.marked)), None if control is None else control.group()


def require_prefix(template: Template, asked: Layout, layout: Layout) -> None:
    """That what is trained begins with what is sampled from.

    Raises:
        InputError: it does not; both texts are shown.
    """
    if not layout.marked.startswith(asked.marked):
        ours, theirs = asked.text(), layout.text()
        pairs = enumerate(itertools.zip_longest(ours, theirs))
        at = next((i for i, (a, b) in pairs if a != b), 0)
        shown = [repr(text[max(0, at - 60) : at + 60]) for text in (ours, theirs)]
        raise InputError(
            f"{template.path}: expected the generation prompt to be the beginning of the conversation with "
            f"its answer, found {shown[0]} and {shown[1]} (from character {max(0, at - 60)}); an answer "
            "would be trained after another prompt than it is sampled from"
        )
