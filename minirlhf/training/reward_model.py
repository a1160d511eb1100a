"""The reward model: a scalar head on the SFT backbone, trained so that the chosen response scores higher.

    r(x, y) = w · h_last        last = lengths - 1: EOS, or where the response broke off
    loss = (1/B) Σ [ -log σ(r⁺ - r⁻ - m) + c (r⁺ + r⁻)² ]

Stiennon et al. 2020 (arXiv:2009.01325), section 3.4; margin m: Touvron et al. 2023 (arXiv:2307.09288), Eq. 2;
centring c: Eisenstein et al. 2023 (arXiv:2312.09244), section 2.2. Metrics carry the names and formulas of
TRL's RewardTrainer: loss, accuracy (r⁺ > r⁻), margin (mean of r⁺ - r⁻), min_reward, mean_reward, max_reward
(over both sides of the batch), grad_norm, learning_rate, num_tokens, and eval_* over the validation set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minirlhf.data.records import PairExample, Sequences
from minirlhf.data.rows import Rows
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.ranking import bradley_terry_loss
from minirlhf.rollout.sampler import Rollout
from minirlhf.runs import InputError
from minirlhf.training.device import device_of
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.loop import (
    Evaluate,
    Keep,
    Log,
    Stage,
    StageResult,
    TrainConfig,
    train_loop,
)
from minirlhf.training.packed import PackedRows, layout_metrics, pack_for
from minirlhf.training.pairs import PairBatch, cut_all, cut_pairs, pair_lengths, pair_rows, per_row, table
from minirlhf.training.rewards import raw_score
from minirlhf.training.trained import trained


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """The reward model. The checkpoint with the highest held-out accuracy is kept unless told otherwise."""

    learning_rate: float = 1e-5
    """Peak step size of AdamW. A model of 1 M parameters wants about 5e-4."""
    metric_for_best_model: str = "eval_accuracy"
    """Evaluation metric by which a checkpoint is the best: lower is better where the name ends in "loss",
    higher elsewhere."""
    label_smoothing: float | None = None
    """Share of the labels taken for flipped, in [0, 0.5); None for none."""
    center_rewards_coefficient: float | None = None
    """Weight of (r⁺ + r⁻)², which pulls the mean reward to 0; TRL recommends 0.01; None for none."""


def train(
    model: LanguageModel,
    params: Params,
    train_pairs: Sequence[PairExample],
    validation_pairs: Sequence[PairExample],
    config: RewardConfig,
    *,
    generator: torch.Generator,
    margins: Tensor | None = None,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """Trains a copy of `params`, backbone and head.

    Args:
        model: the family and its config.
        params: with a head (`models.interface.with_scalar_head`); on the device to train on; not written to.
        train_pairs: preferences.
        validation_pairs: held-out ones, of other prompts.
        config: see `RewardConfig`.
        generator: order of the data; advanced.
        margins: [training pairs] by how much the chosen response must be better; None: 0.
        evaluate: further metrics at each evaluation.
        log: see `loop.Log`.
        keep: see `loop.Keep`.

    Raises:
        InputError: a set is empty, a pair is unusable, or the margins are not one finite number per pair.
        NonFiniteError: a loss or gradient was not finite.
    """
    device, size = device_of(params), config.micro_batch_size
    pairs = pair_rows(train_pairs, name="training", model=model)
    held_out = pair_rows(validation_pairs, name="validation", model=model)
    if margins is not None:
        if margins.shape != (len(train_pairs),):
            raise InputError(f"expected {len(train_pairs)} margins, got shape {list(margins.shape)}")
        if not bool(margins.isfinite().all()):
            pair = int((~margins.isfinite()).nonzero()[0])
            raise InputError(f"the margin of pair {pair} is {float(margins[pair])}, not a finite number")
        pairs = pairs._replace(extra={"margin": margins.cpu()})
    stage = Stage(
        name="reward",
        loss=partial(
            loss,
            model=model_of_loss(model, config),
            label_smoothing=config.label_smoothing,
            center_rewards_coefficient=config.center_rewards_coefficient,
        ),
        lengths=pair_lengths(pairs),
        cut=partial(cut_pairs, pairs, micro_batch_size=size, device=device, pack=pack_for(config)),
        validation=cut_all(held_out, micro_batch_size=size, device=device),
        metrics=metrics,
        shown=("loss", "accuracy", "margin"),
        layout=layout_metrics,
    )
    start = trained(model, params, config, generator=generator)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train_loop(start.initial, stage, config, generator=generator, whole=start.whole, **hooks)


def loss(
    params: Params,
    batch: PairBatch,
    normaliser: Tensor,
    *,
    model: LanguageModel,
    label_smoothing: float | None,
    center_rewards_coefficient: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the mean loss over pairs, and its rewards in their slots.

    Args:
        params: what is differentiated: backbone and head.
        batch: pairs; extra "margin" [b] where there is one.
        normaliser: [] pairs of the whole batch.
        model: the family and its config.
        label_smoothing: see `RewardConfig`.
        center_rewards_coefficient: see `RewardConfig`.
    """
    rewards = raw_score(model, params, batch.rows.tokens, batch.rows.lengths, batch.packing)
    chosen, rejected = rewards.chunk(2)
    losses = bradley_terry_loss(
        chosen, rejected, margin=batch.extra.get("margin"), label_smoothing=label_smoothing
    )
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    return losses.sum() / normaliser, table(batch, chosen_reward=chosen, rejected_reward=rejected)


