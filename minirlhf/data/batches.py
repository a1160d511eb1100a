"""Text records -> examples of ids -> batches in an order: the last place where text and lengths are decided.

Prompt and response are tokenised apart and joined by ids, so the prompt that a response was trained after is,
id for id, the prompt that is sampled from. EOS ends each trained response that is whole. What is longer than
`max_length` is dropped, truncated or refused, as the caller says; whatever is lost is listed by line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from minirlhf.data.readers import describe_dropped
from minirlhf.data.records import Demonstration, Example, PairExample, Pairs, Preference, Prompt, Sequences
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.runs import InputError

Overlong = Literal["drop", "truncate", "error"]
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What tokenisation did to the rows that it was given.

    Attributes:
        total: rows given.
        dropped: (line, why) of each row that is not among the examples.
        truncated: line of each example that was cut.
    """

    total: int
    dropped: list[tuple[int, str]]
    truncated: list[int]

    def __str__(self) -> str:
        """One line for the terminal."""
        told = describe_dropped(self.dropped, total=self.total)
        return f"{told}; truncated {len(self.truncated)}" if self.truncated else told


class Tokenised(NamedTuple, Generic[T]):
    """Examples, the index of the row that each came from, and the account of the rest."""

    examples: list[T]
    kept: list[int]
    report: Report


def tokenise_demonstrations(
    rows: Sequence[Demonstration], tokenizer: Tokenizer, *, max_length: int, overlong: Overlong
) -> Tokenised[Example]:
    """Examples of prompt and segments, EOS after every trained segment.

    Args:
        rows: demonstrations.
        tokenizer: its EOS ends the trained segments.
        max_length: most tokens of an example, EOS included.
        overlong: "truncate" cuts the end of the row (a cut response gets no EOS) and drops the row where no
            trained token is left.

    Raises:
        InputError: a row is too long and overlong is "error", or no row is left.
    """
    texts = [text for row in rows for text in (row.prompt, *(segment for segment, _ in row.segments))]
    ids = iter(tokenizer.encode_all(texts))
    sides = []
    for row in rows:
        prompt = next(ids)
        segments = [(next(ids), trained) for _, trained in row.segments]
        sides.append((_example(prompt, segments, tokenizer.eos_id),))
    fitted = _fit([row.line for row in rows], sides, max_length=max_length, overlong=overlong)
    return Tokenised([example for (example,) in fitted.examples], fitted.kept, fitted.report)


def tokenise_preferences(
    rows: Sequence[Preference], tokenizer: Tokenizer, *, max_length: int, overlong: Overlong
) -> Tokenised[PairExample]:
    """Pairs of examples that begin with the same prompt ids; EOS ends each response.

    Args:
        rows: preferences.
        tokenizer: its EOS ends the responses.
        max_length: most tokens of either side, prompt and EOS included.
        overlong: "truncate" cuts the end of a longer side (a cut response gets no EOS), and drops a pair of
            which a response would be empty or both would be equal.

    Raises:
        InputError: a pair is too long and overlong is "error", or no pair is left.
    """
    texts = [text for row in rows for text in (row.prompt, row.chosen, row.rejected)]
    ids = iter(tokenizer.encode_all(texts))
    sides = []
    for prompt, chosen, rejected in zip(ids, ids, ids, strict=True):
        sides.append(tuple(_example(prompt, [(side, True)], tokenizer.eos_id) for side in (chosen, rejected)))
    fitted = _fit([row.line for row in rows], sides, max_length=max_length, overlong=overlong)
    pairs = [PairExample(chosen, rejected) for chosen, rejected in fitted.examples]
    return Tokenised(pairs, fitted.kept, fitted.report)


def tokenise_prompts(
    rows: Sequence[Prompt], tokenizer: Tokenizer, *, max_length: int, overlong: Literal["drop", "error"]
) -> Tokenised[list[int]]:
    """Ids of prompts, without EOS. A prompt is never cut: the answer would be to another question.

    Args:
        rows: prompts.
        tokenizer: the same that tokenised the training data.
        max_length: most tokens of a prompt: the context less the room for the response.
        overlong: whether a longer prompt is dropped or refused.

    Raises:
        InputError: a prompt is too long and overlong is "error", or no prompt is left.
    """
    if overlong not in ("drop", "error"):
        raise ValueError(f'expected overlong of prompts to be "drop" or "error", got {overlong!r}')
    examples, kept, dropped = [], [], []
    for i, (row, ids) in enumerate(zip(rows, tokenizer.encode_all([r.prompt for r in rows]), strict=True)):
        if not ids:
            dropped.append((row.line, "the prompt has no tokens"))
        elif len(ids) <= max_length:
            examples.append(ids)
            kept.append(i)
        else:
            _refuse_if_error(row.line, len(ids), overlong=overlong, max_length=max_length)
            dropped.append((row.line, _too_long(max_length)))
    return _some_left(Tokenised(examples, kept, Report(len(rows), dropped, [])))


def epoch_order(n: int, *, batch_size: int, generator: torch.Generator, skip: int = 0) -> Iterator[Tensor]:
    """One epoch: every index once, in a random order, the last batch as small as it comes.

    The generator is advanced by exactly one permutation, at the call, whatever is then read of the epoch. To
    restart inside an epoch, restore the generator to its state before the call and skip the batches done.

    Args:
        n: number of examples.
        batch_size: indices of a batch; the last one holds the rest.
        generator: of the order.
        skip: batches at the beginning to leave out.

    Returns:
        iterator over ceil(n / batch_size) - skip int64 tensors.

    >>> [len(batch) for batch in epoch_order(7, batch_size=3, generator=torch.Generator().manual_seed(0))]
    [3, 3, 1]
    """
    if n < 1 or batch_size < 1 or skip < 0:
        raise ValueError(f"expected n >= 1, batch_size >= 1, skip >= 0; got {n}, {batch_size}, {skip}")
    return iter(torch.randperm(n, generator=generator).split(batch_size)[skip:])


