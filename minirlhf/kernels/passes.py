"""The forward and the backward pass of the fused log-prob, on plain tensors.

The vocabulary is gone through in pieces: forward keeps the sums of an online softmax (Milakov & Gimelshein
2018, arXiv:1805.02867), backward computes each piece again, once it knows the normaliser. That is four
products of 2 N D V flops instead of three, and no [N, V] in memory; where the logits of all positions fit
into `KEPT` bytes they are kept, and nothing is computed twice. Positions under the mask are dropped before
any product. What is done with a piece besides products is one pass of `kernels.cpu`, or compiled.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minirlhf.kernels import cpu
from minirlhf.kernels.products import add_mm, mm

KEPT = 2**28
"""Bytes of logits that are kept for the backward pass rather than computed again."""

PIECE = 2**25
"""Bytes of logits at a time, otherwise."""

COPIED = 2**23
"""Bytes of kept logits that are copied at a time, to be overwritten by their gradient."""

_NARROWEST = 256  # tokens of a piece, however many rows: below, products are slow
_COMPILED = 2**22  # logits of a piece from which a compiled body is worth compiling, where no kernel is


def forward_pass(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, entropy, lse, is a most probable one [M], logits [keep, V], first the positions of the mask).

    Args:
        keep: room for the logits of so many positions, of all under the mask; 0: they are not kept.

    Raises:
        IndexError: an id under the mask is outside the vocabulary.
    """
    index, rows = _selected(states, mask, wide_type(states, unembedding))
    rows, chosen_ids = rows / temperature if temperature != 1 else rows, ids[index]
    _check_ids(chosen_ids, len(unembedding))
    kept = rows.new_empty((keep, len(unembedding)))
    most, total, weighted = rows.new_full((len(rows),), -torch.inf), *rows.new_zeros(2, len(rows))
    chosen = rows.new_zeros(len(rows))
    for first, logits in _pieces(rows, unembedding, kept):
        place = chosen_ids - first
        here = (place >= 0) & (place < logits.shape[1])
        chosen = torch.where(here, logits.gather(1, torch.where(here, place, 0)[:, None])[:, 0], chosen)
        most, total, weighted = _absorb(logits, most, total, weighted)
    lse = most + total.log()

    def scattered(values: Tensor) -> Tensor:
        return values.new_zeros(len(states)).index_put_((index,), values)

    entropies = lse - weighted / total if entropy else torch.zeros_like(lse)
    return scattered(chosen - lse), scattered(entropies), scattered(lse), scattered(chosen == most), kept


def backward_pass(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, entropies: Tensor, lse: Tensor,
    kept: Tensor, by_logp: Tensor, by_entropy: Tensor, temperature: float, want_states: bool,
    want_unembedding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(by states [M, D], by unembedding [V, D]); empty where not wanted."""
    index, rows = _selected(states, mask, wide_type(states, unembedding))
    rows, chosen_ids = rows / temperature if temperature != 1 else rows, ids[index]
    entropies, lse, by_logp, by_entropy = (each[index] for each in (entropies, lse, by_logp, by_entropy))
    by_rows = torch.zeros_like(rows) if want_states else None
    by_matrix = rows.new_empty(unembedding.shape) if want_unembedding else None
    for first, logits in _pieces(rows, unembedding, kept, again=True):
        by_logits = _to_gradient(logits, lse, by_logp, by_entropy, entropies)
        here = slice(first, first + logits.shape[1])
        if by_rows is not None:
            add_mm(by_logits, unembedding[here].to(rows.dtype), out=by_rows)
        if by_matrix is not None:
            mm(by_logits.T, rows, out=by_matrix[here])
    if by_rows is not None:  # the token's own share
        by_rows.addcmul_(unembedding[chosen_ids].to(rows.dtype), by_logp[:, None])
        by_rows = states.new_zeros(states.shape).index_copy_(
            0, index, (by_rows / temperature).to(states.dtype)
        )
    if by_matrix is not None:
        by_matrix = by_matrix.index_add_(0, chosen_ids, rows * by_logp[:, None]).to(unembedding.dtype)
    nothing = states.new_empty(0)
    return nothing if by_rows is None else by_rows, nothing.clone() if by_matrix is None else by_matrix


def log_prob_plain(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`log_prob` through all logits [M, V], always with the entropy: what the fused form has to equal."""
    # Zeros under the mask: a NaN there would pass through the product's gradient, an id through gather.
    states, ids = torch.where(mask[:, None], states, 0.0), torch.where(mask, ids, 0)
    wide = wide_type(states, unembedding)
    logp = torch.log_softmax(states.to(wide) @ unembedding.to(wide).T / temperature, dim=-1)
    chosen, entropies = logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    best = mask & (chosen == logp.amax(-1))
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropies, 0.0), best


