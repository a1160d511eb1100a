"""Files -> tokenised splits for one model: what is read, dropped and cut is said once, here.

Every stage cuts by the same hash of the prompt (`ReadingConfig.split_seed`), so a prompt that one stage tests
on is never trained on by another.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from minirlhf.data.batches import Tokenised, tokenise_demonstrations, tokenise_preferences, tokenise_prompts
from minirlhf.data.plain import read_texts, tokenise_texts
from minirlhf.data.readers import (
    Loaded,
    describe_dropped,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from minirlhf.data.records import Demonstration, Example, PairExample, Preference, Prompt
from minirlhf.data.splits import split_by_prompt
from minirlhf.runs import InputError
from minirlhf.training.setting import Setting
from minirlhf.training.workspace import Checkpoint

Row = TypeVar("Row", Demonstration, Preference, Prompt)
Item = TypeVar("Item")


class Parts(NamedTuple):
    """Tokenised train, validation and test examples of one kind; none is empty."""

    train: list
    validation: list
    test: list


class PromptRow(NamedTuple):
    """A prompt that fits: its ids, and its text and facts as they were read."""

    ids: list[int]
    row: Prompt


def read_plain(policy: Checkpoint, data: Path, setting: Setting) -> tuple[list[Example], list[Example]]:
    """Train and validation examples of plain text; texts have no prompt, so they are cut by position.

    Raises:
        InputError: the file is not plain text rows, or holds fewer than two examples.
    """
    length = context_of(policy, setting)
    examples = tokenise_texts(read_texts(data), policy.tokenizer, max_length=length)
    if len(examples) < 2:
        raise InputError(f"{data}: expected at least 2 texts, found {len(examples)}")
    generator = torch.Generator().manual_seed(setting.reading.split_seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    held_out = min(max(1, round(len(examples) * setting.reading.validation)), len(examples) - 1)
    setting.show(f"{data}: {len(examples) - held_out} texts to train on, {held_out} for validation")
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]


def read_supervised(policy: Checkpoint, data: Path, setting: Setting) -> Parts:
    """Demonstrations; of a file of preferences the chosen responses.

    Raises:
        InputError: the file cannot be read as any known format, or a split of it is empty in the end.
    """
    length, overlong = context_of(policy, setting), setting.reading.overlong

    def tokenise(rows: Sequence[Demonstration]) -> Tokenised[Example]:
        return tokenise_demonstrations(rows, policy.tokenizer, max_length=length, overlong=overlong)

    loaded = read_demonstrations(data, strict=setting.reading.strict)
    return _parts(loaded, tokenise, data, setting)


def read_pairs(policy: Checkpoint, data: Path, setting: Setting) -> Parts:
    """Preferences; raises as `read_supervised`."""
    loaded = read_preferences(data, strict=setting.reading.strict)
    return _parts(loaded, lambda rows: tokenise_pairs(policy, rows, setting), data, setting)


def tokenise_pairs(
    policy: Checkpoint, rows: Sequence[Preference], setting: Setting
) -> Tokenised[PairExample]:
    """Pairs for this policy's tokenizer and context."""
    length, overlong = context_of(policy, setting), setting.reading.overlong
    return tokenise_preferences(rows, policy.tokenizer, max_length=length, overlong=overlong)


def read_prompt_ids(policy: Checkpoint, data: Path, max_response: int, setting: Setting) -> Parts:
    """Ids of each different prompt that leaves room for the response; raises as `read_supervised`."""
    loaded = _read_unique_prompts(data, setting)
    return _parts(loaded, lambda rows: _tokenise_prompts(policy, rows, max_response, setting), data, setting)


def read_prompt_rows(policy: Checkpoint, data: Path, max_response: int, setting: Setting) -> Parts:
    """The same prompts as `PromptRow`s, for a reward that reads text and facts; raises likewise."""

    def tokenise(rows: Sequence[Prompt]) -> Tokenised[PromptRow]:
        fitting = _tokenise_prompts(policy, rows, max_response, setting)
        pairs = zip(fitting.examples, fitting.kept, strict=True)
        return Tokenised([PromptRow(ids, rows[i]) for ids, i in pairs], fitting.kept, fitting.report)

    return _parts(_read_unique_prompts(data, setting), tokenise, data, setting)


def read_test_prompts(
    policy: Checkpoint, data: Path, max_response: int, setting: Setting
) -> tuple[list[list[int]], list[Prompt]]:
    """Ids and rows of the prompts that no stage trains on; raises as `read_supervised`."""
    loaded = _read_unique_prompts(data, setting)
    reading = setting.reading
    rows = split_by_prompt(loaded.rows, fractions=reading.fractions, seed=reading.split_seed).test
    tokenised = _tokenise_prompts(policy, rows, max_response, setting)
    if tokenised.report.dropped:
        setting.show(f"{data}, test: {tokenised.report}")
    if not tokenised.examples:
        raise InputError(f"{data}: expected test prompts, found none that fits; {tokenised.report}")
    return tokenised.examples, [rows[i] for i in tokenised.kept]


def _read_unique_prompts(data: Path, setting: Setting) -> Loaded[Prompt]:
    loaded = read_prompts(data, strict=setting.reading.strict)
    return loaded._replace(rows=list({row.prompt: row for row in loaded.rows}.values()))


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


def context_of(policy: Checkpoint, setting: Setting) -> int:
    """Most tokens of a row: the context, or less where the user says so."""
    context, wanted = policy.model.config.n_positions, setting.reading.max_length
    if wanted is not None and wanted > context:
        raise InputError(f"max_length of {wanted} tokens exceeds the context of {context} of {policy.path}")
    return context if wanted is None else wanted


def _parts(
    loaded: Loaded[Row], tokenise: Callable[[Sequence[Row]], Tokenised[Item]], data: Path, setting: Setting
) -> Parts:
    reading, total = setting.reading, len(loaded.rows) + len(loaded.dropped)
    setting.show(loaded.decision)
    if loaded.dropped:
        setting.show(f"{data}: {describe_dropped(loaded.dropped, total=total)}")
    splits = split_by_prompt(loaded.rows, fractions=reading.fractions, seed=reading.split_seed)
    parts: list[list[Item]] = []
    for name, rows in zip(splits._fields, splits, strict=True):
        tokenised = tokenise(rows)
        if tokenised.report.dropped or tokenised.report.truncated:
            setting.show(f"{data}, {name}: {tokenised.report}")
        if not tokenised.examples:
            raise InputError(
                f"{data}: expected examples for {name}, found none that fits; {tokenised.report}"
            )
        parts.append(tokenised.examples)
    sizes = ", ".join(f"{name} {len(part)}" for name, part in zip(splits._fields, parts, strict=True))
    setting.show(f"{data}: {sizes}")
    return Parts(*parts)
