"""Best of n: sample several responses to each prompt, score them by any reward, keep the best.

Alignment without training, and the yardstick for training: what PPO gains at some KL, best of n gains at a KL
of at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv:2401.01879).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.best_of_n import best_of_n_kl_bound, expected_maximum
from minirlhf.rollout.sampler import Law, Rollout, generate
from minirlhf.runs import InputError
from minirlhf.training.rewards import Scorer


class BestOfN(NamedTuple):
    """The best of n responses to each of P prompts, and what is known of them.

    rollout: the best responses, row p answers prompt p; of equal scores the first counts.
    score: [P] theirs.
    scores: [P, n] of all responses.
    kl_bound: nats per response by which the law of the best differs from the sampled law, at most.
    expected_best: [n] mean over prompts of the expected best score of 1, 2, ..., n draws, without bias.
    """

    rollout: Rollout
    score: Tensor
    scores: Tensor
    kl_bound: float
    expected_best: Tensor


def best_of_n(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    *,
    n: int,
    law: Law,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    slots: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> BestOfN:
    """Samples n responses to each prompt, which is read once, and keeps the best.

    Args:
        prompts: P lists of ids.
        scorer: (rollout, prompt_index [P · n]) -> scores [P · n]; `training.reward_sources` and
            `training.rewards` make one of a reward model, a rule or an endpoint.
        n: responses to each prompt, at least 1.
        law, max_new_tokens, stop_ids, seed, slots, progress: as `rollout.sampler.generate` takes them.

    Raises:
        InputError: a prompt cannot be sampled from (see `generate`); a score is not finite, or their number
            is not that of the responses.
        ValueError: n is below 1.
    """
    kl_bound = best_of_n_kl_bound(n)
    prompt_index = torch.arange(len(prompts)).repeat_interleave(n)
    sample_index = torch.arange(n).repeat(len(prompts))
    rollout = generate(
        model,
        params,
        [prompts[row] for row in prompt_index.tolist()],
        law=law,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
        prompt_index=prompt_index,
        sample_index=sample_index,
        slots=slots,
        progress=progress,
    )
    flat = scorer(rollout, prompt_index)
    if flat.shape != (len(prompt_index),) or not bool(flat.isfinite().all()):
        raise InputError(
            f"expected {len(prompt_index)} finite scores, got shape {list(flat.shape)} with "
            f"{int((~flat.isfinite()).sum())} that are not finite"
        )
    scores = flat.view(-1, n)
    best = scores.argmax(1)
    rows = torch.arange(len(prompts), device=best.device) * n + best
    return BestOfN(
        rollout=_rows(rollout, rows),
        score=scores.gather(1, best[:, None])[:, 0],
        scores=scores,
        kl_bound=kl_bound,
        expected_best=torch.stack([expected_maximum(scores, n=draws).mean() for draws in range(1, n + 1)]),
    )


def _rows(rollout: Rollout, rows: Tensor) -> Rollout:
    """These rows, trimmed to the longest of them; counts are those of all that was sampled."""
    rows = rows.to(rollout.tokens.device)
    longest = int(rollout.lengths[rows].max())
    wide = {name: getattr(rollout, name)[rows, :longest] for name in ("tokens", "logp", "sampled_logp")}
    narrow = {name: getattr(rollout, name)[rows] for name in ("prompt_lengths", "lengths", "stop_reason")}
    return rollout._replace(**wide, **narrow)
