"""Text records -> examples of ids -> batches in an order: the last place where text and lengths are decided.

Prompt and response are tokenised apart and joined by ids, so the prompt that a response was trained after
is, id for id, the prompt that is sampled from. EOS ends each trained response that is whole; BOS begins a
row where the tokenizer has one. Rows with messages are written by the checkpoint's own chat template, if it
has one; rows that it refuses are dropped with its reason. What is longer than `max_length` is dropped,
truncated or refused, as the caller says; whatever is lost is listed by line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from minirlhf.data.conversation import Unfit, content_of
from minirlhf.data.readers import describe_dropped
from minirlhf.data.records import (
    Demonstration,
    Example,
    Message,
    PairExample,
    Pairs,
    Preference,
    Prompt,
    Sequences,
)
from minirlhf.data.templates.ids import ChatTemplate
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
        InputError: a row is too long and overlong is "error".
    """
    plain = [row for row in rows if _template(row, tokenizer) is None]
    texts = [text for row in plain for text in (row.prompt, *(segment for segment, _ in row.segments))]
    ids = iter(tokenizer.encode_all(texts))
    sides: list[tuple[Example, ...] | str] = []
    for row in rows:
        template = _template(row, tokenizer)
        if template is None:
            prompt = _opened(tokenizer, next(ids))
            segments = [(next(ids), trained) for _, trained in row.segments]
            sides.append((_example(prompt, segments, tokenizer.eos_id),))
        else:
            answers = sum(trained for _, trained in row.segments)
            sides.append(_chats(template, [row.messages or ()], answers=answers))
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
        InputError: a pair is too long and overlong is "error".
    """
    plain = [row for row in rows if _template(row, tokenizer) is None]
    ids = iter(tokenizer.encode_all([t for row in plain for t in (row.prompt, row.chosen, row.rejected)]))
    sides: list[tuple[Example, ...] | str] = []
    for row in rows:
        template = _template(row, tokenizer)
        if template is None:
            prompt, *responses = _opened(tokenizer, next(ids)), next(ids), next(ids)
            sides.append(tuple(_example(prompt, [(side, True)], tokenizer.eos_id) for side in responses))
        else:
            replies = [Message("assistant", content_of(side)) for side in (row.chosen, row.rejected)]
            sides.append(_chats(template, [(*(row.messages or ()), reply) for reply in replies], answers=1))
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
        InputError: a prompt is too long and overlong is "error".
    """
    if overlong not in ("drop", "error"):
        raise ValueError(f'expected overlong of prompts to be "drop" or "error", got {overlong!r}')
    examples, kept, dropped = [], [], []
    for i, (row, ids) in enumerate(zip(rows, _prompts(rows, tokenizer), strict=True)):
        if isinstance(ids, str):
            dropped.append((row.line, ids))
        elif not ids:
            dropped.append((row.line, "the prompt has no tokens"))
        elif len(ids) <= max_length:
            examples.append(ids)
            kept.append(i)
        else:
            _refuse_if_error(row.line, len(ids), overlong=overlong, max_length=max_length)
            dropped.append((row.line, _too_long(max_length)))
    return Tokenised(examples, kept, Report(len(rows), dropped, []))


def describe_chats(chats: int, *, total: int, tokenizer: Tokenizer) -> str:
    """One line about how the `chats` conversations among `total` rows become ids."""
    if tokenizer.template is None:
        how = (
            r"written as transcripts (\n\nHuman: ... \n\nAssistant: ...): the tokenizer has no chat template"
        )
    else:
        end = repr(tokenizer.template.terminator)
        how = f"written by the chat template in {tokenizer.template.path}; {end} ends an answer"
    rest = f"; the {total - chats} others are plain text, which no template touches"
    return f"{chats} conversations are {how}{rest if chats < total else ''}"


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


def _template(row: Demonstration | Preference | Prompt, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What writes this row; None where it is plain text, or there is no template."""
    return None if row.messages is None else tokenizer.template


def _opened(tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    """A prompt with BOS in front; one without tokens stays unusable."""
    return [*tokenizer.opening, *prompt] if prompt else prompt


def _prompts(rows: Sequence[Prompt], tokenizer: Tokenizer) -> Iterator[list[int] | str]:
    """The ids of each prompt, or why its chat template refuses it."""
    plain = iter(tokenizer.encode_all([r.prompt for r in rows if _template(r, tokenizer) is None]))
    for row in rows:
        template = _template(row, tokenizer)
        try:
            if template is None:
                yield _opened(tokenizer, next(plain))
            else:
                pieces = template.encode(row.messages or (), ask=True)
                yield [id for piece in pieces for id in (*piece.read, *piece.answer)]
        except Unfit as unfit:
            yield str(unfit)


def _chats(
    template: ChatTemplate, chats: Sequence[Sequence[Message]], *, answers: int
) -> tuple[Example, ...] | str:
    """An example of each conversation, its last `answers` trained; or why the template refuses one."""
    try:
        return tuple(_chat(template, messages, answers=answers) for messages in chats)
    except Unfit as unfit:
        return str(unfit)


def _chat(template: ChatTemplate, messages: Sequence[Message], *, answers: int) -> Example:
    pieces = template.encode(messages, ask=False, trained=answers)
    before, trained = pieces[:-answers], pieces[-answers:]
    ids = [id for piece in before for id in (*piece.read, *piece.answer)] + trained[0].read
    prompt_length = len(ids)
    mask = [False] * prompt_length
    for i, piece in enumerate(trained):
        read = piece.read if i else []
        ids += [*read, *piece.answer]
        mask += [False] * len(read) + [True] * len(piece.answer)
    return Example(ids, mask, prompt_length)


def _example(prompt: list[int], segments: Sequence[tuple[list[int], bool]], eos_id: int) -> Example:
    ids, mask = list(prompt), [False] * len(prompt)
    for segment, trained in segments:
        # A response without tokens gets no EOS either, so that its empty mask shows it to be unusable.
        piece = [*segment, eos_id] if trained and segment else segment
        ids += piece
        mask += [trained] * len(piece)
    return Example(ids, mask, len(prompt))


def _fit(
    lines: Sequence[int], rows: Sequence[tuple[Example, ...] | str], *, max_length: int, overlong: Overlong
) -> Tokenised[tuple[Example, ...]]:
    """Holds every side of every row to max_length, and drops rows that can teach nothing or have a reason."""
    if overlong not in get_args(Overlong):
        raise ValueError(f"expected overlong to be one of {get_args(Overlong)}, got {overlong!r}")
    examples, kept, dropped, truncated = [], [], [], []
    for i, (line, sides) in enumerate(zip(lines, rows, strict=True)):
        if isinstance(sides, str):
            dropped.append((line, sides))
            continue
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
    return Tokenised(examples, kept, Report(len(rows), dropped, truncated))


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
