"""What every model family offers, and the two things that all of them share: the shift and the scalar head.

A model is a frozen config, a nested dict of tensors named like the checkpoint, and pure functions of both.
`LanguageModel` binds the functions of one family to one config, so that rollout, kernels, training and
evaluation never learn which family they run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Any]
"""Nested dicts and lists of tensors under the checkpoint's names: `params["h"][3]["ln_1"]["weight"]`."""


class Attend(Protocol):
    """How queries find the keys before them: within the sequence (`causal`), or in a cache (rollout).

    Args:
        layer: which layer asks, counted from 0.
        q: [B, H, T, Dh].
        k, v: [B, H_kv, T, Dh] of the same tokens; heads of a group of H / H_kv share them.
        scale: what the scores are multiplied by; None for 1 / √Dh.
        window: how many tokens a query sees, itself included; None for all that are not after it.

    Returns:
        softmax(scale q·k) v, [B, H, T, Dh], in the dtype of q.
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor: ...


def causal(
    layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """`Attend` within the sequence: a token sees itself and what lies before it."""
    k, v, time, shared = k.to(q.dtype), v.to(q.dtype), q.shape[2], q.shape[1] != k.shape[1]
    shared = True if shared else False  # noqa: SIM210 (to a compiler it may be a symbol, not a bool)
    if window is None or window >= time:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    at = torch.arange(time, device=q.device)
    visible = (at <= at[:, None]) & (at > at[:, None] - window)  # [T, T]
    return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=shared)


class RunBlock(Protocol):
    """How a block of the model is run: as it is (`directly`), or so that its activations are not kept.

    Args:
        block: (params, x [B, T, D], *context) -> [B, T, D].
        params: of this block.
        x: the residual stream.
        context: what else the block reads.
    """

    def __call__(self, block: Callable[..., Tensor], params: Params, x: Tensor, *context: Any) -> Tensor: ...


def directly(block: Callable[..., Tensor], params: Params, x: Tensor, *context: Any) -> Tensor:
    """`RunBlock`: block(params, x, *context)."""
    return block(params, x, *context)


class CacheShape(NamedTuple):
    """What a token leaves behind for later ones: keys and values [heads, width] in each of the layers."""

    layers: int
    heads: int
    width: int


class LanguageModel(NamedTuple):
    """One family bound to one config.

    config: frozen dataclass; has at least `vocab_size`, `n_positions`, `eos_token_id`.
    init: generator -> fresh parameters.
    states: (params, tokens [B, T], positions [T] or [B, T], attend) -> [B, T, D], final norm applied. The
        one forward pass of a family: `hidden` calls it for whole sequences, a sampler for parts of them. The
        families' own also take `run`, a RunBlock (`models.recompute.recomputing` passes another).
    unembedding: params -> [V, D].
    cache: what a cache has to hold per token.
    stop_ids: tokens that end a response, EOS first; a directory may name several.
    head: the entry of the parameters that only `unembedding` reads; None where that is the token embedding.
    """

    config: Any
    init: Callable[[torch.Generator], Params]
    states: Callable[..., Tensor]
    unembedding: Callable[[Params], Tensor]
    cache: CacheShape
    stop_ids: tuple[int, ...]
    head: str | None = None

    def hidden(self, params: Params, tokens: Tensor) -> Tensor:
        """States after each token, final norm applied: tokens [B, T] -> [B, T, D].

        Attention is causal, so right padding reaches no valid position and needs no mask.

        Raises:
            ValueError: T exceeds the context. Nothing is cropped.
        """
        time, context = tokens.shape[1], self.config.n_positions
        if time > context:
            raise ValueError(f"sequence of {time} tokens exceeds the context of {context}")
        return self.states(params, tokens, torch.arange(time, device=tokens.device), causal)


def aligned(hidden: Tensor) -> Tensor:
    """The state that predicts token t, at slot t: aligned(hidden)[:, t] = hidden[:, t - 1].

    The one place where the shift by one happens; log-probs and values both read its result, so slot t of
    everything [B, T] belongs to token t. Slot 0 predicts nothing (prompts are never empty) and holds zeros.

    Args:
        hidden: [B, T, D] states after reading each token.

    Returns:
        [B, T, D] states before reading each token.
    """
    return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)


def with_scalar_head(model: LanguageModel, params: Params, *, generator: torch.Generator) -> Params:
    """The same backbone (shared, not copied) with a fresh scalar head: score.weight [1, D] ~ N(0, 1/(D+1)).

    The head replaces an unembedding of the model's own. The scale is that of Stiennon et al. 2020
    (arXiv:2009.01325), appendix B: on the final norm's output, of unit variance per entry, the first scores
    have a variance near 1.
    """
    reference = model.unembedding(params)
    width = reference.shape[-1]
    weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    return {**without_head(model, params), "score": {"weight": weight.to(reference)}}


def without_head(model: LanguageModel, params: Params) -> Params:
    """The backbone alone: what a scalar head reads, and a reward model's directory holds beside it."""
    return {name: value for name, value in params.items() if name != model.head}


def scalar(params: Params, hidden: Tensor) -> Tensor:
    """Score of every state, hidden · score: [..., D] -> [...], a raw reward or a value.

    At least fp32: half-precision states and heads are computed in fp32.
    """
    head = params["score"]["weight"][0]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
    return hidden.to(dtype) @ head.to(dtype)
