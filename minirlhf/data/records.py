"""The records that leave this room: rows of text as they were read, and batches of token ids.

    file --readers--> Demonstration, Preference, Prompt --batches--> Example --collate--> Sequences, Pairs

Text records know the line that they came from, so that every later complaint can name it. Those of chats
hold the chat twice: as a transcript, which is what people, rules and the split by prompt read, and as
messages, which a checkpoint's own chat template renders. Token records know their lengths, so that no later
code ever has to look for a padding id.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

RewardFn = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any] | None]], Tensor]
"""`reward(prompts, responses, facts) -> [B]`: a reward on text. It is a rule, a judge or a remote model."""


class Message(NamedTuple):
    """One turn of a chat: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A text to imitate: the prompt, then segments, each trained (an answer) or only read (a question).

    `messages` is the whole chat up to the last answer; of its k trained segments, the last k assistant turns.
    """

    prompt: str
    segments: tuple[tuple[str, bool], ...]
    line: int
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, of which somebody preferred the first; `messages` are the prompt's."""

    prompt: str
    chosen: str
    rejected: str
    line: int
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered, with the facts by which a judge scores the answer (None: not known)."""

    prompt: str
    facts: dict[str, Any] | None
    line: int
    messages: tuple[Message, ...] | None = None


class Example(NamedTuple):
    """One tokenised row, not yet padded. `mask[t]` says whether token t is trained or scored."""

    ids: list[int]
    mask: list[bool]
    prompt_length: int


class PairExample(NamedTuple):
    """One tokenised preference; both responses begin with the same prompt ids."""

    chosen: Example
    rejected: Example


class Sequences(NamedTuple):
    """A batch of rows `[prompt][response][padding]`; whatever stands in the padding is never read.

    Attributes:
        tokens: [B, T] int64 ids.
        mask: [B, T] bool, True where the token counts (trained, scored); never in the prompt or the padding.
        prompt_lengths: [B] int64, tokens before the first response token.
        lengths: [B] int64, tokens of prompt and response together.
    """

    tokens: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    lengths: Tensor


class Pairs(NamedTuple):
    """A batch of preferences: row b of `chosen` and row b of `rejected` answer the same prompt."""

    chosen: Sequences
    rejected: Sequences


def join(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Example:
    """The example whose response tokens all count: ids are concatenated, text never is.

    >>> join([5, 6], [7])
    Example(ids=[5, 6, 7], mask=[False, False, True], prompt_length=2)
    """
    mask = [False] * len(prompt_ids) + [True] * len(response_ids)
    return Example([*prompt_ids, *response_ids], mask, len(prompt_ids))


def collate(
    examples: Iterable[Example | tuple[Sequence[int], Sequence[int]]], *, pad_id: int = 0
) -> Sequences:
    """Pads examples, or pairs (prompt_ids, response_ids), on the right to the longest of them.

    The padding id is any valid id: masks come from lengths, so it may as well be the EOS id.

    Raises:
        ValueError: there is no example, or one has a mask of another length than its ids, or a prompt length
            outside 1..len(ids) (a token without a token before it has no log-prob).

    >>> batch = collate([([5, 6], [7]), ([5], [7, 8, 9])])
    >>> batch.tokens
    tensor([[5, 6, 7, 0],
            [5, 7, 8, 9]])
    >>> batch.mask.long().sum(1)
    tensor([1, 3])
    """
    rows = [example if isinstance(example, Example) else join(*example) for example in examples]
    if not rows:
        raise ValueError("expected at least one example to collate, got none")
    for i, row in enumerate(rows):
        _check_example(row, i)
    longest = max(len(row.ids) for row in rows)
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        mask[i, : len(row.ids)] = torch.tensor(row.mask, dtype=torch.bool)
    prompt_lengths = torch.tensor([row.prompt_length for row in rows], dtype=torch.int64)
    return Sequences(tokens, mask, prompt_lengths, torch.tensor([len(row.ids) for row in rows]))


def collate_pairs(pairs: Iterable[PairExample], *, pad_id: int = 0) -> Pairs:
    """Pads both sides, each to its own longest row."""
    rows = list(pairs)
    chosen = collate([pair.chosen for pair in rows], pad_id=pad_id)
    return Pairs(chosen, collate([pair.rejected for pair in rows], pad_id=pad_id))


def take(sequences: Sequences, index: Tensor) -> Sequences:
    """The rows at `index` ([K] int64, or [B] bool), trimmed to the longest of them.

    >>> take(collate([([5, 6], [7]), ([5], [7, 8, 9])]), torch.tensor([0])).tokens
    tensor([[5, 6, 7]])
    """
    if index.ndim != 1:
        raise ValueError(f"expected index of one dimension, got shape {list(index.shape)}")
    lengths = sequences.lengths[index]
    longest = int(lengths.max()) if len(lengths) else 0
    return Sequences(
        tokens=sequences.tokens[index, :longest],
        mask=sequences.mask[index, :longest],
        prompt_lengths=sequences.prompt_lengths[index],
        lengths=lengths,
    )


def take_pairs(pairs: Pairs, index: Tensor) -> Pairs:
    """The pairs at `index`, both sides alike."""
    return Pairs(take(pairs.chosen, index), take(pairs.rejected, index))


def _check_example(row: Example, position: int) -> None:
    if len(row.mask) != len(row.ids):
        raise ValueError(f"example {position}: expected a mask of {len(row.ids)} tokens, got {len(row.mask)}")
    if not 1 <= row.prompt_length <= len(row.ids):
        raise ValueError(
            f"example {position}: expected a prompt length in 1..{len(row.ids)}, got {row.prompt_length}"
        )
    if any(row.mask[: row.prompt_length]):
        raise ValueError(f"example {position}: expected no trained token in the prompt, found one")
