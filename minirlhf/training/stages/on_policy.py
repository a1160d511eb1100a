"""Stages that learn from their own samples: PPO with a critic, groups of samples without."""

from functools import partial
from pathlib import Path

from minirlhf.training import group_policy as group_page
from minirlhf.training import ppo as ppo_page
from minirlhf.training.experience import Sampled
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupObjective, GroupSampled
from minirlhf.training.group_rewards import Reward
from minirlhf.training.inputs import read_prompt_ids, read_prompt_rows
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.progress import Advance, progress
from minirlhf.training.rewards import critic_from_reward_model, reward_model_scorer
from minirlhf.training.samples import show_rollout
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.stages.around import Metrics, save_policy, tell
from minirlhf.training.workspace import (
    Checkpoint,
    Stage,
    load_policy,
    load_reward_model,
    open_stage,
    refuse_existing,
    require_same_model,
)


def ppo(
    policy: Path,
    reference: Path,
    reward_model: Path,
    data: Path,
    out: Path,
    *,
    config: PPOConfig,
    setting: Setting,
    name: str = "ppo",
) -> Metrics:
    """PPO from the policy, near the reference, towards what the reward model prefers."""
    refuse_existing(out)
    start, near = load_policy(policy, setting), load_policy(reference, setting)
    judge = load_reward_model(reward_model, setting)
    require_same_model(start, near)
    require_same_model(start, judge)
    prompts = read_prompt_ids(start, data, config.max_response, setting)
    scorer = reward_model_scorer(judge.model, judge.params, judge.normalisation)
    weights = {"policy": policy, "reference": reference, "reward_model": reward_model}
    save = partial(save_policy, start)
    with (
        open_stage(out, name, save, config, setting, data={"prompts": data}, weights=weights) as stage,
        progress(name, config.critic_pretraining + config.iterations) as advance,
    ):
        result = ppo_page.train(
            start.model,
            start.params,
            near.params,
            critic_from_reward_model(judge.params, judge.normalisation),
            scorer,
            prompts.train,
            config,
            seed=seed_for(setting, "ppo"),
            evaluate=objective_on(
                start.model,
                near.params,
                scorer,
                prompts.validation,
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
    start, near = load_policy(policy, setting), load_policy(reference, setting)
    require_same_model(start, near)
    prompts = read_prompt_rows(start, data, config.max_response, setting)
    score, held_out = (reward.scorer(start, part) for part in (prompts.train, prompts.validation))
    ids, held_out_ids = ([row.ids for row in part] for part in (prompts.train, prompts.validation))
    files = {"prompts": data} | reward.data
    weights = {"policy": policy, "reference": reference} | reward.weights
    seed, other = seed_for(setting, "group"), seed_for(setting, "group validation")
    save = partial(save_policy, start)
    with (
        open_stage(out, name, save, config, setting, data=files, weights=weights) as stage,
        progress(name, config.iterations) as advance,
    ):
        result = group_page.train(
            start.model,
            start.params,
            near.params,
            score,
            ids,
            config,
            objective=objective,
            seed=seed,
            evaluate=objective_on(start.model, near.params, held_out, held_out_ids, config, seed=other),
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
