"""How prompts are taken up: equal ones together, long ones first, what all of them begin with once."""

from collections.abc import Sequence
from typing import NamedTuple

from minirlhf.rollout.pages import PAGE


class Part(NamedTuple):
    """Rows that have one prompt and are taken up together, so that it is read once for all of them."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]


def parts_of(prompts: Sequence[Sequence[int]], slots: int) -> list[Part]:
    """All rows, as parts of at most `slots` rows, in the order in which to take them up.

    Long prompts first: those taken up together are of similar length, and what needs most time starts early.

    >>> [part.rows for part in parts_of([[1], [5, 6], [1], [1]], slots=2)]
    [(1,), (0, 2), (3,)]
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(number)
    ordered = sorted(rows, key=len, reverse=True)  # stable
    return [Part(prompt, tuple(some)) for prompt in ordered for some in _chunks(rows[prompt], slots)]


def common_beginning(parts: Sequence[Part]) -> tuple[int, ...]:
    """What all prompts begin with, in whole pages; empty for one prompt, whose rows share it anyway.

    A prompt keeps at least one token of its own: the state after it predicts the response.
    """
    prompts = {part.prompt for part in parts}
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)  # in the order of lists these two differ earliest
    most = min(len(prompt) for prompt in prompts) - 1
    same = next((at for at in range(most) if first[at] != last[at]), most)
    return first[: same // PAGE * PAGE]


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
