"""Evaluation as a user runs it: model directories and prompts in, one table and a report directory out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minirlhf.data import gold
from minirlhf.data.records import Prompt
from minirlhf.evaluation.compare import Comparison, EvaluationConfig, compare
from minirlhf.evaluation.judges import Judge, gold_judge, reward_judge
from minirlhf.evaluation.memory import evaluation_plan
from minirlhf.evaluation.report import show_report, write_report
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training.device import resolve
from minirlhf.training.inputs import read_test_prompts
from minirlhf.training.plan_table import announce
from minirlhf.training.prompt_rows import PromptRow
from minirlhf.training.reward_sources import Reward
from minirlhf.training.rewards import Scorer
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import (
    Checkpoint,
    load_policy,
    refuse_existing,
    require_same_model,
)


def evaluate(
    policies: Mapping[str, Path],
    sft: Path,
    reward: Reward | None,
    data: Path,
    out: Path,
    *,
    judge: Reward | None,
    config: EvaluationConfig,
    setting: Setting,
    metrics: Path | None = None,
) -> Comparison:
    """Compares policies with SFT on the test prompts, prints the table and writes the report.

    Args:
        policies: directories by the name of their row.
        sft: the other side of every comparison.
        reward: what the policies were trained on; None leaves the score, and the word on hacking, out.
        data: prompts; those that the cut by prompt keeps for testing are used.
        judge: another reward: a second reward model, a rule, an endpoint; None for the gold judge, which
            needs prompts with facts.
        metrics: a run's metrics.jsonl, for the learning curves.

    Raises:
        InputError: a directory or file is missing or does not fit the others, or there is nobody to judge.
    """
    refuse_existing(out)
    read = _read(policies, sft, reward, data, judge, config, setting)
    comparison = compare(
        read.start.model,
        read.start.params,
        read.others,
        [each.ids for each in read.prompts],
        [each.row.prompt for each in read.prompts],
        proxy=read.proxy,
        judge=read.judge,
        tokenizer=read.start.tokenizer,
        config=config,
        seed=seed_for(setting, "evaluation"),
        say=setting.show,
    )
    write_report(out, comparison, metrics=metrics, say=setting.show)
    show_report(comparison)
    return comparison


def plan_evaluation(
    policies: Mapping[str, Path],
    sft: Path,
    reward: Reward | None,
    data: Path,
    *,
    judge: Reward | None,
    config: EvaluationConfig,
    setting: Setting,
) -> None:
    """Says what `evaluate` would need of memory; arguments and errors are its own."""
    read = _read(policies, sft, reward, data, judge, config, setting)
    named = (("reward model", reward), ("judge", judge))
    readers = {owner: each.reader for owner, each in named if each is not None and each.reader is not None}
    ids, device = [each.ids for each in read.prompts], resolve(setting.device)
    start = read.start
    plan = evaluation_plan(start.model, start.params, read.others, readers, ids, config, device=device)
    announce(plan, setting)


class _Read(NamedTuple):
    """What a comparison is made of: SFT, the policies by name, P prompts, and who scores them."""

    start: Checkpoint
    others: dict[str, Params]
    prompts: list[PromptRow]
    proxy: Scorer | None
    judge: Judge


def _read(
    policies: Mapping[str, Path],
    sft: Path,
    reward: Reward | None,
    data: Path,
    judge: Reward | None,
    config: EvaluationConfig,
    setting: Setting,
) -> _Read:
    start = load_policy(sft, setting)
    others = {name: load_policy(path, setting) for name, path in policies.items()}
    for other in others.values():
        require_same_model(start, other)
    ids, rows = read_test_prompts(start, data, config.max_response, setting)
    pairs = list(zip(ids, rows, strict=True))[: config.prompts]
    prompts = [PromptRow(each, row) for each, row in pairs]
    judging = _judge(start, reward, judge, prompts, data, config, setting)
    proxy = None if reward is None else reward.scorer(start, prompts, config.max_response)
    return _Read(start, {name: other.params for name, other in others.items()}, prompts, proxy, judging)


def _judge(
    start: Checkpoint,
    reward: Reward | None,
    judge: Reward | None,
    prompts: Sequence[PromptRow],
    data: Path,
    config: EvaluationConfig,
    setting: Setting,
) -> Judge:
    if judge is None:
        return _gold(start, [row.row for row in prompts], data)
    if reward is None:
        setting.show("no reward is named: the table has no score column, and nothing to say about hacking")
    elif reward.name == judge.name:
        setting.show(f"the judge is {judge.name}, which the policies were trained on: hacking cannot be seen")
    return reward_judge(judge, start, prompts, max_response=config.max_response)


def _gold(start: Checkpoint, rows: Sequence[Prompt], data: Path) -> Judge:
    without = next((row for row in rows if row.facts is None), None)
    if without is not None:
        raise InputError(
            f'{data}:{without.line}: the gold judge needs prompts with "facts", found none; '
            "name another judge with --judge"
        )
    texts, facts = [row.prompt for row in rows], [row.facts for row in rows]
    return gold_judge(gold.gold_score, gold.gold_components, start.tokenizer, texts, facts)
