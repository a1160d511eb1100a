"""Packing predicts every token of the stream once, and says how many fell off its end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.batches import validate
from minirlhf.data.packing import pack_documents
from minirlhf.data.records import collate


@given(documents=st.lists(st.lists(st.integers(1, 9), max_size=7), max_size=8), block=st.integers(1, 9))
def test_each_token_of_the_stream_is_trained_once_after_the_token_before_it(documents, block):
    stream = [0]
    for document in documents:
        stream += [*document, 0]
    packed = pack_documents(documents, eos_id=0, block=block)
    predicted = [
        (example.ids[t - 1], example.ids[t])
        for example in packed.blocks
        for t in range(block + 1)
        if example.mask[t]
    ]
    pairs = list(zip(stream, stream[1:], strict=False))
    assert predicted == pairs[: len(pairs) - packed.dropped_tokens]
    assert 0 <= packed.dropped_tokens < block
    assert all(len(example.ids) == len(example.mask) == block + 1 for example in packed.blocks)


def test_blocks_collate_into_a_valid_batch_without_padding():
    batch = collate(pack_documents([[1, 2, 3], [4, 5]], eos_id=0, block=3).blocks)
    assert validate(batch, vocab_size=6).tokens.tolist() == [[0, 1, 2, 3], [3, 0, 4, 5]]
    assert batch.lengths.tolist() == [4, 4] and batch.prompt_lengths.tolist() == [1, 1]


def test_a_block_without_room_is_refused():
    with pytest.raises(ValueError, match="expected block >= 1, got 0"):
        pack_documents([[1]], eos_id=0, block=0)
