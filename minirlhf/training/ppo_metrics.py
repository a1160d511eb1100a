"""What comes out of a PPO iteration: every metric with its formula, and the functions that compute them."""

from collections.abc import Sequence

from minirlhf.objectives.divergence import kl_k1
from minirlhf.objectives.masked import sequence_sum
from minirlhf.objectives.value import explained_variance
from minirlhf.rollout.sampler import LENGTH, Rollout
from minirlhf.training.device import numbers
from minirlhf.training.experience import PolicyRows, Sampled
from minirlhf.training.mismatch import mismatch_metrics

METRICS = {
    # TRL's names and formulas. What TRL averages over padding too is averaged over response tokens here.
    "objective/kl": "mean over responses of Σ_t log π/π_ref (k1), nats per response, tempered law",
    "objective/entropy": "mean over responses of Σ_t -log π(token): the sampled estimate, nats per response",
    "objective/non_score_reward": "mean over responses of Σ_t -β k1",
    "objective/rlhf_reward": "objective/scores + objective/non_score_reward: what PPO maximises",
    "objective/scores": "mean score, the missing-EOS penalty subtracted",
    "policy/approxkl_avg": "½ (log ratio)² (k2), token mean, averaged over the iteration's minibatches",
    "policy/clipfrac_avg": "share of tokens in the clip's dead zone, averaged likewise",
    "policy/entropy_avg": "exact entropy of the tempered law, token mean, nats, averaged likewise",
    "loss/policy_avg": "clipped surrogate loss, token mean, averaged likewise",
    "loss/value_avg": "clipped value loss ½ (V - R)², token mean, without its coefficient, averaged likewise",
    "val/clipfrac_avg": "share of tokens whose value loss is the clipped one, averaged likewise",
    "val/ratio": "π/π_old, token mean, averaged likewise",
    "val/ratio_var": "variance of that token mean over the iteration's minibatches (0 where there is one)",
    "val/num_eos_tokens": "EOS tokens among the response tokens",
    "lr": "the policy's learning rate in this iteration",
    "episode": "episodes sampled so far",
    "eps": "episodes per second, this iteration",
    # Ours.
    "objective/kl_coefficient": "β used in this iteration",
    "policy/approxkl_k3_avg": "k3 of KL(π_old‖π), token mean, averaged over minibatches; target_kl bounds it",
    "policy/grad_norm_avg": "norm of the policy's gradient before clipping, averaged likewise",
    "value/grad_norm_avg": "norm of the critic's gradient before clipping, averaged likewise",
    "value/explained_variance": "1 - Var(R - V_old) / Var(R) over response tokens",
    "policy/updates": "optimiser steps of the policy in this iteration",
    "policy/early_stops": "iterations so far that target_kl cut short",
    "response/length_mean": "response tokens, the stop token counted",
    "response/missing_eos": "share of responses that no stop token ended",
    "guard/sampler_gap": "largest |recorded - recomputed| log-prob of a sampled token, nats",
    "sampler/kl": "k3 of KL(π_sampler‖π_old), token mean, nats: 0 but for rounding, unless rollouts are int8",
    "sampler/largest_ratio": "largest π_old/π_sampler of a sampled token",
    "sampler/effective_share": "(Σ w)² / (n Σ w²) of those ratios w: effective share of the n tokens",
    "guard/off_policy_tokens": "share of tokens with |log ratio| above the tolerance at the first minibatch",
    "perf/tokens_per_second": "response tokens sampled and learned from, per second of the iteration",
    "perf/padding_waste": "share of the positions computed in updates that are padding, averaged likewise",
    "perf/shared_tokens": "share of the tokens read in updates that another row computes, averaged likewise",
}
"""Every metric of a PPO iteration and its formula."""


def sampled_metrics(sampled: Sampled, *, kl_coefficient: float, eos_id: int) -> dict[str, float]:
    """The metrics that the rollout and its rewards determine, before anything is learned."""
    experience = sampled.experience
    explained = explained_variance(experience.old_value, experience.ret, experience.mask)
    common = rollout_metrics(
        experience, sampled.rollout, sampled.sampler_gap, kl_coefficient=kl_coefficient, eos_id=eos_id
    )
    return common | {"value/explained_variance": float(explained)}


def rollout_metrics(
    experience: PolicyRows, rollout: Rollout, sampler_gap: float, *, kl_coefficient: float, eos_id: int
) -> dict[str, float]:
    """Those of them that know no critic."""
    mask = experience.mask
    kl = sequence_sum(kl_k1(experience.old_logp, experience.ref_logp, mask), mask).mean()
    score = experience.score.mean()
    values = mismatch_metrics(experience.old_logp, rollout.sampled_logp, mask) | {
        "objective/kl": kl,
        "objective/entropy": -sequence_sum(experience.old_logp, mask).mean(),
        "objective/non_score_reward": -kl_coefficient * kl,
        "objective/rlhf_reward": score - kl_coefficient * kl,
        "objective/scores": score,
        "objective/kl_coefficient": kl_coefficient,
        "val/num_eos_tokens": ((experience.tokens == eos_id) & mask).sum(),
        "response/length_mean": mask.sum() / len(mask),
        "response/missing_eos": (rollout.stop_reason == LENGTH).float().mean(),
        "guard/sampler_gap": sampler_gap,
    }
    return numbers(values)


def learning_metrics(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the iteration's minibatches, and what TRL computes from their sequence."""
    means = {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}
    if "val/ratio" not in means:  # the critic learned alone
        return means
    spread = sum((entry["val/ratio"] - means["val/ratio"]) ** 2 for entry in history)
    return means | {
        "val/ratio_var": spread / max(len(history) - 1, 1),
        "policy/updates": float(len(history)),
        "guard/off_policy_tokens": history[0]["guard/off_policy_tokens"],
    }
