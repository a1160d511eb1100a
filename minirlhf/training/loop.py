"""The loop that SFT, reward model and preference training share: steps, metrics, evaluation, the best kept.

    order -> cut into micro-batches -> update -> every log_every steps: metrics
                                             -> every evaluate_every steps: validation; is it the best?

A stage brings what is its own (`Stage`); nothing here knows which stage it runs. The device is read once a
step for the finite check, and otherwise only where something is logged.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minirlhf.data.batches import epoch_order
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training.device import device_of
from minirlhf.training.gradients import ComputeConfig, differentiate_by, work_of
from minirlhf.training.progress import progress
from minirlhf.training.trained import FULL, TrainedConfig, Whole
from minirlhf.training.update import (
    Differentiate,
    Loss,
    NonFiniteError,
    adamw,
    cosine_with_warmup,
    init_state,
    listed,
    non_finite,
    update,
)

_HELD_TOKENS = 4_000_000

Metrics = dict[str, float]
Evaluate = Callable[[Params], Metrics]
"""Metrics of a policy beyond the validation loss (a win rate, say); called at every evaluation."""
Log = Callable[[int, Metrics], None]
"""(optimiser steps done, metrics): called with training metrics and with evaluations."""
Keep = Callable[[Params, Metrics], None]
"""Saves parameters that are the best so far, and their evaluation; they are never written to afterwards."""


@dataclass(frozen=True)
class TrainConfig(ComputeConfig, TrainedConfig):
    """What every stage but PPO is told. The names are Hugging Face's where they mean the same."""

    learning_rate: float = 2e-5
    """Peak step size of AdamW, reached after the warm-up; a half cosine then takes it to 0."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the step size rises linearly."""
    epochs: int = 1
    """Passes over the training set."""
    max_steps: int | None = None
    """Most optimiser steps; None for as many as the epochs have."""
    batch_size: int = 32
    """Examples (or pairs) per optimiser step."""
    micro_batch_size: int = 16
    """Most examples per forward and backward pass; changes time and memory, not the gradient."""
    length_window: int = 1
    """Batches drawn at once and cut by length. 1: each batch is a random sample, and only its micro-batches
    are cut by length, which changes nothing but the time. More: less padding, but batches of like lengths."""
    max_grad_norm: float = 1.0
    """Global L2 norm to which a larger gradient is scaled down."""
    weight_decay: float = 0.0
    """Decoupled decay per step and unit of step size."""
    adam_epsilon: float = 1e-8
    """Added to the root of Adam's second moment, PyTorch's convention."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment per step; a run of a few hundred steps wants 0.99."""
    evaluate_every: int = 50
    """Optimiser steps between evaluations; the start and the end are always evaluated."""
    metric_for_best_model: str = "eval_loss"
    """Evaluation metric by which a checkpoint is the best: lower is better where the name ends in "loss",
    higher elsewhere."""
    patience: int | None = None
    """Evaluations in a row without a new best after which the stage stops; None: never."""
    log_every: int = 10
    """Optimiser steps over which logged metrics are averaged."""

    def __post_init__(self) -> None:
        ComputeConfig.__post_init__(self)
        TrainedConfig.__post_init__(self)
        whole = ("epochs", "batch_size", "micro_batch_size", "length_window", "evaluate_every", "log_every")
        for name in (*whole, "max_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.adam_beta2 < 1:
            raise InputError(f"adam_beta2 must lie in [0, 1), got {self.adam_beta2}")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio must lie in 0..1, got {self.warmup_ratio}")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")


class Step(NamedTuple):
    """A batch that was cut.

    micro_batches: as the stage's loss takes them, on the model's device.
    normaliser: [] what the sum of the losses is divided by.
    tokens: valid tokens read, prompts included, padding not.
    """

    micro_batches: Sequence[Any]
    normaliser: Tensor
    tokens: int


