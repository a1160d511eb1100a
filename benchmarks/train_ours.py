"""minirlhf's steps by its public functions: a stage's cut and loss, `training.update`; `ppo.iteration`."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from harness import forget_peak, peak
from machine import clock
from torch.utils._pytree import tree_leaves
from train_work import Work, demonstrations_of, pairs_of, prompts_of

from minirlhf.data.rows import checked_rows
from minirlhf.models.checkpoint import load_language_model, load_scalar_model
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.runs import keep_freed_memory
from minirlhf.training import pairs, ppo, preference, reward_model, sft
from minirlhf.training.compiling import Compiler
from minirlhf.training.device import move
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.loop import Step, TrainConfig, held
from minirlhf.training.packed import Pack, pack_for
from minirlhf.training.pair_objectives import DPOConfig, dpo
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.rewards import critic_from_reward_model, reward_model_scorer
from minirlhf.training.trained import trained
from minirlhf.training.update import (
    Differentiate,
    Loss,
    TrainState,
    adamw,
    differentiated,
    init_state,
    update,
)


class Took(NamedTuple):
    """seconds: of every step, by part. losses: of every step (of PPO: none).

    trained_bytes: gradients and optimiser state. step_peak: bytes resident at most from the first step on.
    """

    seconds: dict[str, list[float]]
    losses: list[float]
    trained_bytes: int
    step_peak: int


class Setting(NamedTuple):
    """How a step is taken.

    parts: micro-batches that a batch is cut into.
    config: of a stage's config, what is not as it is by default.
    pack: how micro-batches are laid out; None for the stage's way.
    prepare: called before anything else.
    """

    parts: int = 1
    config: Mapping[str, Any] = MappingProxyType({})
    pack: Pack | None = None
    prepare: Callable[[], None] = lambda: None


SETTINGS: dict[str, Setting] = {
    "minirlhf": Setting(),
    "minirlhf, 4 micro-batches": Setting(parts=4),
    "minirlhf, recomputed": Setting(config={"activation_recomputation": True}),
    "minirlhf, compiled": Setting(config={"compile": "on"}),
    "minirlhf, adapters of rank 8": Setting(config={"adapter_rank": 8}),
}
"""What is compared of ours."""


class Ready(NamedTuple):
    """A stage before its first step: which model, its loss, its batches."""

    model: LanguageModel
    params: Params
    loss: Loss
    steps: list[Step]


def measure(work: Work, stage: str, setting: Setting) -> Took:
    """Takes the steps. Batches are cut before: reading data is in no trainer's time."""
    keep_freed_memory()
    setting.prepare()
    return _ppo(work, setting) if stage == "PPO" else _steps(work, STAGES[stage](work, setting), setting)


def _steps(work: Work, ready: Ready, setting: Setting) -> Took:
    device = torch.device(work.device)
    model, params, loss, steps = ready
    start = trained(model, params, TrainConfig(**setting.config), generator=torch.Generator())
    state, whole, differentiate = init_state(start.initial), start.whole, _differentiate(setting)
    del ready, params, start  # what was loaded is gone, but for the state's own copy or adapters' base
    seconds, losses = [], []
    begin(device)
    for step in steps:
        start = clock(device)
        state, sums = update(
            state, step.micro_batches, step.normaliser, loss=loss, optimiser=adamw,
            learning_rate=work.rate, max_grad_norm=1.0, differentiate=differentiate, whole=whole,
        )  # fmt: skip
        seconds.append(clock(device) - start)
        losses.append(float(sums["loss"]))
    return Took({"step": seconds}, losses, _trained(state), most(device))


def _sft(work: Work, setting: Setting) -> Ready:
    (model, params, device), config = _policy(work), TrainConfig(**setting.config)
    rows = checked_rows(demonstrations_of(work), vocab_size=model.config.vocab_size)
    size = _parts(2 * work.pairs, setting)
    steps = [
        held(
            sft.cut(rows, index, micro_batch_size=size, device=device, pack=setting.pack or pack_for(config))
        )
        for index in torch.arange(2 * work.pairs * work.steps).split(2 * work.pairs)
    ]
    return Ready(model, params, partial(sft.loss, model=model_of_loss(model, config)), steps)


