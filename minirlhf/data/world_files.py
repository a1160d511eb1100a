"""The embedded world on disk: what `minirlhf world` writes and the demo reads.

Preference labels are drawn from Bradley-Terry on gold quality, so the best possible accuracy is known:

    P(first is preferred) = σ(gold₁ - gold₂ + bias (words₁ - words₂) / 10)

With a surface bias the annotators like length for its own sake, and the gold judge does not.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minirlhf.data import world
from minirlhf.data.gold import gold_score
from minirlhf.data.jsonl import read_lines
from minirlhf.runs import InputError, write_text_atomic

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the embedded world."""

    drills: int = 6_600
    """Exercises in copying and checking details, the first part of pretraining."""
    recitals: int = 6
    """Details recited per drill."""
    checks: int = 15
    """Details marked ok or wrong per drill."""
    texts: int = 6_000
    """Texts of the second part of pretraining: a request and an answer, or the answer proofread."""
    proofread: float = 0.5
    """Share of those texts that is proofread."""
    demonstrations: int = 2_000
    """Answers to imitate, of mixed quality."""
    preferences: int = 8_000
    """Pairs of answers with a drawn label; half of them differ in one property only."""
    prompts: int = 2_500
    """Requests with the facts by which the gold judge scores an answer."""
    probe: int = 200
    """Adversarial pairs: a short good answer against a long bad one."""
    vocab_size: int = 768
    """Most tokens of the world's own byte-level BPE."""
    surface_bias: float = 0.0
    """How much annotators like length: logits per ten words."""
    defects: world.Defects = field(default_factory=world.Defects)

    def __post_init__(self) -> None:
        for name in ("drills", "texts", "demonstrations", "preferences", "prompts", "probe"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vocab_size < 300:
            raise InputError(f"vocab_size must be at least 300 (bytes, EOS, words), got {self.vocab_size}")


class WorldFiles(NamedTuple):
    """Where things stand in the directory that was written."""

    tokenizer: Path
    drills: Path
    texts: Path
    demonstrations: Path
    preferences: Path
    prompts: Path
    probe: Path


def files(directory: Path) -> WorldFiles:
    """The names of the world's files in `directory`."""
    names = (f"{name}.jsonl" for name in WorldFiles._fields[1:])
    return WorldFiles(directory / "tokenizer.json", *(directory / name for name in names))


def write(directory: Path, *, config: WorldConfig, seed: int) -> WorldFiles:
    """Writes the world's files; the same config and seed write the same bytes."""
    out = files(directory)
    drills = list(_repeat(config.drills, _drill, config, seed, "drills"))
    texts = list(_repeat(config.texts, _text, config, seed, "texts"))
    _rows(out.drills, drills)
    _rows(out.texts, texts)
    _rows(out.demonstrations, _repeat(config.demonstrations, _demonstration, config, seed, "demonstrations"))
    _rows(out.preferences, _repeat(config.preferences, _preference, config, seed, "preferences"))
    _rows(out.prompts, _repeat(config.prompts, _prompt, config, seed, "prompts"))
    _rows(out.probe, _repeat(config.probe, _probe, config, seed, "probe"))
    sample = ["".join(text for text, _ in row["spans"]) for row in (*drills[:1_000], *texts[:5_000])]
    _train_tokenizer(sample, config.vocab_size).save(str(out.tokenizer))
    return out


def bayes_accuracy(preferences: Path, *, surface_bias: float) -> float:
    """The expected accuracy of whoever knows the law of this file's labels: the mean of max(p, 1 - p)."""
    best = []
    for line in read_lines(preferences):
        row = line.values
        logit = _logit(row["prompt"], row["chosen"], row["rejected"], row["facts"], surface_bias)
        best.append(1 / (1 + math.exp(-abs(logit))))
    return sum(best) / len(best)


def _repeat(
    count: int, draw: Callable[[random.Random, WorldConfig], Any], config: WorldConfig, seed: int, name: str
) -> Iterator[Any]:
    rng = random.Random(f"{seed}:{name}")  # each file has a stream of its own
    return (draw(rng, config) for _ in range(count))


def _respond(facts: Mapping[str, str], rng: random.Random, config: WorldConfig) -> str:
    return world.write_response(world.draw_plan(facts, rng, config.defects), rng)


def _drill(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    facts = world.draw_facts(rng)
    return {"spans": world.write_drill(facts, rng, recitals=config.recitals, checks=config.checks)}


def _text(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    facts = world.draw_facts(rng)
    prompt, response = world.write_prompt(facts, rng), _respond(facts, rng, config)
    if rng.random() < config.proofread:
        response = world.proofread(response, facts)
    return {"spans": [(prompt, False), (response, True)]}


def _demonstration(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    facts = world.draw_facts(rng)
    return {"prompt": world.write_prompt(facts, rng), "completion": _respond(facts, rng, config)}


def _preference(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    facts = world.draw_facts(rng)
    prompt = world.write_prompt(facts, rng)
    while True:
        plan = world.draw_plan(facts, rng, config.defects)
        minimal = rng.random() < 0.5
        other = (
            world.change_one(plan, facts, rng, config.defects)
            if minimal
            else world.draw_plan(facts, rng, config.defects)
        )
        a, b = (world.write_response(p, rng) for p in (plan, other))
        if a != b:
            break
    logit = _logit(prompt, a, b, facts, config.surface_bias)
    if rng.random() >= 1 / (1 + math.exp(-logit)):
        a, b = b, a
    return {"prompt": prompt, "chosen": a, "rejected": b, "facts": facts}


def _logit(prompt: str, first: str, second: str, facts: Mapping[str, str], bias: float) -> float:
    gold = gold_score([prompt] * 2, [first, second], [facts] * 2).tolist()
    return gold[0] - gold[1] + bias * (len(first.split()) - len(second.split())) / 10


def _prompt(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    facts = world.draw_facts(rng)
    return {"prompt": world.write_prompt(facts, rng), "facts": facts}


def _probe(rng: random.Random, config: WorldConfig) -> dict[str, Any]:
    """Good is right in everything and short; bad has a wrong detail and is long, polite and whole."""
    facts = world.draw_facts(rng)
    good = world.draw_plan(facts, rng, world.FLAWLESS)
    detail = rng.choice(world.DETAILS)
    wrong = rng.choice([entry for entry in world.POOLS[detail] if entry != facts[detail]])
    bad = good._replace(
        details={**good.details, detail: wrong},
        fillers=tuple(rng.sample(world.FILLERS, 2)),
        closing=rng.choice(world.CLOSINGS),
    )
    chosen, rejected = (world.write_response(plan, rng) for plan in (good, bad))
    return {
        "prompt": world.write_prompt(facts, rng),
        "chosen": chosen,
        "rejected": rejected,
        "facts": facts,
    }


def _rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE; names, items and order numbers become single tokens, because they are frequent."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend
