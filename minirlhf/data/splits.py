"""Train, validation and test, cut by prompt, so that no prompt is trained on and reported."""

import hashlib
import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

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
    positions = [position(row.prompt, seed=seed) for row in rows]
    second, third = boundaries(positions, fractions=fractions)
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row, at in zip(rows, positions, strict=True):
        parts[(at >= second) + (at >= third)].append(row)
    return Splits(*parts)


def position(prompt: str, *, seed: int) -> float:
    """A number in [0, 1) that looks uniform and depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def boundaries(
    positions: Sequence[float] | np.ndarray, *, fractions: tuple[float, float, float]
) -> tuple[float, float]:
    """Where the second and the third split begin: a prompt at or above has left the split before.

    Args:
        positions: of the prompts of all rows, repeated where a prompt is.
        fractions: as for `split_by_prompt`, which also says what is raised.

    >>> boundaries([0.1, 0.2, 0.8, 0.95], fractions=(0.5, 0.4, 0.1))
    (0.8, 0.95)
    """
    if len(fractions) != 3 or not all(f >= 0 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise ValueError(f"expected three fractions >= 0 that sum to 1, got {fractions}")
    prompts = np.unique(np.asarray(positions, dtype=np.float64))  # sorted
    least, n = [int(f > 0) for f in fractions], len(prompts)
    if n < sum(least):
        raise InputError(f"expected at least {sum(least)} different prompts to split, found {n}")
    # Each wanted split is given one prompt where the fractions alone would leave it empty.
    first = int((prompts < fractions[0]).sum())
    first = min(max(first, least[0]), n - least[1] - least[2])
    second = int((prompts < 1 - fractions[2]).sum())
    second = min(max(second, first + least[1]), n - least[2])
    second_begins, third_begins = (float(prompts[i]) if i < n else math.inf for i in (first, second))
    return second_begins, third_begins
