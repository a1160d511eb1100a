"""A policy's own responses as preferences: better by the reward, ended, never of held-out prompts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf.data.readers import read_preferences, read_prompts
from minirlhf.data.splits import split_by_prompt
from minirlhf.runs import InputError
from minirlhf.training import stages
from minirlhf.training.inputs import read_pairs
from minirlhf.training.reward_sources import Reward, of_rule
from minirlhf.training.setting import ReadingConfig, Setting, ShapeConfig
from minirlhf.training.stages.own_pairs import OwnPairs, OwnPairsConfig, best_and_worst, own_pairs
from minirlhf.training.workspace import load_policy
from tests.miniature import write_files, write_rows

CONFIG = OwnPairsConfig(samples=12, pairs_per_prompt=2, temperature=1.0, max_response=48, margin=0.02)
RULE = """
import torch


def share_of_e(prompts, responses, facts):
    return torch.tensor([text.count("e") / max(1, len(text)) for text in responses])


def nothing(prompts, responses, facts):
    return torch.zeros(len(responses))
"""


def quiet(**reading: Any) -> Setting:
    return Setting(0, "cpu", ReadingConfig(validation=0.2, test=0.3, **reading), show=lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, prompts.jsonl as conversations, plain.jsonl the same as texts, rule.py."""
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=96, initializer_range=0.3)
    stages.new_model(root / "data/tokenizer.json", root / "model", shape=shape, seed=0)
    asked = [row.prompt.strip() for row in read_prompts(root / "data/prompts.jsonl").rows]
    write_rows(root / "prompts.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in asked])
    write_rows(root / "plain.jsonl", [{"prompt": text} for text in asked])
    (root / "rule.py").write_text(RULE)
    return root


def rule(made: Path, name: str = "share_of_e") -> Reward:
    return of_rule(f"{made / 'rule.py'}:{name}")


def make(made: Path, out: Path, *, data: str = "prompts.jsonl", config: OwnPairsConfig = CONFIG) -> OwnPairs:
    return own_pairs(made / "model", rule(made), made / data, out, config=config, setting=quiet())


def test_what_did_not_end_is_never_the_better_one() -> None:
    score = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.2]])
    ended = torch.tensor([[False, True, True], [False, False, False]])
    assert best_and_worst(score, ended, margin=0.2) == [(0, 2, 1)]


def test_a_gap_below_the_margin_gives_no_pair_and_one_at_the_margin_does() -> None:
    score = torch.tensor([[0.5, 0.25], [0.5, 0.375]])
    assert best_and_worst(score, torch.ones(2, 2).bool(), margin=0.25) == [(0, 0, 1)]


def test_several_pairs_of_one_prompt_share_no_response() -> None:
    score = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    found = best_and_worst(score, torch.ones(50, 6).bool(), margin=0.01, most=3)
    for prompt in range(50):
        used = [which for i, *pair in found if i == prompt for which in pair]
        assert len(used) == len(set(used))
    assert all(score[i, best] - score[i, worst] >= 0.01 for i, best, worst in found)


def test_a_response_that_breaks_off_cannot_be_better_and_worse_at_once() -> None:
    score, ended = torch.tensor([[0.9, 0.8, 0.1, 0.0]]), torch.tensor([[False, True, True, True]])
    for _, best, worst in best_and_worst(score, ended, margin=0.05, most=2):
        assert best != worst


def test_the_better_response_scores_higher_by_the_margin_as_the_file_has_it(
    made: Path, tmp_path: Path
) -> None:
    found = make(made, tmp_path / "pairs.jsonl")
    rows = read_preferences(tmp_path / "pairs.jsonl", strict=True).rows
    assert len(rows) == found.pairs >= found.prompts - found.without > 1
    for row in rows:
        chosen, rejected = (text.removeprefix(" ") for text in (row.chosen, row.rejected))
        shares = [text.count("e") / len(text) for text in (chosen, rejected)]
        assert shares[0] - shares[1] >= CONFIG.margin - 1e-6


def test_held_out_prompts_have_no_pair(made: Path, tmp_path: Path) -> None:
    make(made, tmp_path / "pairs.jsonl")
    prompts = read_prompts(made / "prompts.jsonl").rows
    test = {row.prompt for row in split_by_prompt(prompts, fractions=(0.5, 0.2, 0.3), seed=0).test}
    paired = {row.prompt for row in read_preferences(tmp_path / "pairs.jsonl").rows}
    assert test
    assert not test & paired


def test_conversations_stay_conversations_and_texts_texts(made: Path, tmp_path: Path) -> None:
    make(made, tmp_path / "chats.jsonl")
    make(made, tmp_path / "texts.jsonl", data="plain.jsonl")
    chats, texts = (
        read_preferences(tmp_path / f"{name}.jsonl", strict=True).rows for name in ("chats", "texts")
    )
    assert all(row.messages is not None and row.messages[-1].role == "user" for row in chats)
    assert all(row.messages is None for row in texts)
    asked = {row.prompt for row in read_prompts(made / "plain.jsonl").rows}
    assert all(row.prompt in asked for row in texts)


def test_no_terminator_is_taught_behind_a_response_that_the_limit_stopped(made: Path, tmp_path: Path) -> None:
    found = make(made, tmp_path / "pairs.jsonl")
    assert found.max_length is not None
    start = load_policy(made / "model", quiet())
    parts = read_pairs(
        start, tmp_path / "pairs.jsonl", quiet(max_length=found.max_length, overlong="truncate")
    )
    pairs = [*parts.train, *parts.validation, *parts.test]
    cut = [pair for pair in pairs if pair.rejected.ids[-1] != start.tokenizer.eos_id]
    assert cut
    for pair in pairs:  # what ends with a terminator is shorter than what the sampler stops
        if pair.rejected.ids[-1] == start.tokenizer.eos_id:
            assert len(pair.rejected.ids) <= found.max_length
    for pair in cut:
        assert start.tokenizer.eos_id not in pair.rejected.ids


def test_the_same_seed_writes_the_same_file(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(made, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_what_cannot_be_done_is_said_before_a_file_is_written(made: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="exists already"):
        make(made, tmp_path / "there.jsonl")
    with pytest.raises(InputError, match="found none among"):
        own_pairs(
            made / "model",
            rule(made, "nothing"),
            made / "prompts.jsonl",
            tmp_path / "pairs.jsonl",
            config=CONFIG,
            setting=quiet(),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
    assert json.loads((tmp_path / "there.jsonl").read_text()) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 1}, "samples"),
        ({"pairs_per_prompt": 7}, "pairs_per_prompt must lie in 1..6"),
        ({"margin": 0.0}, "margin must be positive"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(CONFIG, **changes)
