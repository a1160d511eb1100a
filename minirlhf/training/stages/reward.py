"""The stage that makes a reward model, and says what its accuracy is worth."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from minirlhf.data.readers import read_preferences
from minirlhf.data.records import PairExample
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import Params, with_scalar_head
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import Rollout, generate
from minirlhf.runs import InputError
from minirlhf.training import reward_model as reward_page
from minirlhf.training.baselines import FITTED_PAIRS, bag_of_words_accuracy, length_only_accuracy
from minirlhf.training.device import resolve
from minirlhf.training.inputs import Parts, context_of, read_pairs, tokenise_pairs
from minirlhf.training.plan_table import announce
from minirlhf.training.progress import sampling
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import NormaliseConfig, Setting, generator_for, seed_for
from minirlhf.training.stage_plans import reward_plan
from minirlhf.training.stages.around import Metrics, prompts_of, save_scalar, tell
from minirlhf.training.workspace import Checkpoint, load_policy, open_stage, refuse_existing


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
    probes: list[PairExample] = []
    if probe is not None:
        pairs = read_preferences(probe, format=setting.reading.format).rows
        probes = tokenise_pairs(start, pairs, setting).examples
    generator = generator_for(setting, "reward")
    initial = with_scalar_head(start.model, start.params, generator=generator)
    plan = reward_plan(
        start.model,
        start.params,
        initial,
        parts.train,
        parts.validation,
        prompts_of(parts.validation),
        config,
        normalise,
        device=resolve(setting.device),
    )
    if announce(plan, setting):
        return {}
    files = {"preferences": data} | ({} if probe is None else {"probe": probe})
    save = partial(save_scalar, start, Normalisation(0.0, 1.0))
    weights = {"policy": start.path}
    with open_stage(out, "reward", save, config, setting, data=files, weights=weights) as stage:
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
        if len(parts.train) > FITTED_PAIRS:
            setting.show(f"{data}: the bag of words is fitted to the first {FITTED_PAIRS} training pairs")
        stage.log(result.best_step, metrics)
        rollout = respond(start, prompts_of(parts.validation), normalise, setting)
        normalisation = reward_page.normalise_reward(start.model, result.params, rollout)
        save_scalar(start, normalisation, stage.best, result.params)
    return tell("reward", result._replace(metrics=result.metrics | metrics), out, setting)


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


def respond(
    start: Checkpoint, prompts: Sequence[list[int]], config: NormaliseConfig, setting: Setting
) -> Rollout:
    """Responses of the policy itself to prompts with room, each as often as it takes."""
    room = context_of(start, setting) - config.max_response
    fitting = list(islice((ids for ids in prompts if len(ids) <= room), config.rollouts))
    if not fitting:
        raise InputError(
            f"expected a prompt that leaves room for max_response {config.max_response} in a context of "
            f"{room + config.max_response} tokens, found none"
        )
    episode = torch.arange(config.rollouts)
    index = episode % len(fitting)
    with sampling("normalisation", config.rollouts * config.max_response) as told:
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
            progress=told,
        )
