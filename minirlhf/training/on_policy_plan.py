"""The memory plan of the stages that learn from their own samples: PPO with a critic, groups without.

Responses are taken to be as long as they may be, to the longest prompts, and rows to share nothing, so that
none is packed: the plan is an upper bound.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.footprint import footprint
from minirlhf.training import plan_phases
from minirlhf.training.experience import Experience, logp_of, value_of
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupExperience
from minirlhf.training.group_update import group_loss
from minirlhf.training.live_memory import live_memory, without_gradient
from minirlhf.training.memory_plan import Entry, Phase, Plan, base_of, bytes_of
from minirlhf.training.mismatch import WEIGHTS
from minirlhf.training.plan_phases import Learner, learner
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_update import critic_loss, policy_loss
from minirlhf.training.rewards import Reader
from minirlhf.training.update import Loss

_ROLLOUT_CELL = 16  # bytes: an id in int64, and two log-probs


class Models(NamedTuple):
    """What such a stage has read.

    policy, reference: may be one and the same.
    critic: with its head; what it shares with reward model or policy is not counted twice. None: none.
    reward: the model that scores; None where a rule or an endpoint does.
    offload: whether reference and reward model are on the device only while they are used.
    """

    model: LanguageModel
    policy: Params
    reference: Params
    critic: Params | None
    reward: Reader | None
    offload: bool = False


def on_policy_plan(
    name: str,
    models: Models,
    prompts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    config: PPOConfig | GroupConfig,
    *,
    device: torch.device,
) -> Plan:
    """Of `ppo.train` or `group_policy.train` on these prompts, judged on the held-out ones."""
    model, width = models.model, _longest(prompts) + config.max_response
    longest = sorted(prompts, key=len, reverse=True)
    samples = config.samples_per_prompt if isinstance(config, GroupConfig) else 1
    asked = [longest[i // samples % len(longest)] for i in range(config.batch_size)]
    policy = learner("policy", model, models.policy, config)
    critics = [] if models.critic is None else [learner("critic", model, models.critic, config, shared=True)]
    learners = (*policy.held(), *(entry for each in critics for entry in each.held(bests=0)))
    near, judge = _frozen(models, policy)
    held = (*learners, *_staying(models, near, judge))
    rows = _rows(config, config.batch_size, width)
    data = Entry("data", "experience", bytes_of(rows) + config.batch_size * width * _ROLLOUT_CELL)
    sampling = partial(
        footprint, model, max_new_tokens=config.max_response, slots=config.slots, device=device
    )
    weights = WEIGHTS[config.rollout_precision]
    rollout = sampling(params=policy.computing, prompts=asked, weights=weights)
    judged = sampling(params=policy.kept, prompts=list(held_out))
    # Both models' copies are made before the rollout, and stay until it has become experience.
    sampled = (*held, *(each.copy for each in (policy, *critics)))
    fill = partial(plan_phases.rollout_phase, model=model, device=device)
    phases = [
        plan_phases.loading(
            [("policy", policy.start), *((entry.owner, entry.size) for entry in (*near, *judge))]
        ),
        fill("rollout", params=policy.computing, sampled=rollout, around=sampled),
        *_readings(models, config, width, policy, critics, (*sampled, data), device),
        *_updates(models, config, width, policy, critics, (*held, data), device),
        fill("evaluate", params=policy.kept, sampled=judged, around=(*held, data)),
        plan_phases.saving(policy, (*held, data, Entry("policy", "best checkpoint", policy.size.trained))),
    ]
    assumed = (
        f"rows of {width} tokens: the longest prompts, and responses of {config.max_response}",
        f"{rollout.slots} rows are sampled at a time, {judged.slots} when the policy is judged",
        *plan_phases.assumptions(config),
    )
    trees = (models.policy, models.reference, models.critic, models.reward and models.reward.params)
    return Plan(
        name, device, base_of(device, *trees), tuple(phases), assumed, plan_phases.remedies_of(config)
    )


def _readings(
    models: Models,
    config: PPOConfig | GroupConfig,
    width: int,
    policy: Learner,
    critics: Sequence[Learner],
    around: Sequence[Entry],
    device: torch.device,
) -> list[Phase]:
    """What looks at the responses without learning from them; an offloaded model comes for it and goes."""
    near, judge = _frozen(models, policy)
    law = partial(logp_of, models.model, temperature=config.temperature)
    part = min(config.micro_batch_size, config.batch_size)
    # Policy and reference read alike; the policy may have adapters, and then takes more.
    readings = [("refer", law, policy.computing, part, near)]
    for critic in critics:
        readings.append(("value", partial(value_of, models.model), critic.computing, part, []))
    phases = []
    for name, read, params, rows, lent in readings:
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        live = live_memory(without_gradient(read), params, tokens, tokens.bool(), device=device)
        there = (*around, *(lent if models.offload else ()))
        phases.append(plan_phases.forward_phase(name, "data", live, there))
    if models.reward is not None:
        there = (*around, *(judge if models.offload and models.reward.waits else ()))
        phases.append(
            plan_phases.scoring_phase(models.reward, config.batch_size, width, there, device=device)
        )
    return phases


def _updates(
    models: Models,
    config: PPOConfig | GroupConfig,
    width: int,
    policy: Learner,
    critics: Sequence[Learner],
    around: Sequence[Entry],
    device: torch.device,
) -> list[Phase]:
    """A minibatch of each learner: gradient, then step."""
    model = model_of_loss(models.model, config)
    if isinstance(config, GroupConfig):
        losses: list[tuple[Learner, Loss]] = [(policy, group_loss(model, config, tolerance=1.0))]
    else:
        losses = [(policy, policy_loss(model, config, tolerance=1.0))]
        losses += [(critic, critic_loss(model, config)) for critic in critics]
    count, size = config.batch_size // config.minibatches, config.micro_batch_size
    sizes = [each for each in (min(size, count), min(size, count - size)) if each > 0]
    parts, phases = [_rows(config, rows, width) for rows in sizes], []
    traced = partial(plan_phases.gradient_phases, device=device)
    for each, loss in losses:
        names = (f"{each.owner} gradient", f"{each.owner} step")
        phases += traced(each, loss, parts, torch.ones(()), around, names=names)
    return phases


def _frozen(models: Models, policy: Learner) -> tuple[list[Entry], list[Entry]]:
    """The reference, unless it is the policy's own tensors, and the reward model."""
    same = models.reference is models.policy
    _, made = policy.frozen(None if same else models.reference)
    near = [] if same else [Entry("reference", "start", bytes_of(models.reference))]
    if made:
        # Offloaded, it is this copy that comes, and the start is never on the device.
        near = [*([] if models.offload else near), Entry("reference", "copy in bf16", made)]
    reward = models.reward
    return near, [] if reward is None else [Entry("reward model", "start", bytes_of(reward.params))]


def _staying(models: Models, near: list[Entry], judge: list[Entry]) -> list[Entry]:
    """Those of `_frozen` that are on the device all the time."""
    if not models.offload:
        return [*near, *judge]
    return [] if models.reward is None or models.reward.waits else judge


def _rows(config: PPOConfig | GroupConfig, count: int, width: int) -> Experience | GroupExperience:
    """Rows of experience without memory."""
    table, column = torch.empty(count, width, device="meta"), torch.empty(count, device="meta")
    ids = {"tokens": table.long(), "mask": table.bool(), "prompt_lengths": column.long()}
    ids |= {"lengths": column.long()}
    kind = GroupExperience if isinstance(config, GroupConfig) else Experience
    columns = ("score", "ret") if kind is GroupExperience else ("score",)
    rest = [name for name in kind._fields if name not in (*ids, "packing")]
    others: dict[str, Any] = {name: torch.empty_like(column if name in columns else table) for name in rest}
    return kind(**ids, **others)


def _longest(prompts: Sequence[Sequence[int]]) -> int:
    return max(len(ids) for ids in prompts)
