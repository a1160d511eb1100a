"""Every size, rate and length of a run in one place: the demo's numbers, and where real data starts from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from minirlhf.data.world_files import WorldConfig
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.runs import InputError
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.ppo_config import OnPolicyConfig, PPOConfig
from minirlhf.training.preference import DPOConfig, IPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import NormaliseConfig, ReadingConfig, ShapeConfig
from minirlhf.training.sft import SFTConfig

PolicyName = Literal["ppo", "ppo-no-kl", "dpo", "ipo", "group", "group-normalised"]

_DEMO_RESPONSE = 48
_DEMO_TEMPERATURE = 1.0


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of; with its files and machine, it decides the table. RUN/config.toml holds it."""

    seed: int = 0
    """Of everything random."""
    policies: tuple[PolicyName, ...] = ("ppo", "dpo", "ipo")
    """Rows of the table beside SFT, in this order; ppo-no-kl is PPO with a KL coefficient of 0,
    group is RLOO, group-normalised the same with advantages over the group's standard deviation."""
    world: WorldConfig = field(default_factory=WorldConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    drills: SFTConfig = field(default_factory=SFTConfig)
    base: SFTConfig = field(default_factory=SFTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    ipo: IPOConfig = field(default_factory=IPOConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise InputError(f"policies: expected one or more different names, got {list(self.policies)}")


def demo() -> RunConfig:
    """The embedded world with a model of about 1 M parameters, in minutes on two cores."""
    return RunConfig(
        # Two heads of 64: comparing two words is one inner product, and 32 dimensions do it much later.
        shape=ShapeConfig(n_layer=4, n_embd=128, n_head=2, n_positions=96, initializer_range=0.06),
        drills=_small(SFTConfig, learning_rate=2e-3, evaluate_every=60),
        base=_small(SFTConfig, learning_rate=2e-3, evaluate_every=60),
        sft=_small(SFTConfig, learning_rate=5e-4, evaluate_every=20),
        reward=_small(RewardConfig, learning_rate=5e-4, evaluate_every=50, epochs=2),
        normalise=NormaliseConfig(rollouts=512, max_response=_DEMO_RESPONSE, temperature=_DEMO_TEMPERATURE),
        ppo=PPOConfig(
            iterations=16,
            batch_size=128,
            epochs=2,
            minibatches=4,
            micro_batch_size=32,
            max_response=_DEMO_RESPONSE,
            temperature=_DEMO_TEMPERATURE,
            kl_coefficient=0.15,
            learning_rate=2e-4,
            critic_learning_rate=5e-4,
            critic_pretraining=2,
            evaluate_every=8,
        ),
        group=GroupConfig(
            iterations=32,  # without a critic, and its pretraining, these take about as long as PPO's 16
            prompts_per_batch=32,
            samples_per_prompt=4,
            epochs=2,
            minibatches=4,
            micro_batch_size=32,
            max_response=_DEMO_RESPONSE,
            temperature=_DEMO_TEMPERATURE,
            kl_coefficient=0.15,
            learning_rate=3e-4,
            evaluate_every=8,
        ),
        dpo=_small(DPOConfig, learning_rate=1e-4, evaluate_every=50, beta=0.5),
        ipo=_small(IPOConfig, learning_rate=1e-4, evaluate_every=50, tau=1.0),
        evaluation=EvaluationConfig(max_response=_DEMO_RESPONSE),
    )


def _small(stage: type[Any], **settings: Any) -> Any:
    """A stage of a few hundred steps, one pass unless said; Adam's usual memory of 1,000 would outlast it."""
    return stage(**{"epochs": 1, "batch_size": 32, "micro_batch_size": 32, "adam_beta2": 0.99} | settings)


def real() -> RunConfig:
    """Real preferences and a model of the user's own: published rates, and what does not fit is dropped.

    The numbers of steps are those of a full run; `--max-steps` bounds every stage.
    """
    return RunConfig(
        reading=ReadingConfig(overlong="drop"),
        sft=SFTConfig(batch_size=8, micro_batch_size=4),
        reward=RewardConfig(batch_size=8, micro_batch_size=4),
        normalise=NormaliseConfig(rollouts=64),
        ppo=PPOConfig(iterations=100, batch_size=16, micro_batch_size=4, critic_pretraining=1),
        group=GroupConfig(iterations=100, prompts_per_batch=4, samples_per_prompt=4, micro_batch_size=4),
        dpo=DPOConfig(batch_size=8, micro_batch_size=4),
        ipo=IPOConfig(batch_size=8, micro_batch_size=4),
    )


def bounded(config: Any, max_steps: int | None) -> Any:
    """The same config with at most `max_steps` steps (of PPO and group: iterations) in each stage."""
    if max_steps is None:
        return config
    if max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps}")
    if isinstance(config, PPOConfig):
        pretraining = min(config.critic_pretraining, max_steps)
        config = dataclasses.replace(config, critic_pretraining=pretraining)
    if isinstance(config, OnPolicyConfig):
        return dataclasses.replace(config, iterations=min(config.iterations, max_steps))
    if isinstance(config, RunConfig):
        names = ("drills", "base", "sft", "reward", "ppo", "group", "dpo", "ipo")
        return dataclasses.replace(
            config, **{name: bounded(getattr(config, name), max_steps) for name in names}
        )
    steps = max_steps if config.max_steps is None else min(config.max_steps, max_steps)
    return dataclasses.replace(config, max_steps=steps)
