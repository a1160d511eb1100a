"""`minirlhf run`: the stages in order, nothing else.

    data -> base -> SFT -> reward model -> PPO, DPO, IPO, groups if asked for -> evaluation -> one table

On the embedded world a gold judge compares; on real data a second reward model does, which was trained on
pairs that no other stage has seen. A dry run plans the same stages: data lie in a folder that is gone at the
end, and each model that no stage has written yet is planned by the shapes of the one it starts from.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from minirlhf.data import world_files
from minirlhf.data.preference_files import write_preference_files
from minirlhf.data.readers import open_preferences
from minirlhf.evaluation.stage import evaluate, plan_evaluation
from minirlhf.models.sources import resolve_model
from minirlhf.recipes import RunConfig
from minirlhf.runs import InputError, RunLayout
from minirlhf.training import stages
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.memory_plan import Plan
from minirlhf.training.progress import counting
from minirlhf.training.reward_sources import Reward, of_reward_model, of_untrained, open_reward
from minirlhf.training.run_directory import open_run, plan_run
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import load_policy, refuse_existing

JUDGE_SHARE = 1 / 3
"""Of the prompts of real preferences: those of the judge's own training."""

Open = Callable[[Setting], Reward]
"""Reads a reward, or asks for it."""

_GROUPS = {"group": RLOO, "group-normalised": GROUP_NORMALISED}


def run_world(out: Path, config: RunConfig, *, device: str, dry_run: bool = False) -> None:
    """The whole pipeline on the embedded world; in a dry run its memory plan."""
    if config.reading.format != "auto":
        raise InputError(
            f"--format {config.reading.format}: expected no format, the world writes its own rows"
        )

    def write_data(folder: Path) -> None:
        world_files.write(folder, config=config.world, seed=config.seed)

    opened = plan_run if dry_run else open_run
    with opened(out, config, device, write_data, sources={}) as (run, setting):
        random = run.data / "model"
        stages.new_model(
            run.data / "tokenizer.json", random, shape=config.shape, seed=seed_for(setting, "model")
        )
        _announce("base model, first part: drills in copying and checking")
        data, out = run.data / "drills.jsonl", run.model("drilled")
        stages.pretrain(random, data, out, config=config.drills, setting=setting, name="drills")
        drilled = _made(run, "drilled", random, setting)
        _announce("base model, second part: the world's plain text")
        data, out = run.data / "texts.jsonl", run.model("base")
        stages.pretrain(drilled, data, out, config=config.base, setting=setting)
        base = _made(run, "base", drilled, setting)
        bayes = world_files.bayes_accuracy(
            run.data / "preferences.jsonl", surface_bias=config.world.surface_bias
        )
        sft, reward = _align(run, base, config, setting, bayes_accuracy=bayes)
        _evaluate(run, sft, config, setting, reward=reward(setting), judge=None)


def run_real(
    out: Path,
    config: RunConfig,
    *,
    model: Path,
    preferences: Path,
    device: str,
    reward: str | None = None,
    judge: str | None = None,
    remote: RemoteConfig | None = None,
    dry_run: bool = False,
) -> None:
    """The whole pipeline on a user's model (a directory, a GGUF file or a hub name) and preferences.

    Args:
        reward, judge: sources (`reward_sources`) to use instead of training a reward model, or a second one.
        remote: how they are asked, where they are endpoints.
        dry_run: plan its memory instead.
    """
    refuse_existing(out)
    model = resolve_model(model)
    early = Setting(config.seed, device, config.reading, dry_run=dry_run)
    given, judging = (
        None if source is None else partial(open_reward, source, remote=remote) for source in (reward, judge)
    )
    for opening in filter(None, (given, judging)):
        opening(early)  # what is wrong with it is said now

    def write_data(folder: Path) -> None:
        load_policy(model, early._replace(dry_run=True))  # what headers tell fails now, not after the data
        _split_preferences(preferences, folder, config, judge_share=JUDGE_SHARE if judging is None else 0.0)

    sources, opened = {"model": model, "preferences": preferences}, plan_run if dry_run else open_run
    with opened(out, config, device, write_data, sources=sources) as (run, setting):
        sft, trained_on = _align(run, model, config, setting, reward=given)
        if judging is None:
            judging = _train_judge(run, sft, config, setting)
        _evaluate(run, sft, config, setting, reward=trained_on(setting), judge=judging(setting))


