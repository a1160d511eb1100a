"""What goes into PPO: every knob with its unit and its default with a reason.

What it shares with training by groups of samples (group_config) comes first.
"""

from dataclasses import dataclass

from minirlhf.runs import InputError
from minirlhf.training.gradients import ComputeConfig
from minirlhf.training.mismatch import Precision
from minirlhf.training.trained import TrainedConfig


@dataclass(frozen=True)
class OnPolicyConfig(ComputeConfig, TrainedConfig):
    """What every stage is told that samples from the policy it trains, with a critic or without.

    There is no top-k, top-p or min-p: a filtered new policy can give a sampled token probability 0, and then
    ratio and KL are infinite. Sampling is tempered only, and ratio and KL use that same law on both sides.
    """

    iterations: int = 1953
    """Rollout-and-update rounds; 1,953 rounds of 512 episodes are the million episodes of N+."""
    epochs: int = 4
    """Passes over an iteration's episodes."""
    minibatches: int = 1
    """Optimiser steps per pass; must divide the episodes of an iteration."""
    micro_batch_size: int = 16
    """Rows per forward and backward pass of the trainer; changes memory and speed, not the gradient."""
    slots: int | None = None
    """Rows that are sampled at a time; None takes what fits the memory of `generate`. Changes no uniform."""
    rollout_precision: Precision = "full"
    """full: sample with the parameters. int8: with an 8-bit copy, made anew from them in every iteration, and
    weight each token's loss by min(π/π_sampler, importance_cap). On a CPU that samples faster."""
    importance_cap: float = 2.0
    """Largest importance weight of a token; acts with a rollout_precision that is not full."""
    max_response: int = 53
    """Most tokens sampled per response, the stop token counted."""
    temperature: float = 0.7
    """Divides the logits when sampling, and in ratio and KL on both sides."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score, in its units, where no stop token ended the response; 0 for none."""
    kl_coefficient: float = 0.05
    """β: score units per nat of log π/π_ref (k1) on each sampled token."""
    clip_low: float = 0.2
    """ε below: no gradient pushes a ratio further under 1 - ε."""
    clip_high: float = 0.2
    """ε above: no gradient pushes a ratio further over 1 + ε."""
    learning_rate: float = 3e-6
    """Adam's rate for the policy at the first iteration."""
    final_rate: float = 0.0
    """Share of every rate that is left after the last iteration, approached linearly; 1: constant rates."""
    adam_epsilon: float = 1e-5
    """Adam's ε; 1e-8 takes full steps on tiny gradients (examples/adam_epsilon.py)."""
    max_grad_norm: float = 1.0
    """Largest gradient norm, of each model apart. N+ does not clip; honest gradients stay far below 1."""
    evaluate_every: int = 50
    """Iterations between evaluations; the first and the last policy are always evaluated."""
    metric_for_best_model: str = "validation/objective"
    """Evaluation metric, higher is better, by which a policy is the best; the default is what is maximised:
    score - kl_coefficient · KL on validation prompts."""

    def __post_init__(self) -> None:
        ComputeConfig.__post_init__(self)
        TrainedConfig.__post_init__(self)
        counts = ("iterations", "epochs", "minibatches", "micro_batch_size", "max_response", "evaluate_every")
        self._check_at_least_one(*counts)
        self._check_positive(
            "temperature", "learning_rate", "adam_epsilon", "max_grad_norm", "importance_cap"
        )
        self._check_positive_if_set("slots")
        if not 0 <= self.final_rate <= 1:
            raise InputError(f"final_rate must lie in 0..1, got {self.final_rate}")

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")

    def _check_positive_if_set(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, or left out, got {getattr(self, name)}")


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Knobs of PPO; the defaults are those of the N+ reproduction of TL;DR (Huang et al. 2024, 2403.17031).

    They suit models of 1 B parameters and more. A small model wants a larger rate and a shorter leash: for a
    reward of unit variance the optimum at β lies near 1/(2β²) nats from the reference, so β = 0.05 is
    practically no leash in a short task, and 0.2 to 0.5 is one.

    No top-k, top-p or min-p: see OnPolicyConfig. Rewards are not whitened: N+ found it harmful, and it would
    hide what β means.
    """

    batch_size: int = 512
    """Episodes (prompt and response) per iteration."""
    kl_target: float | None = None
    """Nats per response that the adaptive controller steers to (Ziegler et al. 2019 used 6); None keeps β.
    With it, kl_coefficient is the first β."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive controller acts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    dual_clip: float | None = None
    """c > 1: a negative advantage costs at most c times itself (Ye et al. 2020); None for none."""
    value_clip: float | None = 0.2
    """How far a value may move from its old one before its loss stops following, score units; None: any."""
    value_coefficient: float = 0.1
    """Factor of the value loss; the critic has its own Adam, so it acts through ε and clipping only."""
    entropy_coefficient: float | None = None
    """Score units per nat of the policy's exact token entropy, added to the objective; None for none."""
    target_kl: float | None = None
    """Approximate KL per token (k3, nats) beyond which an iteration's remaining minibatches are skipped."""
    critic_learning_rate: float = 3e-6
    """Adam's rate for the critic at the first iteration."""
    critic_pretraining: int = 0
    """Iterations before the first one in which only the critic learns, from rollouts of the given policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("batch_size", "kl_horizon")
        self._check_positive("critic_learning_rate")
        self._check_positive_if_set("kl_target", "target_kl", "value_clip")
        if self.batch_size % self.minibatches:
            raise InputError(
                f"minibatches must divide batch_size, got {self.minibatches} and {self.batch_size}"
            )
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            raise InputError(
                f"batch_size must be less than 5 · kl_horizon = {5 * self.kl_horizon}, got {self.batch_size}"
            )
        if self.critic_pretraining < 0:
            raise InputError(f"critic_pretraining must not be negative, got {self.critic_pretraining}")
