"""Plain text for pretraining: {"text"} or {"spans"} rows -> examples with nothing that plays the prompt.

A row {"text": "..."} is trained whole. A row {"spans": [["...", false], ["...", true], ...]} is trained where
it says so; its spans are tokenised apart and joined by ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minirlhf.data.jsonl import Line, kind, malformed
from minirlhf.data.records import Example
from minirlhf.data.source import read_rows
from minirlhf.data.tokenizer import Tokenizer

Spans = list[tuple[str, bool]]
"""Pieces of one text, each with whether it is trained."""


def read_texts(path: Path | str) -> Iterator[Spans]:
    """The spans of one row after the other; of what a source may be, see `data.source.read_rows`.

    Raises:
        InputError: the source is missing or empty, or a row has neither a non-empty string under "text" nor a
            non-empty list of [string, bool] under "spans", one of them trained.
    """
    return map(_spans, read_rows(path))


def _spans(line: Line) -> Spans:
    if "spans" in line.values:
        return _checked(line, line.values["spans"])
    text = line.values.get("text")
    if not isinstance(text, str) or not text:
        found = "no such key" if "text" not in line.values else "an empty one" if text == "" else kind(text)
        malformed(line.place, expected='"text" to be a non-empty string', found=found)
    return [(text, True)]


def _checked(line: Line, spans: Any) -> Spans:
    expected = '"spans" to be a list of [non-empty string, true or false], one of them true'
    if not isinstance(spans, list) or not spans:
        malformed(line.place, expected=expected, found=kind(spans) if spans else "an empty one")
    for span in spans:
        match span:
            case [str(text), bool()] if text:
                continue
        malformed(line.place, expected=expected, found=f"{span!r}")
    if not any(trained for _, trained in spans):
        malformed(line.place, expected=expected, found="none that is trained")
    return [(text, trained) for text, trained in spans]


def tokenise_texts(texts: Sequence[Spans], tokenizer: Tokenizer, *, max_length: int) -> list[Example]:
    """One example per text, EOS at its end; a text longer than `max_length` becomes several.

    Where the tokenizer has a BOS, it stands in front, and is read only.
    Nothing precedes a first token, so it has no log-prob; the windows of a long text overlap by one token, so
    that no other token goes untrained. A window in which nothing is trained is left out.

    Args:
        texts: what to learn to write.
        tokenizer: its EOS ends each text, trained where the last span is.
        max_length: most tokens of an example, at least 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    encoded = iter(tokenizer.encode_all([piece for text in texts for piece, _ in text]))
    examples = []
    for text in texts:
        ids = list(tokenizer.opening)
        mask = [False] * len(ids)
        for _, trained in text:
            piece = next(encoded)
            ids += piece
            mask += [trained] * len(piece)
        ids.append(tokenizer.eos_id)
        mask.append(text[-1][1])
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = mask[start : start + max_length]
            if any(window[1:]):
                examples.append(Example(ids[start : start + max_length], [False, *window[1:]], 1))
    return examples
