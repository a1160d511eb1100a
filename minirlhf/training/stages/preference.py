"""Stages that learn from preferences alone: DPO and IPO."""

from functools import partial
from pathlib import Path

from minirlhf.training import pair_objectives
from minirlhf.training import preference as preference_page
from minirlhf.training.device import resolve
from minirlhf.training.inputs import read_pairs
from minirlhf.training.plan_table import announce
from minirlhf.training.preference import DPOConfig, IPOConfig, PairObjective
from minirlhf.training.setting import Setting, generator_for
from minirlhf.training.stage_plans import preference_plan
from minirlhf.training.stages.around import Metrics, prompts_of, save_policy, tell, watcher
from minirlhf.training.trained import trained
from minirlhf.training.workspace import load_policy, load_reference, open_stage, refuse_existing


def dpo(
    policy: Path, reference: Path, data: Path, out: Path, *, config: DPOConfig, setting: Setting
) -> Metrics:
    """Direct preference optimisation from the policy, relative to the reference."""
    return _prefer("dpo", pair_objectives.dpo(config), policy, reference, data, out, config, setting)


def ipo(
    policy: Path, reference: Path, data: Path, out: Path, *, config: IPOConfig, setting: Setting
) -> Metrics:
    """Identity preference optimisation on length-averaged log-probs."""
    return _prefer("ipo", pair_objectives.ipo(config), policy, reference, data, out, config, setting)


def _prefer(
    name: str,
    objective: PairObjective,
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
    prompts, device = prompts_of(parts.validation), resolve(setting.device)
    plan = preference_plan(
        start.model, start.params, near.params, parts.train, parts.validation, prompts, config, objective,
        device=device,
    )  # fmt: skip
    if announce(plan, setting):
        return {}
    save = partial(save_policy, start)
    weights = {"policy": start.path, "reference": near.path}
    with open_stage(out, name, save, config, setting, data={"preferences": data}, weights=weights) as stage:
        generator = generator_for(setting, name)
        actor = trained(start.model, start.params, config, generator=generator)
        referred = preference_page.refer(
            start.model,
            actor.frozen(near.params),
            parts.train,
            parts.validation,
            micro_batch_size=config.micro_batch_size,
        )
        del near  # all that training needs of the reference are these log-probs
        result = preference_page.train_referred(
            start.model,
            actor,
            referred,
            config,
            objective,
            generator=generator,
            evaluate=watcher(name, start, prompts, stage, setting),
            log=stage.log,
            keep=stage.keep,
        )
    return tell(name, result, out, setting)
