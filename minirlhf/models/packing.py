"""Rows without their padding, and what several rows begin with only once: one forward pass over a pool.

    rows [R, T]                     pool [N]                        row 0 reads 0 1 2 3 4
    a b c d e      (row 0)          a b c d e                       row 1 reads 0 1 2 5
    a b c f .      (row 1)                f                         N = 6 tokens instead of R · T = 10

A state depends on the tokens up to it and on nothing else. So padding need not be computed, and a token needs
to be computed once for all rows that are equal up to it: the chosen and the rejected side of a pair share
their prompt, the samples of a group theirs. Norms, linear layers and feed-forward, which see one token at a
time, run over the pool; only attention sees rows. It gathers queries, keys and values into a few blocks of
rows of like length, attends as ever in each (windows included), and picks each token's result from one row
that holds it. Values and gradients are those of the padded rows up to rounding, whatever the family: all of
it is one more `Attend`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirlhf.models.interface import Attend, LanguageModel, Params, causal

WORTH = 0.95
"""Largest share of the padded positions R · T that a pool may have; above it, rows are computed as they are.
A step of GPT-2 124M on a 2-core CPU with a share of 1 takes 1 to 3 % longer packed, with 0.96 as long."""

BLOCKS = 4
"""Most blocks of rows in attention. Each number of them is another graph to a compiler, so they are few."""

# What a block costs, in units of attention's work on one pair of positions, measured as above: so much per
# block, and so much per position for gathering it.
_PER_BLOCK = 4096
_PER_POSITION = 40


class Packing(NamedTuple):
    """Where R rows of at most T tokens find their tokens in a pool of N.

    tokens: int64 [N] ids of the pool. positions: int64 [N] the place of each in its row.
    slots: int64 [R, T] the place in the pool of every token; 0 in the padding.
    blocks: the rows again, sorted into blocks [R_i, T_i] of like length; entries as those of `slots`.
    picked: int64 [N] the place among the positions of all blocks where a token's attention is read; None
        where the pool is the one block itself, position by position.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    blocks: tuple[Tensor, ...]
    picked: Tensor | None


def pack(tokens: Tensor, lengths: Tensor, *, worth: float = WORTH, blocks: int = BLOCKS) -> Packing | None:
    """The packing of these rows, or None where it saves too little: see `WORTH`.

    Computed on the host from the ids, so a device waits for it; nothing is read in the padding.

    Args:
        tokens: int64 [R, T] right-padded rows. lengths: int64 [R], 1 to T.
        worth: largest N / (R · T). blocks: most blocks of rows.

    >>> packing = pack(torch.tensor([[7, 8], [7, 9]]), torch.tensor([2, 2]))
    >>> packing.tokens, packing.slots
    (tensor([7, 8, 9]), tensor([[0, 1],
            [0, 2]]))
    """
    device, rows, lengths = tokens.device, tokens.cpu(), lengths.cpu()
    (count, width), at = rows.shape, torch.arange(rows.shape[1])
    valid = at < lengths[:, None]
    owner = _owners(rows, lengths, valid)
    own = valid & (owner == torch.arange(count)[:, None])
    taken = own.flatten().nonzero()[:, 0]
    if len(taken) > worth * rows.numel():
        return None
    place = own.flatten().cumsum(0) - 1  # in the pool, of the positions that are taken into it
    slots = torch.where(valid, place[owner * width + at], 0)
    order = lengths.argsort(descending=True, stable=True)
    cut, where, start = [], torch.empty_like(slots), 0
    for part in order.split(_block_sizes(lengths[order].numpy(), blocks)):
        longest = int(lengths[part[0]])
        block = slots[part, :longest]
        where[part, :longest] = start + torch.arange(block.numel()).view_as(block)
        start += block.numel()
        cut.append(block.to(device))
    ids, picked = rows.flatten()[taken], where.flatten()[taken]
    ids, positions, slots, picked = (each.to(device) for each in (ids, taken % width, slots, picked))
    return Packing(ids, positions, slots, tuple(cut), picked)


def unpacked(tokens: Tensor) -> Packing:
    """The packing that changes nothing: all positions of rows [R, T] one by one, padding included."""
    (count, width), place = tokens.shape, torch.arange(tokens.numel(), device=tokens.device)
    slots = place.view(count, width)
    return Packing(tokens.flatten(), place % width, slots, (slots,), None)


