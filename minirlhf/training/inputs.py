"""Sources -> tokenised splits for one model: what is read, dropped and cut is said once, here.

Every stage cuts by the same hash of the prompt (`ReadingConfig.split_seed`), so a prompt that one stage tests
on is never trained on by another. A source is read once, as a stream; its text is let go as soon as it is
ids, and of those what is more than a few thousand rows lies on disk (`data.spool`).
"""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from minirlhf.data.account import Account
from minirlhf.data.batches import (
    Tokenised,
    describe_chats,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)
from minirlhf.data.plain import read_texts, tokenise_texts
from minirlhf.data.readers import Dropped, Opened, open_demonstrations, open_preferences, open_prompts
from minirlhf.data.records import Demonstration, Example, PairExample, Preference, Prompt
from minirlhf.data.splits import Splits, boundaries, position
from minirlhf.data.spool import EXAMPLES, PAIRS, Codec, Spool
from minirlhf.runs import InputError
from minirlhf.training.progress import counting
from minirlhf.training.prompt_rows import PROMPT_ROWS, PROMPTS, PromptRow, without_repeats
from minirlhf.training.setting import Setting
from minirlhf.training.workspace import Checkpoint

SPOOL_AFTER = 20_000
"""Rows of a source that stay in memory; at 200 tokens each they take some 200 MB, of pairs twice that."""

Row = TypeVar("Row", Demonstration, Preference, Prompt)
Item = TypeVar("Item")
_AT_ONCE = 1024


class Parts(NamedTuple):
    """Tokenised train, validation and test examples of one kind; none is empty."""

    train: Sequence
    validation: Sequence
    test: Sequence


