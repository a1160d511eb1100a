"""Stages that learn from their own samples: PPO with a critic, groups of samples without."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.spool import LazySequence
from minirlhf.models.interface import Params
from minirlhf.training import group_policy as group_page
from minirlhf.training import ppo as ppo_page
from minirlhf.training.device import move, resolve
from minirlhf.training.experience import Sampled
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupObjective, GroupSampled
from minirlhf.training.inputs import read_prompt_rows
from minirlhf.training.offload import waiting, where_it_waits
from minirlhf.training.on_policy_plan import Models, on_policy_plan
from minirlhf.training.plan_table import announce
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.progress import Advance, progress
from minirlhf.training.prompt_rows import PromptRow
from minirlhf.training.reward_sources import Reward, critic_for
from minirlhf.training.rewards import Scorer
from minirlhf.training.samples import show_rollout
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.stages.around import Metrics, save_policy, tell
from minirlhf.training.workspace import (
    Checkpoint,
    Stage,
    load_policy,
    load_reference,
    open_stage,
    refuse_existing,
)


class _Task(NamedTuple):
    """Ids of prompts to train on and of prompts to choose the best policy by, with their scorers."""

    scorer: Scorer
    prompts: Sequence[list[int]]
    held_out_scorer: Scorer
    held_out: Sequence[list[int]]


def _task(start: Checkpoint, reward: Reward, data: Path, max_response: int, setting: Setting) -> _Task:
    """Reads the prompts and checks the reward on them, before anything is sampled."""
    parts = read_prompt_rows(start, data, max_response, setting)
    train, held_out = (reward.scorer(start, part, max_response) for part in (parts.train, parts.validation))
    return _Task(train, _ids(parts.train), held_out, _ids(parts.validation))


def _models(policy: Path, reference: Path, setting: Setting) -> tuple[Checkpoint, Checkpoint]:
    """Policy and reference, on the CPU where they are to wait there."""
    there = where_it_waits(setting)
    start = load_policy(policy, there)
    return start, load_reference(reference, start, there)


def _read(
    start: Checkpoint, near: Checkpoint, critic: Params | None, reward: Reward, setting: Setting
) -> Models:
    return Models(start.model, start.params, near.params, critic, reward.reader, setting.offload)


def _ids(prompts: Sequence[PromptRow]) -> Sequence[list[int]]:
    return LazySequence(len(prompts), lambda i: prompts[i].ids)


def ppo(
    policy: Path,
    reference: Path,
    reward: Reward,
    data: Path,
    out: Path,
    *,
    config: PPOConfig,
    setting: Setting,
    name: str = "ppo",
) -> Metrics:
    """PPO from the policy, near the reference, towards what the reward prefers."""
    refuse_existing(out)
    start, near = _models(policy, reference, setting)
    task, device = _task(start, reward, data, config.max_response, setting), resolve(setting.device)
    critic = critic_for(reward, start, setting)
    plan = on_policy_plan(
        name, _read(start, near, critic, reward, setting), task.prompts, task.held_out, config, device=device
    )
    if announce(plan, setting):
        return {}
    reference_params = waiting(near.params, device) if setting.offload else near.params
    files = {"prompts": data} | reward.data
    weights = {"policy": start.path, "reference": near.path} | reward.weights
    save = partial(save_policy, start)
    with (
        open_stage(out, name, save, config, setting, data=files, weights=weights) as stage,
        progress(name, config.critic_pretraining + config.iterations) as advance,
    ):
        result = ppo_page.train(
            start.model,
            move(start.params, device),
            reference_params,
            move(critic, device),
            task.scorer,
            task.prompts,
            config,
            seed=seed_for(setting, "ppo"),
            evaluate=objective_on(
                start.model,
                reference_params,
                task.held_out_scorer,
                task.held_out,
                config,
                seed=seed_for(setting, "ppo validation"),
            ),
            keep=stage.keep,
            log=partial(_log_iteration, stage, advance, config.batch_size),
            show=partial(_show_iteration, name, start, stage),
        )
    return tell(name, result, out, setting)


def group(
    policy: Path,
    reference: Path,
    reward: Reward,
    data: Path,
    out: Path,
    *,
    config: GroupConfig,
    objective: GroupObjective,
    setting: Setting,
    name: str,
) -> Metrics:
    """Several samples per prompt and no critic, near the reference, towards what the reward prefers."""
    refuse_existing(out)
    start, near = _models(policy, reference, setting)
    task, device = _task(start, reward, data, config.max_response, setting), resolve(setting.device)
    plan = on_policy_plan(
        name, _read(start, near, None, reward, setting), task.prompts, task.held_out, config, device=device
    )
    if announce(plan, setting):
        return {}
    reference_params = waiting(near.params, device) if setting.offload else near.params
    files = {"prompts": data} | reward.data
    weights = {"policy": start.path, "reference": near.path} | reward.weights
    seed, other = seed_for(setting, "group"), seed_for(setting, "group validation")
    save = partial(save_policy, start)
    with (
        open_stage(out, name, save, config, setting, data=files, weights=weights) as stage,
        progress(name, config.iterations) as advance,
    ):
        result = group_page.train(
            start.model,
            move(start.params, device),
            reference_params,
            task.scorer,
            task.prompts,
            config,
            objective=objective,
            seed=seed,
            evaluate=objective_on(
                start.model, reference_params, task.held_out_scorer, task.held_out, config, seed=other
            ),
            keep=stage.keep,
            log=partial(_log_iteration, stage, advance, config.batch_size),
            show=partial(_show_iteration, name, start, stage),
        )
    return tell(name, result, out, setting)


def _log_iteration(stage: Stage, advance: Advance, episodes: int, step: int, metrics: Metrics) -> None:
    stage.log(step, metrics)
    if step == 0:
        return
    tokens = round(metrics["response/length_mean"] * episodes)
    keys = {"score": "objective/scores", "KL": "objective/kl", "length": "response/length_mean"}
    advance(tokens, {shown: metrics[key] for shown, key in keys.items()})


def _show_iteration(
    name: str, start: Checkpoint, stage: Stage, number: int, sampled: Sampled | GroupSampled
) -> None:
    title, score = f"{name}, iteration {number}", sampled.experience.score
    show_rollout(title, start.tokenizer, sampled.rollout, score, stage.folder)
