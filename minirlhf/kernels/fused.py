"""The log-prob of tokens and the entropy of their laws without ever holding [N, V] logits.

    z = W x / τ,   log π(i) = z_i - lse,   lse = log Σ_v e^(z_v),   H = lse - Σ_v π(v) z_v
    ∂(g log π(i) + h H)/∂z_v = g (1[v = i] - π(v)) - h π(v) (log π(v) + H)

Both passes (`kernels.passes`) are operators of their own, so a compiler sees them as one node each; the two
`autograd.Function`s around them give torch.func its rules. Under vmap an element is computed after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

from minirlhf.kernels import passes
from minirlhf.kernels.passes import fits, log_prob_plain, wide_type


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
    rows = _rows(mask) if torch.is_grad_enabled() else 0  # whose logits may be kept for a backward pass
    keep = rows if fits(rows, unembedding, wide_type(states, unembedding)) else 0
    logp, entropies, _, best, _ = _LogProb.apply(states, unembedding, ids, mask, temperature, entropy, keep)
    return logp, entropies, best


def _rows(mask: Tensor) -> int:
    """Positions under the mask; all of them where nobody can count: under vmap, for a compiler, on fakes."""
    inside = mask
    while is_functorch_wrapped_tensor(inside):
        if is_batchedtensor(inside):
            return mask.shape[0]
        inside = get_unwrapped(inside)
    if torch.compiler.is_compiling() or detect_fake_mode([inside]) is not None or inside.is_meta:
        return mask.shape[0]
    return int(inside.sum())


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        return _log_prob(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, unembedding, ids, mask, ctx.temperature, *_ = inputs
        _, entropies, lse, best, kept = output
        ctx.mark_non_differentiable(lse, best, kept)
        ctx.set_materialize_grads(False)  # zeros for the kept logits would be as large as these
        ctx.save_for_backward(states, unembedding, ids, mask, entropies, lse, kept)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        lse = ctx.saved_tensors[5]
        by_logp, by_entropy = (torch.zeros_like(lse) if each is None else each for each in by_outputs[:2])
        wanted = ctx.needs_input_grad[:2]
        by_states, by_unembedding = _Gradient.apply(
            *ctx.saved_tensors, by_logp, by_entropy, ctx.temperature, *wanted
        )
        return (by_states if wanted[0] else None, by_unembedding if wanted[1] else None, *[None] * 5)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return one_after_the_other(_LogProb.apply, info.batch_size, in_dims, given)


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
        return one_after_the_other(_Gradient.apply, info.batch_size, in_dims, given)


def one_after_the_other(
    work: Callable[..., tuple[Tensor, ...]],
    count: int,
    in_dims: tuple[int | None, ...],
    given: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A rule for vmap: what `work` gives for each element, stacked in front, and where that is."""

    def of(number: int) -> list[Any]:
        return [
            each if place is None else each.select(place, number)
            for each, place in zip(given, in_dims, strict=True)
        ]

    results = [work(*of(number)) for number in range(count)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _log_prob_shapes(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, temperature: float, entropy: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = wide_type(states, unembedding)
    count, vocabulary = states.shape[0], unembedding.shape[0]  # not len(), which a compiler would fix
    logp, entropies, lse = (states.new_empty(count, dtype=wide) for _ in range(3))
    best = states.new_empty(count, dtype=torch.bool)
    return logp, entropies, lse, best, states.new_empty((keep, vocabulary), dtype=wide)


def _log_prob_gradient_shapes(
    states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, entropies: Tensor, lse: Tensor,
    kept: Tensor, by_logp: Tensor, by_entropy: Tensor, temperature: float, want_states: bool,
    want_unembedding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(states) if want_states else states.new_empty(0),
        torch.empty_like(unembedding) if want_unembedding else states.new_empty(0),
    )


_log_prob = torch.library.custom_op("minirlhf::log_prob", passes.forward_pass, mutates_args=())
_log_prob.register_fake(_log_prob_shapes)
_log_prob_gradient = torch.library.custom_op(
    "minirlhf::log_prob_gradient", passes.backward_pass, mutates_args=()
)
_log_prob_gradient.register_fake(_log_prob_gradient_shapes)
