"""PPO from human feedback: sample, score, shape the reward, estimate advantages, learn, guard.

    rollout → score → missing-EOS penalty → per-token KL-shaped reward → values → GAE → whitened advantages
            → epochs of minibatches of clipped surrogate + clipped value loss (+ entropy) → KL controller

`iteration` is one round of it, `train` the stage. What lies between is importable too: `ppo_sampling.sample`
makes the experience, `ppo_update.optimise` learns from it, and examples/own_loop.py does without both.

Ouyang et al. 2022, "Training language models to follow instructions" (arXiv:2203.02155); details after Huang
et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031). Any LanguageModel will do.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.divergence import KLController, adapt_kl
from minirlhf.runs import InputError
from minirlhf.training.experience import Sampled
from minirlhf.training.loop import Evaluate, Keep, Log, Metrics, StageResult
from minirlhf.training.offload import Lendable, formed
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_metrics import learning_metrics, sampled_metrics
from minirlhf.training.ppo_sampling import sample, seeded
from minirlhf.training.ppo_update import Learners, critic_step, gradients_of, minibatches, optimise
from minirlhf.training.rewards import Scorer
from minirlhf.training.trained import FULL, Whole, trained
from minirlhf.training.update import Differentiate, NonFiniteError, differentiated, init_state


class PPOState(NamedTuple):
    """All that changes from one iteration to the next.

    learners: policy and critic with their optimiser states, which own their buffers.
    controller: the KL coefficient in force.
    episode: episodes sampled so far; with the seed it fixes prompts, uniforms and minibatch order.
    early_stops: iterations that the target KL cut short.
    """

    learners: Learners
    controller: KLController
    episode: int
    early_stops: int


class Iteration(NamedTuple):
    """One iteration's outcome: the next state, its metrics (see ppo_metrics.METRICS), and what it sampled."""

    state: PPOState
    metrics: Metrics
    sampled: Sampled


class Task(NamedTuple):
    """What PPO is run on, and never changes.

    model: policy, reference and critic are parameters of this one model; the critic has a scalar head.
    reference: π_ref, as it is computed with; gets no gradient.
    scorer: (rollout, prompt_index) -> score [N].
    prompts: token ids of all prompts.
    stop_ids: tokens that end a response; the first is EOS.
    differentiate: how gradients are computed, see `update.Differentiate`.
    policy, critic: from what the learners hold to parameters of the model.
    """

    model: LanguageModel
    reference: Lendable
    scorer: Scorer
    prompts: Sequence[Sequence[int]]
    stop_ids: Sequence[int]
    differentiate: Differentiate = differentiated
    policy: Whole = FULL
    critic: Whole = FULL


def begin(policy: Params, critic: Params, config: PPOConfig) -> PPOState:
    """The state before the first episode, of what is trained of policy and critic.

    Both are copied: the reference may be `policy` itself.
    """
    learners = Learners(init_state(policy), init_state(critic))
    return PPOState(learners, KLController(torch.tensor(config.kl_coefficient)), episode=0, early_stops=0)


def iteration(task: Task, state: PPOState, config: PPOConfig, *, seed: int, rate: float = 1.0) -> Iteration:
    """One round of PPO.

    Args:
        state: from `begin` or a former iteration; its buffers are written to, so use only the new one.
        seed: of everything random here; with `state.episode` it fixes all of it.
        rate: factor of both learning rates (`train` passes its schedule).

    Raises:
        GuardError: sampler and trainer disagree, or the first minibatch is off-policy.
        NonFiniteError: a loss or gradient is not finite.
        InputError: a score is not finite, or a prompt does not fit.
    """
    start = time.perf_counter()
    sampled = _sample(task, state, config, seed=seed)
    learners, history, stopped = optimise(
        task.model,
        state.learners,
        sampled.experience,
        config,
        rate=rate,
        generator=seeded(seed, "minibatches", state.episode),
        differentiate=task.differentiate,
        policy_whole=task.policy,
        critic_whole=task.critic,
    )
    metrics = _sampled_metrics(task, state, sampled) | learning_metrics(history)
    after = PPOState(
        learners=learners,
        controller=_adapted(state.controller, metrics["objective/kl"], config),
        episode=state.episode + config.batch_size,
        early_stops=state.early_stops + int(stopped),
    )
    seconds = time.perf_counter() - start
    metrics |= {
        "policy/early_stops": float(after.early_stops),
        "lr": rate * config.learning_rate,
        "episode": float(after.episode),
        "eps": config.batch_size / seconds,
        "perf/tokens_per_second": metrics["response/length_mean"] * config.batch_size / seconds,
    }
    return Iteration(after, metrics, sampled)


