"""A run's files from real preferences: nothing lost, nothing in two of them, and read once."""

import json
from pathlib import Path

import pytest

from minirlhf.data.preference_files import write_preference_files
from minirlhf.data.readers import (
    Dropped,
    open_preferences,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from minirlhf.data.records import Message, Preference
from minirlhf.data.splits import split_by_prompt
from minirlhf.runs import InputError


def rows(count: int) -> list[Preference | Dropped]:
    """Plain and conversational pairs, two to a prompt, and a dropped row."""
    found: list[Preference | Dropped] = [Dropped(99, "empty chosen response")]
    for i in range(count):
        chat = (Message("user", f"q{i}"),) if i % 2 else None
        prompt = f"\n\nHuman: q{i}\n\nAssistant:" if chat else f"Question {i}?\n"
        space = " " if chat else ""
        for j in range(2):
            found.append(Preference(prompt, f"{space}good {j}", f"{space}bad {j}", 2 * i + j + 1, chat))
    return found


def without_lines(records: list) -> list:
    return [record.__class__(**{**vars(record), "line": 0}) for record in records]


@pytest.mark.parametrize("share", [0.0, 1 / 3])
def test_the_files_hold_the_cut_by_prompt_and_read_back_as_the_same_records(
    share: float, tmp_path: Path
) -> None:
    given = rows(40)
    pairs = [row for row in given if isinstance(row, Preference)]
    ours, _, judges = split_by_prompt(pairs, fractions=(1 - share, 0.0, share), seed=1)
    written = write_preference_files(iter(given), tmp_path, judge_share=share, seed=1)
    assert written == (len(ours), len(judges), "dropped 1 of 81: empty chosen response (line 99)")
    files = {"preferences.jsonl", "demonstrations.jsonl", "prompts.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == files | (
        {"judge_preferences.jsonl"} if share else set()
    )
    assert without_lines(read_preferences(tmp_path / "preferences.jsonl").rows) == without_lines(ours)
    if share:
        assert without_lines(read_preferences(tmp_path / "judge_preferences.jsonl").rows) == without_lines(
            judges
        )
    demonstrations = read_demonstrations(tmp_path / "demonstrations.jsonl").rows
    assert [(row.prompt, row.segments) for row in demonstrations] == [
        (pair.prompt, ((pair.chosen, True),)) for pair in ours
    ]
    prompts = read_prompts(tmp_path / "prompts.jsonl").rows
    assert [(row.prompt, row.messages) for row in prompts] == [(pair.prompt, pair.messages) for pair in ours]


def test_a_source_is_walked_through_once_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9))
    )
    opened = open_preferences(source)
    (tmp_path / "out").mkdir()
    assert write_preference_files(opened.rows, tmp_path / "out", judge_share=0.5, seed=0)[:2] != (0, 0)
    assert next(opened.rows, None) is None
    with pytest.raises(InputError, match="expected at least 2 different prompts to split, found 0"):
        write_preference_files(iter(()), tmp_path / "out", judge_share=0.5, seed=0)
