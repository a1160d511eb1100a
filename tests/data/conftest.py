"""A byte-level tokenizer small enough to be trained in a test, and writers of JSONL."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minirlhf.data.tokenizer import Tokenizer, load_tokenizer

CORPUS = ["the cat sat on the mat. ", "Human: what is it?", "Assistant: it is the cat.", "  two spaces\n\n"]


def train_backend(eos: str = "<|endoftext|>") -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """EOS is id 0, which is falsy."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_backend().save(str(file))
    return load_tokenizer(file)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, objects or raw lines, to a file."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
