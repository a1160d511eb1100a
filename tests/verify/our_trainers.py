"""Our own training code, the same that trains GPT-2, as trainers of a table of logits.

Preference data are the *population*: the world's rewards are logs of small integers a, so that a pair (i, j)
is won by i with probability a_i / (a_i + a_j), and a_i rows of i over j beside a_j rows of j over i are that
law exactly. A step on all of them is a step on the population loss, without weights and without noise. Every
other pair counts twice, since the optimum must not depend on which pairs are shown how often.
"""

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.data.records import PairExample, collate, join
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import Params
from minirlhf.training import group_policy, ppo, preference, reward_model
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupObjective
from minirlhf.training.group_policy import GroupState
from minirlhf.training.loop import Step
from minirlhf.training.pair_objectives import PairObjective
from minirlhf.training.pairs import cut_all, pair_rows
from minirlhf.training.ppo import PPOState, Task
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.rewards import Scorer, reward_model_scorer
from minirlhf.training.update import Loss, TrainState, adamw, init_state, update
from minirlhf.verify.goals import Goal
from minirlhf.verify.optima import optimal_law
from minirlhf.verify.trainers import TrainerReport, certify_trainer
from minirlhf.verify.world import World, small_world, tabulate
from tests.training import tabular

CPU = torch.device("cpu")


class Trainer(NamedTuple):
    """What `certify_trainer` asks for."""

    begin: Callable[[World], Any]
    update: Callable[[Any], Any]
    policy: Callable[[Any], Tensor]


def certified(trainer: Trainer, goal: Goal, *, max_updates: int, patience: int = 50) -> TrainerReport:
    return certify_trainer(
        trainer.update,
        goal,
        begin=trainer.begin,
        policy=trainer.policy,
        max_updates=max_updates,
        patience=patience,
    )


PPO = PPOConfig(
    iterations=1,  # not read: `certify_trainer` counts
    batch_size=256,
    micro_batch_size=256,
    max_response=3,
    temperature=1.0,
    missing_eos_penalty=0.0,
    kl_coefficient=1.0,
    value_clip=None,
    value_coefficient=1.0,
    learning_rate=0.07,
    critic_learning_rate=0.1,
    max_grad_norm=100.0,
)
GROUPS = GroupConfig(
    iterations=1,  # not read
    prompts_per_batch=32,
    samples_per_prompt=8,
    epochs=4,
    minibatches=1,
    micro_batch_size=256,
    max_response=3,
    temperature=1.0,
    missing_eos_penalty=0.0,
    kl_coefficient=1.0,
    learning_rate=0.07,
    max_grad_norm=100.0,
)