def train(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    critic: Params,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    config: PPOConfig,
    *,
    seed: int,
    stop_ids: Sequence[int] | None = None,
    evaluate: Evaluate | None = None,
    keep: Keep | None = None,
    log: Log | None = None,
    show: Callable[[int, Sampled], None] | None = None,
) -> StageResult:
    """The stage: critic pretraining, then iterations at a linearly falling rate, the best policy kept.

    Args:
        model: one family for policy, reference, critic; a reward model inside the scorer may be another.
        policy, reference: start policy and π_ref, often the same SFT parameters; neither is written to.
        critic: backbone and scalar head, usually `rewards.critic_from_reward_model`; not written to.
        scorer: reward of each response (`rewards`). prompts: token ids, each with room for max_response.
        seed: of prompts, uniforms and minibatch orders.
        stop_ids: tokens that end a response, the first is EOS; by default those of the model.
        evaluate: called on the first policy, every config.evaluate_every iterations, and on the last one;
            `ppo_sampling.objective_on` gives the default criterion.
        keep: gets each new best policy, by config.metric_for_best_model, and its evaluation.
        log: gets every iteration's metrics, the evaluation's among them, and its number (0 is before any).
        show: gets each evaluated iteration's number and samples, for a table of them.

    Returns:
        The best policy and every evaluation; without `evaluate`, the last policy and its metrics.

    Raises:
        GuardError, NonFiniteError, InputError: see `iteration`. What `keep` was given stays the best so far.
    """
    stops = model.stop_ids if stop_ids is None else stop_ids
    check_prompts(prompts, config.max_response, context=model.config.n_positions)
    actor, valuer = (
        trained(model, start, config, generator=seeded(seed, f"{name} adapters", 0))
        for name, start in (("policy", policy), ("critic", critic))
    )
    differentiate = gradients_of(actor.initial, prompts, config, rows=2 * config.batch_size, name="ppo")
    task = Task(
        model,
        formed(reference, actor.frozen),
        scorer,
        prompts,
        stops,
        differentiate,
        policy=actor.whole,
        critic=valuer.whole,
    )
    state = begin(actor.initial, valuer.initial, config)
    # Copies are trained; without adapters the first tensors are gone where the caller has let them go.
    del policy, critic, actor, valuer
    hooks = {"evaluate": evaluate, "keep": keep}
    judge = partial(best_so_far, criterion=config.metric_for_best_model, whole=task.policy, **hooks)
    best, metrics = judge(None, state.learners.policy.params, 0)
    if log is not None and metrics:
        log(0, metrics)
    total = config.critic_pretraining + config.iterations
    for number in range(1, total + 1):
        done = number - 1 - config.critic_pretraining
        if done < 0:
            state, metrics, sampled = pretrain_critic(task, state, config, seed=seed)
        else:
            rate = 1 - (1 - config.final_rate) * done / config.iterations
            state, metrics, sampled = iteration(task, state, config, seed=seed, rate=rate)
        if number == total or (done >= 0 and (done + 1) % config.evaluate_every == 0):
            best, evaluation = judge(best, state.learners.policy.params, number)
            metrics |= evaluation
            if show is not None:
                show(number, sampled)
        if log is not None:
            log(number, metrics)
    return best or StageResult(task.policy.kept(state.learners.policy.params), total, metrics, [])