def fits(rows: int, unembedding: Tensor, dtype: torch.dtype) -> bool:
    """Whether the logits of so many positions take no more than `KEPT` bytes."""
    return rows * unembedding.shape[0] * dtype.itemsize <= KEPT


def wide_type(states: Tensor, unembedding: Tensor) -> torch.dtype:
    """What is computed in: fp32, or fp64 where an input has it."""
    return torch.promote_types(torch.promote_types(states.dtype, unembedding.dtype), torch.float32)


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if len(ids):
        low, high = torch.stack(ids.aminmax()).tolist()  # one wait for the device
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise IndexError(f"token id {wrong} under the mask is outside the vocabulary of {vocabulary}")


def _selected(states: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The positions under the mask [N], and their states [N, D] in this type."""
    index = mask.nonzero()[:, 0]
    return index, (states if len(index) == len(states) else states[index]).to(dtype)


def _pieces(
    rows: Tensor, unembedding: Tensor, kept: Tensor, *, again: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits [N, w] of w tokens from it on); the caller may overwrite them if it is `again`."""
    count, vocabulary = len(rows), len(unembedding)
    if len(kept) and not again:
        yield 0, mm(rows, unembedding.to(rows.dtype).T, out=kept[:count])
        return
    most = COPIED if len(kept) else PIECE
    width = min(vocabulary, max(_NARROWEST, most // (rows.element_size() * max(count, 1))))
    room = rows.new_empty(count * width)
    for first in range(0, vocabulary, width):
        wide = min(width, vocabulary - first)
        logits = room[: count * wide].view(count, wide)
        if len(kept):
            yield first, logits.copy_(kept[:count, first : first + wide])
        else:
            piece = unembedding[first : first + wide].to(rows.dtype)
            yield first, mm(rows, piece.T, out=logits)


def _absorb(logits: Tensor, most: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if _by_kernel(logits):
        return cpu.absorb(logits, most, total, weighted)
    return _body(_absorb_plain, logits)(logits, most, total, weighted)


def _to_gradient(
    logits: Tensor, lse: Tensor, by_logp: Tensor, by_entropy: Tensor, entropies: Tensor
) -> Tensor:
    if _by_kernel(logits):
        return cpu.to_gradient(logits, lse, by_logp, by_entropy, entropies)
    return _body(_to_gradient_plain, logits)(logits, lse, by_logp, by_entropy, entropies)


def _absorb_plain(
    logits: Tensor, most: Tensor, total: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of an online softmax over one more piece."""
    top = torch.maximum(most, logits.amax(1))
    shrink = (most - top).exp()
    mass = (logits - top[:, None]).exp()
    return top, total * shrink + mass.sum(1), weighted * shrink + (mass * logits).sum(1)


def _to_gradient_plain(
    logits: Tensor, lse: Tensor, by_logp: Tensor, by_entropy: Tensor, entropies: Tensor
) -> Tensor:
    """-π (g + h (log π + H)): the gradient by the logits, but for the token's own."""
    logp = logits - lse[:, None]
    return -logp.exp() * ((by_logp + by_entropy * entropies)[:, None] + by_entropy[:, None] * logp)


def _by_kernel(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and cpu.available()


def _body(work: Callable[..., Any], logits: Tensor) -> Callable[..., Any]:
    return _compiled(work) if logits.numel() >= _COMPILED else work


@cache
def _compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(work, dynamic=True)
