"""Text <-> ids by a Hugging Face `tokenizer.json`, without the parts of it that would change data silently.

Four settings that a tokenizer file may carry are switched off: truncation, padding, special tokens that are
added around a text, and special tokens that are recognised *inside* a text. The last is a matter of safety:
a user who types `<|endoftext|>` must not be able to end the prompt. Only this package writes the EOS id.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from minirlhf.runs import InputError

# The library's own record of a text is some 20 times its ids; a large file must not hold all of them.
_TEXTS_AT_ONCE = 1024
_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer bound to its file.

    Attributes:
        path: the `tokenizer.json` it came from, copied beside every model that is saved.
        eos_id: the id that ends a response; 0 is as good as any other.
        vocab_size: one more than the largest id.
        backend: the `tokenizers` object; its settings are ours, do not change them.
    """

    path: Path
    eos_id: int
    vocab_size: int
    backend: tokenizers.Tokenizer = field(repr=False)

    def encode(self, text: str) -> list[int]:
        """The ids of exactly this text: nothing added, nothing cut, and never the EOS id."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text; much faster than one at a time.

        Raises:
            InputError: the tokenizer writes some text with the EOS id.
        """
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = list(texts[start : start + _TEXTS_AT_ONCE])
            encoded += [e.ids for e in self.backend.encode_batch(some, add_special_tokens=False)]
        if any(self.eos_id in ids for ids in encoded):
            raise InputError(_EOS_IN_TEXT.format(path=self.path, eos_id=self.eos_id))
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens shown: what a model wrote is not prettied."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


_EOS_IN_TEXT = (
    "{path}: expected ordinary text never to be encoded as the EOS id {eos_id}, found a text that is; "
    "declare EOS as a special added token that the model's own vocabulary cannot produce"
)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads `tokenizer.json`, or a directory that contains it.

    EOS is `eos_token_id` of a `config.json` beside it (the first, of a list), else the token named
    `<|endoftext|>`, `</s>` or `<eos>`.

    Raises:
        InputError: there is no such file, it is not a tokenizer, EOS cannot be found, or text could spell it.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    settings = _read_settings(file)
    backend = _build(file, settings)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    eos_id = _find_eos(file, vocabulary)
    if _declare_special(settings, eos_id):
        backend = _build(file, settings)
    tokenizer = Tokenizer(file, eos_id, max(vocabulary.values()) + 1, backend)
    name = next(token for token, i in vocabulary.items() if i == eos_id)
    tokenizer.encode_all([name, f"a {name} b", f"a{name}b"])  # fails now rather than on some user's text
    return tokenizer


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected a tokenizer.json or a directory with one") from None
    except OSError as error:
        raise InputError(f"{file}: expected a readable file, found {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{file}: expected a tokenizer.json, found no JSON ({error})") from None
    if not isinstance(settings, dict) or "model" not in settings:
        raise InputError(f'{file}: expected a tokenizer.json with "model", found other JSON')
    return settings


def _build(file: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{file}: expected a tokenizer.json, found one that does not load ({error})"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # inside a text they are text
    return backend


def _declare_special(settings: dict[str, Any], eos_id: int) -> bool:
    """Makes EOS special where it is added as an ordinary token, which text may spell; True if that was so.

    Other ordinary added tokens stay: some vocabularies (GPT-NeoX) add runs of spaces that way.
    """
    for token in settings.get("added_tokens") or []:
        if token["id"] == eos_id and not token["special"]:
            token["special"] = True
            return True
    return False


def _find_eos(file: Path, vocabulary: dict[str, int]) -> int:
    stated = _stated_eos(file.parent / "config.json")
    if stated is not None:
        if stated not in vocabulary.values():
            config = file.parent / "config.json"
            raise InputError(
                f"{config}: expected eos_token_id to be in {file.name}, found {stated}, which is not"
            )
        return stated
    for name in _EOS_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise InputError(
        f"{file}: expected an end-of-text token named {' or '.join(_EOS_NAMES)}, found none; "
        f'name its id as "eos_token_id" in {file.parent / "config.json"}'
    )


def _stated_eos(config: Path) -> int | None:
    """`eos_token_id` of a model's config; None where there is no config, or it states none."""
    if not config.is_file():
        return None
    try:
        settings: Any = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config}: expected JSON, found none ({error})") from None
    stated = settings.get("eos_token_id") if isinstance(settings, dict) else None
    if isinstance(stated, list) and stated:
        stated = stated[0]
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise InputError(f"{config}: expected eos_token_id to be an integer, found {stated!r}")
    return stated
