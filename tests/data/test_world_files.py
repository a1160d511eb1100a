"""The embedded world's files: sizes, label law, adversarial probe, tokenizer."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from minirlhf.data import world
from minirlhf.data.gold import gold_score
from minirlhf.data.plain import read_texts
from minirlhf.data.readers import read_demonstrations, read_preferences, read_prompts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.data.world_files import WorldConfig, WorldFiles, bayes_accuracy, write
from minirlhf.runs import InputError

SIZES: dict[str, Any] = {
    "drills": 300,
    "texts": 1500,
    "demonstrations": 40,
    "preferences": 1500,
    "prompts": 30,
    "probe": 40,
}


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write(tmp_path_factory.mktemp("fair"), config=WorldConfig(**SIZES), seed=0)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write(tmp_path_factory.mktemp("biased"), config=WorldConfig(**SIZES, surface_bias=3.0), seed=0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def gold(row: dict[str, Any], side: str) -> float:
    return float(gold_score([row["prompt"]], [row[side]], [row["facts"]])[0])


def test_files_have_the_sizes_asked_for_and_their_readers_take_every_row(fair: WorldFiles) -> None:
    assert {name: len(rows(getattr(fair, name))) for name in SIZES} == SIZES
    assert not read_demonstrations(fair.demonstrations, strict=True).dropped
    assert not read_preferences(fair.preferences, strict=True).dropped
    assert all(row.facts for row in read_prompts(fair.prompts, strict=True).rows)


def test_labels_are_as_often_right_as_the_bayes_accuracy_says(fair: WorldFiles) -> None:
    pairs = rows(fair.preferences)
    gaps = [gold(row, "chosen") - gold(row, "rejected") for row in pairs]
    decided = sum(gap > 0 for gap in gaps) + 0.5 * sum(gap == 0 for gap in gaps)
    expected = sum(1 / (1 + math.exp(-abs(gap))) for gap in gaps) / len(gaps)
    assert bayes_accuracy(fair.preferences, surface_bias=0.0) == pytest.approx(expected, abs=1e-6)
    error = 0.5 / math.sqrt(len(pairs))  # of a share
    assert decided / len(pairs) == pytest.approx(expected, abs=4 * error)


def test_a_surface_bias_prefers_length_that_gold_does_not(fair: WorldFiles, biased: WorldFiles) -> None:
    def longer(path: Path) -> float:
        gaps = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows(path)]
        return sum(gap > 0 for gap in gaps) / sum(gap != 0 for gap in gaps)

    assert longer(biased.preferences) > longer(fair.preferences) + 0.05


def test_the_bayes_accuracy_of_biased_labels_is_that_of_the_biased_law(biased: WorldFiles) -> None:
    pairs = rows(biased.preferences)
    logits = [
        gold(row, "chosen")
        - gold(row, "rejected")
        + 3.0 * (len(row["chosen"].split()) - len(row["rejected"].split())) / 10
        for row in pairs
    ]
    expected = sum(1 / (1 + math.exp(-abs(logit))) for logit in logits) / len(logits)
    assert bayes_accuracy(biased.preferences, surface_bias=3.0) == pytest.approx(expected, abs=1e-6)
    right = sum(logit > 0 for logit in logits) / len(logits)
    assert right == pytest.approx(expected, abs=2 / math.sqrt(len(pairs)))


def test_the_probes_good_answer_is_shorter_and_better(fair: WorldFiles) -> None:
    for row in rows(fair.probe):
        assert len(row["chosen"].split()) < len(row["rejected"].split())
        assert gold(row, "chosen") > gold(row, "rejected")


def test_every_file_has_prompts_of_its_own_stream(fair: WorldFiles) -> None:
    first = [rows(getattr(fair, name))[0]["prompt"] for name in SIZES if name not in ("drills", "texts")]
    assert len(set(first)) == len(first)


def test_names_items_and_numbers_are_single_tokens_and_text_comes_back(fair: WorldFiles) -> None:
    tokenizer = load_tokenizer(fair.tokenizer)
    words = [word for pool in world.POOLS.values() for word in pool]
    assert [word for word in words if len(tokenizer.encode(" " + word)) > 1] == []
    assert tokenizer.vocab_size <= WorldConfig().vocab_size
    for row in rows(fair.demonstrations):
        assert tokenizer.decode(tokenizer.encode(row["completion"])) == row["completion"]


def test_half_of_the_texts_are_answers_and_half_are_proofread(fair: WorldFiles) -> None:
    texts = list(read_texts(fair.texts))
    assert all([trained for _, trained in spans] == [False, True] for spans in texts)
    marked = sum(bool(re.search(r" (ok|wrong)\b", spans[1][0])) for spans in texts) / len(texts)
    assert marked == pytest.approx(0.5, abs=0.06)


def test_drills_train_only_what_the_request_tells(fair: WorldFiles) -> None:
    known = set(world.KIND_OF) | {"ok", "wrong"}
    for spans in read_texts(fair.drills):
        assert {text.strip() for text, trained in spans if trained} <= known
        (prompt, asked), *rest = spans
        assert not asked
        for (word, _), (mark, trained) in zip(rest, rest[1:], strict=False):
            if trained and mark.strip() in ("ok", "wrong"):
                assert (mark == " ok") == (word.strip() in re.findall(r"\w+", prompt))


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"vocab_size": 100}])
def test_impossible_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least"):
        WorldConfig(**wrong)