def _dpo(work: Work, setting: Setting) -> Ready:
    model, params, device = _policy(work)
    rows = pairs.pair_rows(pairs_of(work), name="training", model=model)
    rows = preference.with_reference(model, params, rows, micro_batch_size=2 * work.pairs)
    config = TrainConfig(**setting.config)
    loss = partial(preference.loss, model=model_of_loss(model, config), objective=dpo(DPOConfig()))
    return Ready(model, params, loss, _cut(rows, work, setting, device))


def _reward(work: Work, setting: Setting) -> Ready:
    model, params, device = _scalar_model(work)
    rows = pairs.pair_rows(pairs_of(work), name="training", model=model)
    model_in_loss = model_of_loss(model, TrainConfig(**setting.config))
    plain = {"label_smoothing": None, "center_rewards_coefficient": None}
    loss = partial(reward_model.loss, model=model_in_loss, **plain)
    return Ready(model, params, loss, _cut(rows, work, setting, device))


STAGES: dict[str, Callable[[Work, Setting], Ready]] = {"SFT": _sft, "DPO": _dpo, "reward": _reward}


def _ppo(work: Work, setting: Setting) -> Took:
    """Whole iterations, and in them the time of `ppo_update.optimise`, which is wrapped from outside."""
    model, policy, device = _policy(work)
    _, scored, normalisation = load_scalar_model(work.reward)
    scored = move(scored, device)
    config = PPOConfig(
        batch_size=work.rollouts, max_response=work.answered, learning_rate=work.rate,
        critic_learning_rate=work.rate, micro_batch_size=_parts(work.rollouts, setting), **setting.config,
    )  # fmt: skip
    scorer, critic = reward_model_scorer(model, scored, normalisation), scored
    actor, valuer = (
        trained(model, params, config, generator=torch.Generator())
        for params in (policy, critic_from_reward_model(critic, normalisation))
    )
    differentiate = _differentiate(setting)
    task = ppo.Task(
        model, actor.frozen(policy), scorer, prompts_of(work), model.stop_ids, differentiate,
        policy=actor.whole, critic=valuer.whole,
    )  # fmt: skip
    state = ppo.begin(actor.initial, valuer.initial, config)
    seconds: dict[str, list[float]] = {"iteration": [], "update": []}
    _time_update(seconds["update"], device)
    begin(device)
    for _ in range(work.steps):
        start = clock(device)
        state = ppo.iteration(task, state, config, seed=0).state
        seconds["iteration"].append(clock(device) - start)
    return Took(seconds, [], sum(map(_trained, state.learners)), most(device))


def _time_update(seconds: list[float], device: torch.device) -> None:
    work = ppo.optimise

    def timed(*given: Any, **named: Any) -> Any:
        start = clock(device)
        got = work(*given, **named)
        seconds.append(clock(device) - start)
        return got

    ppo.optimise = timed


def begin(device: torch.device) -> None:
    """From here on `most` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def most(device: torch.device) -> int:
    """Bytes: of the process on a CPU, of tensors on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak()


def _policy(work: Work) -> tuple[LanguageModel, Params, torch.device]:
    device = torch.device(work.device)
    model, params = load_language_model(work.policy)
    return model, move(params, device), device


def _scalar_model(work: Work) -> tuple[LanguageModel, Params, torch.device]:
    device = torch.device(work.device)
    model, params, _ = load_scalar_model(work.reward)
    return model, move(params, device), device


def _cut(rows: pairs.PairRows, work: Work, setting: Setting, device: torch.device) -> list[Step]:
    size, pack = _parts(work.pairs, setting), setting.pack or pack_for(TrainConfig(**setting.config))
    return [
        held(pairs.cut_pairs(rows, index, micro_batch_size=size, device=device, pack=pack))
        for index in torch.arange(work.pairs * work.steps).split(work.pairs)
    ]


def _differentiate(setting: Setting) -> Differentiate:
    compiled = setting.config.get("compile") == "on"
    return Compiler(name="benchmark", needed=True, tell=lambda _: None) if compiled else differentiated


def _parts(rows: int, setting: Setting) -> int:
    """Rows of a micro-batch; a row of the table that says how many there are is not made of fewer."""
    size = -(-rows // setting.parts)
    if -(-rows // size) != setting.parts:
        raise SystemExit(f"{rows} rows cannot be cut into {setting.parts} micro-batches")
    return size


def _trained(state: TrainState) -> int:
    """Bytes of gradients, which are as large as the parameters, and of both moments."""
    return sum(leaf.nbytes for leaf in tree_leaves((state.params, state.exp_avg, state.exp_avg_sq)))