def read_plain(
    policy: Checkpoint, data: Path, setting: Setting
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Train and validation examples of plain text; texts have no prompt, so they are cut by position.

    Raises:
        InputError: the source is not plain text rows, or holds fewer than two examples.
    """
    if setting.reading.format != "auto":
        raise InputError(
            f"--format {setting.reading.format}: expected no format of plain text, which has one"
        )
    length, spool = context_of(policy, setting), Spool(EXAMPLES, keep=SPOOL_AFTER)
    for texts in _blocks(counting(read_texts(data), f"{data}")):
        for example in tokenise_texts(texts, policy.tokenizer, max_length=length):
            spool.append(example)
    count = len(spool)
    if count < 2:
        raise InputError(f"{data}: expected at least 2 texts, found {count}")
    generator = torch.Generator().manual_seed(setting.reading.split_seed)
    order = torch.randperm(count, generator=generator).numpy()
    held_out = min(max(1, round(count * setting.reading.validation)), count - 1)
    _tell_spooled(spool, data, setting)
    setting.show(f"{data}: {count - held_out} texts to train on, {held_out} for validation")
    return spool.select(order[held_out:]), spool.select(order[:held_out])


def read_supervised(policy: Checkpoint, data: Path, setting: Setting) -> Parts:
    """Demonstrations; of a source of preferences the chosen responses.

    Raises:
        InputError: the source cannot be read as any known format, or a split of it is empty in the end.
    """
    length, overlong = context_of(policy, setting), setting.reading.overlong

    def tokenise(rows: Sequence[Demonstration]) -> Tokenised[Example]:
        return tokenise_demonstrations(rows, policy.tokenizer, max_length=length, overlong=overlong)

    opened = open_demonstrations(data, strict=setting.reading.strict, format=setting.reading.format)
    return _parts(policy, opened, tokenise, EXAMPLES, data, setting)


def read_pairs(policy: Checkpoint, data: Path, setting: Setting) -> Parts:
    """Preferences; raises as `read_supervised`."""
    opened = open_preferences(data, strict=setting.reading.strict, format=setting.reading.format)
    return _parts(policy, opened, lambda rows: tokenise_pairs(policy, rows, setting), PAIRS, data, setting)


def tokenise_pairs(
    policy: Checkpoint, rows: Sequence[Preference], setting: Setting
) -> Tokenised[PairExample]:
    """Pairs for this policy's tokenizer and context."""
    length, overlong = context_of(policy, setting), setting.reading.overlong
    return tokenise_preferences(rows, policy.tokenizer, max_length=length, overlong=overlong)


def read_prompt_rows(policy: Checkpoint, data: Path, max_response: int, setting: Setting) -> Parts:
    """Each different prompt that leaves room for the response; raises as `read_supervised`."""

    def tokenise(rows: Sequence[Prompt]) -> Tokenised[PromptRow]:
        return _tokenise_prompt_rows(policy, rows, max_response, setting)

    return _parts(policy, _open_prompts(data, setting), tokenise, PROMPT_ROWS, data, setting)


def read_test_prompts(
    policy: Checkpoint, data: Path, max_response: int, setting: Setting
) -> tuple[list[list[int]], list[Prompt]]:
    """Ids and rows of the prompts that no stage trains on; raises as `read_supervised`."""
    reading, spool, places = setting.reading, Spool(PROMPTS, keep=SPOOL_AFTER), array("d")
    opened = _open_prompts(data, setting)
    for row in counting(opened.rows, f"{data}"):
        if not isinstance(row, Dropped):
            spool.append(row)
            places.append(position(row.prompt, seed=reading.split_seed))
    _, begins = boundaries(np.asarray(places), fractions=reading.fractions)
    rows = spool.select(np.flatnonzero(np.asarray(places) >= begins))
    tokenised = _tokenise_prompts(policy, rows, max_response, setting)
    if tokenised.report.dropped:
        setting.show(f"{data}, test: {tokenised.report}")
    if not tokenised.examples:
        raise InputError(f"{data}: expected test prompts, found none that fits; {tokenised.report}")
    return tokenised.examples, [rows[i] for i in tokenised.kept]


def context_of(policy: Checkpoint, setting: Setting) -> int:
    """Most tokens of a row: the context, or less where the user says so."""
    context, wanted = policy.model.config.n_positions, setting.reading.max_length
    if wanted is not None and wanted > context:
        raise InputError(f"max_length of {wanted} tokens exceeds the context of {context} of {policy.path}")
    return context if wanted is None else wanted


def _open_prompts(data: Path, setting: Setting) -> Opened[Prompt]:
    opened = open_prompts(data, strict=setting.reading.strict, format=setting.reading.format)
    return opened._replace(rows=without_repeats(opened.rows))


def _tokenise_prompts(
    policy: Checkpoint, rows: Sequence[Prompt], max_response: int, setting: Setting
) -> Tokenised[list[int]]:
    context = context_of(policy, setting)
    if max_response >= context:
        raise InputError(
            f"max_response of {max_response} tokens leaves no room for a prompt in a context of {context}"
        )
    overlong = "error" if setting.reading.overlong == "error" else "drop"
    return tokenise_prompts(rows, policy.tokenizer, max_length=context - max_response, overlong=overlong)


def _tokenise_prompt_rows(
    policy: Checkpoint, rows: Sequence[Prompt], max_response: int, setting: Setting
) -> Tokenised[PromptRow]:
    fitting = _tokenise_prompts(policy, rows, max_response, setting)
    pairs = zip(fitting.examples, fitting.kept, strict=True)
    return Tokenised([PromptRow(ids, rows[i]) for ids, i in pairs], fitting.kept, fitting.report)


class _Taken(NamedTuple):
    """What was read of a source.

    spool: the examples. kept: of each, where its prompt lies. every: where the prompts of all rows lie, also
    of those that do not fit. report: what became of these.
    """

    spool: Spool
    kept: np.ndarray
    every: np.ndarray
    report: str


def _parts(
    policy: Checkpoint,
    opened: Opened[Row],
    tokenise: Callable[[Sequence[Row]], Tokenised[Item]],
    codec: Codec[Item],
    data: Path,
    setting: Setting,
) -> Parts:
    taken = _take(policy, opened, tokenise, codec, data, setting)
    second, third = boundaries(taken.every, fractions=setting.reading.fractions)
    part = (taken.kept >= second).astype(np.int8) + (taken.kept >= third)
    parts = [taken.spool.select(np.flatnonzero(part == i)) for i in range(3)]
    for name, examples in zip(Splits._fields, parts, strict=True):
        if not examples:
            raise InputError(f"{data}: expected examples for {name}, found none that fits; {taken.report}")
    _tell_spooled(taken.spool, data, setting)
    sizes = ", ".join(f"{name} {len(part)}" for name, part in zip(Splits._fields, parts, strict=True))
    setting.show(f"{data}: {sizes}")
    return Parts(*parts)


def _take(
    policy: Checkpoint,
    opened: Opened[Row],
    tokenise: Callable[[Sequence[Row]], Tokenised[Item]],
    codec: Codec[Item],
    data: Path,
    setting: Setting,
) -> _Taken:
    setting.show(opened.decision)
    spool, kept, every = Spool(codec, keep=SPOOL_AFTER), array("d"), array("d")
    unusable, unfit = Account(), Account()
    chats = truncated = 0
    for records in _blocks(counting(opened.rows, f"{data}")):
        rows: list[Row] = []
        for record in records:
            if isinstance(record, Dropped):
                unusable.add(*record)
            else:
                rows.append(record)
        places = [position(row.prompt, seed=setting.reading.split_seed) for row in rows]
        tokenised = tokenise(rows)
        for i, example in zip(tokenised.kept, tokenised.examples, strict=True):
            spool.append(example)
            kept.append(places[i])
        every.extend(places)
        for line, why in tokenised.report.dropped:
            unfit.add(line, why)
        truncated += len(tokenised.report.truncated)
        chats += sum(row.messages is not None for row in rows)
    report = unfit.told(total=len(every)) + (f"; truncated {truncated}" if truncated else "")
    if unusable.dropped:
        setting.show(f"{data}: {unusable.told(total=len(every) + unusable.dropped)}")
    if chats:
        setting.show(describe_chats(chats, total=len(every), tokenizer=policy.tokenizer))
    if unfit.dropped or truncated:
        setting.show(f"{data}: {report}")
    return _Taken(spool, np.asarray(kept), np.asarray(every), report)


def _tell_spooled(spool: Spool, data: Path, setting: Setting) -> None:
    if spool.on_disk:
        size = f"{spool.on_disk} more as {spool.bytes_on_disk / 1e6:.0f} MB"
        where = f"in {tempfile.gettempdir()} (TMPDIR) until the stage ends"
        setting.show(f"{data}: {SPOOL_AFTER} rows are kept in memory, {size} {where}")


def _blocks(rows: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(rows)
    while block := list(islice(iterator, _AT_ONCE)):
        yield block
