"""The memory plans of the stages: which phases they have, and what lives in each.

A step is traced on the longest batch that the data has (`live_memory`), packed as the stage packs it. Another
batch may share fewer tokens and take up to what its padded rows take. A plan reads shapes, types, lengths and
what rows begin with alike; it computes nothing and draws nothing.
"""

from collections.abc import Sequence
from functools import partial

import torch

from minirlhf.data.records import Example, PairExample
from minirlhf.data.rows import checked_rows
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.footprint import footprint
from minirlhf.training import plan_phases, preference, reward_model, sft
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.live_memory import live_memory, without_gradient
from minirlhf.training.loop import Step, TrainConfig, longest_first
from minirlhf.training.memory_plan import Entry, Plan, base_of, bytes_of
from minirlhf.training.packed import Batch, PackedRows, pack_for
from minirlhf.training.pair_objectives import PairObjective, PreferenceConfig
from minirlhf.training.pairs import cut_pairs, pair_lengths, pair_rows
from minirlhf.training.plan_phases import Learner, learner
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.samples import shown_prompts
from minirlhf.training.setting import NormaliseConfig
from minirlhf.training.sft import SFTConfig
from minirlhf.training.update import Loss

_CPU = torch.device("cpu")  # where micro-batches are cut; only their shapes are read


def sft_plan(
    name: str,
    model: LanguageModel,
    params: Params,
    train: Sequence[Example],
    validation: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    config: SFTConfig,
    *,
    device: torch.device,
) -> Plan:
    """Of `sft.train` on these examples, with samples shown of the prompts at each evaluation."""
    steps = []
    for examples, count in ((train, config.batch_size), (validation, config.micro_batch_size)):
        rows = checked_rows(examples, vocab_size=model.config.vocab_size)
        index = longest_first(rows.lengths, torch.arange(len(rows.lengths)))[:count]
        size, pack = config.micro_batch_size, pack_for(config)
        steps.append(sft.cut(rows, index, micro_batch_size=size, device=_CPU, pack=pack))
    step, held_out = steps
    loss, policy = (
        partial(sft.loss, model=model_of_loss(model, config)),
        learner("policy", model, params, config),
    )
    plan = _loop_plan(name, model, policy, loss, step, held_out, prompts, config, device=device)
    return plan._replace(base=base_of(device, params))


def preference_plan(
    model: LanguageModel,
    params: Params,
    reference: Params,
    train: Sequence[PairExample],
    validation: Sequence[PairExample],
    prompts: Sequence[Sequence[int]],
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    device: torch.device,
) -> Plan:
    """Of `preference.train`; a reference other than `params` is gone when the first step is taken."""
    step, held_out = (
        _longest_pairs(pairs, count, config, model, ("ref_chosen", "ref_rejected"))
        for pairs, count in ((train, config.batch_size), (validation, config.micro_batch_size))
    )
    loss = partial(preference.loss, model=model_of_loss(model, config), objective=objective)
    policy, other = (
        learner("policy", model, params, config),
        0 if reference is params else bytes_of(reference),
    )
    plan = _loop_plan(objective.name, model, policy, loss, step, held_out, prompts, config, device=device)
    near, made = policy.frozen(None if reference is params else reference)
    rows = step.micro_batches[0]
    logps = without_gradient(partial(preference.sequence_logp, model))
    live = live_memory(logps, near, PackedRows(rows.rows, rows.packing), device=device)
    around = (
        Entry("policy", "start", policy.start),
        Entry("policy", "base in bf16", policy.base),
        Entry("reference", "start", other),
        Entry("reference", "copy in bf16", made),
    )
    first = (
        plan_phases.loading([("policy", policy.start), ("reference", other)]),
        plan_phases.forward_phase("refer", "reference", live, around),
    )
    return plan._replace(base=base_of(device, params, reference), phases=(*first, *plan.phases[1:]))


