"""Batches are what their examples were, whatever the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.records import Example, PairExample, collate, collate_pairs, join, take, take_pairs

ids = st.integers(0, 9)
# An EOS or padding id may stand anywhere: masks come from lengths.
examples = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=5), st.lists(ids, min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


@given(rows=examples, pad_id=ids)
def test_collate_keeps_every_id_and_marks_exactly_the_response(rows, pad_id):
    batch = collate(rows, pad_id=pad_id)
    assert batch.tokens.shape[1] == max(len(p) + len(r) for p, r in rows)
    assert batch.tokens.dtype == torch.int64 and batch.mask.dtype == torch.bool
    for b, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        assert batch.tokens[b, :length].tolist() == prompt + response
        assert (batch.prompt_lengths[b].item(), batch.lengths[b].item()) == (len(prompt), length)
        counts = [len(prompt) <= t < length for t in range(batch.tokens.shape[1])]
        assert batch.mask[b].tolist() == counts
        assert (batch.tokens[b, length:] == pad_id).all()


@given(rows=examples, pad_id=ids)
def test_the_padding_id_changes_nothing_but_the_padding(rows, pad_id):
    first, second = collate(rows, pad_id=pad_id), collate(rows, pad_id=(pad_id + 1) % 10)
    assert torch.equal(first.mask, second.mask) and torch.equal(first.lengths, second.lengths)
    inside = torch.arange(first.tokens.shape[1]) < first.lengths[:, None]
    assert torch.equal(first.tokens[inside], second.tokens[inside])


@given(rows=examples, data=st.data())
def test_taking_rows_of_a_batch_is_collating_those_rows(rows, data):
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    taken = take(collate(rows), torch.tensor(index))
    for got, expected in zip(taken, collate([rows[i] for i in index]), strict=True):
        assert torch.equal(got, expected)


def test_taking_no_row_gives_an_empty_batch():
    taken = take(collate([([1], [2])]), torch.tensor([], dtype=torch.int64))
    assert taken.tokens.shape == (0, 0) and taken.lengths.shape == (0,)


def test_take_refuses_an_index_that_would_add_or_remove_a_dimension():
    batch = collate([([1], [2])])
    with pytest.raises(ValueError, match=r"index of one dimension, got shape \[\]"):
        take(batch, torch.tensor(0))


def test_pairs_keep_chosen_and_rejected_apart_and_in_step():
    pairs = collate_pairs(
        [PairExample(join([1], [2]), join([1], [3, 4])), PairExample(join([5], [6]), join([5], [7]))]
    )
    assert pairs.chosen.tokens.tolist() == [[1, 2], [5, 6]]
    assert pairs.rejected.tokens.tolist() == [[1, 3, 4], [5, 7, 0]]
    second = take_pairs(pairs, torch.tensor([1]))
    assert (second.chosen.tokens.tolist(), second.rejected.tokens.tolist()) == ([[5, 6]], [[5, 7]])


def test_masked_tokens_inside_a_conversation_survive_collating():
    batch = collate([Example([1, 2, 3, 4], [False, True, False, True], 1)])
    assert batch.mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("example", "complaint"),
    [
        (([], [1]), "example 0: expected a prompt length in 1..1, got 0"),
        (Example([1, 2], [False], 1), "example 0: expected a mask of 2 tokens, got 1"),
        (Example([1, 2], [False, True], 3), "expected a prompt length in 1..2, got 3"),
        (Example([1, 2], [True, True], 1), "expected no trained token in the prompt"),
    ],
)
def test_collate_names_the_example_that_contradicts_itself(example, complaint):
    with pytest.raises(ValueError, match=complaint):
        collate([example])


def test_collate_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
