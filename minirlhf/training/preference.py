"""DPO, conservative DPO and IPO: learn from preferences without a reward model. One loop, three entries.

The reference's log-probs are computed once, before the first step; the reference is not needed afterwards,
and is neither written to nor differentiated. Metrics carry the names of TRL's DPOTrainer: loss,
rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies (chosen > rejected), logps/chosen and
logps/rejected, all means over pairs; grad_norm, learning_rate, num_tokens, and eval_*. logps are summed over
the response, in nats; rewards are β times the log-ratio to the reference, for IPO τ times its token average.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.records import PairExample, Sequences
from minirlhf.data.rows import Rows
from minirlhf.kernels.logprob import token_logp
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.models.packing import hidden
from minirlhf.objectives.masked import sequence_sum
from minirlhf.runs import InputError
from minirlhf.training.device import device_of
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.guards import GuardError, tolerance_for
from minirlhf.training.loop import (
    Evaluate,
    Keep,
    Log,
    Stage,
    StageResult,
    Step,
    measure,
    train_loop,
)
from minirlhf.training.packed import PackedRows, layout_metrics, pack_for
from minirlhf.training.pair_objectives import (
    ConservativeDPOConfig,
    DPOConfig,
    IPOConfig,
    PairLogps,
    PairObjective,
    PreferenceConfig,
    conservative_dpo,
    dpo,
    ipo,
)
from minirlhf.training.pairs import (
    PairBatch,
    PairRows,
    cut_all,
    cut_pairs,
    pair_lengths,
    pair_rows,
    per_row,
    table,
)
from minirlhf.training.trained import Trained, trained


def train_dpo(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    config: DPOConfig,
    *,
    generator: torch.Generator,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """DPO from `params` against `ref_params`; all arguments are those of `train`."""
    data, objective = (train_pairs, validation_pairs), dpo(config)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train(model, params, ref_params, *data, config, objective, generator=generator, **hooks)


def train_conservative_dpo(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    config: ConservativeDPOConfig,
    *,
    generator: torch.Generator,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """DPO with label smoothing from `params` against `ref_params`; all arguments are those of `train`."""
    data, objective = (train_pairs, validation_pairs), conservative_dpo(config)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train(model, params, ref_params, *data, config, objective, generator=generator, **hooks)


def train_ipo(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    config: IPOConfig,
    *,
    generator: torch.Generator,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """IPO on averaged log-probs from `params` against `ref_params`; all arguments are those of `train`."""
    data, objective = (train_pairs, validation_pairs), ipo(config)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train(model, params, ref_params, *data, config, objective, generator=generator, **hooks)


def train(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    generator: torch.Generator,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """Trains a copy of `params` on any pair objective; the best has the lowest eval_loss unless told else.

    Args:
        model: the family and its config, of policy and reference.
        params: the policy to start from, on the device to train on; not written to.
        ref_params: the reference, on the same device; may be `params` itself; not written to.
        train_pairs: preferences.
        validation_pairs: held-out ones, of other prompts.
        config: see `PreferenceConfig`.
        objective: the loss, from one of the entries above or your own.
        generator: order of the data; advanced.
        evaluate: further metrics of a policy at each evaluation, such as a win rate.
        log: see `loop.Log`.
        keep: see `loop.Keep`.

    Raises:
        InputError: a set is empty, a pair is unusable, or a log-prob of the reference is not finite.
        GuardError: policy and reference differ at the start (see `PreferenceConfig.start_at_reference`).
        NonFiniteError: a loss or gradient was not finite.
    """
    start, size = trained(model, params, config, generator=generator), config.micro_batch_size
    referred = refer(model, start.frozen(ref_params), train_pairs, validation_pairs, micro_batch_size=size)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train_referred(model, start, referred, config, objective, generator=generator, **hooks)


class Referred(NamedTuple):
    """Pairs with the reference's log-probs, which are all that training needs of it."""

    train: PairRows
    validation: PairRows


def refer(
    model: LanguageModel,
    ref_params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    *,
    micro_batch_size: int,
) -> Referred:
    """The first half of `train`: the reference, as `Trained.frozen` makes it, reads all pairs once.

    Raises:
        InputError: a set is empty, a pair is unusable, or a log-prob of the reference is not finite.
    """
    read = partial(with_reference, model, ref_params, micro_batch_size=micro_batch_size)
    sets = ((train_pairs, "training"), (validation_pairs, "validation"))
    return Referred(*(read(pair_rows(pairs, name=name, model=model)) for pairs, name in sets))


