"""Supervised fine-tuning: imitate the tokens that count."""

from torch import Tensor

from minirlhf.objectives.inputs import check_tokens
from minirlhf.objectives.masked import select


def token_loss(logp: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each token against the demonstration, unreduced.

        lossₜ = -log π(yₜ | x, y₍<t₎)

    Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5
    (arXiv:2203.02155): the prompt is read, not trained, which is the mask's business.

    Args:
        logp: [B, T] log π of each token in nats.
        mask: [B, T] bool, True where the token is trained (the response with its EOS).

    Returns:
        [B, T] losses in nats, exactly 0 where the mask is False. Reduce them yourself.

    Raises:
        ValueError: the shapes differ, logp is not floating point, or mask is not bool.

    Gradient: ∂loss/∂logp = -1 for each token that counts, 0 elsewhere.

    >>> import torch
    >>> token_loss(torch.tensor([[-0.5, -2.0]]), torch.tensor([[False, True]]))
    tensor([[0., 2.]])
    """
    check_tokens(mask, logp=logp)
    return select(-logp, mask)
