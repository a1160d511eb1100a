"""The memory plans of the stages: which phases they have, and what lives in each.

A step is traced on the longest batch that the data has (`live_memory`), so the plan is an upper bound for
other batches. A plan reads shapes, types and lengths; it computes nothing and draws nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from minirlhf.data.records import Example, PairExample
from minirlhf.data.rows import checked_rows
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.footprint import Footprint, footprint
from minirlhf.training import preference, reward_model, sft
from minirlhf.training.live_memory import live_memory, without_gradient
from minirlhf.training.loop import Step, TrainConfig, longest_first
from minirlhf.training.memory_plan import (
    Entry,
    Phase,
    Plan,
    Trained,
    base_of,
    bytes_of,
    forward_phase,
    gradient_phase,
    loading,
    optimiser_phase,
    saving,
)
from minirlhf.training.pair_objectives import PairObjective, PreferenceConfig
from minirlhf.training.pairs import cut_pairs, pair_lengths, pair_rows
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.samples import shown_prompts
from minirlhf.training.setting import NormaliseConfig
from minirlhf.training.sft import SFTConfig
from minirlhf.training.update import Loss, gradient

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
        steps.append(sft.cut(rows, index, micro_batch_size=config.micro_batch_size, device=_CPU))
    step, held_out = steps
    loss = partial(sft.loss, model=model)
    return _loop_plan(name, model, params, loss, step, held_out, prompts, device=device)


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
    loss = partial(preference.loss, model=model, objective=objective)
    plan = _loop_plan(objective.name, model, params, loss, step, held_out, prompts, device=device)
    size, other = bytes_of(params), 0 if reference is params else bytes_of(reference)
    logps = without_gradient(partial(preference.sequence_logp, model))
    live = live_memory(logps, reference, step.micro_batches[0].rows, device=device)
    around = (Entry("policy", "start", size), Entry("reference", "start", other))
    first = (
        loading([("policy", size), ("reference", other)]),
        forward_phase("refer", "reference", live, around),
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
        model=model,
        label_smoothing=config.label_smoothing,
        center_rewards_coefficient=config.center_rewards_coefficient,
    )
    plan = _loop_plan("reward", model, params, loss, step, held_out, (), device=device)
    response = min(normalise.max_response, model.config.n_positions - 1)
    some = [ids for ids in prompts if len(ids) <= model.config.n_positions - response][: normalise.rollouts]
    asked = [some[i % len(some)] for i in range(normalise.rollouts)] if some else []
    around = (
        Entry("policy", "start", bytes_of(backbone)),
        Entry("reward model", "best checkpoint", bytes_of(params)),
    )
    if not asked:
        return plan
    sampled = footprint(model, backbone, asked, max_new_tokens=response, device=device)
    last = rollout_phase("normalise", model, backbone, sampled, around, device=device)
    return plan._replace(phases=(*plan.phases, last))


def rollout_phase(
    name: str,
    model: LanguageModel,
    params: Params,
    sampled: Footprint,
    around: Sequence[Entry],
    *,
    device: torch.device,
) -> Phase:
    """A rollout at its fullest. On a CPU, packed weights and cache lie in rooms, which go back."""
    tokens = torch.zeros(sampled.rows, sampled.tokens, dtype=torch.int64)
    live = live_memory(without_gradient(model.hidden), params, tokens, device=device)
    in_rooms = device.type == "cpu"
    entries = (
        Entry("policy", "packed weights", sampled.copies.room, in_rooms),
        Entry("policy", "8-bit weights", sampled.copies.heap),
        Entry("policy", "KV cache", sampled.cache, in_rooms),
        Entry("policy", "activations", max(live.peak, sampled.tables)),
    )
    return Phase(name, (*around, *(entry for entry in entries if entry.size)))


def _loop_plan(
    name: str,
    model: LanguageModel,
    params: Params,
    loss: Loss,
    step: Step,
    held_out: Step,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device,
) -> Plan:
    """Of `loop.train_loop` on these parameters; samples of the prompts are shown at each evaluation."""
    size = bytes_of(params)
    trained = Trained("policy", size, size)
    # Of micro-batches after the second, each needs what the second does: a gradient beside the sum so far.
    parts = [step.micro_batches[i] for i in range(min(2, len(step.micro_batches)))]
    live = live_memory(partial(gradient, loss=loss), params, parts, step.normaliser, device=device)
    part = held_out.micro_batches[0]
    judged = live_memory(without_gradient(loss), params, part, held_out.normaliser, device=device)
    around, shown = trained.held(), []
    fitting, most = shown_prompts(model, prompts)
    if fitting:
        sampled = footprint(model, params, fitting, max_new_tokens=most, device=device)
        shown = [rollout_phase("show samples", model, params, sampled, around, device=device)]
    phases = (
        loading([("policy", size)]),
        gradient_phase("gradient", "policy", live, around),
        optimiser_phase("step", trained, live, around),
        forward_phase("evaluate", "policy", judged, around),
        *shown,
        saving(trained, trained.held(bests=2)),
    )
    rows, tokens = _shape(parts[0])
    assumed = (f"longest micro-batch of the data: {rows} rows of {tokens} tokens",)
    return Plan(name, device, base_of(device, params), phases, assumed)


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
    return cut_pairs(rows, index, micro_batch_size=config.micro_batch_size, device=_CPU)


def _shape(part: Any) -> tuple[int, int]:
    """Rows and tokens of a micro-batch of rows or of pairs."""
    rows, tokens = (part.tokens if hasattr(part, "tokens") else part.rows.tokens).shape
    return rows, tokens
