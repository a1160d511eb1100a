"""minirlhf's steps by its public functions: a stage's cut and loss, `training.update`; `ppo.iteration`."""

from collections.abc import Callable
from functools import partial
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
from minirlhf.training.device import move
from minirlhf.training.loop import Step, held
from minirlhf.training.pair_objectives import DPOConfig, dpo
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.rewards import critic_from_reward_model, reward_model_scorer
from minirlhf.training.update import Loss, TrainState, adamw, init_state, update


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
    prepare: called before anything else.
    """

    parts: int = 1
    prepare: Callable[[], None] = lambda: None


SETTINGS: dict[str, Setting] = {
    "minirlhf": Setting(),
    "minirlhf, 4 micro-batches": Setting(parts=4),
}
"""What is compared of ours."""


class Ready(NamedTuple):
    """A stage at its first step. What was loaded is gone, but for the state's own copy."""

    state: TrainState
    loss: Loss
    steps: list[Step]


def measure(work: Work, stage: str, setting: Setting) -> Took:
    """Takes the steps. Batches are cut before: reading data is in no trainer's time."""
    keep_freed_memory()
    setting.prepare()
    return _ppo(work, setting) if stage == "PPO" else _steps(work, STAGES[stage](work, setting))


def _steps(work: Work, ready: Ready) -> Took:
    device, state = torch.device(work.device), ready.state
    seconds, losses = [], []
    begin(device)
    for step in ready.steps:
        start = clock(device)
        state, sums = update(
            state, step.micro_batches, step.normaliser, loss=ready.loss, optimiser=adamw,
            learning_rate=work.rate, max_grad_norm=1.0,
        )  # fmt: skip
        seconds.append(clock(device) - start)
        losses.append(float(sums["loss"]))
    return Took({"step": seconds}, losses, _trained(state), most(device))


def _sft(work: Work, setting: Setting) -> Ready:
    model, params, device = _policy(work)
    rows = checked_rows(demonstrations_of(work), vocab_size=model.config.vocab_size)
    size = _parts(2 * work.pairs, setting)
    steps = [
        held(sft.cut(rows, index, micro_batch_size=size, device=device))
        for index in torch.arange(2 * work.pairs * work.steps).split(2 * work.pairs)
    ]
    return Ready(init_state(params), partial(sft.loss, model=model), steps)


def _dpo(work: Work, setting: Setting) -> Ready:
    model, params, device = _policy(work)
    rows = pairs.pair_rows(pairs_of(work), name="training", model=model)
    rows = preference.with_reference(model, params, rows, micro_batch_size=2 * work.pairs)
    loss = partial(preference.loss, model=model, objective=dpo(DPOConfig()))
    return Ready(init_state(params), loss, _cut(rows, work, setting, device))


def _reward(work: Work, setting: Setting) -> Ready:
    model, params, device = _scalar_model(work)
    rows = pairs.pair_rows(pairs_of(work), name="training", model=model)
    loss = partial(reward_model.loss, model=model, label_smoothing=None, center_rewards_coefficient=None)
    return Ready(init_state(params), loss, _cut(rows, work, setting, device))


STAGES: dict[str, Callable[[Work, Setting], Ready]] = {"SFT": _sft, "DPO": _dpo, "reward": _reward}


def _ppo(work: Work, setting: Setting) -> Took:
    """Whole iterations, and in them the time of `ppo_update.optimise`, which is wrapped from outside."""
    model, policy, device = _policy(work)
    _, scored, normalisation = load_scalar_model(work.reward)
    scored = move(scored, device)
    config = PPOConfig(
        batch_size=work.rollouts, max_response=work.answered, learning_rate=work.rate,
        critic_learning_rate=work.rate, micro_batch_size=_parts(work.rollouts, setting),
    )  # fmt: skip
    scorer, critic = reward_model_scorer(model, scored, normalisation), scored
    task = ppo.Task(model, policy, scorer, prompts_of(work), model.stop_ids)
    state = ppo.begin(policy, critic_from_reward_model(critic, normalisation), config)
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
    size = _parts(work.pairs, setting)
    return [
        held(pairs.cut_pairs(rows, index, micro_batch_size=size, device=device))
        for index in torch.arange(work.pairs * work.steps).split(work.pairs)
    ]


def _parts(rows: int, setting: Setting) -> int:
    return -(-rows // setting.parts)


def _trained(state: TrainState) -> int:
    """Bytes of gradients, which are as large as the parameters, and of both moments."""
    return sum(leaf.nbytes for leaf in tree_leaves((state.params, state.exp_avg, state.exp_avg_sq)))
