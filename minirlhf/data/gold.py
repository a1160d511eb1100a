"""The gold judge of the embedded world: quality of a response, read off its text and the request's facts.

    gold = facts + intent + manners + ending

Only evaluation, and the law by which preference labels are drawn, look at it. It reads what stands there and
not how it came about, so it judges any text, also one that no plan of `data.world` would produce:
naming two names is a wrong name, and a sentence that the desk does not know counts against the ending.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.data.world import CLOSINGS, DETAILS, FILLERS, INTENTS, NAMELESS, OPENINGS, POOLS

COMPONENTS = ("facts", "intent", "manners", "ending")

DETAIL = 1.2
"""Each detail: + right, - wrong, 0 missing. Worth more than all manners together, as a customer would say."""
INTENT = 1.2
"""The request: + right, - another one, 0 none."""
KIND, RUDE, CLOSING = 0.5, -1.0, 0.5
BROKEN_OFF, REPEATED, FILLER, STRANGE = -1.5, -1.0, -0.4, -1.0
"""No full stop at the end; per sentence said again, beside the point, unknown to the desk."""


def _pattern(template: str) -> re.Pattern[str]:
    words = re.escape(template)
    for detail in DETAILS:
        words = words.replace(re.escape(f"{{{detail}}}"), f"(?:{'|'.join(POOLS[detail])})")
    return re.compile(words)


_TONES = {
    tone: [_pattern(text) for text in (*OPENINGS[tone], *NAMELESS[tone])]
    for tone in ("kind", "plain", "rude")
}
_CORES = [_pattern(text) for want in INTENTS.values() for text in (want.answer, want.answer_without_order)]
_KNOWN = [
    *(pattern for patterns in _TONES.values() for pattern in patterns),
    *_CORES,
    *map(_pattern, (*FILLERS, *CLOSINGS)),
]


def gold_score(
    prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> Tensor:
    """[B] quality of each response, higher is better; the sum of `gold_components`."""
    parts = gold_components(prompts, responses, facts)
    return torch.stack([parts[name] for name in COMPONENTS]).sum(0)


def gold_components(
    prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> dict[str, Tensor]:
    """{"facts", "intent", "manners", "ending"}: [B] each, points as in the constants above.

    Raises:
        ValueError: a prompt has no facts, or the arguments differ in length.
    """
    rows = []
    for prompt, response, truth in zip(prompts, responses, facts, strict=True):
        if truth is None:
            raise ValueError(f"the gold judge needs the facts of every prompt, got none for {prompt!r}")
        rows.append(judge(response, truth))
    return {name: torch.tensor([row[name] for row in rows]) for name in COMPONENTS}


def judge(response: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """The components of one response.

    >>> truth = {"name": "Irene", "item": "lamp", "order": "34", "intent": "refund"}
    >>> judge(" Dear Irene, thank you for writing. We have refunded the lamp from order 43.", truth)
    {'facts': 1.2, 'intent': 1.2, 'manners': 0.5, 'ending': 0.0}
    """
    words = set(re.findall(r"[A-Za-z]+|[0-9]+", response))
    said = {detail: words & set(POOLS[detail]) for detail in DETAILS}
    said["order"] = {word for word in words if word.isdigit()}
    wants = {name for name, intent in INTENTS.items() if intent.keyword in words}
    sentences = [s.strip() for s in re.findall(r"[^.?!]*[.?!]|[^.?!]+$", response) if s.strip()]
    return {
        "facts": round(DETAIL * sum(_verdict(said[detail], facts[detail]) for detail in DETAILS), 6),
        "intent": INTENT * _verdict(wants, facts["intent"]),
        "manners": _manners(sentences),
        "ending": _ending(sentences),
    }


def _verdict(said: set[str], truth: str) -> int:
    """1: the truth and nothing else; 0: nothing; -1: anything else."""
    return 0 if not said else 1 if said == {truth} else -1


def _manners(sentences: Sequence[str]) -> float:
    if not sentences:
        return 0.0
    kind = any(pattern.fullmatch(sentences[0]) for pattern in _TONES["kind"])
    rude = any(pattern.fullmatch(sentence) for pattern in _TONES["rude"] for sentence in sentences)
    return KIND * kind + RUDE * rude + CLOSING * (sentences[-1] in CLOSINGS)


def _ending(sentences: Sequence[str]) -> float:
    whole = bool(sentences) and sentences[-1][-1] in ".?!"
    complete = sentences if whole else sentences[:-1]
    strange = sum(not any(pattern.fullmatch(sentence) for pattern in _KNOWN) for sentence in complete)
    return (
        0.0  # so that no defect is 0 and not -0
        + BROKEN_OFF * (not whole)
        + REPEATED * (len(complete) - len(set(complete)))
        + FILLER * sum(sentence in FILLERS for sentence in set(complete))
        + STRANGE * strange
    )
