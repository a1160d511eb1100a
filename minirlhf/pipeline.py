"""`minirlhf run`: the stages in order, nothing else.

    data -> base -> SFT -> reward model -> PPO, DPO, IPO, groups if asked for -> evaluation -> one table

On the embedded world a gold judge compares; on real data a second reward model does, which was trained on
pairs that no other stage has seen.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from minirlhf.data import world_files
from minirlhf.data.preference_files import write_preference_files
from minirlhf.data.readers import open_preferences
from minirlhf.data.source import fingerprint
from minirlhf.evaluation.stage import evaluate
from minirlhf.models.sources import resolve_model
from minirlhf.recipes import RunConfig
from minirlhf.runs import (
    InputError,
    MetricsWriter,
    RunLayout,
    atomic_directory,
    dump_config,
    manifest,
    write_json_atomic,
    write_text_atomic,
)
from minirlhf.training import stages
from minirlhf.training.device import resolve
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.progress import counting
from minirlhf.training.reward_sources import Reward, of_reward_model, open_reward
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import load_policy, refuse_existing

JUDGE_SHARE = 1 / 3
"""Of the prompts of real preferences: those of the judge's own training."""

_GROUPS = {"group": RLOO, "group-normalised": GROUP_NORMALISED}


def run_world(out: Path, config: RunConfig, *, device: str) -> None:
    """The whole pipeline on the embedded world."""
    if config.reading.format != "auto":
        raise InputError(
            f"--format {config.reading.format}: expected no format, the world writes its own rows"
        )
    run = RunLayout(out)

    def write_data(folder: Path) -> None:
        world_files.write(folder, config=config.world, seed=config.seed)

    with _open_run(run, config, device, write_data, sources={}) as setting:
        random = run.data / "model"
        stages.new_model(
            run.data / "tokenizer.json", random, shape=config.shape, seed=seed_for(setting, "model")
        )
        drilled, base = run.model("drilled"), run.model("base")
        _announce("base model, first part: drills in copying and checking")
        stages.pretrain(
            random, run.data / "drills.jsonl", drilled, config=config.drills, setting=setting, name="drills"
        )
        _announce("base model, second part: the world's plain text")
        stages.pretrain(drilled, run.data / "texts.jsonl", base, config=config.base, setting=setting)
        bayes = world_files.bayes_accuracy(
            run.data / "preferences.jsonl", surface_bias=config.world.surface_bias
        )
        reward = _align(run, base, config, setting, bayes_accuracy=bayes)
        _evaluate(run, config, setting, reward=reward, judge=None)


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
) -> None:
    """The whole pipeline on a user's model (a directory, a GGUF file or a hub name) and preferences.

    Args:
        reward, judge: sources (`reward_sources`) to use instead of training a reward model, or a second one.
        remote: how they are asked, where they are endpoints.
    """
    refuse_existing(out)
    run, model = RunLayout(out), resolve_model(model)
    early = Setting(config.seed, device, config.reading)  # what is wrong with these is said now
    given, judging = (
        None if source is None else open_reward(source, early, remote=remote) for source in (reward, judge)
    )

    def write_data(folder: Path) -> None:
        load_policy(model, early)  # fails now, not after the data
        _split_preferences(preferences, folder, config, judge_share=JUDGE_SHARE if judging is None else 0.0)

    sources = {"model": model, "preferences": preferences}
    with _open_run(run, config, device, write_data, sources=sources) as setting:
        trained_on = _align(run, model, config, setting, reward=given)
        if judging is None:
            judging = _train_judge(run, config, setting)
        _evaluate(run, config, setting, reward=trained_on, judge=judging)


