"""Token log-probs from hidden states: log π(token) without holding logits for masked positions.

`token_logp_dense` is the plain twin: ten lines, every position, works under vmap.
`token_logp` compacts masked positions away before the product with the unembedding, so a prompt costs none.
"""

import torch
from torch import Tensor


def token_logp_dense(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    logits = (states @ unembedding.T).float() / temperature
    logp = torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]
    return torch.where(mask, logp, 0.0)


def token_logp(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    logits = (states[mask] @ unembedding.T).float() / temperature
    logp = torch.log_softmax(logits, dim=-1).gather(-1, tokens[mask][:, None])[:, 0]
    return torch.zeros(mask.shape, dtype=logp.dtype, device=logp.device).masked_scatter(mask, logp)
