"""A prompt and a response as an encoder reads them: one row of ids with separators, and the side of each id.

The row is what the tokenizer's own post-processor makes of two texts, such as [CLS] prompt [SEP] response
[SEP]. As everywhere, special tokens inside a text are text, and nothing is padded or cut unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minirlhf.runs import InputError


class PairIds(NamedTuple):
    """One row. segments: 0 for ids of the prompt's side, 1 for the response's, as the post-processor says.
    cut: whether the end of the response was left out."""

    ids: list[int]
    segments: list[int]
    cut: bool


@dataclass(frozen=True)
class PairTokenizer:
    """An encoder's tokenizer bound to its file.

    Attributes:
        path: the `tokenizer.json` it came from.
        vocab_size: one more than the largest id.
        context: most ids of a row.
        backend: the `tokenizers` object; its settings are ours, do not change them.
    """

    path: Path
    vocab_size: int
    context: int
    backend: tokenizers.Tokenizer = field(repr=False)

    def encode_all(self, prompts: Sequence[str], responses: Sequence[str]) -> list[PairIds]:
        """A row for each pair; where it would be longer than the context, the response's end is left out.

        Raises:
            ValueError: a prompt is longer than `longest_prompt`; whoever has the prompts checks them before.
        """
        rows = []
        for prompt, response in zip(self._encode(prompts), self._encode(responses), strict=True):
            if len(prompt.ids) > self.longest_prompt:
                raise ValueError(f"a prompt of {len(prompt.ids)} tokens leaves no room for a response")
            room = self.longest_prompt + 1 - len(prompt.ids)
            cut = len(response.ids) > room
            if cut:
                response.truncate(room)
            row = self.backend.post_process(prompt, response, add_special_tokens=True)
            rows.append(PairIds(row.ids, row.type_ids, cut))
        return rows

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, without separators."""
        return [len(row.ids) for row in self._encode(prompts)]

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt that leaves room for the separators and one token of a response."""
        return self.context - self.backend.num_special_tokens_to_add(True) - 1


def load_pair_tokenizer(path: Path | str, *, context: int) -> PairTokenizer:
    """Loads `tokenizer.json`, or a directory that contains it, for rows of at most `context` ids.

    Raises:
        InputError: there is no such file, it is not a tokenizer, or it has no post-processor that joins two
            texts, so that nobody can say how the encoder wants to read them.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; an encoder reads text by its own tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: expected a tokenizer.json, found none that loads ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # inside a text they are text
    if backend.num_special_tokens_to_add(True) < 2:
        raise InputError(
            f"{file}: expected a post-processor that joins two texts ([CLS] A [SEP] B [SEP]), found none"
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return PairTokenizer(file, vocab_size, context, backend)
