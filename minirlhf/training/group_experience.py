"""The sampling half of an iteration by groups: G responses to each prompt, scored, compared with each other.

    R(x, y) = score(x, y) - β Σ_t log π_old(y_t)/π_ref(y_t)    return of a response: the KL, by k1, is reward
    A_1 .. A_G = advantages(R_1 .. R_G)                        over the responses to one prompt

A response is one action here: each of its tokens has the advantage of the whole.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.packing import Packing
from minirlhf.objectives.divergence import kl_k1
from minirlhf.objectives.group_advantages import (
    group_centred_advantage,
    group_normalised_advantage,
    rloo_advantage,
)
from minirlhf.objectives.masked import select, sequence_sum
from minirlhf.rollout.sampler import Rollout, response_mask
from minirlhf.training.experience import by_rows, check_finite, logp_of, penalised_score
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.offload import Lendable, using
from minirlhf.training.ppo_sampling import corrected, prompts_of, respond
from minirlhf.training.rewards import Scorer


class GroupObjective(NamedTuple):
    """How the returns of a group become advantages.

    name: of the stage.
    advantages: (return [P, G], mask bool [P, G], False = not scored) -> [P, G]; one row per prompt.
    """

    name: str
    advantages: Callable[[Tensor, Tensor], Tensor]


RLOO = GroupObjective("rloo", rloo_advantage)
"""R_i less the mean of the others: an unbiased policy gradient (Ahmadian et al. 2024, arXiv:2402.14740)."""

GROUP_CENTRED = GroupObjective("group-centred", group_centred_advantage)
"""R_i less the mean of all: (G - 1)/G times RLOO (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""

GROUP_NORMALISED = GroupObjective("group-normalised", group_normalised_advantage)
"""The same over the group's standard deviation (GRPO, Shao et al. 2024, arXiv:2402.03300): easy and hard
prompts weigh alike. It is no gradient of E R any more, but its fixed point is that of RLOO (group_policy)."""


class GroupExperience(NamedTuple):
    """One iteration's N = P · G responses; rows p·G .. p·G + G - 1 answer the same prompt.

    tokens: int64 [N, T] prompt and response; mask: bool [N, T], True on response tokens.
    prompt_lengths, lengths: int64 [N].
    old_logp: [N, T] log π_old(token), tempered as it was sampled; ref_logp: [N, T] the reference's, likewise.
    score: [N] the reward of the response, less the missing-EOS penalty.
    ret: [N] R: the score less β times the response's log ratio to the reference.
    advantage: [N, T] A of the response on each of its tokens.
    packing: how these rows are computed, once they are a micro-batch; None: as padded rows.
    """

    tokens: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    score: Tensor
    ret: Tensor
    advantage: Tensor
    packing: Packing | None = None


class GroupSampled(NamedTuple):
    """What one iteration sampled.

    prompt_index: int64 [N] the prompt of each row; rollout: as sampled; experience: what is made of it.
    sampler_gap: the largest |recorded - recomputed| log-prob of a sampled token, in nats.
    """

    prompt_index: Tensor
    rollout: Rollout
    experience: GroupExperience
    sampler_gap: float


def sample(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    config: GroupConfig,
    objective: GroupObjective,
    *,
    episode: int,
    seed: int,
    stop_ids: Sequence[int],
) -> GroupSampled:
    """The episodes `episode` .. `episode` + batch_size - 1, group after group, made into experience.

    Which prompts, and which uniforms, is a function of seed and episode; the prompts come pass after pass in
    PPO's order.

    Raises:
        GuardError: the trainer's log-probs are not those that the sampler recorded.
        InputError: a score is not finite.
    """
    episodes = torch.arange(episode, episode + config.batch_size)
    groups = episodes[:: config.samples_per_prompt] // config.samples_per_prompt
    prompt_index = grouped(prompts_of(groups, len(prompts), seed=seed), config.samples_per_prompt)
    rollout = respond(
        model,
        policy,
        [prompts[row] for row in prompt_index.tolist()],
        config,
        seed=seed,
        prompt_index=prompt_index,
        sample_index=episodes,
        stop_ids=stop_ids,
    )
    score = scorer(rollout, prompt_index)
    experience = collect(model, policy, reference, rollout, score, config, objective)
    gap, advantage = corrected(policy, rollout, experience, config)
    return GroupSampled(prompt_index, rollout, experience._replace(advantage=advantage), gap)


def grouped(prompt_index: Tensor, samples: int) -> Tensor:
    """Each prompt [P] as often as it is sampled, its rows side by side: [P · samples].

    >>> grouped(torch.tensor([4, 2]), 3)
    tensor([4, 4, 4, 2, 2, 2])
    """
    return prompt_index.repeat_interleave(samples)


@torch.no_grad()
def collect(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    rollout: Rollout,
    score: Tensor,
    config: GroupConfig,
    objective: GroupObjective,
) -> GroupExperience:
    """Scores every token of a rollout by both models and forms returns and advantages.

    The length limit is part of the task: a truncated response is scored as it stands and pays the missing-EOS
    penalty. The KL compares both laws at the sampling temperature. Nothing is whitened over the batch, so
    that β keeps its unit and no group sees another.

    Args:
        rollout: rows of one prompt side by side, as `grouped` orders them.
        score: [N] one number per response, as the scorer gave it.

    Raises:
        InputError: score has another shape than [N]; or a score or a log-prob is not finite.
        ValueError: an advantage is not finite.
    """
    mask = response_mask(rollout)
    law = partial(logp_of, model, temperature=config.temperature)
    old_logp = by_rows(partial(law, policy), rollout, micro_batch_size=config.micro_batch_size)
    ref_logp = using(
        reference, lambda near: by_rows(partial(law, near), rollout, micro_batch_size=config.micro_batch_size)
    )
    check_finite(policy=old_logp, reference=ref_logp)
    penalised = penalised_score(score, rollout, missing_eos_penalty=config.missing_eos_penalty)
    ret = penalised - config.kl_coefficient * sequence_sum(kl_k1(old_logp, ref_logp, mask), mask)
    table = ret.view(-1, config.samples_per_prompt)  # [P, G]
    advantage = objective.advantages(table, torch.ones_like(table, dtype=torch.bool)).flatten()
    if not bool(advantage.isfinite().all()):
        row = int((~advantage.isfinite()).nonzero()[0])
        raise ValueError(f"{objective.name} gives response {row} the advantage {float(advantage[row])}")
    return GroupExperience(
        tokens=rollout.tokens,
        mask=mask,
        prompt_lengths=rollout.prompt_lengths,
        lengths=rollout.lengths,
        old_logp=old_logp,
        ref_logp=ref_logp,
        score=penalised,
        ret=ret,
        advantage=select(advantage[:, None].expand_as(old_logp), mask),
    )
