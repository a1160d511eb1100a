"""The log-prob of tokens and the entropy of their laws without ever holding [N, V] logits.

    z = W x / τ,   log π(i) = z_i - lse,   lse = log Σ_v e^(z_v),   H = lse - Σ_v π(v) z_v
    ∂(g log π(i) + h H)/∂z_v = g (1[v = i] - π(v)) - h π(v) (log π(v) + H)

The vocabulary is gone through in pieces: forward keeps the sums of an online softmax (Milakov & Gimelshein
2018, arXiv:1805.02867), backward computes each piece again, once it knows lse. That is four products of
2 N D V flops instead of three, and no [N, V] in memory; where the logits of all positions fit into `KEPT`
bytes they are kept, and nothing is computed twice. Positions under the mask are dropped before any product.

Both passes are operators of their own (`torch.library`), so a compiler sees them as one node each; the two
`autograd.Function`s around them give torch.func its rules. Under vmap an element is computed after the other.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minirlhf.kernels import cpu

KEPT = 2**28
"""Bytes of logits that are kept for the backward pass rather than computed again."""

PIECE = 2**25
"""Bytes of logits at a time, otherwise."""

_NARROWEST = 256  # tokens of a piece, however many rows: below, products are slow
_COMPILED = 2**22  # logits of a piece from which a compiled body is worth compiling, where no kernel is


def log_prob(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log π(id), entropy of the law, whether the id is a most probable one): [M] each, 0 or False if masked.

    Args:
        states: [M, D]. unembedding: [V, D]. ids: int64 [M], read under the mask only. mask: bool [M].
        entropy: whether the entropy is asked for; it is 0 otherwise.

    Returns:
        At least fp32. The first two are differentiable in states and unembedding.
    """
    if torch.compiler.is_compiling() and not _known_to_compiler:
        return log_prob_plain(states, unembedding, ids, mask, temperature)
    return _whole(states, unembedding, ids, mask, temperature, entropy)


def tell_compiler() -> None:
    """Lets `torch.compile` take the fused form as one node, with its derivatives, from now on.

    Without it a compiled step gets the plain form, whose logits it holds. It is not done on import, since it
    imports the compiler, which takes a second.
    """
    global _known_to_compiler
    torch.compiler.allow_in_graph(_whole)
    _known_to_compiler = True


_known_to_compiler = False


