"""What goes to disk comes back as it was, nothing is left of it, and a set costs numbers, not tokens."""

import errno
import os
import random
import tempfile
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.account import Account
from minirlhf.data.batches import validate, validate_pairs
from minirlhf.data.records import Example, PairExample, collate, collate_pairs, join, take
from minirlhf.data.rows import checked_pair_rows, checked_rows, gather
from minirlhf.data.spool import EXAMPLES, PAIRS, LazySequence, Spool
from minirlhf.runs import InputError

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
examples = st.builds(
    lambda prompt, response, seed: Example(
        prompt + response,
        [False] * len(prompt) + [random.Random(seed + i).random() < 0.7 for i in range(len(response))],
        len(prompt),
    ),
    ids,
    ids,
    st.integers(0, 99),
)


def some_pairs(count: int) -> list[PairExample]:
    """Ragged pairs of at most 20 tokens."""
    pairs = []
    for i in range(count):
        prompt = [i % 7] * (1 + i % 5)
        pairs.append(PairExample(join(prompt, [8] * (1 + i % 3)), join(prompt, [9] * (1 + i % 11))))
    return pairs


def spooled(items: list, codec: Any, *, keep: int) -> Spool:
    spool = Spool(codec, keep=keep)
    for item in items:
        spool.append(item)
    return spool


@given(st.lists(examples, max_size=12), st.integers(0, 4), st.randoms())
def test_every_item_comes_back_in_any_order_wherever_it_lies(items, keep, rng):
    spool = spooled(items, EXAMPLES, keep=keep)
    assert len(spool) == len(items) and spool.on_disk == max(0, len(items) - keep)
    index = [rng.randrange(len(items)) for _ in items]
    chosen = spool.select(np.array(index, dtype=np.int64))
    assert list(chosen) == [items[i] for i in index]
    assert isinstance(chosen, list) is not bool(spool.on_disk)


def test_a_pair_comes_back_with_both_sides():
    pairs = some_pairs(9)
    chosen = spooled(pairs, PAIRS, keep=2).select(np.arange(9))
    assert list(chosen) == pairs
    assert list(chosen[2:5]) == pairs[2:5] and chosen[-1] == pairs[-1]
    with pytest.raises(IndexError):
        chosen[9]


def test_items_appended_after_a_reading_are_read_too():
    pairs = some_pairs(6)
    spool = spooled(pairs[:4], PAIRS, keep=1)
    assert spool.item(3) == pairs[3]
    spool.append(pairs[4])
    assert [spool.item(i) for i in range(5)] == pairs[:5]


def test_a_lazy_sequence_makes_an_item_each_time_it_is_asked():
    made = []
    lazy = LazySequence(3, lambda i: made.append(i) or i)
    assert lazy and len(lazy) == 3 and not made
    assert lazy[1] == 1 and lazy[-1] == 2 and list(lazy[::-1]) == [2, 1, 0]
    assert made == [1, 2, 2, 1, 0]
    assert not LazySequence(0, lambda i: i)


def test_the_file_has_no_name_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = spooled(some_pairs(50), PAIRS, keep=1)
    assert spool.item(40) == some_pairs(41)[40]  # it lies there
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    class Full:
        def close(self) -> None: ...

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    spool = spooled(some_pairs(5), PAIRS, keep=2)
    told = (
        f"{tmp_path}: cannot hold the data set's tokens beyond 2 rows (No space left on device); set TMPDIR"
    )
    with pytest.raises(InputError) as raised:
        spool.item(3)
    assert str(raised.value).startswith(told)
    with pytest.raises(InputError, match="No space left"):
        for _ in range(5):
            spool.append(PairExample(join([1], [2] * 100_000), join([1], [3])))
    assert list(tmp_path.iterdir()) == []


def test_a_set_on_disk_costs_a_few_numbers_per_row():
    rows, length = 4_000, 100
    example = join(list(range(1000, 1000 + length // 2)), list(range(2000, 2000 + length // 2)))
    tracemalloc.start()
    spool = Spool(EXAMPLES, keep=10)
    for _ in range(rows):
        spool.append(Example(list(example.ids), list(example.mask), example.prompt_length))
    found = checked_rows(spool.select(np.arange(rows)), vocab_size=3000)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spool.bytes_on_disk == (rows - 10) * (8 + 5 * length)  # 2 MB, and 30 as lists
    assert size < 6 * 8 * rows + 5e5 and peak < 4e6
    assert found.lengths.tolist() == [length] * rows


@pytest.mark.parametrize("keep", [3, 1000])
def test_rows_are_gathered_as_they_would_be_taken_from_one_padded_batch(keep):
    items = [pair.rejected for pair in some_pairs(700)]
    rows = checked_rows(spooled(items, EXAMPLES, keep=keep).select(np.arange(700)), vocab_size=10)
    whole = validate(collate(items), vocab_size=10)
    assert torch.equal(rows.lengths, whole.lengths) and torch.equal(rows.counted, whole.mask.sum(1))
    index = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:40]
    for ours, theirs in zip(gather(rows, index), take(whole, index), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_pairs_are_rows_chosen_sides_first():
    pairs = some_pairs(300)
    rows = checked_pair_rows(spooled(pairs, PAIRS, keep=5).select(np.arange(300)), vocab_size=10)
    whole = validate_pairs(collate_pairs(pairs), vocab_size=10)
    assert torch.equal(rows.lengths, torch.cat([whole.chosen.lengths, whole.rejected.lengths]))
    assert torch.equal(rows.counted, torch.cat([side.mask.sum(1) for side in whole]))
    assert [rows.examples[i] for i in (7, 307)] == list(pairs[7])


@pytest.mark.parametrize("count", [300, 3])
def test_a_bad_example_is_found_before_training_wherever_it_lies(count):
    pairs = some_pairs(count)
    pairs[-1] = PairExample(join([1], [99]), join([1], [2]))
    with pytest.raises(InputError) as raised:
        checked_pair_rows(pairs, vocab_size=10)
    first = "examples 256 to 299: row 43" if count == 300 else "row 2"
    assert str(raised.value).startswith(f"{first} of the batch: expected every id in the model's vocabulary")


def test_an_account_counts_all_and_lists_the_first():
    account = Account()
    for line in range(1, 100_001):
        account.add(line, "longer than 8 tokens")
    account.add(7, "empty response")
    listed = ", ".join(map(str, range(1, 21)))
    assert account.dropped == 100_001
    assert account.told(total=200_000) == (
        f"dropped 100001 of 200000: longer than 8 tokens (lines {listed} and 99980 more); "
        "empty response (line 7)"
    )
    assert Account().told(total=5) == "dropped 0 of 5"