class Stage(NamedTuple):
    """What is a stage's own.

    name: shown, and said in errors.
    loss: of one micro-batch (see `update.Loss`).
    lengths: [N] tokens of each training example (of a pair: of its longer side).
    cut: [K] indices of training examples, longest first -> the batch of them.
    validation: the whole validation set, cut; its losses and metrics add up like those of a batch.
    metrics: the summed aux of a batch -> scalar tensors under their names.
    shown: names of the metrics on the progress display.
    layout: the micro-batches of a step -> metrics of how they were laid out (see `packed`).
    """

    name: str
    loss: Loss
    lengths: Tensor
    cut: Callable[[Tensor], Step]
    validation: Step
    metrics: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    shown: tuple[str, ...]
    layout: Callable[[Sequence[Any]], dict[str, Tensor]] = lambda micro_batches: {}


class StageResult(NamedTuple):
    """What a stage ends with.

    params: the best parameters by the stage's criterion, a copy of what was trained of them; adapted weights
        are `models.adapters.Adapted`, which `merged` ends.
    best_step: optimiser steps after which they stood.
    metrics: their evaluation.
    history: every evaluation, in order, each with its "step".
    """

    params: Params
    best_step: int
    metrics: Metrics
    history: list[Metrics]


def train_loop(
    params: Params,
    stage: Stage,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    whole: Whole = FULL,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    keep: Keep | None = None,
) -> StageResult:
    """Trains a copy of `params` and returns the best of the evaluated checkpoints, the start among them.

    Args:
        params: what is trained, on the device to train on; not written to.
        stage: see `Stage`.
        config: see `TrainConfig`.
        generator: order of the data; advanced.
        whole: from what is trained to the model's parameters, which everything else here takes.
        evaluate: adds to the metrics of each evaluation.
        log: gets the metrics of the last `log_every` steps (means over them), and each evaluation.
        keep: gets each new best; whatever stops the run, what it saved last stays.

    Raises:
        NonFiniteError: a loss, a gradient, the validation loss or the criterion was not finite.
        InputError: the criterion is not among the evaluation's metrics.
    """
    total = total_steps(len(stage.lengths), config)
    rate = partial(
        cosine_with_warmup, total=total, warmup=int(config.warmup_ratio * total), peak=config.learning_rate
    )
    optimiser = partial(
        adamw, betas=(0.9, config.adam_beta2), eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    hooks = {"evaluate": evaluate, "log": log, "keep": keep}
    judge = partial(_judge, stage=stage, config=config, whole=whole, **hooks)
    state, window, tokens = init_state(params), [], 0
    differentiate = _gradients(params, stage, config)
    best, stale = judge(None, state.params, 0), 0
    with progress(stage.name, total) as advance:
        for index in islice(_orders(stage.lengths, config, generator=generator), total):
            cut, normaliser, read = stage.cut(index)
            micro_batches = list(cut)
            learning_rate = rate(state.step)
            state, sums = update(
                state,
                micro_batches,
                normaliser,
                loss=stage.loss,
                optimiser=optimiser,
                learning_rate=learning_rate,
                max_grad_norm=config.max_grad_norm,
                differentiate=differentiate,
                whole=whole,
            )
            window.append(_named(sums, stage) | stage.layout(micro_batches))
            tokens += read
            last = state.step == total
            shown = None
            if last or state.step % config.log_every == 0:
                metrics = _means(window) | {"learning_rate": learning_rate, "num_tokens": float(tokens)}
                shown, window = {name: metrics[name] for name in stage.shown}, []
                if log is not None:
                    log(state.step, metrics)
            advance(read, shown)
            if last or state.step % config.evaluate_every == 0:
                best = judge(best, state.params, state.step)
                stale = 0 if best.best_step == state.step else stale + 1
                if stale == config.patience:
                    break
    return best


def total_steps(examples: int, config: TrainConfig) -> int:
    """Optimiser steps of a run: the last batch of an epoch may be smaller, none is dropped."""
    steps = math.ceil(examples / config.batch_size) * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


@torch.no_grad()
def measure(params: Params, step: Step, *, loss: Loss) -> dict[str, Tensor]:
    """ "loss" and the summed aux of a whole batch, without a gradient."""
    scalars: dict[str, list[Tensor]] = {}
    tables: dict[str, Tensor] = {}
    for batch in step.micro_batches:
        value, aux = loss(params, batch, step.normaliser)
        for name, part in {"loss": value, **aux}.items():
            if part.ndim == 0:
                scalars.setdefault(name, []).append(part)
            else:  # as long as the whole batch: one of each is enough
                tables[name] = tables[name] + part if name in tables else part
    return {name: torch.stack(parts).sum() for name, parts in scalars.items()} | tables


def held(step: Step) -> Step:
    """The same batch; unless it is large, its micro-batches are made now, and not each time they are read."""
    return step._replace(micro_batches=list(step.micro_batches)) if step.tokens <= _HELD_TOKENS else step


def longest_first(lengths: Tensor, index: Tensor) -> Tensor:
    """The same indices, by falling length, so that rows of like length share a micro-batch."""
    return index[lengths[index].argsort(descending=True, stable=True)]


def _gradients(params: Params, stage: Stage, config: TrainConfig) -> Differentiate:
    """How the steps of the whole stage compute their gradients."""
    steps = total_steps(len(stage.lengths), config)
    tokens = int(steps * config.batch_size * stage.lengths.float().mean())
    passes = steps * math.ceil(config.batch_size / config.micro_batch_size)
    work = work_of(params, tokens=tokens, passes=passes)
    return differentiate_by(config.compile, work, device_of(params), name=stage.name)


def _orders(lengths: Tensor, config: TrainConfig, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices for ever, longest row first; every epoch holds each index exactly once."""
    while True:
        window = config.batch_size * config.length_window
        for drawn in epoch_order(len(lengths), batch_size=window, generator=generator):
            batches = longest_first(lengths, drawn).split(config.batch_size)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]


def _named(sums: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """The loss (and gradient norm) as they are, the rest of the sums as the stage's metrics."""
    own = {name: value for name, value in sums.items() if name not in ("loss", "grad_norm")}
    return {name: sums[name] for name in ("loss", "grad_norm") if name in sums} | stage.metrics(own)


def _means(window: list[dict[str, Tensor]]) -> Metrics:
    """Mean over the steps, read off the device in one piece."""
    table = torch.stack([torch.stack([row[name].detach().float() for row in window]) for name in window[0]])
    return dict(zip(window[0], table.mean(1).tolist(), strict=True))


def _judge(
    best: StageResult | None,
    params: Params,
    step: int,
    *,
    stage: Stage,
    config: TrainConfig,
    whole: Whole,
    evaluate: Evaluate | None,
    log: Log | None,
    keep: Keep | None,
) -> StageResult:
    """Evaluates `params`; the result is `best`, or a copy of `params` where they are better."""
    measured = _named(measure(whole.computing(params), stage.validation, loss=stage.loss), stage)
    metrics = {f"eval_{name}": value for name, value in _means([measured]).items()}
    metrics |= {} if evaluate is None else evaluate(whole.kept(params))
    name = config.metric_for_best_model
    if name not in metrics:
        raise InputError(f"metric_for_best_model: expected one of {', '.join(sorted(metrics))}, got {name!r}")
    for each in ("eval_loss", name):  # NaN rewards still have an accuracy
        if not math.isfinite(metrics[each]):
            bad = non_finite(params)
            why = f"; parameters {listed(bad)}" if bad else ""
            raise NonFiniteError(step, f"{each} = {metrics[each]}{why}")
    if log is not None:
        log(step, metrics)
    history = [*(best.history if best else []), {"step": float(step), **metrics}]
    sign = -1.0 if name.endswith("loss") else 1.0
    if best is not None and not sign * metrics[name] > sign * best.metrics[name]:
        return best._replace(history=history)
    copy = whole.kept(pytree.tree_map(torch.clone, params))  # of what is trained alone
    if keep is not None:
        keep(copy, metrics)
    return StageResult(copy, step, metrics, history)