def reward_plan(
    model: LanguageModel,
    backbone: Params,
    params: Params,
    train: Sequence[PairExample],
    validation: Sequence[PairExample],
    prompts: Sequence[Sequence[int]],
    config: RewardConfig,
    normalise: NormaliseConfig,
    *,
    device: torch.device,
) -> Plan:
    """Of the reward stage: `params` is the backbone with a head; the policy itself samples at the end."""
    step, held_out = (
        _longest_pairs(pairs, count, config, model, ())
        for pairs, count in ((train, config.batch_size), (validation, config.micro_batch_size))
    )
    loss = partial(
        reward_model.loss,
        model=model_of_loss(model, config),
        label_smoothing=config.label_smoothing,
        center_rewards_coefficient=config.center_rewards_coefficient,
    )
    judge = learner("policy", model, params, config)
    plan = _loop_plan("reward", model, judge, loss, step, held_out, (), config, device=device)
    response = min(normalise.max_response, model.config.n_positions - 1)
    some = [ids for ids in prompts if len(ids) <= model.config.n_positions - response][: normalise.rollouts]
    asked = [some[i % len(some)] for i in range(normalise.rollouts)] if some else []
    around = (
        Entry("policy", "start", judge.start),
        Entry("reward model", "best checkpoint", judge.size.trained),
    )
    plan = plan._replace(base=base_of(device, params, backbone))
    if not asked:
        return plan
    sampled = footprint(model, backbone, asked, max_new_tokens=response, device=device)
    last = plan_phases.rollout_phase("normalise", model, backbone, sampled, around, device=device)
    return plan._replace(phases=(*plan.phases, last))


def _loop_plan(
    name: str,
    model: LanguageModel,
    policy: Learner,
    loss: Loss,
    step: Step,
    held_out: Step,
    prompts: Sequence[Sequence[int]],
    config: TrainConfig,
    *,
    device: torch.device,
) -> Plan:
    """Of `loop.train_loop` on this learner, but for the base; samples are shown at each evaluation."""
    parts = [step.micro_batches[i] for i in range(min(2, len(step.micro_batches)))]
    around, shown = policy.held(), []
    judged = live_memory(
        without_gradient(loss),
        policy.computing,
        held_out.micro_batches[0],
        held_out.normaliser,
        device=device,
    )
    fitting, most = shown_prompts(model, prompts)
    if fitting:
        sampled = footprint(model, policy.kept, fitting, max_new_tokens=most, device=device)
        shown = [
            plan_phases.rollout_phase("show samples", model, policy.kept, sampled, around, device=device)
        ]
    names = ("gradient", "step")
    phases = (
        plan_phases.loading([("policy", policy.start)]),
        *plan_phases.gradient_phases(
            policy, loss, parts, step.normaliser, around, names=names, device=device
        ),
        plan_phases.forward_phase("evaluate", "policy", judged, (*around, policy.copy)),
        *shown,
        plan_phases.saving(policy, policy.held(bests=2)),
    )
    assumed = (f"longest micro-batch of the data: {_shape(parts[0])}", *plan_phases.assumptions(config))
    return Plan(name, device, 0, phases, assumed, plan_phases.remedies_of(config))


def _longest_pairs(
    pairs: Sequence[PairExample],
    count: int,
    config: TrainConfig,
    model: LanguageModel,
    extra: Sequence[str],
) -> Step:
    """The longest pairs as a batch, with the columns that the loss reads besides."""
    rows = pair_rows(pairs, name="training", model=model)
    lengths = pair_lengths(rows)
    rows = rows._replace(extra={name: torch.zeros(len(lengths)) for name in extra})
    index = longest_first(lengths, torch.arange(len(lengths)))[:count]
    size, pack = config.micro_batch_size, pack_for(config)
    return cut_pairs(rows, index, micro_batch_size=size, device=_CPU, pack=pack)


def _shape(part: Batch) -> str:
    """A micro-batch of rows or of pairs, in words."""
    rows, tokens = part.rows.tokens.shape
    said = f"{rows} rows of {tokens} tokens"
    return said if part.packing is None else f"{said}, {len(part.packing.tokens)} of them computed"
