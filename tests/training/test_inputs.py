"""A set on disk trains as a set in memory does, to the last bit; reading a large one takes no more memory."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from minirlhf.data.batches import Report, Tokenised
from minirlhf.data.readers import Dropped, Opened, read_demonstrations, read_prompts
from minirlhf.data.records import Demonstration, Message, Prompt, join
from minirlhf.data.splits import split_by_prompt
from minirlhf.data.spool import EXAMPLES, PAIRS, Codec, LazySequence, Spool
from minirlhf.runs import InputError
from minirlhf.training import inputs, preference, reward_model, sft, stages
from minirlhf.training.loop import StageResult
from minirlhf.training.preference import DPOConfig
from minirlhf.training.progress import counting
from minirlhf.training.prompt_rows import PROMPT_ROWS, PROMPTS, PromptRow, without_repeats
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import ReadingConfig, Setting, ShapeConfig
from minirlhf.training.sft import SFTConfig
from minirlhf.training.workspace import Checkpoint, load_policy
from tests.miniature import write_files, write_rows
from tests.training import tiny
from tests.training.tiny import EXAMPLES as ROWS
from tests.training.tiny import MODEL
from tests.training.tiny import PAIRS as PREFERENCES

STEPS: dict[str, Any] = dict(batch_size=4, micro_batch_size=3, epochs=2, learning_rate=1e-2, evaluate_every=2)


def said_in(setting: Setting) -> list[str]:
    return setting.show.__self__  # pyright: ignore[reportFunctionMemberAccess]


def listening(**reading: Any) -> Setting:
    return Setting(0, "cpu", ReadingConfig(**reading), show=[].append)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("start")
    write_files(root, rows=40)
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
    stages.new_model(root / "tokenizer.json", root / "model", shape=shape, seed=0)
    return load_policy(root / "model", listening())


@pytest.fixture
def data(start: Checkpoint) -> Path:
    return start.path.parent


def on_disk(items: list, codec: Codec) -> LazySequence:
    spool = Spool(codec, keep=1)
    for item in items:
        spool.append(item)
    found = spool.select(torch.arange(len(items)).numpy())
    assert isinstance(found, LazySequence)
    return found


def train_sft(rows: Any, held_out: Any, log: Any) -> StageResult:
    config = SFTConfig(**STEPS)
    return sft.train(MODEL, tiny.fresh(), rows, held_out, config, generator=tiny.generator(), log=log)


def train_reward(rows: Any, held_out: Any, log: Any) -> StageResult:
    start, config = tiny.fresh_reward(), RewardConfig(**STEPS)
    return reward_model.train(MODEL, start, rows, held_out, config, generator=tiny.generator(), log=log)


def train_dpo(rows: Any, held_out: Any, log: Any) -> StageResult:
    params, config = tiny.fresh(), DPOConfig(**STEPS)
    return preference.train_dpo(
        MODEL, params, params, rows, held_out, config, generator=tiny.generator(), log=log
    )


@pytest.mark.parametrize(
    ("train", "items", "codec"),
    [(train_sft, ROWS, EXAMPLES), (train_reward, PREFERENCES, PAIRS), (train_dpo, PREFERENCES, PAIRS)],
)
@pytest.mark.parametrize("held", [4_000_000, 0], ids=["validation held", "validation read again"])
def test_training_from_disk_is_training_from_memory_to_the_last_bit(
    train: Callable[..., StageResult], items: list, codec: Codec, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: tuple[list, list] = ([], [])
    expected = train(items * 3, items, lambda *told: metrics[0].append(told))
    monkeypatch.setattr("minirlhf.training.loop._HELD_TOKENS", held)
    found = train(on_disk(items * 3, codec), on_disk(items, codec), lambda *told: metrics[1].append(told))
    assert metrics[0] == metrics[1] and found.history == expected.history
    for ours, theirs in zip(tiny.leaves(found.params), tiny.leaves(expected.params), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("keep", [20_000, 7])
def test_examples_and_splits_do_not_depend_on_where_they_are_kept(
    start: Checkpoint, data: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SPOOL_AFTER", keep)
    monkeypatch.setattr(inputs, "_AT_ONCE", 9)
    setting, file = listening(), data / "demonstrations.jsonl"
    parts = inputs.read_supervised(start, file, setting)
    rows = split_by_prompt(read_demonstrations(file).rows, fractions=(0.8, 0.1, 0.1), seed=0)
    for part, expected in zip(parts, rows, strict=True):
        decoded = [start.tokenizer.decode(example.ids) for example in part]
        assert decoded == [f"{row.prompt}{row.segments[0][0]}<|endoftext|>" for row in expected]
    spooled = f"{file}: 7 rows are kept in memory, 33 more as 0 MB in {tempfile.gettempdir()} (TMPDIR)"
    assert any(line.startswith(spooled) for line in said_in(setting)) is (keep == 7)


def test_in_a_tiny_file_every_split_still_gets_a_prompt(start: Checkpoint, tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": " yes"} for p in ("a", "b", "c", "a")]
    write_rows(tmp_path / "rows.jsonl", rows)
    parts = inputs.read_supervised(start, tmp_path / "rows.jsonl", listening())
    assert sorted(len(part) for part in parts) == [1, 1, 2]
    write_rows(tmp_path / "rows.jsonl", rows[:2])
    with pytest.raises(InputError, match="expected at least 3 different prompts to split, found 2"):
        inputs.read_supervised(start, tmp_path / "rows.jsonl", listening())


def test_what_was_dropped_and_cut_is_said_once_for_the_whole_source(
    start: Checkpoint, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i}", "completion": " yes"} for i in range(30)]
    rows[4]["completion"], rows[6]["completion"] = " ", "far too long " * 30
    write_rows(tmp_path / "rows.jsonl", rows)
    setting = listening(overlong="drop")
    inputs.read_supervised(start, tmp_path / "rows.jsonl", setting)
    assert said_in(setting)[1:3] == [
        f"{tmp_path / 'rows.jsonl'}: dropped 1 of 30: empty response (line 5)",
        f"{tmp_path / 'rows.jsonl'}: dropped 1 of 29: longer than 48 tokens (line 7)",
    ]
    setting = listening(overlong="truncate")
    inputs.read_supervised(start, tmp_path / "rows.jsonl", setting)
    assert said_in(setting)[2].endswith("dropped 0 of 29; truncated 1")
    write_rows(tmp_path / "rows.jsonl", [{**row, "completion": "too long " * 30} for row in rows])
    with pytest.raises(
        InputError, match="examples for train, found none that fits; dropped 30 of 30: longer"
    ):
        inputs.read_supervised(start, tmp_path / "rows.jsonl", listening(overlong="drop"))


def test_columns_that_change_on_the_way_stop_the_reading(start: Checkpoint, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": " yes"} for i in range(30)]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:31: expected .* found \{\"question\", \"answer\"\}"):
        inputs.read_supervised(start, tmp_path / "rows.jsonl", listening())


def resident() -> float:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_a_large_source_is_read_in_flat_memory(start: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    count, sizes = 100_000, []

    def rows() -> Iterator[Demonstration]:
        for i in range(count):
            if i % 10_000 == 0:
                sizes.append(resident())
            yield Demonstration(f"question {i}", ((" an answer", True),), i + 1)

    def tokenise(some: list[Demonstration], *_: Any, **__: Any) -> Tokenised:
        examples = [join([row.line % 256] * 12, [1000 + row.line % 256] * 20) for row in some]
        return Tokenised(examples, list(range(len(some))), Report(len(some), [], []))

    opened: Opened[Demonstration] = Opened(rows(), "generated", "generated rows")
    monkeypatch.setattr(inputs, "SPOOL_AFTER", 1000)
    monkeypatch.setattr(inputs, "open_demonstrations", lambda *_, **__: opened)
    monkeypatch.setattr(inputs, "tokenise_demonstrations", tokenise)
    parts = inputs.read_supervised(start, Path("generated"), listening())
    assert sum(len(part) for part in parts) == count
    assert max(sizes) - sizes[1] < 20  # as lists the examples take 100 MB, and their texts 25


def test_a_full_disk_is_an_error_before_anything_is_written(
    start: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inputs, "SPOOL_AFTER", 7)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"beyond 7 rows \(No space left on device\); set TMPDIR"):
        stages.sft(
            start.path,
            data / "demonstrations.jsonl",
            tmp_path / "out",
            config=SFTConfig(max_steps=1),
            setting=listening(),
        )
    assert list(tmp_path.iterdir()) == []


def test_plain_texts_are_cut_in_the_same_places_wherever_they_are_kept(
    start: Checkpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = inputs.read_plain(start, data / "plain.jsonl", listening())
    monkeypatch.setattr(inputs, "SPOOL_AFTER", 7)
    monkeypatch.setattr(inputs, "_AT_ONCE", 9)
    found = inputs.read_plain(start, data / "plain.jsonl", listening())
    assert [list(part) for part in found] == [list(part) for part in expected]


@pytest.mark.parametrize("keep", [20_000, 3])
def test_prompts_are_used_once_and_keep_their_text_and_facts(
    start: Checkpoint, tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SPOOL_AFTER", keep)
    rows: list[dict] = [{"prompt": f"p{i % 20}", "facts": {"n": i % 20, "é": None}} for i in range(40)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    parts = inputs.read_prompt_rows(start, tmp_path / "prompts.jsonl", 8, listening())
    found = sorted((row for part in parts for row in part), key=lambda row: row.row.line)
    assert [row.row for row in found] == read_prompts(tmp_path / "prompts.jsonl").rows[:20]
    assert [start.tokenizer.decode(row.ids) for row in found] == [f"p{i}" for i in range(20)]
    ids, tested = inputs.read_test_prompts(start, tmp_path / "prompts.jsonl", 8, listening())
    assert [PromptRow(*both) for both in zip(ids, tested, strict=True)] == list(parts.test)


def test_prompts_come_back_from_disk_with_their_messages() -> None:
    messages = (Message("system", "be brief"), Message("user", "é\u2028"))
    for row in (Prompt("p", None, 3), Prompt("q", {"a": [1.5, None]}, 4, messages)):
        assert PROMPTS.unpack(PROMPTS.pack(row)) == row
        both = PromptRow([5, 70_000], row)
        assert PROMPT_ROWS.unpack(PROMPT_ROWS.pack(both)) == both


def test_of_repeated_prompts_the_first_is_used_and_dropped_rows_pass() -> None:
    rows = [Prompt("a", None, 1), Dropped(2, "empty prompt"), Prompt("b", None, 3), Prompt("a", {"n": 1}, 4)]
    assert list(without_repeats(rows)) == rows[:3]


def test_a_long_reading_says_how_far_it_is_and_how_fast() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60)
    rows = counting(iter(range(5000)), "rows [of] x.jsonl", console=console, after=0.0)
    assert next(rows) == 0 and not out.getvalue()  # nothing is read before it is asked for
    assert list(rows) == list(range(1, 5000))
    assert out.getvalue().startswith("rows [of] x.jsonl: 1,000 rows read, ")
    out.truncate(0)
    assert list(counting(range(5000), "x", console=console, after=60.0)) and not out.getvalue().strip("\0")
    terminal = Console(file=out, force_terminal=True, width=60)
    assert len(list(counting(range(3000), "x", console=terminal, after=0.0))) == 3000
    assert "\r" in out.getvalue() and out.getvalue().endswith("x: 3,000 rows read\n")


def test_a_data_set_of_the_hub_stands_in_the_manifest_with_its_revision(
    start: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (data / "demonstrations.jsonl").read_text().splitlines()]
    monkeypatch.setattr("minirlhf.data.hub._open_hub", lambda wanted: (rows, "revision abc"))
    monkeypatch.chdir(tmp_path)
    config = SFTConfig(max_steps=1, batch_size=4)
    stages.sft(start.path, Path("org/name:train"), tmp_path / "out", config=config, setting=listening())
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["data"] == {"data": {"path": "org/name:train", "revision": "revision abc"}}