def train_referred(
    model: LanguageModel,
    start: Trained,
    referred: Referred,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    generator: torch.Generator,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """The second half of `train`, whose arguments and errors these are; the reference may be gone by now."""
    device, size = device_of(start.initial), config.micro_batch_size
    pairs, held_out = referred
    stage = Stage(
        name=objective.name,
        loss=partial(loss, model=model_of_loss(model, config), objective=objective),
        lengths=pair_lengths(pairs),
        cut=partial(cut_pairs, pairs, micro_batch_size=size, device=device, pack=pack_for(config)),
        validation=cut_all(held_out, micro_batch_size=size, device=device),
        metrics=metrics,
        shown=("loss", "rewards/accuracies", "rewards/margins"),
        layout=layout_metrics,
    )
    if config.start_at_reference:
        first = stage.cut(torch.arange(min(len(stage.lengths), config.batch_size)))
        check_start(start.whole.computing(start.initial), first, objective, loss=stage.loss)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train_loop(start.initial, stage, config, generator=generator, whole=start.whole, **hooks)


def loss(
    params: Params, batch: PairBatch, normaliser: Tensor, *, model: LanguageModel, objective: PairObjective
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the mean loss over pairs, and what the metrics read, in their slots.

    Args:
        params: what is differentiated; the reference's log-probs are constants of the batch.
        batch: pairs with extra "ref_chosen" and "ref_rejected" [b].
        normaliser: [] pairs of the whole batch.
        model: the family and its config.
        objective: see `PairObjective`.
    """
    chosen, rejected = sequence_logp(model, params, PackedRows(batch.rows, batch.packing)).chunk(2)
    chosen_length, rejected_length = batch.rows.mask.sum(1).chunk(2)
    ref_chosen, ref_rejected = batch.extra["ref_chosen"], batch.extra["ref_rejected"]
    logps = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length)
    chosen_reward, rejected_reward = objective.rewards(logps)
    shown = {"chosen": chosen, "rejected": rejected}
    shown |= {"chosen_reward": chosen_reward, "rejected_reward": rejected_reward}
    return objective.losses(logps).sum() / normaliser, table(batch, **shown)


def metrics(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's DPO metrics from log-probs and implicit rewards [B]; equal rewards count as wrong."""
    chosen, rejected = values["chosen_reward"], values["rejected_reward"]
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "logps/chosen": values["chosen"].mean(),
        "logps/rejected": values["rejected"].mean(),
    }


def sequence_logp(model: LanguageModel, params: Params, batch: PackedRows) -> Tensor:
    """log π(y|x) [B] in nats, summed over the tokens under the mask."""
    tokens, mask = batch.rows.tokens, batch.rows.mask
    states = aligned(hidden(model, params, tokens, batch.packing))
    return sequence_sum(token_logp(states, model.unembedding(params), tokens, mask), mask)


def reference_logps(
    model: LanguageModel,
    ref_params: Params,
    rows: Rows | Sequences,
    *,
    micro_batch_size: int,
    sides: int = 1,
) -> Tensor:
    """log π_ref(y|x) [B] of rows, on the CPU, without a gradient; sides as in `pairs.per_row`."""
    logp, device = partial(sequence_logp, model, ref_params), device_of(ref_params)
    return per_row(logp, rows, micro_batch_size=micro_batch_size, device=device, sides=sides)


def check_start(
    params: Params,
    step: Step,
    objective: PairObjective,
    *,
    loss: Callable[[Params, PairBatch, Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> None:
    """Before the first step: log-probs equal to the reference's, margin 0, and the loss that belongs to it.

    Raises:
        GuardError: it is not, on this batch; the message says by how much.
    """
    sums = measure(params, step, loss=loss)
    gaps = []
    for side in ("chosen", "rejected"):
        reference = torch.cat([batch.extra[f"ref_{side}"] for batch in step.micro_batches])
        masks = [batch.rows.mask.chunk(2)[side == "rejected"] for batch in step.micro_batches]
        tokens = torch.cat([mask.sum(1) for mask in masks])
        gaps.append((sums[side] - reference).abs() / tokens)  # [B] nats per token
    largest, value = float(torch.cat(gaps).max()), float(sums["loss"])
    if not largest <= tolerance_for(params):  # also refuses NaN
        raise GuardError(
            f"{objective.name}: before the first step the policy is not the reference: log-probs differ by "
            f"up to {largest:.3g} nats per token, so the margin is not 0. Usually the reference is another "
            f"checkpoint than the policy; where that is meant, set start_at_reference to False."
        )
    wanted = objective.loss_at_reference
    if not abs(value - wanted) <= 1e-2 * max(1.0, wanted):
        raise GuardError(
            f"{objective.name}: policy and reference agree, so the loss must be {wanted:.6g}, not "
            f"{value:.6g}. The loss reads its arguments in another order or on another scale than they have."
        )


def with_reference(
    model: LanguageModel, ref_params: Params, pairs: PairRows, *, micro_batch_size: int
) -> PairRows:
    """The pairs with what `loss` reads of the reference, its log-probs.

    Raises:
        InputError: one of them is not finite.
    """
    logps = reference_logps(model, ref_params, pairs.rows, micro_batch_size=micro_batch_size, sides=2)
    if not bool(logps.isfinite().all()):
        row, count = int((~logps.isfinite()).nonzero()[0]), len(logps) // 2
        side = "rejected" if row >= count else "chosen"
        raise InputError(
            f"pair {row % count}: the reference gives its {side} response the log-prob {float(logps[row])}, "
            f"not a finite number"
        )
    ref_chosen, ref_rejected = logps.chunk(2)
    return pairs._replace(extra={"ref_chosen": ref_chosen, "ref_rejected": ref_rejected})
