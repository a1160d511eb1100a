"""Two goals as rules on text, `(prompts, responses, facts) -> Tensor [B]` in [0, 1]; 1 means that it is met.

    brief    at most two sentences that contain everything that was asked for
    direct   to the point: no stock opening, no refusal, no talk about itself, no offer of help

Below 1 the score is graded, so that there is something to learn from. So one number is the reward, and also a
judge that passes or fails with a graded tie-break: a response that meets its goal beats each that does not,
and of two that fail the nearer one wins.

What is no answer at all scores 0, whatever else holds (`sound`): too short, a list of keywords, the prompt
said again, one phrase over and over, words that are none. These are tests of form. A fluent untruth passes:
no rule here knows whether an egg is boiled for seven minutes or for seventy.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_SENTENCES, MOST_WORDS = 2, 50
"""Of a brief answer: two sentences without end are not brief."""
LEAST_WORDS = 6
"""Of any answer."""

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_ENDS = re.compile(r"[.!?…]+[\"'”’)\]*]*(?=\s|$)|\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)])\s)")
_FINISHED = re.compile(r"[.!?…][\"'”’)\]*]*\s*$")
_ABBREVIATIONS = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|a\.m|p\.m|no)\.", re.IGNORECASE)
_NUMBERING = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+")

FUNCTION_WORDS = frozenset(
    "a about after all also an and another are as at be because been before both but by can could do does "
    "each for from get had has have he her his how i if in into is it its just like made make many may more "
    "most my no not of off on one or other our out over she should so some such than that the their them "
    "then there these they this those to too up use very was we were what when where which while who why "
    "will with would you your".split()
)
"""English prose is a third to a half these; lists of keywords and made-up words have hardly any."""

STOCK_OPENINGS = (
    # greetings, assent, praise of the question
    r"^\W*(?:sure|certainly|of course|absolutely|definitely|ok|okay|alright|yes|great|awesome|hello|hi|hey|"
    r"thanks|thank you|welcome|well|ah+|oh+|aw+|hmm+|wow)\b(?! (?:as|known|made|cooked|done|rested))",
    r"\bquestion\b",
    r"^\W*(?:what an?|that['’]?s an?|that is an?|this is an?)\b",
    # announcing an answer
    r"\bhere(?:['’]s| is| are)\b|\bfollow (?:these|the)\b|\bsteps?\b|\bguide\b|\bthe following\b|"
    r"\bthe answer\b|\bin (?:this|general)\b|\bwhen it comes to\b",
    r"^\W*there(?:['’]s| is| are)\b",
    # speaking of oneself
    r"^\W*(?:i|my|we|our|let me|let['’]?s|imagine)\b|\bi['’]?(?:m|ve|d|ll)\b|\bi (?:am|have|can|will|hope)\b",
    # saying only that the matter is a matter
    r"(?:\b(?:is|are|can be|could be|has been|involves?|requires?|needs?)|\bit['’]s)\s+(?:\w+\s+){0,3}?"
    r"(?:art|skill|process|task|challenge|challenging|daunting|tricky|difficult|delicate|rewarding|crucial|essential|"
    r"important|vital|common|classic|simple|straightforward|easy|great|wonderful|fun|frustrating|fascinating|"
    r"complex|overwhelming|powerful|bit|patience|care|creativity|breeze|several|many|various|number|combination)\b",
    r"\b(?:age-old|infamous|classic|eternal|timeless|ultimate|conundrum|dilemma|plethora|multitude|myth|mystery|"
    r"puzzle|realm|universe|quest|delve)\b",
)
"""Searched for in the first sentence, whatever its case."""

REFUSALS = (
    r"\bas an? (?:\w+ )*(?:ai|assistant|language model|chatbot)\b|\blanguage model\b|\bsmollm\b|"
    r"\bhugging face\b",
    r"\bi(?:['’]m| am) (?:sorry|unable|not able|afraid|not sure|"
    r"(?:just )?an? (?:\w+ )?(?:ai|assistant|chatbot))\b",
    r"\bi (?:can(?:no|['’])t|could ?n['’]t|do ?n['’]t|do not) (?:help|assist|answer|provide|have|know)\b|"
    r"\bi apologi[sz]e\b",
)
"""Searched for in the whole response: refusals and talk about itself."""

OFFERS = (
    r"\blet me know\b|\bfeel free\b|\b(?:i|we) hope (?:this|that|these|it)\b|\b(?:happy|glad|here) to help\b",
    r"\b(?:any|other|further|more) questions\b|\bdo(?:n['’]t| not) hesitate\b|\bgood luck\b|"
    r"\b(?:how )?(?:can|may) i (?:help|assist)\b|\bwould you like (?:me|to)\b|\bis there anything\b",
)
"""Searched for in the whole response."""


def brief(
    prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> Tensor:
    """At most two sentences that contain all asked-for items: named · (1 + brevity) / 2.

    Completeness comes first: what names nothing scores 0 however brief, and half of what is named is lost
    where the answer has no end (`brevity`).

    Args:
        facts: {"items": [[word, ...], ...]}: of each item the words that name it; a plural s is added here.

    Returns:
        [B] in [0, 1]; 1 exactly where every item is named in at most two finished sentences of 50 words.

    >>> asked = {"items": [["tea"], ["coffee"]]}
    >>> brief(["Tea or coffee?"], ["Tea is mild and has less caffeine than coffee."], [asked])
    tensor([1.])
    >>> brief(["Tea or coffee?"], ["Tea is mild. It is green. It is also hot in the cup."], [asked])
    tensor([0.3750])
    """
    scores = []
    for prompt, response, known in zip(prompts, responses, facts, strict=True):
        items = _fact(known, "items")
        named = sum(names(response, forms) for forms in items) / len(items)
        scores.append(named * (1 + brevity(response)) / 2 if sound(prompt, response) else 0.0)
    return torch.tensor(scores)


def direct(
    prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> Tensor:
    """To the point: the share of four things that an answer does right, the first counted twice.

        its first sentence is none of the stock openings     it neither refuses nor talks about itself
        and does not say the question again (`restates`)     it does not offer help or ask back
                                                             it names the matter

    Args:
        facts: {"topic": [word, ...]}, one of which an answer to this prompt names.

    Returns:
        [B] in [0, 1]; 1 exactly where all of it holds.

    >>> direct(["How do I boil an egg?"], ["Put it in hot water for eight minutes."], [{"topic": ["water"]}])
    tensor([1.])
    >>> direct(["How do I boil an egg?"], ["Sure! Put it in hot water for a while."], [{"topic": ["water"]}])
    tensor([0.6000])
    """
    scores = []
    for prompt, response, known in zip(prompts, responses, facts, strict=True):
        opening = first_sentence(response)
        right = (
            2 * (not _any(STOCK_OPENINGS, opening) and not restates(prompt, response)),
            not _any(REFUSALS, response),
            not _any(OFFERS, response) and not response.rstrip().endswith("?"),
            names(response, _fact(known, "topic")),
        )
        scores.append(sum(right) / 5 if sound(prompt, response) else 0.0)
    return torch.tensor(scores)


def brevity(response: str) -> float:
    """1 for at most two finished sentences of at most 50 words in all, falling with each further one.

    1 / (1 + sentences beyond two) · min(1, 50 / words), and half of it where the response breaks off.

    >>> brevity("Yes. It is."), brevity("One. Two. Three."), brevity("It is not fin")
    (1.0, 0.5, 0.5)
    """
    extra = max(0, sentences(response) - MOST_SENTENCES)
    length = min(1.0, MOST_WORDS / max(1, len(words(response))))
    return length / (1 + extra) * (1.0 if _FINISHED.search(response) else 0.5)


def sentences(text: str) -> int:
    """Sentences, list items and paragraphs: each is a thing to read.

    >>> sentences("Mr. Lee paid 3.50. He left!"), sentences("- tea\\n- coffee"), sentences("")
    (2, 2, 0)
    """
    return len(_cut(text))


def first_sentence(text: str) -> str:
    """What is read first; of a text without an end, all of it.

    >>> first_sentence("Sure! Boil it.")
    'Sure'
    """
    found = _cut(text)
    return found[0].strip() if found else ""


def restates(prompt: str, response: str) -> bool:
    """Whether an answer begins by saying the question again: "To boil an egg, ...", "Boiling an egg ...".

    It does where it opens with "to" or a word in -ing, and its first ten words hold half of the question's
    own words or more, compared by their first four letters.

    >>> asked = "How do I boil an egg?"
    >>> restates(asked, "Boiling an egg is fun."), restates(asked, "Boil the egg.")
    (True, False)
    """
    opening = words(response)[:10]
    asked = {word[:4] for word in words(_question(prompt)) if word not in FUNCTION_WORDS}
    if not opening or not (opening[0] == "to" or opening[0].endswith("ing")):
        return False
    return 2 * len(asked & {word[:4] for word in opening}) >= len(asked)


def words(text: str) -> list[str]:
    """The words of a text, lower case, with straight apostrophes."""
    return [found.replace("’", "'").lower() for found in _WORD.findall(text)]


def names(text: str, forms: Sequence[str]) -> bool:
    """Whether a text contains one of these words, or its plural or genitive with s, as a whole word.

    >>> names("Two Dogs bark.", ["dog"]), names("Dogma", ["dog"])
    (True, False)
    """
    said = {part for word in words(text) for part in (word, *word.split("-"))}
    return any(form + ending in said for form in forms for ending in ("", "s", "es", "'s"))


def sound(prompt: str, response: str) -> bool:
    """Whether a response has the form of an answer in English prose; see the top of the page.

    Six words or more, a fifth of them function words; half of them different, no three words said three
    times; a fifth of them, and two at least, not in the question, whose first three words are not said again;
    hardly a word that no English speaker could say.
    """
    said, asked = words(response), words(_question(prompt))
    if len(said) < LEAST_WORDS or sum(word in FUNCTION_WORDS for word in said) < len(said) / 5:
        return False
    triples = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
    if len(set(said)) < len(said) / 2 or max(map(triples.count, triples)) > 2:
        return False
    if sum(word not in asked for word in said) < max(2, len(said) / 5) or tuple(asked[:3]) in triples:
        return False
    return sum(not _speakable(word) for word in said) <= len(said) / 10


def _cut(text: str) -> list[str]:
    plain = _NUMBERING.sub("\n\n", _ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), text))
    return [part for part in _ENDS.split(plain) if _WORD.search(part)]


def _any(patterns: Sequence[str], text: str) -> bool:
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def _question(prompt: str) -> str:
    """The last thing that was asked, of a transcript; of anything else the whole of it."""
    return prompt.rsplit("\n\nHuman:", 1)[-1].split("\n\nAssistant:", 1)[0]


def _speakable(word: str) -> bool:
    """A number, or at most 24 Latin letters with a vowel, no six consonants in a row and no letter thrice."""
    letters = re.sub(r"\W", "", word)
    if letters.isdigit() or len(letters) == 1 or letters in ("mr", "mrs", "ms", "dr", "tv"):
        return True
    unsaid = re.search(r"[bcdfghjklmnpqrstvwxz]{6}|(.)\1\1|[^\x00-\u024f]", letters)
    return bool(re.search(r"[aeiouy0-9\u00c0-\u024f]", letters)) and not unsaid and len(letters) <= 24


def _fact(known: Mapping[str, Any] | None, name: str) -> Any:
    if known is None or not known.get(name):
        raise ValueError(f"expected prompts with the fact {name!r}, got {known}")
    return known[name]