def _whole(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropies, _, best, _ = _LogProb.apply(states, unembedding, ids, mask, temperature, entropy)
    return logp, entropies, best


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, ...]:
        return _log_prob(states, unembedding, ids, mask, temperature, entropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, unembedding, ids, mask, ctx.temperature, ctx.entropy = inputs
        _, entropies, lse, best, kept = output
        ctx.mark_non_differentiable(lse, best, kept)
        ctx.save_for_backward(states, unembedding, ids, mask, entropies, lse, kept)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by_logp, by_entropy = by_outputs[:2]
        wanted = ctx.needs_input_grad[:2]
        by_states, by_unembedding = _Gradient.apply(
            *ctx.saved_tensors, by_logp, by_entropy, ctx.temperature, *wanted
        )
        return (by_states if wanted[0] else None, by_unembedding if wanted[1] else None, *[None] * 4)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return _one_after_the_other(_LogProb.apply, info.batch_size, in_dims, given)


class _Gradient(torch.autograd.Function):
    """Of `_LogProb`; a function of its own, so that vmap knows what to do with it."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        return _log_prob_gradient(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        states, unembedding, ids, mask, _, _, _, by_logp, by_entropy, ctx.temperature, *ctx.wanted = inputs
        ctx.save_for_backward(states, unembedding, ids, mask, by_logp, by_entropy)

    @staticmethod
    def backward(ctx: Any, *by_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives are rare: they come from the plain form, and cost its memory."""
        states, unembedding, ids, mask, *cotangents = ctx.saved_tensors

        def gradients(states: Tensor, unembedding: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
            def plain(states: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor]:
                return log_prob_plain(states, unembedding, ids, mask, ctx.temperature)[:2]

            both = torch.func.vjp(plain, states, unembedding)[1](cotangents)
            return tuple(each for each, wanted in zip(both, ctx.wanted, strict=True) if wanted)

        given = tuple(each for each, wanted in zip(by_gradients, ctx.wanted, strict=True) if wanted)
        pulled = torch.func.vjp(gradients, states, unembedding, *cotangents)[1](given)
        return *pulled[:2], None, None, None, None, None, *pulled[2:], None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return _one_after_the_other(_Gradient.apply, info.batch_size, in_dims, given)


def _one_after_the_other(
    work: Callable[..., tuple[Tensor, ...]],
    count: int,
    in_dims: tuple[int | None, ...],
    given: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def of(number: int) -> list[Any]:
        return [
            each if place is None else each.select(place, number)
            for each, place in zip(given, in_dims, strict=True)
        ]

    results = [work(*of(number)) for number in range(count)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def log_prob_plain(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`log_prob` through all logits [M, V], always with the entropy: what the fused form has to equal."""
    # Zeros under the mask: a NaN there would pass through the product's gradient, an id through gather.
    states, ids = torch.where(mask[:, None], states, 0.0), torch.where(mask, ids, 0)
    wide = _wide(states, unembedding)
    logp = torch.log_softmax(states.to(wide) @ unembedding.to(wide).T / temperature, dim=-1)
    chosen, entropies = logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    best = mask & (chosen == logp.amax(-1))
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropies, 0.0), best


def forward_pass(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, is a most probable one [M], kept logits [M or 0, V])."""
    index, rows = _selected(states, mask, _wide(states, unembedding))
    rows, chosen_ids = rows / temperature if temperature != 1 else rows, ids[index]
    kept = rows.new_empty((len(states) if _keeps(states, unembedding) else 0, len(unembedding)))
    most, total, weighted = rows.new_full((len(rows),), -torch.inf), *rows.new_zeros(2, len(rows))
    chosen = rows.new_zeros(len(rows))
    for first, logits in _pieces(rows, unembedding, kept):
        place = chosen_ids - first
        here = (place >= 0) & (place < logits.shape[1])
        chosen = torch.where(here, logits.gather(1, torch.where(here, place, 0)[:, None])[:, 0], chosen)
        most, total, weighted = _absorb(logits, most, total, weighted)
    lse = most + total.log()

    def scattered(values: Tensor) -> Tensor:
        return values.new_zeros(len(states)).index_copy_(0, index, values)

    entropies = lse - weighted / total if entropy else torch.zeros_like(lse)
    return scattered(chosen - lse), scattered(entropies), scattered(lse), scattered(chosen == most), kept


def backward_pass(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, entropies: Tensor, lse: Tensor,
    kept: Tensor, by_logp: Tensor, by_entropy: Tensor, temperature: float, want_states: bool,
    want_unembedding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(by states [M, D], by unembedding [V, D]); empty where not wanted."""
    index, rows = _selected(states, mask, _wide(states, unembedding))
    rows, chosen_ids = rows / temperature if temperature != 1 else rows, ids[index]
    entropies, lse, by_logp, by_entropy = (each[index] for each in (entropies, lse, by_logp, by_entropy))
    by_rows = torch.zeros_like(rows) if want_states else None
    by_matrix = rows.new_empty(unembedding.shape) if want_unembedding else None
    for first, logits in _pieces(rows, unembedding, kept, again=True):
        by_logits = _to_gradient(logits, lse, by_logp, by_entropy, entropies)
        piece = unembedding[first : first + logits.shape[1]].to(rows.dtype)
        if by_rows is not None:
            by_rows.addmm_(by_logits, piece)
        if by_matrix is not None:
            torch.mm(by_logits.T, rows, out=by_matrix[first : first + logits.shape[1]])
    if by_rows is not None:  # the token's own share
        by_rows.addcmul_(unembedding[chosen_ids].to(rows.dtype), by_logp[:, None])
        by_rows = states.new_zeros(states.shape).index_copy_(
            0, index, (by_rows / temperature).to(states.dtype)
        )
    if by_matrix is not None:
        by_matrix = by_matrix.index_add_(0, chosen_ids, rows * by_logp[:, None]).to(unembedding.dtype)
    nothing = states.new_empty(0)
    return nothing if by_rows is None else by_rows, nothing.clone() if by_matrix is None else by_matrix


_log_prob = torch.library.custom_op("minirlhf::log_prob", forward_pass, mutates_args=())
_log_prob_gradient = torch.library.custom_op("minirlhf::log_prob_gradient", backward_pass, mutates_args=())


@_log_prob.register_fake
def _(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(states, unembedding)
    kept = len(states) if _keeps(states, unembedding) else 0
    logp, entropies, lse = (states.new_empty(len(states), dtype=wide) for _ in range(3))
    best = states.new_empty(len(states), dtype=torch.bool)
    return logp, entropies, lse, best, states.new_empty((kept, len(unembedding)), dtype=wide)


@_log_prob_gradient.register_fake
def _(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, entropies: Tensor, lse: Tensor,
    kept: Tensor, by_logp: Tensor, by_entropy: Tensor, temperature: float, want_states: bool,
    want_unembedding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(states) if want_states else states.new_empty(0),
        torch.empty_like(unembedding) if want_unembedding else states.new_empty(0),
    )


def _keeps(states: Tensor, unembedding: Tensor) -> bool:
    return len(states) * len(unembedding) * _wide(states, unembedding).itemsize <= KEPT


def _wide(states: Tensor, unembedding: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(states.dtype, unembedding.dtype), torch.float32)


def _selected(states: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The positions under the mask [N], and their states [N, D] in this type."""
    index = mask.nonzero()[:, 0]
    return index, (states if len(index) == len(states) else states[index]).to(dtype)


def _pieces(rows: Tensor, unembedding: Tensor, kept: Tensor, *, again: bool = False) -> Any:
    """(first token, logits [N, w] of w tokens from it on); the caller may overwrite them if it is `again`."""
    count, vocabulary = len(rows), len(unembedding)
    if len(kept):
        if not again:
            torch.mm(rows, unembedding.to(rows.dtype).T, out=kept[:count])
        yield 0, kept[:count].clone() if again else kept[:count]
        return
    width = min(vocabulary, max(_NARROWEST, PIECE // (rows.element_size() * max(count, 1))))
    room = rows.new_empty(count * width)
    for first in range(0, vocabulary, width):
        piece = unembedding[first : first + width].to(rows.dtype)
        logits = room[: count * len(piece)].view(count, len(piece))
        yield first, torch.mm(rows, piece.T, out=logits)


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