def hidden(model: LanguageModel, params: Params, tokens: Tensor, packing: Packing | None) -> Tensor:
    """`LanguageModel.hidden` of the rows [R, T] -> [R, T, D], computed over their pool if there is a packing.

    Args:
        packing: of these very tokens; None computes every position, padding too.

    Returns:
        As without packing on every token; in the padding, which nothing reads, some other state.

    Raises:
        ValueError: T exceeds the context, or the packing is of rows of another shape.
    """
    if packing is None:
        return model.hidden(params, tokens)
    (rows, time), context = packing.slots.shape, model.config.n_positions
    if packing.slots.shape != tokens.shape:
        raise ValueError(f"a packing of rows {list(packing.slots.shape)} for tokens {list(tokens.shape)}")
    if time > context:
        raise ValueError(f"sequence of {time} tokens exceeds the context of {context}")
    pool, positions = packing.tokens[None], packing.positions[None]
    states = model.states(params, pool, positions, within_rows(packing))[0]
    return states.index_select(0, packing.slots.reshape(-1)).view(rows, time, -1)


def within_rows(packing: Packing, attend_rows: Attend = causal) -> Attend:
    """`Attend` for the pool as one sequence [1, H, N, Dh]: a token sees what lies before it in its row.

    Rows that share a token agree up to it, so it does not matter in which of them it looks back.

    Args:
        attend_rows: of a block of rows [R, H, T, Dh].
    """
    blocks, sizes, picked = packing.blocks, [block.numel() for block in packing.blocks], packing.picked
    if picked is None:
        return _one_by_one(blocks[0].shape, attend_rows)
    gathered = torch.cat([block.reshape(-1) for block in blocks])

    def spread(x: Tensor) -> list[Tensor]:  # [1, H, N, Dh] -> [R_i, H, T_i, Dh] of each block
        by_token = x[0].transpose(0, 1).flatten(1).index_select(0, gathered)
        return [
            part.view(*block.shape, x.shape[1], -1).transpose(1, 2)
            for part, block in zip(by_token.split(sizes), blocks, strict=True)
        ]

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        parts = [
            attend_rows(layer, *rows, scale=scale, window=window).transpose(1, 2).flatten(0, 1).flatten(1)
            for rows in zip(spread(q), spread(k), spread(v), strict=True)
        ]  # [R_i · T_i, H · Dh] each
        by_token = parts[0] if len(parts) == 1 else torch.cat(parts)
        by_token = by_token.index_select(0, picked)
        return by_token.unflatten(-1, (q.shape[1], -1)).transpose(0, 1)[None]

    return attend


def _one_by_one(shape: torch.Size, attend_rows: Attend) -> Attend:
    """`within_rows` of a pool that is rows [R, T], one by one."""

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        rows = (each[0].unflatten(1, shape).transpose(0, 1) for each in (q, k, v))  # [R, H, T, Dh]
        attended = attend_rows(layer, *rows, scale=scale, window=window)
        return attended.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]

    return attend


def _owners(rows: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
    """[R, T] the row from which each token is taken: of all rows equal up to it, always the same one.

    In lexicographic order, a token is shared with the row before if with any row before.
    """
    ids: list[list[int]] = [row[:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
    order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
    rows, valid = rows[order], valid[order]
    equal = (rows[1:] == rows[:-1]) & valid[1:] & valid[:-1]
    shared = torch.cat([torch.zeros_like(valid[:1]), equal.long().cumprod(1).bool()])
    number = torch.arange(len(ids))[:, None]
    owner = torch.where(shared, 0, number).cummax(0).values  # the last row, down to here, not to share it
    return torch.empty_like(owner).index_copy_(0, order, order[owner])


def _block_sizes(lengths: np.ndarray, blocks: int) -> list[int]:
    """How many rows each block has: of all cuts of the falling lengths [R] into at most `blocks` the one of
    the least work.

    No block has a single row unless all rows are one block: a compiler makes another graph for size 1.
    """
    count = len(lengths)
    wide = lengths.astype(np.float64)
    size = np.arange(count + 1)[None] - np.arange(count)[:, None]  # of the block from row i up to row j
    work = size * (wide * (wide + _PER_POSITION))[:, None] + _PER_BLOCK
    work = np.where((size >= 2) | (size == count), work, np.inf)
    best, starts = work[0], []  # best[j]: the least work of rows 0 to j, in one block more each time
    least, cut = best[count], [count]
    for _ in range(min(blocks, count // 2) - 1):
        total = best[:count, None] + work
        starts.append(total.argmin(0))
        best = total.min(0)
        if best[count] < least:
            least, cut = best[count], _cut_back(starts, count)
    return cut


def _cut_back(starts: list[np.ndarray], count: int) -> list[int]:
    """Sizes of the blocks, from where the last block of each number of blocks starts."""
    ends = [count]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    ends = [*ends, 0][::-1]
    return [after - before for before, after in zip(ends[:-1], ends[1:], strict=True)]
