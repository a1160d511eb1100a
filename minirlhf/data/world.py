"""The embedded world: a small customer desk with ground truth, for runs that need no download.

A customer writes a short request with three details (a name, an item, an order number) and an intent; an
agent answers. A good answer does what was asked, copies the details exactly, is courteous and ends. Answers
are drawn with defects: a wrong or missing detail, another intent, rudeness, filler, repetition, a sentence
that breaks off. `data.gold` reads the quality off the text; no training stage sees it.

A pretrained model brings two skills to alignment that this world's base must be given: to copy a detail and
to *check* one, which is another skill. Without the second a reward model judges manners only. `write_drill`
and `proofread` are the plain text in which both can be learned; README, "The embedded world", has the story.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NAMES = tuple(
    "Alice Bruno Carla David Elena Frank Greta Hugo Irene James Karen Lucas Maria Nadia Oscar Paula "
    "Quinn Rosa Simon Tessa Ulrich Vera Walter Yusuf".split()
)
ITEMS = tuple(
    "lamp clock chair table phone radio kettle mirror carpet bicycle camera printer helmet jacket "
    "guitar blanket pillow toaster laptop keyboard backpack umbrella heater scooter".split()
)
ORDERS = tuple(str(number) for number in range(30, 70))

DETAILS = ("name", "item", "order")
POOLS: Mapping[str, Sequence[str]] = {"name": NAMES, "item": ITEMS, "order": ORDERS}
KIND_OF = {word: detail for detail, pool in POOLS.items() for word in pool}
"""Which detail a word is: {"Irene": "name", "lamp": "item", "34": "order", ...}."""


class Intent(NamedTuple):
    """What a customer may want: how it is asked for, how it is answered, and the word that gives it away."""

    asks: tuple[str, ...]
    answer: str
    answer_without_order: str
    keyword: str


INTENTS: Mapping[str, Intent] = {
    "refund": Intent(
        ("Please refund it.", "I want my money back."),
        "We have refunded the {item} from order {order}.",
        "We have refunded the {item}.",
        "refunded",
    ),
    "repair": Intent(
        ("Please repair it.", "I need you to fix it."),
        "We will repair the {item} from order {order}.",
        "We will repair the {item}.",
        "repair",
    ),
    "cancel": Intent(
        ("Please cancel it.", "I no longer want it."),
        "We have cancelled the {item} from order {order}.",
        "We have cancelled the {item}.",
        "cancelled",
    ),
    "track": Intent(
        ("Where is it?", "I am still waiting for it."),
        "We have just shipped the {item} from order {order}.",
        "We have just shipped the {item}.",
        "shipped",
    ),
}

OPENINGS: Mapping[str, tuple[str, ...]] = {
    "kind": ("Dear {name}, thank you for writing.", "Thank you for your patience, {name}."),
    "plain": ("Hello {name}.",),
    "rude": ("What is it now, {name}?", "You again, {name}."),
}
NAMELESS: Mapping[str, tuple[str, ...]] = {
    "kind": ("Thank you for writing.",),
    "plain": ("Hello.",),
    "rude": ("What is it now?",),
}
FILLERS = (
    "Our shop is open every day.",
    "We have many other things on sale.",
    "Our team works very hard.",
    "You can also find us on the web.",
)
CLOSINGS = ("Have a nice day.", "Kind regards, your team.")


class Plan(NamedTuple):
    """An answer before it is written: what it says of each detail and how it behaves.

    details: what is written for each of `DETAILS`; None leaves it out. An answer always names an item.
    """

    details: Mapping[str, str | None]
    intent: str
    tone: str  # "kind", "plain", "rude"
    fillers: tuple[str, ...]
    repeat: bool
    closing: str | None
    cut: float | None  # the share of the last sentence that is still written; None: all of it


@dataclass(frozen=True)
class Defects:
    """How often an answer has each defect: probabilities, drawn independently."""

    wrong: float = 0.22
    """Each detail on its own."""
    missing: float = 0.08
    """Each detail but the item."""
    intent: float = 0.15
    """Another request is answered."""
    rude: float = 0.2
    """A rude opening."""
    plain: float = 0.35
    """A plain opening; otherwise it is kind."""
    filler: float = 0.3
    """Each of two sentences beside the point."""
    repeat: float = 0.1
    """A sentence said twice."""
    no_closing: float = 0.5
    """No closing line."""
    cut: float = 0.12
    """The last sentence breaks off."""


FLAWLESS = Defects(0, 0, 0, 0, 0, 0, 0, 1, 0)
"""Right in everything, kind and short."""


def draw_facts(rng: random.Random) -> dict[str, str]:
    """The truth of one request: name, item, order number, intent."""
    facts = {detail: rng.choice(POOLS[detail]) for detail in DETAILS}
    return {**facts, "intent": rng.choice(list(INTENTS))}


def write_prompt(facts: Mapping[str, str], rng: random.Random) -> str:
    """The customer's request: who, what, which order; what is wanted; the end of the turn."""
    ask = rng.choice(INTENTS[facts["intent"]].asks)
    return f"From {facts['name']}: {facts['item']}, order {facts['order']}. {ask}\n"


