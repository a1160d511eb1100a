"""A miniature of everything a stage reads: a tokenizer, a tiny model, a few dozen rows of each kind."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
THINGS = ("lamp", "chair", "door", "car", "house", "boat", "coat", "hat")


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE with <|endoftext|>, trained on the miniature's own words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{_ask(c, t)} {_good(c, t)}" for c in COLOURS for t in THINGS], trainer)
    backend.save(str(path))


def write_files(folder: Path, *, rows: int = 64, seed: int = 0) -> None:
    """tokenizer.json, plain.jsonl, demonstrations.jsonl, preferences.jsonl, prompts.jsonl, probe.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pairs = [(c, t) for c in COLOURS for t in THINGS][:rows]
    rng.shuffle(pairs)
    write_tokenizer(folder / "tokenizer.json")
    write_rows(folder / "plain.jsonl", [{"text": f"{_ask(c, t)}{_good(c, t)}"} for c, t in pairs])
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": _ask(c, t), "completion": rng.choice((_good, _bad))(c, t)} for c, t in pairs],
    )
    write_rows(
        folder / "preferences.jsonl",
        [{"prompt": _ask(c, t), "chosen": _good(c, t), "rejected": _bad(c, t)} for c, t in pairs],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": _ask(c, t)} for c, t in pairs])
    probe = [{"prompt": _ask(c, t), "chosen": _good(c, t), "rejected": _bad(c, t) * 2} for c, t in pairs[:4]]
    write_rows(folder / "probe.jsonl", probe)


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _ask(colour: str, thing: str) -> str:
    return f"I want a {colour} {thing}.\n"


def _good(colour: str, thing: str) -> str:
    return f"Here is a {colour} {thing}."


def _bad(colour: str, thing: str) -> str:
    return f"No {thing} here."
