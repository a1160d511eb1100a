"""The stages as a user runs them: read data and model directories, call the stage's page, write a directory.

Every function returns the metrics of the checkpoint that it wrote. The equations and loops are on the pages
sft, reward_model, ppo, group_policy and preference.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from minirlhf.data.readers import read_preferences
from minirlhf.data.records import Example, PairExample
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import Params, with_scalar_head
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import Rollout, generate
from minirlhf.runs import InputError
from minirlhf.training import group_policy as group_page
from minirlhf.training import ppo as ppo_page
from minirlhf.training import preference as preference_page
from minirlhf.training import reward_model as reward_page
from minirlhf.training import sft as sft_page
from minirlhf.training.baselines import bag_of_words_accuracy, length_only_accuracy
from minirlhf.training.experience import Sampled
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupObjective, GroupSampled
from minirlhf.training.group_rewards import Reward
from minirlhf.training.inputs import (
    Parts,
    context_of,
    read_pairs,
    read_plain,
    read_prompt_ids,
    read_prompt_rows,
    read_supervised,
    tokenise_pairs,
)
from minirlhf.training.loop import StageResult
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.progress import Advance, progress
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.rewards import critic_from_reward_model, reward_model_scorer
from minirlhf.training.samples import sample_watcher, show_rollout
from minirlhf.training.setting import NormaliseConfig, Setting, ShapeConfig, generator_for, seed_for
from minirlhf.training.sft import SFTConfig
from minirlhf.training.workspace import (
    Checkpoint,
    Stage,
    load_policy,
    load_reward_model,
    open_stage,
    refuse_existing,
    require_same_model,
)

Metrics = dict[str, float]


def new_model(tokenizer: Path, out: Path, *, shape: ShapeConfig, seed: int) -> str:
    """Writes a GPT-2 directory with fresh weights; returns one line about it.

    Raises:
        InputError: no such tokenizer, an impossible shape, or `out` is not new.
    """
    refuse_existing(out)
    text = load_tokenizer(tokenizer)
    try:
        config = gpt2.GPT2Config(vocab_size=text.vocab_size, eos_token_id=text.eos_id, **asdict(shape))
    except ValueError as error:
        raise InputError(str(error)) from None
    model = gpt2.bind(config)
    params = model.init(torch.Generator().manual_seed(seed))
    save_language_model(out, model, params, tokenizer=text.path)
    count = sum(leaf.numel() for leaf in tree_leaves(params))
    return f"{out}: GPT-2 with {count:,} parameters, {shape.n_layer} layers, vocabulary {text.vocab_size}"


def pretrain(
    policy: Path, data: Path, out: Path, *, config: SFTConfig, setting: Setting, name: str = "pretrain"
) -> Metrics:
    """Plain language modelling: every token of every text is trained, or those that the file says."""
    refuse_existing(out)
    start = load_policy(policy, setting)
    train, validation = read_plain(start, data, setting)
    openings = [example.ids[: max(1, len(example.ids) // 3)] for example in validation]
    return _supervise(name, start, train, validation, openings, data, out, config, setting)


def sft(policy: Path, data: Path, out: Path, *, config: SFTConfig, setting: Setting) -> Metrics:
    """Supervised fine-tuning on demonstrations."""
    refuse_existing(out)
    start = load_policy(policy, setting)
    parts = read_supervised(start, data, setting)
    prompts = [example.ids[: example.prompt_length] for example in parts.validation]
    return _supervise("sft", start, parts.train, parts.validation, prompts, data, out, config, setting)


def _supervise(
    name: str,
    start: Checkpoint,
    train: Sequence[Example],
    validation: Sequence[Example],
    prompts: Sequence[list[int]],
    data: Path,
    out: Path,
    config: SFTConfig,
    setting: Setting,
) -> Metrics:
    save, files, weights = partial(_save_policy, start), {"data": data}, {"policy": start.path}
    with open_stage(out, name, save, config, setting, data=files, weights=weights) as stage:
        result = sft_page.train(
            start.model,
            start.params,
            train,
            validation,
            config,
            generator=generator_for(setting, name),
            name=name,
            evaluate=_watcher(name, start, prompts, stage, setting),
            log=stage.log,
            keep=stage.keep,
        )
    return _tell(name, result, out, setting)


def reward(
    policy: Path,
    data: Path,
    out: Path,
    *,
    config: RewardConfig,
    normalise: NormaliseConfig,
    setting: Setting,
    probe: Path | None = None,
) -> Metrics:
    """A Bradley-Terry reward model on the policy's backbone, normalised on the policy's own responses.

    What is reported beside the validation metrics: test accuracy, that of length alone and of a bag of words,
    and on the probe's pairs whose good response is the shorter one.
    """
    refuse_existing(out)
    start = load_policy(policy, setting)
    parts = read_pairs(start, data, setting)
    probes = [] if probe is None else tokenise_pairs(start, read_preferences(probe).rows, setting).examples
    generator = generator_for(setting, "reward")
    initial = with_scalar_head(start.model, start.params, generator=generator)
    files = {"preferences": data} | ({} if probe is None else {"probe": probe})
    save = partial(_save_scalar, start, Normalisation(0.0, 1.0))
    with open_stage(out, "reward", save, config, setting, data=files, weights={"policy": policy}) as stage:
        result = reward_page.train(
            start.model,
            initial,
            parts.train,
            parts.validation,
            config,
            generator=generator,
            log=stage.log,
            keep=stage.keep,
        )
        metrics = _assess(start, result.params, parts, probes)
        stage.log(result.best_step, metrics)
        rollout = _respond(start, _prompts(parts.validation), normalise, setting)
        normalisation = reward_page.normalise_reward(start.model, result.params, rollout)
        _save_scalar(start, normalisation, stage.best, result.params)
    return _tell("reward", result._replace(metrics=result.metrics | metrics), out, setting)


def _assess(start: Checkpoint, params: Params, parts: Parts, probes: Sequence[PairExample]) -> Metrics:
    """Accuracies on the test pairs and on the probe, beside what length and words alone reach."""
    vocab_size = start.model.config.vocab_size
    metrics = {
        "test/accuracy": reward_page.accuracy(start.model, params, parts.test),
        "test/pairs": float(len(parts.test)),
        "test/length_only_accuracy": length_only_accuracy(parts.train, parts.test),
        "test/bag_of_words_accuracy": bag_of_words_accuracy(parts.train, parts.test, vocab_size=vocab_size),
    }
    if probes:
        metrics["probe/accuracy"] = reward_page.adversarial_probe(start.model, params, probes)
    return metrics


def _respond(
    start: Checkpoint, prompts: Sequence[list[int]], config: NormaliseConfig, setting: Setting
) -> Rollout:
    """Responses of the policy itself to prompts with room, each as often as it takes."""
    room = context_of(start, setting) - config.max_response
    fitting = [ids for ids in prompts if len(ids) <= room]
    if not fitting:
        raise InputError(
            f"expected a prompt that leaves room for max_response {config.max_response} in a context of "
            f"{room + config.max_response} tokens, found none"
        )
    episode = torch.arange(config.rollouts)
    index = episode % len(fitting)
    return generate(
        start.model,
        start.params,
        [fitting[i] for i in index.tolist()],
        law=partial(tempered, temperature=config.temperature),
        max_new_tokens=config.max_response,
        stop_ids=start.model.stop_ids,
        seed=seed_for(setting, "reward normalisation"),
        prompt_index=index,
        sample_index=episode // len(fitting),
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
    save = partial(_save_policy, start)
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
    return _tell(name, result, out, setting)


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
    save = partial(_save_policy, start)
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
    return _tell(name, result, out, setting)


def dpo(
    policy: Path, reference: Path, data: Path, out: Path, *, config: DPOConfig, setting: Setting
) -> Metrics:
    """Direct preference optimisation from the policy, relative to the reference."""
    return _prefer("dpo", preference_page.train_dpo, policy, reference, data, out, config, setting)


def ipo(
    policy: Path, reference: Path, data: Path, out: Path, *, config: IPOConfig, setting: Setting
) -> Metrics:
    """Identity preference optimisation on length-averaged log-probs."""
    return _prefer("ipo", preference_page.train_ipo, policy, reference, data, out, config, setting)


def _prefer(
    name: str,
    train: Callable[..., StageResult],
    policy: Path,
    reference: Path,
    data: Path,
    out: Path,
    config: DPOConfig | IPOConfig,
    setting: Setting,
) -> Metrics:
    refuse_existing(out)
    start, near = load_policy(policy, setting), load_policy(reference, setting)
    require_same_model(start, near)
    parts = read_pairs(start, data, setting)
    save = partial(_save_policy, start)
    weights = {"policy": policy, "reference": reference}
    with open_stage(out, name, save, config, setting, data={"preferences": data}, weights=weights) as stage:
        result = train(
            start.model,
            start.params,
            near.params,
            parts.train,
            parts.validation,
            config,
            generator=generator_for(setting, name),
            evaluate=_watcher(name, start, _prompts(parts.validation), stage, setting),
            log=stage.log,
            keep=stage.keep,
        )
    return _tell(name, result, out, setting)


def _save_policy(start: Checkpoint, folder: Path, params: Params) -> None:
    save_language_model(folder, start.model, params, tokenizer=start.tokenizer.path)


def _save_scalar(start: Checkpoint, normalisation: Normalisation, folder: Path, params: Params) -> None:
    save_scalar_model(
        folder, start.model, params, tokenizer=start.tokenizer.path, normalisation=normalisation
    )


def _prompts(pairs: Sequence[PairExample]) -> list[list[int]]:
    return [pair.chosen.ids[: pair.chosen.prompt_length] for pair in pairs]


def _watcher(
    name: str, start: Checkpoint, prompts: Sequence[Sequence[int]], stage: Stage, setting: Setting
) -> Callable[[Params], Metrics]:
    seed = seed_for(setting, f"{name} samples")
    return sample_watcher(start.model, start.tokenizer, prompts, stage.folder, stage=name, seed=seed)


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


def _tell(name: str, result: StageResult, out: Path, setting: Setting) -> Metrics:
    told = ", ".join(
        f"{key} {value:.4g}" for key, value in result.metrics.items() if isinstance(value, float)
    )
    setting.show(f"{name}: best after step {result.best_step}: {told}; written to {out}")
    return result.metrics
