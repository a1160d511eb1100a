"""How far a policy has moved from its reference, in nats per sequence, with the law and not the sample.

Both models read the same rows, so one packing serves both: no padding, and the samples of a prompt read it
once (`models.packing`).
"""

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.models.packing import Packing, hidden
from minirlhf.objectives.divergence import exact_kl
from minirlhf.objectives.masked import sequence_sum
from minirlhf.rollout.sampler import Rollout, response_mask
from minirlhf.training.packed import in_order, parts_of

KL_ROWS = 64
"""Rows that both models read at a time."""

_LOGITS = 2**22  # most logits held at once, per tensor: 16 MiB in fp32


@torch.no_grad()
def kl_to_reference(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    *,
    micro_batch_size: int = KL_ROWS,
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
    parts, found = parts_of(rollout, size=micro_batch_size), []
    for rows, width, packing in parts:
        tokens, counts = rollout.tokens[rows, :width], mask[rows, :width]
        place = counts.flatten().nonzero()[:, 0]
        kl = kl_of_tokens(model, params, ref_params, tokens, place, packing)
        found.append(
            sequence_sum(torch.zeros_like(counts, dtype=kl.dtype).masked_scatter(counts, kl), counts)
        )
    return in_order(found, parts)


@torch.no_grad()
def kl_of_tokens(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    tokens: Tensor,
    place: Tensor,
    packing: Packing | None = None,
) -> Tensor:
    """KL(π(·|x, y₍<t₎) ‖ π_ref(·|x, y₍<t₎)) at the tokens of right-padded rows [R, T] that stand at `place`.

    Args:
        place: int64 [N] positions among the R · T, by rows; none is a row's first.
        packing: of these rows; see `packing.hidden`.

    Returns:
        fp32 [N] in nats.
    """
    states, ref_states = (
        aligned(hidden(model, each, tokens, packing)).flatten(0, 1).index_select(0, place)  # [N, D]
        for each in (params, ref_params)
    )
    head, ref_head = model.unembedding(params), model.unembedding(ref_params)
    at_once = max(1, _LOGITS // len(head))
    every = torch.ones(1, at_once, dtype=torch.bool, device=tokens.device)
    return torch.cat(
        [
            exact_kl((s @ head.T)[None], (r @ ref_head.T)[None], every[:, : len(s)])[0]
            for s, r in zip(states.split(at_once), ref_states.split(at_once), strict=True)
        ]
    )
