"""The sampling half of a PPO iteration: which prompts, which responses, scored and made into experience.

Nothing here keeps a random state: prompts, uniforms and orders are functions of the seed and of the number of
the episode, so that any iteration can be repeated alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from minirlhf.kernels.memory import release_rooms
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.divergence import kl_k1
from minirlhf.objectives.masked import sequence_sum
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import Rollout, generate, response_mask
from minirlhf.training.device import numbers
from minirlhf.training.experience import (
    PolicyRows,
    Sampled,
    by_rows,
    collect,
    logp_of,
    penalised_score,
)
from minirlhf.training.guards import check_sampler, measure_for
from minirlhf.training.mismatch import WEIGHTS, tolerated_gap, weighted
from minirlhf.training.offload import Lendable, using
from minirlhf.training.ppo_config import OnPolicyConfig, PPOConfig
from minirlhf.training.rewards import Scorer


def sample(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    critic: Params,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    config: PPOConfig,
    *,
    episode: int,
    kl_coefficient: float,
    seed: int,
    stop_ids: Sequence[int],
) -> Sampled:
    """The episodes `episode` .. `episode` + batch_size - 1, sampled, scored and made into experience.

    Raises:
        GuardError: the trainer's log-probs are not those that the sampler recorded.
    """
    episodes = torch.arange(episode, episode + config.batch_size)
    prompt_index = prompts_of(episodes, len(prompts), seed=seed)
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
    experience = collect(
        model,
        policy,
        reference,
        critic,
        rollout,
        scorer(rollout, prompt_index),
        temperature=config.temperature,
        kl_coefficient=kl_coefficient,
        missing_eos_penalty=config.missing_eos_penalty,
        gamma=config.gamma,
        lam=config.lam,
        micro_batch_size=config.micro_batch_size,
    )
    gap, advantage = corrected(policy, rollout, experience, config)
    return Sampled(prompt_index, rollout, experience._replace(advantage=advantage), gap)


def respond(
    model: LanguageModel,
    policy: Params,
    prompts: Sequence[Sequence[int]],
    config: OnPolicyConfig,
    *,
    seed: int,
    prompt_index: Tensor,
    sample_index: Tensor,
    stop_ids: Sequence[int],
) -> Rollout:
    """One response to each prompt from the tempered law, and from no other: ratio and KL need all of it."""
    rollout = generate(
        model,
        policy,
        prompts,
        law=partial(tempered, temperature=config.temperature),
        max_new_tokens=config.max_response,
        stop_ids=stop_ids,
        seed=seed,
        prompt_index=prompt_index,
        sample_index=sample_index,
        slots=config.slots,
        weights=WEIGHTS[config.rollout_precision],
    )
    release_rooms()  # what trains next needs the memory more than the next rollout needs it warm
    return rollout


def corrected(
    policy: Params, rollout: Rollout, experience: PolicyRows, config: OnPolicyConfig
) -> tuple[float, Tensor]:
    """The sampler's gap, and the advantages [N, T], weighted for it where the sampler had other weights.

    Raises:
        GuardError: sampler and trainer had the same weights, and yet their log-probs differ.
    """
    old_logp, sampled_logp, mask = experience.old_logp, rollout.sampled_logp, experience.mask
    precision = config.rollout_precision
    held = {"tolerance": tolerated_gap(policy, precision), "measure": measure_for(policy)}
    gap = check_sampler(sampled_logp, old_logp, mask, **held)
    laws = (old_logp, sampled_logp, mask)
    return gap, weighted(experience.advantage, *laws, precision=precision, cap=config.importance_cap)


def prompts_of(episodes: Tensor, prompts: int, *, seed: int) -> Tensor:
    """The prompt of each episode [N]: pass after pass over all prompts, each pass in an order of its own.

    >>> sorted(prompts_of(torch.arange(4, 8), 4, seed=0).tolist())
    [0, 1, 2, 3]
    """
    passes = episodes // prompts
    orders = {
        number: torch.randperm(prompts, generator=seeded(seed, "prompts", number))
        for number in sorted(set(passes.tolist()))
    }
    places = zip(passes.tolist(), (episodes % prompts).tolist(), strict=True)
    return torch.tensor([int(orders[number][place]) for number, place in places])


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, each purpose with streams of its own."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def objective_on(
    model: LanguageModel,
    reference: Lendable,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    config: OnPolicyConfig,
    *,
    seed: int,
    stop_ids: Sequence[int] | None = None,
) -> Callable[[Params], dict[str, float]]:
    """An evaluation of policies by what PPO maximises, score - β KL, on validation prompts.

    Every call uses the same uniforms, so that two policies differ by themselves and not by luck.

    Args:
        scorer: as for training; its prompt_index counts these prompts.
        config: its kl_coefficient is β here, also where training adapts it.
        seed: another than in training, or prompt 0 here gets the uniforms of prompt 0 there.

    Returns:
        params -> `validation/objective`, `validation/score` (less the missing-EOS penalty), `validation/kl`
        (k1, nats per response, tempered law), `validation/response_length` (tokens).
    """
    index = torch.arange(len(prompts))
    stops = model.stop_ids if stop_ids is None else stop_ids
    config = replace(config, rollout_precision="full")  # it is the policy that is judged, not its copy

    @torch.no_grad()
    def evaluate(params: Params) -> dict[str, float]:
        rollout = respond(
            model,
            params,
            prompts,
            config,
            seed=seed,
            prompt_index=index,
            sample_index=torch.zeros_like(index),
            stop_ids=stops,
        )
        law = partial(logp_of, model, temperature=config.temperature)
        logp = by_rows(partial(law, params), rollout, micro_batch_size=config.micro_batch_size)
        size = config.micro_batch_size
        ref_logp = using(reference, lambda near: by_rows(partial(law, near), rollout, micro_batch_size=size))
        mask = response_mask(rollout)
        score = penalised_score(
            scorer(rollout, index), rollout, missing_eos_penalty=config.missing_eos_penalty
        )
        kl = sequence_sum(kl_k1(logp, ref_logp, mask), mask)
        values = {
            "validation/objective": (score - config.kl_coefficient * kl).mean(),
            "validation/score": score.mean(),
            "validation/kl": kl.mean(),
            "validation/response_length": mask.sum() / len(mask),
        }
        return numbers(values)

    return evaluate