def _align(
    run: RunLayout,
    base: Path,
    config: RunConfig,
    setting: Setting,
    *,
    reward: Open | None = None,
    bayes_accuracy: float | None = None,
) -> tuple[Path, Open]:
    """SFT, a reward model unless there is a reward, and every policy that the config asks for; the SFT model
    and the reward. A reward is opened where it is used, so that no stage holds it for the next.
    """
    data = run.data
    _announce("SFT")
    stages.sft(base, data / "demonstrations.jsonl", run.model("sft"), config=config.sft, setting=setting)
    sft = _made(run, "sft", base, setting)
    if reward is None:
        reward = _train_reward(run, sft, config, setting, bayes_accuracy)
    prompts = data / "prompts.jsonl"
    for policy in config.policies:
        _announce(policy)
        out = run.model(policy)
        if policy == "dpo":
            stages.dpo(sft, sft, data / "preferences.jsonl", out, config=config.dpo, setting=setting)
        elif policy == "ipo":
            stages.ipo(sft, sft, data / "preferences.jsonl", out, config=config.ipo, setting=setting)
        elif policy in _GROUPS:
            groups = partial(stages.group, config=config.group, objective=_GROUPS[policy], name=policy)
            groups(sft, sft, reward(setting), prompts, out, setting=setting)
        else:
            ppo = config.ppo if policy == "ppo" else dataclasses.replace(config.ppo, kl_coefficient=0.0)
            stages.ppo(sft, sft, reward(setting), prompts, out, config=ppo, setting=setting, name=policy)
    return sft, reward


def _made(run: RunLayout, name: str, start: Path, setting: Setting) -> Path:
    """The model that a stage wrote; in a dry run none did, and the one that it starts from has its shapes."""
    return start if setting.dry_run else run.model(name)


def _train_reward(
    run: RunLayout, sft: Path, config: RunConfig, setting: Setting, bayes_accuracy: float | None
) -> Open:
    _announce("reward model")
    probe = run.data / "probe.jsonl"
    accuracies = stages.reward(
        sft,
        run.data / "preferences.jsonl",
        run.model("reward"),
        config=config.reward,
        normalise=config.normalise,
        setting=setting,
        probe=probe if probe.exists() else None,
    )
    if accuracies:
        _tell_accuracies(accuracies, bayes_accuracy)
    return _made_reward(run, "reward", sft, setting)


def _train_judge(run: RunLayout, sft: Path, config: RunConfig, setting: Setting) -> Open:
    _announce("the judge: a second reward model, on pairs that no policy has seen")

    def planned(plan: Plan) -> Plan:
        return setting.planned(plan._replace(stage="judge"))

    stages.reward(
        sft,
        run.data / "judge_preferences.jsonl",
        run.model("judge"),
        config=config.reward,
        normalise=config.normalise,
        setting=setting._replace(seed=seed_for(setting, "judge"), planned=planned),
    )
    return _made_reward(run, "judge", sft, setting)


def _made_reward(run: RunLayout, name: str, sft: Path, setting: Setting) -> Open:
    out = run.model(name)
    return partial(of_untrained, sft, out) if setting.dry_run else partial(of_reward_model, out)


def _evaluate(
    run: RunLayout,
    sft: Path,
    config: RunConfig,
    setting: Setting,
    *,
    reward: Reward,
    judge: Reward | None,
) -> None:
    _announce("evaluation: the same held-out prompts for every policy")
    policies = {policy: _made(run, policy, sft, setting) for policy in config.policies}
    prompts, more = run.data / "prompts.jsonl", {"judge": judge, "config": config.evaluation}
    if setting.dry_run:
        plan_evaluation(policies, sft, reward, prompts, **more, setting=setting)
    else:
        out, metrics = run.evaluation, run.metrics
        evaluate(policies, sft, reward, prompts, out, **more, setting=setting, metrics=metrics)


def _tell_accuracies(metrics: dict[str, float], bayes_accuracy: float | None) -> None:
    """The reward model beside what is possible and what is trivial."""
    names = {
        "test/accuracy": "reward model",
        "test/length_only_accuracy": "length alone",
        "test/bag_of_words_accuracy": "bag of words",
        "probe/accuracy": "reward model on the adversarial probe",
    }
    told = [f"{name} {100 * metrics[key]:.1f} %" for key, name in names.items() if key in metrics]
    if bayes_accuracy is not None:
        told.append(f"best possible (Bayes) {100 * bayes_accuracy:.1f} %")
    print(f"accuracy on {metrics['test/pairs']:.0f} test pairs: {', '.join(told)}")


def _split_preferences(preferences: Path, folder: Path, config: RunConfig, *, judge_share: float) -> None:
    """Cuts real pairs by prompt into the policies' and the judge's, and writes the run's files."""
    reading = config.reading
    opened = open_preferences(preferences, strict=reading.strict, format=reading.format)
    print(opened.decision)
    rows = counting(opened.rows, f"{preferences}")
    # Another seed than the stages' own cut, or the judge's prompts would all lie in one of their splits.
    seed = reading.split_seed + 1
    written = write_preference_files(rows, folder, judge_share=judge_share, seed=seed)
    print(written.dropped)
    print(
        f"{preferences}: {written.ours} pairs to learn from, {written.judges} of other prompts for the judge"
    )


def _announce(stage: str) -> None:
    Console(stderr=True).rule(f"[bold]{stage}", align="left")
