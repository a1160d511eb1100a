"""Real preferences -> the files of a run: pairs, demonstrations and prompts to learn from, pairs for a judge.

Read once as a stream, and written in a second pass over what was usable: where a split begins is known only
when the last prompt was seen, and the text of a large set does not fit into memory.
"""

import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from minirlhf.data.account import Account
from minirlhf.data.conversation import demonstration_of, prompt_of
from minirlhf.data.readers import Dropped, open_preferences, row_of
from minirlhf.data.records import Demonstration, Preference, Prompt
from minirlhf.data.splits import boundaries, position

PAIRS, JUDGES_PAIRS = "preferences.jsonl", "judge_preferences.jsonl"
DEMONSTRATIONS, PROMPTS = "demonstrations.jsonl", "prompts.jsonl"


class Written(NamedTuple):
    """What was written: pairs to learn from, pairs for the judge, and what became of the other rows."""

    ours: int
    judges: int
    dropped: str


def write_preference_files(
    rows: Iterable[Preference | Dropped], folder: Path, *, judge_share: float, seed: int
) -> Written:
    """Cuts pairs by prompt, and writes the four files; the judge's only where it has a share.

    Args:
        rows: as `readers.open_preferences` gives them.
        folder: where to write.
        judge_share: of the prompts, in [0, 1).
        seed: of the cut; not that of the stages' own, or the judge's prompts would all lie in one of theirs.

    Raises:
        InputError: as of the rows, or there are too few prompts to cut.
    """
    usable, places, dropped = folder / ".usable.jsonl", array("d"), Account()
    with usable.open("w", encoding="utf-8") as file:
        for row in rows:
            if isinstance(row, Dropped):
                dropped.add(*row)
            else:
                _write(file, row)
                places.append(position(row.prompt, seed=seed))
    _, begins = boundaries(np.asarray(places), fractions=(1 - judge_share, 0.0, judge_share))
    judges = 0
    with (
        (folder / PAIRS).open("w", encoding="utf-8") as pairs,
        (folder / DEMONSTRATIONS).open("w", encoding="utf-8") as demonstrations,
        (folder / PROMPTS).open("w", encoding="utf-8") as prompts,
        (folder / JUDGES_PAIRS).open("w", encoding="utf-8") as judged,
    ):
        again = open_preferences(usable, strict=True).rows if places else ()
        for place, row in zip(places, again, strict=True):
            assert isinstance(row, Preference)  # strict: none is dropped
            if place >= begins:
                judges += 1
                _write(judged, row)
            else:
                _write(pairs, row)
                _write(demonstrations, demonstration_of(row))
                _write(prompts, prompt_of(row))
    usable.unlink()
    if not judges:
        (folder / JUDGES_PAIRS).unlink()
    told = dropped.told(total=len(places) + dropped.dropped)
    return Written(len(places) - judges, judges, told)


def _write(file: TextIO, record: Demonstration | Preference | Prompt) -> None:
    file.write(json.dumps(row_of(record), ensure_ascii=False) + "\n")