def pretrain_critic(task: Task, state: PPOState, config: PPOConfig, *, seed: int) -> Iteration:
    """One round in which only the critic learns, so that the policy's first advantages mean something.

    Its value loss is not clipped: a clip keeps a critic near its old values, and these are what is wrong.
    """
    unclipped = replace(config, value_clip=None)
    sampled = _sample(task, state, config, seed=seed)
    critic, history = state.learners.critic, []
    order = seeded(seed, "minibatches", state.episode)
    for minibatch in minibatches(sampled.experience, unclipped, generator=order):
        critic, step_metrics = critic_step(
            task.model,
            critic,
            minibatch,
            unclipped,
            rate=1.0,
            differentiate=task.differentiate,
            whole=task.critic,
        )
        history.append(step_metrics)
    after = state._replace(
        learners=state.learners._replace(critic=critic), episode=state.episode + config.batch_size
    )
    metrics = _sampled_metrics(task, state, sampled) | learning_metrics(history)
    return Iteration(after, metrics | {"episode": float(after.episode)}, sampled)


def _sample(task: Task, state: PPOState, config: PPOConfig, *, seed: int) -> Sampled:
    return sample(
        task.model,
        task.policy.computing(state.learners.policy.params),
        task.reference,
        task.critic.computing(state.learners.critic.params),
        task.scorer,
        task.prompts,
        config,
        episode=state.episode,
        kl_coefficient=float(state.controller.coefficient),
        seed=seed,
        stop_ids=task.stop_ids,
    )


def _sampled_metrics(task: Task, state: PPOState, sampled: Sampled) -> dict[str, float]:
    beta = float(state.controller.coefficient)
    return sampled_metrics(sampled, kl_coefficient=beta, eos_id=task.stop_ids[0])


def best_so_far(
    best: StageResult | None,
    params: Params,
    number: int,
    *,
    criterion: str,
    evaluate: Evaluate | None,
    keep: Keep | None,
    whole: Whole = FULL,
) -> tuple[StageResult | None, Metrics]:
    """The best policy so far, the present one included, and the present one's evaluation.

    Args:
        best: of the evaluations before; None at the first.
        params: what is trained of the present policy, after `number` iterations; copied where it is the best.
        criterion: evaluation metric, higher is better.
        whole: from `params` to the policy that is evaluated and kept.

    Raises:
        InputError: the evaluation has no such metric.
        NonFiniteError: it is not a finite number.
    """
    if evaluate is None:
        return None, {}
    metrics = evaluate(whole.kept(params))
    if criterion not in metrics:
        raise InputError(
            f"metric_for_best_model: expected one of {', '.join(sorted(metrics))}, got {criterion!r}"
        )
    if not math.isfinite(metrics[criterion]):
        raise NonFiniteError(number, f"{criterion} = {metrics[criterion]}")
    history = [*(best.history if best else []), {"step": float(number), **metrics}]
    if best is not None and not metrics[criterion] > best.metrics[criterion]:
        return best._replace(history=history), metrics
    copy = whole.kept(tree_map(torch.clone, params))  # the optimiser goes on writing into its own
    if keep is not None:
        keep(copy, metrics)
    return StageResult(copy, number, metrics, history), metrics


def check_prompts(prompts: Sequence[Sequence[int]], max_response: int, *, context: int) -> None:
    """All of them before the first iteration: none may stop the run in its middle."""
    if not prompts:
        raise InputError("no prompts to train on")
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context - max_response:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; expected 1 to {context - max_response}, "
                f"since the context is {context} and max_response {max_response}"
            )


def _adapted(controller: KLController, kl: float, config: PPOConfig) -> KLController:
    """The controller after an iteration whose responses lay `kl` nats from the reference."""
    if config.kl_target is None:
        return controller
    return adapt_kl(
        controller,
        torch.tensor(kl),
        target=config.kl_target,
        horizon=config.kl_horizon,
        n_steps=config.batch_size,
    )
