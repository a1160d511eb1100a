"""Evaluation as a user runs it: model directories and prompts in, one table and a report directory out."""

from collections.abc import Mapping
from pathlib import Path

from minirlhf.data import gold
from minirlhf.data.records import Prompt
from minirlhf.evaluation.compare import Comparison, EvaluationConfig, compare
from minirlhf.evaluation.judges import Judge, gold_judge, reward_model_judge
from minirlhf.evaluation.report import show_report, write_report
from minirlhf.runs import InputError
from minirlhf.training.inputs import read_test_prompts
from minirlhf.training.rewards import reward_model_scorer
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import (
    Checkpoint,
    load_policy,
    load_reward_model,
    refuse_existing,
    require_same_model,
)


def evaluate(
    policies: Mapping[str, Path],
    sft: Path,
    reward_model: Path,
    data: Path,
    out: Path,
    *,
    judge: Path | None,
    config: EvaluationConfig,
    setting: Setting,
    metrics: Path | None = None,
) -> Comparison:
    """Compares policies with SFT on the test prompts, prints the table and writes the report.

    Args:
        policies: directories by the name of their row.
        sft: the other side of every comparison. reward_model: what the policies were trained on.
        data: prompts; those that the cut by prompt keeps for testing are used.
        judge: a second reward model; None for the gold judge, which needs prompts with facts.
        metrics: a run's metrics.jsonl, for the learning curves.

    Raises:
        InputError: a directory or file is missing or does not fit the others, or there is nobody to judge.
    """
    refuse_existing(out)
    start, proxy = load_policy(sft, setting), load_reward_model(reward_model, setting)
    others = {name: load_policy(path, setting) for name, path in policies.items()}
    for other in (proxy, *others.values()):
        require_same_model(start, other)
    ids, rows = read_test_prompts(start, data, config.max_response, setting)
    ids, rows = ids[: config.prompts], rows[: config.prompts]
    judging = _gold(start, rows, data) if judge is None else _second(start, judge, setting)
    comparison = compare(
        start.model,
        start.params,
        {name: other.params for name, other in others.items()},
        ids,
        [row.prompt for row in rows],
        proxy=reward_model_scorer(proxy.model, proxy.params, proxy.normalisation),
        judge=judging,
        tokenizer=start.tokenizer,
        config=config,
        seed=seed_for(setting, "evaluation"),
        say=setting.show,
    )
    write_report(out, comparison, metrics=metrics, say=setting.show)
    show_report(comparison)
    return comparison


def _gold(start: Checkpoint, rows: list[Prompt], data: Path) -> Judge:
    without = next((row for row in rows if row.facts is None), None)
    if without is not None:
        raise InputError(
            f'{data}:{without.line}: the gold judge needs prompts with "facts", found none; '
            "name a second reward model with --judge"
        )
    texts, facts = [row.prompt for row in rows], [row.facts for row in rows]
    return gold_judge(gold.gold_score, gold.gold_components, start.tokenizer, texts, facts)


def _second(start: Checkpoint, judge: Path, setting: Setting) -> Judge:
    loaded = load_reward_model(judge, setting)
    require_same_model(start, loaded)
    return reward_model_judge(
        loaded.model, loaded.params, loaded.normalisation, name=f"second reward model ({judge.name})"
    )
