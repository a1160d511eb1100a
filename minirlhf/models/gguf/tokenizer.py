"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

llama.cpp keeps the vocabulary and the merges (or scores) but of the splitting before them only a name, for
which it has code. So a name is known here, with the splitting that the model's own tokenizer.json has, or
it is refused: another splitting gives other ids, and the model would quietly be a worse one.
"""

from typing import Any

from minirlhf.models.gguf.file import GGUFFile
from minirlhf.runs import InputError

# llama.cpp's kinds of tokens
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_NAMED = {  # tokenizer_config.json's name -> llama.cpp's
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_OUR_OWN = "give the model's own tokenizer.json: minirlhf import {path} --tokenizer FILE --out DIR"


def tokenizer_json(file: GGUFFile) -> dict[str, Any]:
    """The contents of a tokenizer.json that gives the ids of the model's own.

    Raises:
        InputError: the file's vocabulary is of a kind, or its splitting of a name, that we do not know.
    """
    kind = file.value("tokenizer.ggml.model", str)
    if kind == "gpt2":
        return _byte_level(file)
    if kind == "llama":
        return _sentencepiece(file)
    raise InputError(
        f"{file.path}: unsupported tokenizer {kind!r}; supported: gpt2 (byte-level BPE), llama "
        f"(SentencePiece BPE); {_OUR_OWN.format(path=file.path)}"
    )


def tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of tokenizer_config.json: the special tokens by name, and the chat template."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    tokens = file.value("tokenizer.ggml.tokens", list)
    for name, key in _NAMED.items():
        number = special_id(file, key)
        if number is not None:
            config[name] = tokens[number]
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.value("tokenizer.chat_template", str)
    return config


def special_id(file: GGUFFile, name: str) -> int | None:
    """The id that the file gives a special token, such as `eos_token_id`; None where it gives none.

    Raises:
        InputError: it is not the id of a token.
    """
    key = f"tokenizer.ggml.{name}"
    if key not in file.metadata:
        return None
    number, size = file.value(key, int), len(file.value("tokenizer.ggml.tokens", list))
    if not 0 <= number < size:
        raise InputError(f"{file.path}: expected {key} below {size}, the number of tokens, found {number}")
    return number


def _byte_level(file: GGUFFile) -> dict[str, Any]:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name == "default" and file.metadata["general.architecture"] == "gpt2":
        name = "gpt-2"  # files from before the names; this architecture has one tokenizer
    if name not in _SPLITTING:
        raise InputError(
            f"{file.path}: unsupported pre-tokenizer {name!r}; supported: {', '.join(_SPLITTING)}; "
            f"{_OUR_OWN.format(path=file.path)}"
        )
    vocabulary, added = _vocabulary(file)
    merges = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InputError(f"{file.path}: expected merges of two tokens into a third, found {merge}")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITTING[name]},
        "post_processor": _around(file, by_default=name in _LLAMA3),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=name in _LLAMA3),
    }


def _sentencepiece(file: GGUFFile) -> dict[str, Any]:
    """Llama 1 and 2, Mistral: pieces with scores; the pair whose union scores best is merged first."""
    vocabulary, added = _vocabulary(file)
    kinds = file.value("tokenizer.ggml.token_type", list)
    if kinds.count(_BYTE) != 256:
        raise InputError(f"{file.path}: expected 256 byte tokens, found {kinds.count(_BYTE)}")
    _refuse_ambiguous(file, kinds)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = file.value("tokenizer.ggml.tokens", list)[special_id(file, "unknown_token_id") or 0]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _around(file, by_default=True),
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(vocabulary, _merges(file, kinds), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _refuse_ambiguous(file: GGUFFile, kinds: list[int]) -> None:
    """What a SentencePiece file can say that tokenizer.json files do in more than one way."""
    key = "tokenizer.ggml.precompiled_charsmap"
    if file.metadata.get(key) or file.metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise InputError(f"{file.path}: its tokenizer rewrites text first; {_OUR_OWN.format(path=file.path)}")
    named = {special_id(file, key) for key in _NAMED.values()}
    tokens = file.value("tokenizer.ggml.tokens", list)
    others = [
        tokens[i] for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED) and i not in named
    ]
    if others:
        raise InputError(
            f"{file.path}: special tokens besides BOS and EOS ({', '.join(others[:4])}), after which "
            f"tokenizers of this kind differ in adding a space; {_OUR_OWN.format(path=file.path)}"
        )


def _merges(file: GGUFFile, kinds: list[int]) -> list[tuple[str, str]]:
    """The scores as an order of merges: best union first, then as the parts come in the vocabulary."""
    tokens, scores = file.value("tokenizer.ggml.tokens", list), file.value("tokenizer.ggml.scores", list)
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    found = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _vocabulary(file: GGUFFile) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(token -> id, the added tokens). Rows without a token, which pad the embedding, are left out.

    Where the added tokens come behind all others, they are only added, as in the model's own file: there no
    text is ever taken for one of them.
    """
    tokens = file.value("tokenizer.ggml.tokens", list)
    kinds = file.value("tokenizer.ggml.token_type", list)
    if len(tokens) != len(kinds) or len(tokens) != len(set(tokens)):
        raise InputError(
            f"{file.path}: expected distinct tokens and a type of each, found {len(kinds)} types"
        )
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    ids = {token["id"] for token in added}
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    ordinary = len(vocabulary) - len(ids)
    if ids == set(range(ordinary, ordinary + len(ids))):
        vocabulary = {token: i for token, i in vocabulary.items() if i not in ids}
    return vocabulary, added


def _bpe(vocabulary: dict[str, int], merges: list[Any], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocabulary,
        "merges": merges,
    }


def _around(file: GGUFFile, *, by_default: bool) -> dict[str, Any] | None:
    """The special tokens that the tokenizer itself puts around a text; None for none."""
    tokens = file.value("tokenizer.ggml.tokens", list)
    first = file.metadata.get("tokenizer.ggml.add_bos_token", by_default)
    last = file.metadata.get("tokenizer.ggml.add_eos_token", False)
    ids = [
        special_id(file, name) if wanted else None
        for wanted, name in ((first, "bos_token_id"), (last, "eos_token_id"))
    ]
    parts = [[{"SpecialToken": {"id": tokens[i], "type_id": 0}}] if i is not None else [] for i in ids]
    if not any(parts):
        return None
    second = [{"Sequence": {"id": "B", "type_id": 0}}]
    single = [*parts[0], {"Sequence": {"id": "A", "type_id": 0}}, *parts[1]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids if i is not None
        },
    }


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # takes whole words of the vocabulary, and starts with BOS
_SPLITTING: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "qwen2": _split(_WORDS + r"\p{N}" + _REST),
    **{name: _split(_WORDS + r"\p{N}{1,3}" + _REST) for name in _LLAMA3},
}
