"""Documents -> blocks of one length, for pretraining: no padding, and every token is predicted once."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minirlhf.data.records import Example


class Packed(NamedTuple):
    """Blocks of equal length, and how many tokens at the end of the stream did not fill one."""

    blocks: list[Example]
    dropped_tokens: int


def pack_documents(documents: Iterable[Sequence[int]], *, eos_id: int, block: int) -> Packed:
    """Cuts the stream EOS doc EOS doc ... EOS into blocks that train `block` tokens each.

    A block has block + 1 ids, since its first token is only read: it is the last one that the block before
    it trained (EOS, in the first block). So each token of the stream but the first is trained once, EOS after
    each document included, and a document's first token is predicted from EOS. Documents in one block see
    each other; there is no mask between them.

    Args:
        documents: ids without EOS.
        eos_id: what stands before, between and after them.
        block: tokens trained per block; the model's context must hold block + 1.

    Returns:
        the blocks, each with a prompt of one token; and the tokens lost at the end (fewer than block).

    >>> packed = pack_documents([[5, 6], [7]], eos_id=0, block=2)
    >>> [example.ids for example in packed.blocks], packed.dropped_tokens
    ([[0, 5, 6], [6, 0, 7]], 1)
    """
    if block < 1:
        raise ValueError(f"expected block >= 1, got {block}")
    stream = [eos_id]
    for document in documents:
        stream += [*document, eos_id]
    count, dropped = divmod(len(stream) - 1, block)
    mask = [False] + [True] * block
    blocks = [Example(stream[i * block : (i + 1) * block + 1], list(mask), 1) for i in range(count)]
    return Packed(blocks, dropped)
