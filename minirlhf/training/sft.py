"""Supervised fine-tuning: imitate the demonstrations, the prompt read but not trained.

    loss = -(1/N) Σ log π(yₜ | x, y₍<t₎)      over the N trained tokens of the batch: a token mean

Ouyang et al. 2022, "Training language models to follow instructions", section 3.5 (arXiv:2203.02155). Metrics
carry the names of TRL's SFTTrainer: loss, mean_token_accuracy, entropy (nats) and eval_*, all means over the
trained tokens; grad_norm, learning_rate, and num_tokens (read so far, prompts included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minirlhf.data.records import Example
from minirlhf.data.rows import Rows, checked_rows, gather
from minirlhf.data.spool import LazySequence
from minirlhf.kernels.logprob import token_report
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.models.packing import hidden, pack
from minirlhf.objectives.masked import token_sum
from minirlhf.objectives.supervised import token_loss
from minirlhf.runs import InputError
from minirlhf.training.device import device_of, move
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.loop import (
    Evaluate,
    Keep,
    Log,
    Stage,
    StageResult,
    Step,
    TrainConfig,
    held,
    longest_first,
    train_loop,
)
from minirlhf.training.packed import Pack, PackedRows, layout_metrics, pack_for, packed
from minirlhf.training.trained import trained


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning; the defaults are usual for models of 100 M parameters and more."""

    learning_rate: float = 2e-5
    """Peak step size of AdamW. A model of 1 M parameters wants about 1e-3."""
    epochs: int = 3
    """Passes over the demonstrations."""


def train(
    model: LanguageModel,
    params: Params,
    train_examples: Sequence[Example],
    validation_examples: Sequence[Example],
    config: SFTConfig,
    *,
    generator: torch.Generator,
    name: str = "sft",
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """Fine-tunes a copy of `params`; the best checkpoint has the lowest eval_loss unless told otherwise.

    Args:
        model: the family and its config.
        params: on the device to train on; not written to.
        train_examples: demonstrations; their masks say what is trained.
        validation_examples: held-out ones.
        config: see `SFTConfig`.
        generator: order of the data; advanced.
        name: on the progress display and in errors; pretraining is the same loop.
        evaluate: further metrics of a policy at each evaluation, such as a win rate.
        log: see `loop.Log`.
        keep: see `loop.Keep`.

    Raises:
        InputError: a set is empty, or an example is unusable (see `data.batches.validate`).
        NonFiniteError: a loss or gradient was not finite.
    """
    device = device_of(params)
    rows = _rows(train_examples, "training", model)
    held_out = _rows(validation_examples, "validation", model)
    stage = Stage(
        name=name,
        loss=partial(loss, model=model_of_loss(model, config)),
        lengths=rows.lengths,
        cut=partial(
            cut, rows, micro_batch_size=config.micro_batch_size, device=device, pack=pack_for(config)
        ),
        validation=held(
            cut(
                held_out,
                longest_first(held_out.lengths, torch.arange(len(held_out.lengths))),
                micro_batch_size=config.micro_batch_size,
                device=device,
            )
        ),
        metrics=dict,
        shown=("loss", "mean_token_accuracy"),
        layout=layout_metrics,
    )
    start = trained(model, params, config, generator=generator)
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    return train_loop(start.initial, stage, config, generator=generator, whole=start.whole, **hooks)


def loss(
    params: Params, batch: PackedRows, normaliser: Tensor, *, model: LanguageModel
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the token-mean loss, accuracy and entropy.

    Args:
        params: what is differentiated.
        batch: rows; only tokens under the mask are trained.
        normaliser: [] trained tokens of the whole batch.
        model: the family and its config.
    """
    tokens, mask = batch.rows.tokens, batch.rows.mask
    states = aligned(hidden(model, params, tokens, batch.packing))
    report = token_report(states, model.unembedding(params), tokens, mask)
    return token_sum(token_loss(report.logp, mask), mask) / normaliser, {
        "mean_token_accuracy": report.is_argmax.sum() / normaliser,
        "entropy": token_sum(report.entropy, mask) / normaliser,
    }


def cut(rows: Rows, index: Tensor, *, micro_batch_size: int, device: torch.device, pack: Pack = pack) -> Step:
    """The rows at `index` as micro-batches, packed where that pays; normalised by trained tokens."""
    parts = index.split(micro_batch_size)
    micro_batches = LazySequence(
        len(parts), lambda i: move(packed(gather(rows, parts[i]), pack=pack), device)
    )
    trained = rows.counted[index].sum().to(device, torch.float32)
    return Step(micro_batches, trained, int(rows.lengths[index].sum()))


def _rows(examples: Sequence[Example], name: str, model: LanguageModel) -> Rows:
    if not examples:
        raise InputError(f"sft: expected at least one {name} example, got none")
    return checked_rows(examples, vocab_size=model.config.vocab_size)
