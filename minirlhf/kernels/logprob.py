"""Token log-probs from hidden states, where only the tokens under the mask cost a product with [V, D].

`token_logp`, `token_logp_and_entropy` and `token_report` are fused (`kernels.fused`): they never hold logits
of a whole batch, unless these are few. Their `_dense` twins are the plain statement of what they must equal.

All of them take states that are aligned with the tokens they predict (`models.interface.aligned`), compute
the log-softmax in fp32 for half-precision input (fp64 stays fp64), and return exactly 0 with zero gradient
where the mask is False, whatever lies there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.kernels.fused import log_prob
from minirlhf.kernels.passes import log_prob_plain


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
        ValueError: shapes disagree, the mask is not bool, tokens are not int64, or the temperature is not
            positive.
        IndexError: an id under the mask is outside the vocabulary.

    >>> states, unembedding = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.0], [1.0], [2.0]])
    >>> tokens, mask = torch.tensor([[0, 2]]), torch.tensor([[False, True]])
    >>> token_logp(states, unembedding, tokens, mask)
    tensor([[ 0.0000, -0.4076]])
    """
    return _fused(states, unembedding, tokens, mask, temperature)[0]


def token_logp_and_entropy(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logp` and the entropy of the law at every token under the mask, from one product.

        H_t = -Σ_v π_t(v) log π_t(v)

    Arguments and errors are those of `token_logp`.

    Returns:
        (logp, entropy), each [B, T] in nats; the entropy lies in [0, log V]. Both differentiable.
    """
    return _fused(states, unembedding, tokens, mask, temperature)[:2]


def token_report(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> TokenReport:
    """`token_logp` with metrics beside it that cost neither a second product nor a backward pass.

    Arguments and errors are those of `token_logp`.
    """
    logp, entropy, is_argmax = _fused(states, unembedding, tokens, mask, temperature)
    return TokenReport(logp, entropy.detach(), is_argmax)


def token_logp_dense(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """`token_logp` over every position: the plain twin. Costs B·T·V memory."""
    return token_logp_and_entropy_dense(states, unembedding, tokens, mask, temperature=temperature)[0]


def token_logp_and_entropy_dense(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logp_and_entropy` over every position: the plain twin."""
    _check(states, unembedding, tokens, mask, temperature)
    logp, entropies, _ = log_prob_plain(*_flat(states, unembedding, tokens, mask), temperature)
    return logp.view(mask.shape), entropies.view(mask.shape)


def _fused(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(states, unembedding, tokens, mask, temperature)
    flat = _flat(states, unembedding, tokens, mask)
    logp, entropies, best = log_prob(*flat, temperature, entropy=True)
    return logp.view(mask.shape), entropies.view(mask.shape), best.view(mask.shape)


def _flat(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return states.reshape(-1, states.shape[-1]), unembedding, tokens.reshape(-1), mask.reshape(-1)


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
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64, got {tokens.dtype}")
    if not temperature > 0:  # also refuses NaN
        raise ValueError(f"temperature must be positive, got {temperature}")
