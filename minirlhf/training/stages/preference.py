"""Stages that learn from preferences alone: DPO and IPO."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from minirlhf.training import preference as preference_page
from minirlhf.training.inputs import read_pairs
from minirlhf.training.loop import StageResult
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.setting import Setting, generator_for
from minirlhf.training.stages.around import Metrics, prompts_of, save_policy, tell, watcher
from minirlhf.training.workspace import load_policy, load_reference, open_stage, refuse_existing


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
    start = load_policy(policy, setting)
    near = load_reference(reference, start, setting)
    parts = read_pairs(start, data, setting)
    save = partial(save_policy, start)
    weights = {"policy": start.path, "reference": near.path}
    with open_stage(out, name, save, config, setting, data={"preferences": data}, weights=weights) as stage:
        result = train(
            start.model,
            start.params,
            near.params,
            parts.train,
            parts.validation,
            config,
            generator=generator_for(setting, name),
            evaluate=watcher(name, start, prompts_of(parts.validation), stage, setting),
            log=stage.log,
            keep=stage.keep,
        )
    return tell(name, result, out, setting)