def metrics(rewards: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's reward metrics from the chosen and the rejected rewards [B]; equal rewards count as wrong."""
    chosen, rejected = rewards["chosen_reward"], rewards["rejected_reward"]
    both = torch.cat([chosen, rejected])
    return {
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "min_reward": both.min(),
        "mean_reward": both.mean(),
        "max_reward": both.max(),
    }


def scores(
    model: LanguageModel,
    params: Params,
    rows: Rows | Sequences,
    *,
    micro_batch_size: int = 64,
    sides: int = 1,
) -> Tensor:
    """Raw rewards [B] of rows, on the CPU, without a gradient; sides as in `pairs.per_row`."""

    def score(part: PackedRows) -> Tensor:
        return raw_score(model, params, part.rows.tokens, part.rows.lengths, part.packing)

    size, device = micro_batch_size, device_of(params)
    return per_row(score, rows, micro_batch_size=size, device=device, sides=sides)


def normalise_reward(model: LanguageModel, params: Params, rollouts: Rollout) -> Normalisation:
    """Shift and scale by which these rollouts' rewards, normalised, have mean 0 and variance 1.

    The variance divides by N. With rollouts of SFT, a score of 1 is one standard deviation above its mean.

    Raises:
        InputError: fewer than two rollouts, all with the same reward, or a reward that is not finite.
    """
    mask = torch.zeros_like(rollouts.tokens, dtype=torch.bool)  # rewards read no mask
    rows = Sequences(rollouts.tokens, mask, rollouts.prompt_lengths, rollouts.lengths)
    raw = scores(model, params, rows).double()
    if not bool(raw.isfinite().all()):
        row = int((~raw.isfinite()).nonzero()[0])
        raise InputError(f"the reward model gives rollout {row} the reward {float(raw[row])}")
    shift, scale = float(raw.mean()), float(raw.std(correction=0)) if len(raw) > 1 else 0.0
    if not scale > 0:
        raise InputError(
            f"expected rollouts of different rewards to normalise by, got {len(raw)} of {shift:.4g}"
        )
    return Normalisation(shift=shift, scale=scale)


def accuracy(model: LanguageModel, params: Params, pairs: Sequence[PairExample]) -> float:
    """Share of the pairs whose chosen response has the higher reward; equal rewards count as wrong."""
    rows = pair_rows(pairs, name="preference", model=model).rows
    chosen, rejected = scores(model, params, rows, sides=2).chunk(2)
    return float((chosen > rejected).float().mean())


def adversarial_probe(model: LanguageModel, params: Params, pairs: Sequence[PairExample]) -> float:
    """Accuracy on those pairs whose chosen response is the shorter one: a reward for length alone scores 0.

    Raises:
        InputError: there is no such pair.
    """
    short_good = [pair for pair in pairs if len(pair.chosen.ids) < len(pair.rejected.ids)]
    if not short_good:
        raise InputError(
            "the adversarial probe needs pairs whose chosen response is the shorter one, got none"
        )
    return accuracy(model, params, short_good)
