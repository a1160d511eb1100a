"""Plain text for pretraining: {"text"} rows -> examples in which every token but the first is trained."""

from collections.abc import Sequence
from pathlib import Path

from minirlhf.data.jsonl import kind, malformed, read_lines
from minirlhf.data.records import Example
from minirlhf.data.tokenizer import Tokenizer


def read_texts(path: Path) -> list[str]:
    """The `text` of every row.

    Raises:
        InputError: the file is missing or empty, or a row has no non-empty string under "text".
    """
    texts = []
    for line in read_lines(path):
        text = line.values.get("text")
        if not isinstance(text, str) or not text:
            found = (
                "no such key" if "text" not in line.values else "an empty one" if text == "" else kind(text)
            )
            malformed(line.path, line.number, expected='"text" to be a non-empty string', found=found)
        texts.append(text)
    return texts


def tokenise_texts(texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int) -> list[Example]:
    """One example per text, EOS at its end; a text longer than `max_length` becomes several.

    Nothing precedes a first token, so it has no log-prob; the windows of a long text overlap by one token, so
    that no other token goes untrained.

    Args:
        texts: what to learn to write.
        tokenizer: its EOS ends each text.
        max_length: most tokens of an example, at least 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    examples = []
    for encoded in tokenizer.encode_all(texts):
        ids = [*encoded, tokenizer.eos_id]
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = ids[start : start + max_length]
            examples.append(Example(window, [False] + [True] * (len(window) - 1), 1))
    return examples
