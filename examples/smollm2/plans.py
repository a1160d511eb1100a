"""How much of everything a run does: FULL for a result, QUICK to see that all of it works.

A token of SmolLM2-135M costs about 0.27 GFLOP forward and 0.81 trained on. The sizes are for two CPU cores.
"""

from dataclasses import dataclass

from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.preference import DPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.setting import NormaliseConfig
from minirlhf.training.stages.own_pairs import OwnPairsConfig

TEMPERATURE = 0.7
"""Of every sample but the KL's: at 1 a quantised model of 135 M parameters loses the thread."""
ANSWER, OPENING = 80, 40
"""Most tokens of a response. "direct" is decided in the opening, so more would only cost time."""


@dataclass(frozen=True)
class Plan:
    """The sizes of one run. prompts, pairs: None for all that there are."""

    prompts: int | None
    validation: float
    test: float
    own_pairs: OwnPairsConfig
    dpo: DPOConfig
    group: GroupConfig
    brief: EvaluationConfig
    direct: EvaluationConfig
    pairs: int | None
    longest_pair: int
    reward: RewardConfig
    normalise: NormaliseConfig


FULL = Plan(
    prompts=None,
    validation=0.1,
    test=0.22,
    own_pairs=OwnPairsConfig(
        samples=6, pairs_per_prompt=2, temperature=TEMPERATURE, max_response=ANSWER, margin=0.15
    ),
    dpo=DPOConfig(
        beta=0.1, learning_rate=2e-5, epochs=2, batch_size=8, micro_batch_size=4, adam_beta2=0.99,
        evaluate_every=16, log_every=4,
    ),
    group=GroupConfig(
        iterations=12, prompts_per_batch=16, samples_per_prompt=4, epochs=1, minibatches=2,
        micro_batch_size=16, max_response=OPENING, temperature=TEMPERATURE, missing_eos_penalty=0.0,
        kl_coefficient=0.01, learning_rate=4e-5, final_rate=0.1, evaluate_every=6,
    ),
    brief=EvaluationConfig(
        prompts=64, samples=2, temperature=TEMPERATURE, max_response=ANSWER, examples=4
    ),
    direct=EvaluationConfig(
        prompts=64, samples=4, temperature=TEMPERATURE, max_response=OPENING, examples=4
    ),
    pairs=None,
    longest_pair=256,
    reward=RewardConfig(
        learning_rate=1e-5, batch_size=16, micro_batch_size=4, evaluate_every=24, log_every=4
    ),
    normalise=NormaliseConfig(rollouts=32, max_response=OPENING, temperature=TEMPERATURE),
)  # fmt: skip

QUICK = Plan(
    prompts=72,
    validation=0.15,
    test=0.2,
    own_pairs=OwnPairsConfig(
        samples=4, pairs_per_prompt=2, temperature=TEMPERATURE, max_response=72, margin=0.15
    ),
    dpo=DPOConfig(
        beta=0.1, learning_rate=4e-5, epochs=2, batch_size=4, micro_batch_size=4, adam_beta2=0.99,
        evaluate_every=100, log_every=2,
    ),
    group=GroupConfig(
        iterations=3, prompts_per_batch=6, samples_per_prompt=4, epochs=1, minibatches=2,
        micro_batch_size=12, max_response=32, temperature=TEMPERATURE, missing_eos_penalty=0.0,
        kl_coefficient=0.01, learning_rate=4e-5, final_rate=1.0, evaluate_every=100,
    ),
    brief=EvaluationConfig(prompts=16, samples=1, temperature=TEMPERATURE, max_response=72, examples=3),
    direct=EvaluationConfig(prompts=16, samples=2, temperature=TEMPERATURE, max_response=32, examples=3),
    pairs=40,
    longest_pair=128,
    reward=RewardConfig(
        learning_rate=2e-5, batch_size=8, micro_batch_size=4, evaluate_every=100, log_every=2
    ),
    normalise=NormaliseConfig(rollouts=4, max_response=16, temperature=TEMPERATURE),
)  # fmt: skip
