"""Text <-> ids by a Hugging Face `tokenizer.json`, without the parts of it that would change data silently.

Four settings that a tokenizer file may carry are switched off: truncation, padding, special tokens that are
added around a text, and special tokens that are recognised *inside* a text. The last is a matter of safety:
a user who types `<|endoftext|>` must not be able to end the prompt. Only this package writes the EOS id,
and the BOS id where the tokenizer's own post-processor would. A chat template that stands beside the file
comes along.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from minirlhf.data.templates.ids import ChatTemplate, bind_template
from minirlhf.data.templates.source import Source, content, find_template, read_config
from minirlhf.runs import InputError

# The library's own record of a text is some 20 times its ids; a large file must not hold all of them.
_TEXTS_AT_ONCE = 1024
_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer bound to its file.

    Attributes:
        path: the `tokenizer.json` it came from, copied beside every model that is saved.
        eos_id: the id that ends a response, with a template the template's own; 0 is as good as any other.
        vocab_size: one more than the largest id.
        backend: the `tokenizers` object; its settings are ours, do not change them.
        bos_id: the id that the tokenizer itself puts in front of a text; None where it puts none.
        template: the checkpoint's chat template, for conversations; None where it has none.
    """

    path: Path
    eos_id: int
    vocab_size: int
    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None = None
    template: ChatTemplate | None = None

    @property
    def opening(self) -> list[int]:
        """The ids that stand before the first text of a sequence: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

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


def no_template(folder: Path) -> None:
    """In place of `find_template`: conversations are written as transcripts, whatever the checkpoint has."""
    del folder


def load_tokenizer(
    path: Path | str, *, template_of: Callable[[Path], Source | None] = find_template
) -> Tokenizer:
    """Loads `tokenizer.json`, or a directory that contains it, and the chat template that stands beside it.

    Args:
        path: the file or the directory.
        template_of: finds the chat template in the directory; `no_template` finds none.

    EOS is the token that the chat template ends an answer with. Where it writes none, or there is no
    template: "eos_token" of `tokenizer_config.json` if `config.json` names it among its `eos_token_id` (or
    names none), else the first that `config.json` names, else the token named `<|endoftext|>`, `</s>` or
    `<eos>`.

    Raises:
        InputError: there is no such file, it is not a tokenizer, EOS cannot be found, or text could spell it;
            or the chat template cannot be used.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    settings = _read_settings(file)
    backend = _build(file, settings)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    bos_id, source, template = _find_bos(file, backend, vocabulary), template_of(file.parent), None
    if source is None:
        eos_id = _find_eos(file, vocabulary)
    else:
        eos_name = partial(_find_eos_name, file, vocabulary)
        try:
            template = bind_template(source, _build(file, settings), eos=eos_name, bos_id=bos_id)
        except InputError as error:
            raise InputError(
                f"{error}; to write conversations as transcripts instead: --chat-template none"
            ) from error
        eos_id = vocabulary[template.terminator]
    if _declare_special(settings, eos_id):
        backend = _build(file, settings)
    tokenizer = Tokenizer(file, eos_id, max(vocabulary.values()) + 1, backend, bos_id, template)
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
    config = file.parent / "config.json"
    stated = _stated_eos(config)
    named = content(read_config(file.parent / "tokenizer_config.json").get("eos_token"))
    if named in vocabulary and (not stated or vocabulary[named] in stated):
        return vocabulary[named]
    if stated:
        if stated[0] not in vocabulary.values():
            raise InputError(
                f"{config}: expected eos_token_id to be in {file.name}, found {stated[0]}, which is not"
            )
        return stated[0]
    for name in _EOS_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise InputError(
        f"{file}: expected an end-of-text token named {' or '.join(_EOS_NAMES)}, found none; "
        f'name its id as "eos_token_id" in {config}'
    )


def _find_eos_name(file: Path, vocabulary: dict[str, int]) -> str:
    eos_id = _find_eos(file, vocabulary)
    return next(token for token, i in vocabulary.items() if i == eos_id)


def _find_bos(file: Path, backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> int | None:
    """What the post-processor puts in front; "add_bos_token" of the config, if stated, outvotes it."""
    config = read_config(file.parent / "tokenizer_config.json")
    added, name = config.get("add_bos_token"), content(config.get("bos_token"))
    if added is False:
        return None
    if added is True and name in vocabulary:
        return vocabulary[name]
    plain, whole = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    if at > 1:
        raise InputError(f"{file}: expected at most one token in front of a text, found that it puts {at}")
    return whole[0] if at else None


def _stated_eos(config: Path) -> list[int]:
    """`eos_token_id` of a model's config, one or several; none where nothing states any."""
    stated = read_config(config).get("eos_token_id")
    several = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for eos in several:
        if isinstance(eos, bool) or not isinstance(eos, int):
            raise InputError(f"{config}: expected eos_token_id to be an integer, found {eos!r}")
    return several