def _align(
    run: RunLayout,
    base: Path,
    config: RunConfig,
    setting: Setting,
    *,
    reward: Reward | None = None,
    bayes_accuracy: float | None = None,
) -> Reward:
    """SFT, a reward model unless there is a reward, and every policy that the config asks for; the reward."""
    data, sft = run.data, run.model("sft")
    _announce("SFT")
    stages.sft(base, data / "demonstrations.jsonl", sft, config=config.sft, setting=setting)
    if reward is None:
        reward = _train_reward(run, config, setting, bayes_accuracy)
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
            groups(sft, sft, reward, prompts, out, setting=setting)
        else:
            ppo = config.ppo if policy == "ppo" else dataclasses.replace(config.ppo, kl_coefficient=0.0)
            stages.ppo(sft, sft, reward, prompts, out, config=ppo, setting=setting, name=policy)
    return reward


def _train_reward(
    run: RunLayout, config: RunConfig, setting: Setting, bayes_accuracy: float | None
) -> Reward:
    _announce("reward model")
    probe = run.data / "probe.jsonl"
    accuracies = stages.reward(
        run.model("sft"),
        run.data / "preferences.jsonl",
        run.model("reward"),
        config=config.reward,
        normalise=config.normalise,
        setting=setting,
        probe=probe if probe.exists() else None,
    )
    _tell_accuracies(accuracies, bayes_accuracy)
    return of_reward_model(run.model("reward"), setting)


def _train_judge(run: RunLayout, config: RunConfig, setting: Setting) -> Reward:
    _announce("the judge: a second reward model, on pairs that no policy has seen")
    stages.reward(
        run.model("sft"),
        run.data / "judge_preferences.jsonl",
        run.model("judge"),
        config=config.reward,
        normalise=config.normalise,
        setting=setting._replace(seed=seed_for(setting, "judge")),
    )
    return of_reward_model(run.model("judge"), setting)


def _evaluate(
    run: RunLayout, config: RunConfig, setting: Setting, *, reward: Reward, judge: Reward | None
) -> None:
    _announce("evaluation: the same held-out prompts for every policy")
    evaluate(
        {policy: run.model(policy) for policy in config.policies},
        run.model("sft"),
        reward,
        run.data / "prompts.jsonl",
        run.evaluation,
        judge=judge,
        config=config.evaluation,
        setting=setting,
        metrics=run.metrics,
    )


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


@contextmanager
def _open_run(
    run: RunLayout,
    config: RunConfig,
    device: str,
    write_data: Callable[[Path], None],
    *,
    sources: dict[str, Path],
) -> Iterator[Setting]:
    """The run directory with its data and config; the stages fill it one by one, each whole.

    A mistake that is found before a model stands in it removes it again.
    """
    refuse_existing(run.root)
    where = str(resolve(device))
    started = time.perf_counter()
    with atomic_directory(run.root) as folder:
        data = RunLayout(folder).data
        data.mkdir()
        write_data(data)
        write_text_atomic(RunLayout(folder).config, dump_config(config))
    files: dict[str, Path | dict[str, str]] = {
        **{path.name: path for path in sorted(run.data.iterdir()) if path.is_file()},
        **{name: fingerprint(source) for name, source in sources.items()},
    }
    record = manifest(config, config.seed, files, {}, device=where)
    write_json_atomic(run.manifest, record)
    try:
        with MetricsWriter(run.metrics) as writer:
            # The run's own files are in our own format, whatever the user's were in.
            reading = dataclasses.replace(config.reading, format="auto")
            yield Setting(config.seed, device, reading, log=partial(_log, writer))
    except InputError:
        if not any((run.root / name / "manifest.json").exists() for name in _models(run)):
            shutil.rmtree(run.root)
        raise
    weights = {name: run.model(name) for name in _models(run)}
    seconds = time.perf_counter() - started
    write_json_atomic(
        run.manifest, {**manifest(config, config.seed, files, weights, device=where), "seconds": seconds}
    )
    print(f"done in {seconds / 60:.1f} minutes; everything is in {run.root}")


def _models(run: RunLayout) -> list[str]:
    return [path.name for path in sorted(run.root.iterdir()) if (path / "model.safetensors").exists()]


def _log(writer: MetricsWriter, step: int, stage: str, metrics: dict[str, float]) -> None:
    writer.write(step, stage, metrics)


def _announce(stage: str) -> None:
    Console(stderr=True).rule(f"[bold]{stage}", align="left")
