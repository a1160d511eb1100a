"""How far a policy has moved from its reference, in nats per sequence, with the law and not the sample."""

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.objectives.divergence import exact_kl
from minirlhf.objectives.masked import sequence_sum
from minirlhf.rollout.sampler import Rollout, response_mask

_LOGITS = 2**22  # most logits held at once, per tensor: 16 MiB in fp32


@torch.no_grad()
def kl_to_reference(
    model: LanguageModel, params: Params, ref_params: Params, rollout: Rollout, *, micro_batch_size: int = 64
) -> Tensor:
    """An estimate of KL(π‖π_ref) of whole responses from each response; y ~ π at temperature 1.

        Σₜ KL(π(·|x, y₍<t₎) ‖ π_ref(·|x, y₍<t₎))   over the response tokens t, the stop token included

    By the tower rule its mean over y ~ π is the KL of the sequences. It is the Rao-Blackwellised form of the
    sum of log-ratios: each step's expectation is taken exactly, so it is never negative and varies less.
    A response that met the length limit counts up to there: this is the KL of the law with that limit.

    Args:
        model: the functions of both.
        params, ref_params: π and π_ref.
        rollout: sampled from π at temperature 1, unfiltered.
        micro_batch_size: rows per forward pass. Logits are held for a bounded number of tokens at once,
            whatever the vocabulary.

    Returns:
        fp32 [B] in nats per response, each >= 0 up to rounding.

    Raises:
        ValueError: the rollout was sampled from another law than π at temperature 1.
    """
    mask = response_mask(rollout)
    if (rollout.logp - rollout.sampled_logp)[mask].abs().max() > 1e-4:
        raise ValueError(
            "expected responses sampled at temperature 1, unfiltered; their log-probs say otherwise"
        )
    parts = []
    for rows in torch.arange(len(mask), device=mask.device).split(micro_batch_size):
        width = int(rollout.lengths[rows].max())
        tokens, counts = rollout.tokens[rows, :width], mask[rows, :width]
        kl = _kl_of_states(model, params, ref_params, tokens, counts)
        parts.append(
            sequence_sum(torch.zeros_like(counts, dtype=kl.dtype).masked_scatter(counts, kl), counts)
        )
    return torch.cat(parts)


def _kl_of_states(
    model: LanguageModel, params: Params, ref_params: Params, tokens: Tensor, mask: Tensor
) -> Tensor:
    """Exact KL at every token that counts, [N] in row order."""
    states = aligned(model.hidden(params, tokens))[mask]  # [N, D]
    ref_states = aligned(model.hidden(ref_params, tokens))[mask]
    head, ref_head = model.unembedding(params), model.unembedding(ref_params)
    at_once = max(1, _LOGITS // len(head))
    every = torch.ones(1, at_once, dtype=torch.bool, device=mask.device)
    return torch.cat(
        [
            exact_kl((s @ head.T)[None], (r @ ref_head.T)[None], every[:, : len(s)])[0]
            for s, r in zip(states.split(at_once), ref_states.split(at_once), strict=True)
        ]
    )
