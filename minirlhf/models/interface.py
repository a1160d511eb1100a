"""What every model family offers, and the two things that all of them share: the shift and the scalar head.

A model is a frozen config, a nested dict of tensors named like the checkpoint, and pure functions of both.
`LanguageModel` binds the functions of one family to one config, so that rollout, kernels, training and
evaluation never learn which family they run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Any]
"""Nested dicts and lists of tensors under the checkpoint's names: `params["h"][3]["ln_1"]["weight"]`."""


class Cache(NamedTuple):
    """Keys and values of every layer, allocated once at full capacity S by whoever samples.

    keys: L tensors [B, H, S, Dh]; values: likewise. Slots beyond a row's length hold garbage that no
    query attends to.
    """

    keys: list[Tensor]
    values: list[Tensor]


class LanguageModel(NamedTuple):
    """One family bound to one config.

    config: frozen dataclass; has at least `vocab_size`, `n_positions`, `eos_token_id`.
    init: generator -> fresh parameters.
    hidden: (params, tokens [B, T]) -> [B, T, D], final norm applied. Causal: right padding changes nothing.
    unembedding: params -> [V, D].
    new_cache: (params, batch, capacity) -> Cache on the device and in the dtype of the parameters.
    extend_: (params, tokens [B, T], start [B], cache) -> hidden [B, T, D]; writes the cache at
        start[b] .. start[b] + T - 1 of row b and attends to what lies before in row b, as far as the family
        looks back.
    stop_ids: tokens that end a response, EOS first; a directory may name several.
    head: the entry of the parameters that only `unembedding` reads; None where that is the token embedding.

    What is longer than the context or the cache is a ValueError, never cropped.
    """

    config: Any
    init: Callable[[torch.Generator], Params]
    hidden: Callable[[Params, Tensor], Tensor]
    unembedding: Callable[[Params], Tensor]
    new_cache: Callable[[Params, int, int], Cache]
    extend_: Callable[[Params, Tensor, Tensor, Cache], Tensor]
    stop_ids: tuple[int, ...]
    head: str | None = None


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