def draw_plan(facts: Mapping[str, str], rng: random.Random, defects: Defects) -> Plan:
    """A plan for one answer, each defect drawn on its own."""
    wrong_intent = rng.random() < defects.intent
    tones = (defects.rude, defects.plain, 1 - defects.rude - defects.plain)
    return Plan(
        details={detail: _draw_detail(detail, facts, rng, defects) for detail in DETAILS},
        intent=_other(list(INTENTS), facts["intent"], rng) if wrong_intent else facts["intent"],
        tone=rng.choices(("rude", "plain", "kind"), tones)[0],
        fillers=tuple(rng.sample(FILLERS, sum(rng.random() < defects.filler for _ in range(2)))),
        repeat=rng.random() < defects.repeat,
        closing=None if rng.random() < defects.no_closing else rng.choice(CLOSINGS),
        cut=rng.random() if rng.random() < defects.cut else None,
    )


def _draw_detail(detail: str, facts: Mapping[str, str], rng: random.Random, defects: Defects) -> str | None:
    roll = rng.random()
    if roll < defects.wrong:
        return _other(POOLS[detail], facts[detail], rng)
    if roll < defects.wrong + defects.missing and detail != "item":
        return None
    return facts[detail]


def _other(pool: Sequence[str], truth: str, rng: random.Random) -> str:
    return rng.choice([entry for entry in pool if entry != truth])


def change_one(plan: Plan, facts: Mapping[str, str], rng: random.Random, defects: Defects) -> Plan:
    """The same plan but for one property, redrawn until it differs: a minimal pair.

    Half of the changes are of a detail, since three of the properties that a customer cares about are.
    """
    while True:
        other = draw_plan(facts, rng, defects)
        if rng.random() < 0.5:
            detail = rng.choice(DETAILS)
            changed = plan._replace(details={**plan.details, detail: other.details[detail]})
        else:
            field = rng.choice(("intent", "tone", "fillers", "repeat", "closing", "cut"))
            changed = plan._replace(**{field: getattr(other, field)})
        if changed != plan:
            return changed


def write_response(plan: Plan, rng: random.Random) -> str:
    """The answer's text, which begins with a space: opening, core, fillers, closing."""
    named = plan.details["name"] is not None
    intent = INTENTS[plan.intent]
    core = intent.answer if plan.details["order"] is not None else intent.answer_without_order
    sentences = [rng.choice((OPENINGS if named else NAMELESS)[plan.tone]), core, *plan.fillers]
    if plan.repeat:
        sentences.append(sentences[-1])
    if plan.closing:
        sentences.append(plan.closing)
    sentences = [sentence.format(**plan.details) for sentence in sentences]
    if plan.cut is not None:
        words = sentences[-1].split()
        sentences[-1] = " ".join(words[: 1 + int(plan.cut * (len(words) - 1))])
    return " " + " ".join(sentences)


def proofread(response: str, facts: Mapping[str, str]) -> str:
    """The response with a proofreader's mark after each detail: "ok" or "wrong"."""

    def mark(word: re.Match[str]) -> str:
        detail = KIND_OF.get(word[0])
        if detail is None:
            return word[0]
        return f"{word[0]} {'ok' if facts[detail] == word[0] else 'wrong'}"

    return re.sub(r"[A-Za-z]+|[0-9]+", mark, response)


Spans = list[tuple[str, bool]]
"""Text in pieces, each trained or only read."""


def write_drill(facts: Mapping[str, str], rng: random.Random, *, recitals: int, checks: int) -> Spans:
    """A clerk's exercise about one request: recite its details, then mark others as ok or wrong.

    Only what can be known is trained (the recited detail, the mark), never what is drawn at random; so every
    trained token teaches copying or checking, and nothing drowns it.
    """
    spans: Spans = [(write_prompt(facts, rng), False)]
    for detail in rng.choices(DETAILS, k=recitals):
        spans += [(f" {detail}", False), (f" {facts[detail]}", True), (";", False)]
    for detail in rng.choices(DETAILS, k=checks):
        word = facts[detail] if rng.random() < 0.5 else rng.choice(POOLS[detail])
        spans += [(f" {word}", False), (" ok" if word == facts[detail] else " wrong", True)]
    return spans