def validate(sequences: Sequences, *, vocab_size: int) -> Sequences:
    """The same batch, its values checked: once here, so that no pure function has to.

    Raises:
        InputError: an id is outside the vocabulary (padding included: the embedding reads it), lengths
            contradict each other or the mask, or a row has nothing that counts. The row is named.
    """
    tokens, mask, prompt_lengths, lengths = sequences
    if tokens.ndim != 2 or mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise InputError(
            f"expected tokens and a bool mask of one shape [B, T], got {list(tokens.shape)} and "
            f"{list(mask.shape)} ({mask.dtype})"
        )
    if not prompt_lengths.shape == lengths.shape == tokens.shape[:1]:
        raise InputError(
            f"expected prompt_lengths and lengths [{len(tokens)}], got {list(prompt_lengths.shape)} and "
            f"{list(lengths.shape)}"
        )
    place = torch.arange(tokens.shape[1], device=tokens.device)
    outside = (place < prompt_lengths[:, None]) | (place >= lengths[:, None])
    wrong_id = (tokens < 0) | (tokens >= vocab_size)
    for rows, what in (
        (wrong_id.any(1), f"every id in the model's vocabulary 0..{vocab_size - 1}, found another"),
        (prompt_lengths < 1, "a prompt of at least one token, found none"),
        (lengths < prompt_lengths, "a length not below the prompt's, found a smaller one"),
        (lengths > tokens.shape[1], "a length within the batch's width, found a larger one"),
        ((mask & outside).any(1), "a mask inside the response, found True outside"),
        (~mask.any(1), "at least one token that counts, found an empty mask"),
    ):
        if rows.any():
            raise InputError(f"row {int(rows.nonzero()[0])} of the batch: expected {what}")
    return sequences


def validate_pairs(pairs: Pairs, *, vocab_size: int) -> Pairs:
    """The same pairs, both sides checked, and that they answer the same prompts differently.

    Raises:
        InputError: as for `validate`; or the prompts of a pair differ; or its two sides are equal.
    """
    chosen, rejected = (
        validate(pairs.chosen, vocab_size=vocab_size),
        validate(pairs.rejected, vocab_size=vocab_size),
    )
    if len(chosen.tokens) != len(rejected.tokens):
        raise InputError(
            f"expected as many chosen as rejected, got {len(chosen.tokens)}, {len(rejected.tokens)}"
        )
    for i in range(len(chosen.tokens)):
        ids = [side.tokens[i, : side.lengths[i]].tolist() for side in (chosen, rejected)]
        prompts = [side.tokens[i, : side.prompt_lengths[i]].tolist() for side in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise InputError(f"pair {i} of the batch: expected one prompt, found two")
        if ids[0] == ids[1]:
            raise InputError(f"pair {i} of the batch: expected two responses, found the same one twice")
    return pairs


def _example(prompt: list[int], segments: Sequence[tuple[list[int], bool]], eos_id: int) -> Example:
    ids, mask = list(prompt), [False] * len(prompt)
    for segment, trained in segments:
        # A response without tokens gets no EOS either, so that its empty mask shows it to be unusable.
        piece = [*segment, eos_id] if trained and segment else segment
        ids += piece
        mask += [trained] * len(piece)
    return Example(ids, mask, len(prompt))


def _fit(
    lines: Sequence[int], rows: Sequence[tuple[Example, ...]], *, max_length: int, overlong: Overlong
) -> Tokenised[tuple[Example, ...]]:
    """Holds every side of every row to max_length, and drops rows that can teach nothing."""
    if overlong not in get_args(Overlong):
        raise ValueError(f"expected overlong to be one of {get_args(Overlong)}, got {overlong!r}")
    examples, kept, dropped, truncated = [], [], [], []
    for i, (line, sides) in enumerate(zip(lines, rows, strict=True)):
        why, longest = _flaw(sides), max(len(side.ids) for side in sides)
        if why is None and longest > max_length:
            _refuse_if_error(line, longest, overlong=overlong, max_length=max_length)
            sides = tuple(Example(s.ids[:max_length], s.mask[:max_length], s.prompt_length) for s in sides)
            why = _too_long(max_length) if overlong == "drop" else _flaw(sides, after=" after truncation")
            if why is None:
                truncated.append(line)
        if why is None:
            examples.append(sides)
            kept.append(i)
        else:
            dropped.append((line, why))
    return _some_left(Tokenised(examples, kept, Report(len(rows), dropped, truncated)))


def _some_left(tokenised: Tokenised[T]) -> Tokenised[T]:
    if tokenised.report.total and not tokenised.examples:
        raise InputError(f"expected at least one row that can be used, found none: {tokenised.report}")
    return tokenised


def _too_long(max_length: int) -> str:
    return f"longer than {max_length} tokens"


def _flaw(sides: tuple[Example, ...], after: str = "") -> str | None:
    """Why nothing can be learned from a row; None where something can."""
    if sides[0].prompt_length == 0:
        return "the prompt has no tokens"
    if not all(any(side.mask) for side in sides):
        return f"a response has no tokens{after}"
    if len(sides) == 2 and sides[0].ids == sides[1].ids:
        return f"both responses have the same tokens{after}"
    return None


def _refuse_if_error(line: int, length: int, *, overlong: Overlong, max_length: int) -> None:
    if overlong == "error":
        raise InputError(
            f"line {line}: expected at most {max_length} tokens, found {length}; "
            'such rows can be dropped by choice (overlong = "drop")'
        )
