"""Token log-probs from hidden states, where only the tokens under the mask cost a product with [V, D].

`token_logp` and `token_logp_and_entropy` compact the masked positions away first, so a prompt costs no
unembedding. A boolean index has a data-dependent shape, which vmap cannot have: there the `_dense` twins run,
which compute every position and are the plain statement of what the others must equal.

All of them take states that are aligned with the tokens they predict (`models.interface.aligned`), compute
the log-softmax in fp32 for half-precision input (fp64 stays fp64), and return exactly 0 with zero gradient
where the mask is False, whatever lies there.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenReport(NamedTuple):
    """What a supervised step wants to know of its tokens; each [B, T], 0 or False where masked.

    logp: in nats, differentiable. entropy: of the law at the token, in nats, without a gradient.
    is_argmax: bool, the token is a most probable one.
    """

    logp: Tensor
    entropy: Tensor
    is_argmax: Tensor


def token_logp(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every token under the mask.

        log π(token_t) = z_t[token_t] / τ - log Σ_v exp(z_t[v] / τ),    z_t = unembedding · states_t

    Args:
        states: [B, T, D] the state that predicts token t, at slot t.
        unembedding: [V, D].
        tokens: [B, T] ids, read under the mask only.
        mask: [B, T] bool, True = counts.
        temperature: τ > 0, which divides the logits.

    Returns:
        [B, T] in nats, at most 0; 0 where masked. Differentiable in states and unembedding.

    Raises:
        ValueError: shapes disagree, the mask is not bool, or the temperature is not positive.

    >>> states, unembedding = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.0], [1.0], [2.0]])
    >>> tokens, mask = torch.tensor([[0, 2]]), torch.tensor([[False, True]])
    >>> token_logp(states, unembedding, tokens, mask)
    tensor([[ 0.0000, -0.4076]])
    """
    _check(states, unembedding, tokens, mask, temperature)
    rows, ids = _selected(states, tokens, mask)
    return _scattered(_of_token(_log_softmax(rows, unembedding, temperature), ids), mask)


def token_logp_and_entropy(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logp` and the entropy of the law at every token under the mask, from one product.

        H_t = -Σ_v π_t(v) log π_t(v)

    Arguments and errors are those of `token_logp`.

    Returns:
        (logp, entropy), each [B, T] in nats; the entropy lies in [0, log V]. Both differentiable.
    """
    _check(states, unembedding, tokens, mask, temperature)
    rows, ids = _selected(states, tokens, mask)
    logp = _log_softmax(rows, unembedding, temperature)
    return _scattered(_of_token(logp, ids), mask), _scattered(_entropy(logp), mask)


def token_report(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> TokenReport:
    """`token_logp` with metrics beside it that cost neither a second product nor a backward pass.

    Arguments and errors are those of `token_logp`.
    """
    _check(states, unembedding, tokens, mask, temperature)
    rows, ids = _selected(states, tokens, mask)
    logp = _log_softmax(rows, unembedding, temperature)
    chosen, fixed = _of_token(logp, ids), logp.detach()
    return TokenReport(
        _scattered(chosen, mask),
        _scattered(_entropy(fixed), mask),
        _scattered(chosen == fixed.amax(-1), mask),
    )


def token_logp_dense(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """`token_logp` over every position: the plain twin, which works under vmap. Costs B·T·V memory."""
    _check(states, unembedding, tokens, mask, temperature)
    states, tokens = _blanked(states, tokens, mask)
    logp = _log_softmax(states, unembedding, temperature)
    return torch.where(mask, _of_token(logp, tokens), 0.0)


def token_logp_and_entropy_dense(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logp_and_entropy` over every position: the plain twin, which works under vmap."""
    _check(states, unembedding, tokens, mask, temperature)
    states, tokens = _blanked(states, tokens, mask)
    logp = _log_softmax(states, unembedding, temperature)
    return torch.where(mask, _of_token(logp, tokens), 0.0), torch.where(mask, _entropy(logp), 0.0)


def _log_softmax(states: Tensor, unembedding: Tensor, temperature: float) -> Tensor:
    """[..., D] -> [..., V] in nats, at least fp32."""
    logits = states @ unembedding.T
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if temperature != 1.0:  # a division by one would still cost a pass over [N, V]
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def _of_token(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(-1, tokens[..., None])[..., 0]


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def _selected(states: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States [N, D] and tokens [N] of the N positions under the mask."""
    index = mask.reshape(-1).nonzero()[:, 0]  # index_select's backward is faster than a boolean index's
    return states.reshape(-1, states.shape[-1]).index_select(0, index), tokens.reshape(-1)[index]


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """[N] back to [B, T], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _blanked(states: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros under the mask: a NaN there would pass through the product's gradient, an id through gather."""
    return torch.where(mask[..., None], states, 0.0), torch.where(mask, tokens, 0)


def _check(states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> None:
    shapes = [tuple(each.shape) for each in (states, unembedding, tokens, mask)]
    fits = states.ndim == 3 and unembedding.ndim == 2 and states.shape[2] == unembedding.shape[1]
    if not (fits and tokens.shape == mask.shape == states.shape[:2]):
        raise ValueError(
            "expected states [B, T, D], unembedding [V, D], tokens [B, T], mask [B, T]; "
            "got {}, {}, {}, {}".format(*shapes)
        )
    if mask.dtype != torch.bool:  # an integer mask would be read as indices
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if not temperature > 0:  # also refuses NaN
        raise ValueError(f"temperature must be positive, got {temperature}")