def ppo_trainer(w: World, config: PPOConfig = PPO, *, scorer: Scorer | None = None, seed: int = 0) -> Trainer:
    """`ppo.iteration`; the world's reference is the tempered one."""
    reference = tabular.table_of(w.ref_logits * config.temperature)
    task = _task(w, reference, tabular.gold_scorer(w) if scorer is None else scorer)

    def step(state: PPOState) -> PPOState:
        rate = _falling(state.episode // config.batch_size)
        return ppo.iteration(task, state, config, seed=seed, rate=rate).state

    return Trainer(
        begin=lambda w: ppo.begin(reference, tabular.zero_critic(w), config),
        update=step,
        policy=lambda state: tabular.logits_of(state.learners.policy.params, w) / config.temperature,
    )


def group_trainer(
    w: World, objective: GroupObjective, config: GroupConfig = GROUPS, *, seed: int = 0
) -> Trainer:
    """`group_policy.iteration`."""
    reference = tabular.table_of(w.ref_logits)
    task = _task(w, reference, tabular.gold_scorer(w))

    def step(state: GroupState) -> GroupState:
        rate = _falling(state.episode // config.batch_size)
        return group_policy.iteration(task, state, config, objective, seed=seed, rate=rate).state

    return Trainer(
        begin=lambda w: group_policy.begin(reference),
        update=step,
        policy=lambda state: tabular.logits_of(state.policy.params, w),
    )


def _task(w: World, reference: Params, scorer: Scorer) -> Task:
    prompts = [[1 + x] for x in range(w.config.prompts)]
    return Task(tabular.bind(w.config), reference, scorer, prompts, stop_ids=[0])


def _falling(iterations: int) -> float:
    """1 for ten iterations, and then like 1/n: the noise of sampling falls with the rate."""
    return min(1.0, 10 / max(iterations, 1))


def population_world(prompts: int = 2) -> World:
    """W_small with rewards that are logs of 1 to 4."""
    w = small_world(prompts)
    return w._replace(gold=_odds(w).log())


def population(w: World) -> list[PairExample]:
    """The pairs of a `population_world`: i over j as often as e^r(i) says, for every i and j."""
    pairs = []
    for x, odds in enumerate(_odds(w).long().tolist()):
        rows = [join([1 + x], response) for response in w.responses]
        for i, j in permutations(range(len(rows)), 2):
            pairs += [PairExample(rows[i], rows[j])] * (odds[i] * (1 + (i + j) % 2))
    return pairs


def population_comparisons(w: World) -> Tensor:
    """The same data as `preferences.comparisons` [X, N, N], from their description and not from the rows."""
    n = torch.arange(w.gold.shape[1])
    shown = (1 + (n[:, None] + n) % 2) * (n[:, None] != n)
    wins = _odds(w)[:, :, None] * shown
    return wins / wins.sum((1, 2), keepdim=True)


def _odds(w: World) -> Tensor:
    n, x = torch.arange(w.gold.shape[1]), torch.arange(w.gold.shape[0])[:, None]
    return (1 + (n * n + 2 * n // 3 + 3 * x) % 4).double()


def preference_trainer(w: World, objective: PairObjective) -> Trainer:
    """`preference.loss` under `update`, every step on the whole population."""
    model, reference = tabular.bind(w.config), tabular.table_of(w.ref_logits)
    pairs = pair_rows(population(w), name="population", model=model)
    logps = preference.reference_logps(model, reference, pairs.rows, micro_batch_size=4096)
    ref_chosen, ref_rejected = logps.chunk(2)
    pairs = pairs._replace(extra={"ref_chosen": ref_chosen, "ref_rejected": ref_rejected})
    batch = cut_all(pairs, micro_batch_size=4096, device=CPU)
    loss = partial(preference.loss, model=model, objective=objective)
    return Trainer(
        begin=lambda w: init_state(reference),
        update=partial(_step, batch=batch, loss=loss),
        policy=lambda state: tabular.logits_of(state.params, w),
    )


def reward_model_trainer(w: World) -> Trainer:
    """`reward_model.loss` under `update` on the whole population; the policy is the best one for the model.

    The model is a table of rewards, one for each prompt and response.
    """
    reader = tabular.bind_reader(w.config)
    pairs = pair_rows(population(w), name="population", model=reader)
    batch = cut_all(pairs, micro_batch_size=4096, device=CPU)
    loss = partial(reward_model.loss, model=reader, label_smoothing=None, center_rewards_coefficient=None)
    rows = collate([join([1 + x], response) for x in range(len(w.gold)) for response in w.responses])

    def policy(state: TrainState) -> Tensor:
        reward = reward_model.scores(reader, state.params, rows, micro_batch_size=4096)
        learned = w._replace(gold=reward.double().view_as(w.gold))
        return tabulate(optimal_law(learned, beta=1.0), w)

    return Trainer(
        begin=lambda w: init_state(tabular.zero_rewards(w)),
        update=partial(_step, batch=batch, loss=loss),
        policy=policy,
    )


def learned_scorer(w: World, state: TrainState) -> Scorer:
    """What PPO is given of a trained reward model."""
    unit = Normalisation(shift=0.0, scale=1.0)
    return reward_model_scorer(tabular.bind_reader(w.config), state.params, unit)


def _step(state: TrainState, *, batch: Step, loss: Loss) -> TrainState:
    return update(
        state,
        batch.micro_batches,
        batch.normaliser,
        loss=loss,
        optimiser=adamw,
        learning_rate=0.1 * 0.5 ** (state.step / 30),
        max_grad_norm=10.0,
    )[0]
