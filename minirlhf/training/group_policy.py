"""Policy gradient from groups: several samples per prompt, each judged by its siblings, and no critic.

    G rollouts per prompt → score → missing-EOS penalty → KL as reward → advantages within the group
            → epochs of minibatches of the clipped surrogate

RLOO: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to
Basics" (arXiv:2402.14740). Group-normalised: Shao et al. 2024, "DeepSeekMath" (GRPO, arXiv:2402.03300). The
score is any Scorer: a reward model, or a rule that checks the answer (`rewards.text_scorer`).

**Fixed point.** For both it is the optimum of E r - β KL(π‖π_ref), π* ∝ π_ref e^{r/β}. There the return
R = r - β log π*/π_ref = β log Z(x) is the same for every response to x, so every group has advantage 0,
whatever was sampled; anywhere else a response with a larger R has a larger expected advantage. RLOO comes to
rest by itself, since its advantages shrink with the spread of R. Normalised ones do not: however near π* is,
a group has deviation 1, so the learning rate must fall (`final_rate` 0, the default).

This holds because the KL is in the *reward*, by k1. GRPO's paper puts k3 into the *loss* instead: on samples
of π that has the gradient of KL(π_ref‖π), the other direction, and another fixed point, β π_ref / (λ(x) - r)
with λ(x) such that it sums to 1 (Vojnovic & Yun 2025, arXiv:2502.18548).

**Clipping.** The ratio is per token, as in PPO and GRPO, while the advantage is that of the response. At the
first minibatch every ratio is 1, and RLOO's gradient is the unbiased one.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import (
    GROUP_NORMALISED,
    RLOO,
    GroupObjective,
    GroupSampled,
    sample,
)
from minirlhf.training.group_metrics import sampled_metrics
from minirlhf.training.group_update import optimise
from minirlhf.training.loop import Evaluate, Keep, Log, Metrics, StageResult
from minirlhf.training.offload import Lendable, formed
from minirlhf.training.ppo import Task, best_so_far, check_prompts
from minirlhf.training.ppo_metrics import learning_metrics
from minirlhf.training.ppo_sampling import seeded
from minirlhf.training.ppo_update import gradients_of
from minirlhf.training.rewards import Scorer
from minirlhf.training.trained import trained
from minirlhf.training.update import TrainState, init_state


class GroupState(NamedTuple):
    """All that changes from one iteration to the next.

    policy: with its optimiser state, which owns its buffers.
    episode: episodes sampled so far; with the seed it fixes prompts, uniforms and minibatch order.
    """

    policy: TrainState
    episode: int


class GroupIteration(NamedTuple):
    """One iteration's outcome: the next state, its metrics (group_metrics.METRICS), and what it sampled."""

    state: GroupState
    metrics: Metrics
    sampled: GroupSampled


def begin(policy: Params) -> GroupState:
    """The state before the first episode. The policy is copied: the reference may be `policy` itself."""
    return GroupState(init_state(policy), episode=0)


def iteration(
    task: Task,
    state: GroupState,
    config: GroupConfig,
    objective: GroupObjective,
    *,
    seed: int,
    rate: float = 1.0,
) -> GroupIteration:
    """One round: sample groups, compare, learn.

    Args:
        task: what is trained on; see `ppo.Task`.
        state: from `begin` or a former iteration; its buffers are written to, so use only the new one.
        objective: how a group's returns become advantages.
        seed: of everything random here; with `state.episode` it fixes all of it.
        rate: factor of the learning rate (`train` passes its schedule).

    Raises:
        GuardError: sampler and trainer disagree, or the first minibatch is off-policy.
        NonFiniteError: a loss or gradient is not finite.
        InputError: a score is not finite, or a prompt does not fit.
    """
    start = time.perf_counter()
    sampled = sample(
        task.model,
        task.policy.computing(state.policy.params),
        task.reference,
        task.scorer,
        task.prompts,
        config,
        objective,
        episode=state.episode,
        seed=seed,
        stop_ids=task.stop_ids,
    )
    order = seeded(seed, "minibatches", state.episode)
    policy, history = optimise(
        task.model,
        state.policy,
        sampled.experience,
        config,
        rate=rate,
        generator=order,
        differentiate=task.differentiate,
        whole=task.policy,
    )
    beta, samples = config.kl_coefficient, config.samples_per_prompt
    of_rollout = sampled_metrics(sampled, samples=samples, kl_coefficient=beta, eos_id=task.stop_ids[0])
    after = GroupState(policy, state.episode + config.batch_size)
    seconds = time.perf_counter() - start
    metrics = {
        **of_rollout,
        **learning_metrics(history),
        "lr": rate * config.learning_rate,
        "episode": float(after.episode),
        "eps": config.batch_size / seconds,
        "perf/tokens_per_second": of_rollout["response/length_mean"] * config.batch_size / seconds,
    }
    return GroupIteration(after, metrics, sampled)


def train(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    config: GroupConfig,
    *,
    objective: GroupObjective,
    seed: int,
    stop_ids: Sequence[int] | None = None,
    evaluate: Evaluate | None = None,
    keep: Keep | None = None,
    log: Log | None = None,
    show: Callable[[int, GroupSampled], None] | None = None,
) -> StageResult:
    """The stage: iterations at a linearly falling rate, the best policy kept.

    Args:
        model: one family for policy and reference; a reward model inside the scorer may be another.
        policy, reference: start policy and π_ref, often the same SFT parameters; neither is written to.
        scorer: reward of each response (`rewards`). prompts: token ids, each with room for max_response.
        objective: RLOO, GROUP_NORMALISED, GROUP_CENTRED or your own; the entries below name the first two.
        seed: of prompts, uniforms and minibatch orders.
        stop_ids, evaluate, keep, log, show: as in `ppo.train`.

    Returns:
        The best policy and every evaluation; without `evaluate`, the last policy and its metrics.

    Raises:
        GuardError, NonFiniteError, InputError: see `iteration`. What `keep` was given stays the best so far.
    """
    stops = model.stop_ids if stop_ids is None else stop_ids
    check_prompts(prompts, config.max_response, context=model.config.n_positions)
    actor = trained(model, policy, config, generator=seeded(seed, "policy adapters", 0))
    differentiate = gradients_of(actor.initial, prompts, config, rows=config.batch_size, name="group")
    near = formed(reference, actor.frozen)
    task = Task(model, near, scorer, prompts, stops, differentiate, policy=actor.whole)
    state, hooks = begin(actor.initial), {"evaluate": evaluate, "keep": keep}
    del policy, actor  # a copy is trained; without adapters the first tensors are gone where nobody has them
    judge = partial(best_so_far, criterion=config.metric_for_best_model, whole=task.policy, **hooks)
    best, metrics = judge(None, state.policy.params, 0)
    if log is not None and metrics:
        log(0, metrics)
    for number in range(1, config.iterations + 1):
        rate = 1 - (1 - config.final_rate) * (number - 1) / config.iterations
        state, metrics, sampled = iteration(task, state, config, objective, seed=seed, rate=rate)
        if number == config.iterations or number % config.evaluate_every == 0:
            best, evaluation = judge(best, state.policy.params, number)
            metrics |= evaluation
            if show is not None:
                show(number, sampled)
        if log is not None:
            log(number, metrics)
    return best or StageResult(task.policy.kept(state.policy.params), config.iterations, metrics, [])


train_rloo = partial(train, objective=RLOO)
"""RLOO; every other argument is `train`'s."""

train_group_normalised = partial(train, objective=GROUP_NORMALISED)
"""Advantages normalised within the group; every other argument is `train`'s."""
