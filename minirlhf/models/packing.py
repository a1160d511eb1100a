"""Rows without their padding, and what several rows begin with only once: one forward pass over a pool.

    rows [R, T]                     pool [N]                        row 0 reads 0 1 2 3 4
    a b c d e      (row 0)          a b c d e                       row 1 reads 0 1 2 5
    a b c f .      (row 1)                f                         N = 6 tokens instead of R · T = 10

A state depends on the tokens up to it and on nothing else. So padding need not be computed, and a token needs
to be computed once for all rows that are equal up to it: the chosen and the rejected side of a pair share
their prompt, the samples of a group theirs. Norms, linear layers and feed-forward, which see one token at a
time, run over the pool; only attention sees rows. It gathers queries, keys and values into right-padded rows,
attends as ever (windows included), and picks each token's result from the first row that holds it. Values and
gradients are those of the padded rows up to rounding, whatever the family: all of it is one more `Attend`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.models.interface import Attend, LanguageModel, Params, causal

WORTH = 0.95
"""Largest share of the padded positions R · T that a pool may have. Above it rows are computed as they are:
gathering costs a few percent of a forward and backward pass of GPT-2 124M on a CPU."""


class Packing(NamedTuple):
    """Where R rows of at most T tokens find their tokens in a pool of N.

    slots: int64 [R, T] the place in the pool of every token; 0 in the padding.
    first: int64 [N] the place among the R · T positions from which each token of the pool is taken.
    """

    slots: Tensor
    first: Tensor


def pack(tokens: Tensor, lengths: Tensor, *, worth: float = WORTH) -> Packing | None:
    """The packing of these rows, or None where it saves too little: see `WORTH`.

    Computed on the host from the ids, so a device waits for it; nothing is read in the padding.

    Args:
        tokens: int64 [R, T] right-padded rows. lengths: int64 [R], 1 to T.
        worth: largest N / (R · T).

    >>> pack(torch.tensor([[7, 8, 9], [7, 8, 0]]), torch.tensor([3, 2]))
    Packing(slots=tensor([[0, 1, 2],
            [0, 1, 0]]), first=tensor([0, 1, 2]))
    """
    rows, lengths = tokens.cpu(), lengths.cpu()
    count, width = rows.shape
    valid = torch.arange(width) < lengths[:, None]
    owner = _owners(rows, lengths, valid)
    own = (valid & (owner == torch.arange(count)[:, None])).flatten()
    first = own.nonzero()[:, 0]
    if len(first) > worth * rows.numel():
        return None
    place = own.cumsum(0) - 1  # in the pool, of the positions that are taken into it
    slots = torch.where(valid, place[owner * width + torch.arange(width)], 0)
    return Packing(slots.to(tokens.device), first.to(tokens.device))


def hidden(model: LanguageModel, params: Params, tokens: Tensor, packing: Packing | None) -> Tensor:
    """`LanguageModel.hidden` of the rows [R, T] -> [R, T, D], computed over their pool if there is a packing.

    Args:
        packing: of these very tokens; None computes every position, padding too.

    Returns:
        As without packing on every token; in the padding, which nothing reads, some other state.

    Raises:
        ValueError: T exceeds the context.
    """
    if packing is None:
        return model.hidden(params, tokens)
    (rows, time), context = packing.slots.shape, model.config.n_positions
    if time > context:
        raise ValueError(f"sequence of {time} tokens exceeds the context of {context}")
    pool = tokens.reshape(-1).index_select(0, packing.first)
    states = model.states(params, pool[None], (packing.first % time)[None], within_rows(packing))
    return states[0].index_select(0, packing.slots.reshape(-1)).view(rows, time, -1)


def within_rows(packing: Packing) -> Attend:
    """`Attend` for the pool as one sequence [1, H, N, Dh]: a token sees what lies before it in its row.

    Rows that share a token agree up to it, so it does not matter in which of them it looks back.
    """
    (rows, time), slots = packing.slots.shape, packing.slots.reshape(-1)

    def spread(x: Tensor) -> Tensor:  # [1, H, N, Dh] -> [R, H, T, Dh]; whole tokens are contiguous pieces
        by_token = x[0].transpose(0, 1).flatten(1)
        return by_token.index_select(0, slots).view(rows, time, x.shape[1], -1).transpose(1, 2)

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        attended = causal(layer, spread(q), spread(k), spread(v), scale=scale, window=window)
        by_token = attended.transpose(1, 2).flatten(2).flatten(0, 1)  # [R · T, H · Dh]
        return by_token.index_select(0, packing.first).unflatten(-1, (q.shape[1], -1)).transpose(0, 1)[None]

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
