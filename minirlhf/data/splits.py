"""Train, validation and test, cut by prompt, so that no prompt is trained on and reported."""

import hashlib
import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from minirlhf.data.records import Demonstration, Preference, Prompt
from minirlhf.runs import InputError

Row = TypeVar("Row", Demonstration, Preference, Prompt)


class Splits(NamedTuple, Generic[Row]):
    """Rows in their original order; no prompt is in two of the three.

    Attributes:
        train: for gradients.
        validation: for early stopping and every other choice.
        test: for what is reported.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def split_by_prompt(rows: Sequence[Row], *, fractions: tuple[float, float, float], seed: int) -> Splits[Row]:
    """Sends every prompt to one of three splits by a hash of (seed, prompt).

    The hash decides, not the order or the company: the same prompt lands in the same split in every file
    (demonstrations, preferences, prompts) that is split with the same seed and fractions, and new rows move
    no old ones. The sizes therefore vary around the fractions like coin tosses. Only where a split would
    stay empty, as in a tiny file, it is given the prompt whose hash is nearest.

    Args:
        rows: text records.
        fractions: of the unique prompts, for train, validation, test; they sum to 1; 0 keeps a split empty.
        seed: another seed, another cut.

    Raises:
        ValueError: the fractions are negative or do not sum to 1.
        InputError: there are fewer unique prompts than splits to fill.
    """
    if len(fractions) != 3 or not all(f >= 0 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise ValueError(f"expected three fractions >= 0 that sum to 1, got {fractions}")
    prompts = sorted({row.prompt for row in rows}, key=lambda prompt: _position(prompt, seed))
    wanted = sum(f > 0 for f in fractions)
    if len(prompts) < wanted:
        raise InputError(f"expected at least {wanted} different prompts to split, found {len(prompts)}")
    first, second = _cuts([_position(prompt, seed) for prompt in prompts], fractions)
    split_of = {prompt: (i >= first) + (i >= second) for i, prompt in enumerate(prompts)}
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        parts[split_of[row.prompt]].append(row)
    return Splits(*parts)


def _position(prompt: str, seed: int) -> float:
    """A number in [0, 1) that looks uniform and depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _cuts(positions: list[float], fractions: tuple[float, float, float]) -> tuple[int, int]:
    """Where the second and the third split begin among the sorted positions; each wanted split gets one."""
    least = [int(f > 0) for f in fractions]
    n = len(positions)
    first = sum(p < fractions[0] for p in positions)
    second = sum(p < 1 - fractions[2] for p in positions)
    first = min(max(first, least[0]), n - least[1] - least[2])
    second = min(max(second, first + least[1]), n - least[2])
    return first, second
