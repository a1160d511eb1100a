"""The tokenizer of a GGUF file gives the ids of the model's own, or is refused."""

import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from minirlhf.models.gguf import convert_gguf
from minirlhf.runs import InputError
from tests.models.gguf_files import SMOL, a_file, byte_level, sentencepiece

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

NUMBERS = [
    "2024 and 12,345.678",
    "a1b22c333",
    "x²½ ٣٤ ⅷ",
    "0x1F 1e-9",
]
WORDS = [
    "Hello world",
    "I'm you're WE'LL they'd 'S it's",
    "  leading and trailing  ",
    "\t\tcode\n\n\n  if x:\n        pass\r\n",
    "日本語 текст émoji 👩‍👩‍👧 漢字",
    "a\u0301 é \u00a0 \u200d",
    "def f(x):\n    return x**2",
    "...!!! ?! -- (a) [b] {c}",
    "",
]


def random_texts(letters: str, count: int = 150) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(count)]


def converted_tokenizer(path: Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    a_file(path / "a.gguf", metadata)
    convert_gguf(path / "a.gguf", path / "out")
    return tokenizers.Tokenizer.from_file(str(path / "out" / "tokenizer.json"))


def test_smollms_numerals_stand_alone_and_the_rest_is_gpt2s(tmp_path: Path) -> None:
    ours = converted_tokenizer(tmp_path, SMOL)
    gpt2 = gpt2_oracle(SMOL)

    def expected(text: str) -> list[int]:
        parts: list[str] = []
        for character in text:
            if character.isnumeric() or not parts or parts[-1][-1].isnumeric():
                parts.append(character)
            else:
                parts[-1] += character
        return [i for part in parts for i in gpt2(part)]

    texts = WORDS + NUMBERS + random_texts("abc 012 89\n\t'st.,½²日")
    assert [ours.encode(text).ids for text in texts] == [expected(text) for text in texts]
    assert [ours.decode(ours.encode(text).ids) for text in texts] == texts
    assert any(gpt2(text) != expected(text) for text in NUMBERS)  # the splitting decides


def gpt2_oracle(metadata: dict[str, Any], kind: str = "GPT2Tokenizer") -> Callable[[str], list[int]]:
    """transformers' own tokenizer of that name, of this vocabulary."""
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = getattr(transformers, kind)(vocab=vocabulary, merges=merges)
    return lambda text: theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_a_splitting_is_that_of_the_models_own_tokenizer(pre: str, kind: str, tmp_path: Path) -> None:
    metadata = byte_level(pre=pre, tail=True)
    ours, theirs = converted_tokenizer(tmp_path, metadata), gpt2_oracle(metadata, kind)
    texts = WORDS + NUMBERS + random_texts("abAB 012\n\r\t'stS.,é\u0301日")
    assert [ours.encode(text).ids for text in texts] == [theirs(text) for text in texts]
    assert ours.get_vocab_size() == len(metadata["tokenizer.ggml.tokens"])


def test_llama_3_splits_numbers_in_threes_takes_whole_words_and_starts_with_bos(tmp_path: Path) -> None:
    metadata = byte_level(pre="llama-bpe", tail=True)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens.insert(256, "Ġunreachable")  # no merge makes it
    kinds.insert(256, 1)
    metadata |= {
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
    }
    ours = converted_tokenizer(tmp_path, metadata)
    assert ours.encode(" unreachable", add_special_tokens=False).ids == [256]
    assert ours.encode("a").ids == [len(tokens) - 2, tokens.index("a")]
    ids = ours.encode("12345678", add_special_tokens=False).tokens
    assert "".join(ids) == "12345678" and {3, 6} <= {len("".join(ids[:i])) for i in range(len(ids))}

    file = tmp_path / "a.gguf"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).backend_tokenizer
    texts = [text for text in WORDS + NUMBERS + random_texts("abAB 012\n\r\t'stS.,é日") if text]
    for text in texts:
        assert (
            ours.encode(text, add_special_tokens=False).ids
            == theirs.encode(text, add_special_tokens=False).ids
        )


def test_special_tokens_keep_their_ids_and_are_one_token_each(tmp_path: Path) -> None:
    for tail in (False, True):
        metadata = byte_level(pre="gpt-2", tail=tail, padding=2)
        tokens = metadata["tokenizer.ggml.tokens"]
        ours = converted_tokenizer(tmp_path, metadata)
        for token in ("<|end|>", "<|start|>", "<think>"):
            assert ours.encode(f"a{token}b").ids.count(tokens.index(token)) == 1
        assert ours.decode(ours.encode("a<|end|><think>").ids) == "a<think>"  # control tokens are special
        assert "[PAD0]" not in ours.get_vocab()


def test_text_is_never_taken_for_a_special_token_behind_the_vocabulary(tmp_path: Path) -> None:
    metadata = byte_level(pre="llama-bpe", tail=True)  # which takes whole words of the vocabulary
    metadata["tokenizer.ggml.tokens"].append("magic")
    metadata["tokenizer.ggml.token_type"].append(3)
    ours = converted_tokenizer(tmp_path, metadata)
    number = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ours.encode("magic", add_special_tokens=False).ids == [number]
    ours.encode_special_tokens = True  # special tokens in a text are text
    assert number not in ours.encode("magic").ids


def sentencepiece_ids(text: str, metadata: dict[str, Any], *, prefix: bool) -> list[int]:
    """SentencePiece's BPE: the neighbours whose union scores best merge, the first of equals."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        unions = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not unions:
            break
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_its_algorithm(prefix: bool, tmp_path: Path) -> None:
    metadata = sentencepiece(**{"tokenizer.ggml.add_space_prefix": prefix})
    ours = converted_tokenizer(tmp_path, metadata)
    texts = WORDS + NUMBERS + random_texts("theinad r 12▁é日\n", 200)
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == sentencepiece_ids(
            text, metadata, prefix=prefix
        )
    assert ours.encode("the").ids[0] == 1  # BOS, as llama.cpp adds it where the file does not say
    plain = [text for text in texts if "▁" not in text]
    assert [ours.decode(ours.encode(text).ids) for text in plain] == plain


def test_files_may_say_whether_bos_and_eos_go_around_a_text(tmp_path: Path) -> None:
    stated = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert converted_tokenizer(tmp_path, SMOL | stated).encode("a").ids[::2] == [1, 0]
    stated = {"tokenizer.ggml.add_bos_token": False}
    assert 1 not in converted_tokenizer(tmp_path, sentencepiece(**stated)).encode("the").ids


def test_special_pieces_after_which_tokenizers_differ_are_refused(tmp_path: Path) -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"].append("[INST]")
    metadata["tokenizer.ggml.token_type"].append(3)
    metadata["tokenizer.ggml.scores"].append(-1000.0)
    a_file(tmp_path / "a.gguf", metadata)
    with pytest.raises(InputError, match=r"special tokens besides BOS and EOS \(\[INST\]\)"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
