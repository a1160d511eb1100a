"""What comes out of an iteration by groups: PPO's metrics but the critic's, and those of the groups."""

from minirlhf.training import ppo_metrics
from minirlhf.training.device import numbers
from minirlhf.training.group_experience import GroupSampled

_OF_THE_CRITIC = ("loss/value_avg", "val/clipfrac_avg", "value/grad_norm_avg", "value/explained_variance")
_OF_THE_TARGET_KL = ("policy/early_stops",)

METRICS = {
    name: formula
    for name, formula in ppo_metrics.METRICS.items()
    if name not in (*_OF_THE_CRITIC, *_OF_THE_TARGET_KL)
} | {
    "group/loss_avg": "the loss that is descended: Σ_t summed, mean over responses, / max_response",
    "group/score_std": "standard deviation of the scores within a group (unbiased), mean over groups",
    "group/return_std": "likewise of score - β Σ_t k1, what the advantages are made of",
    "group/no_spread": "share of groups whose scores are all equal: these teach nothing but the KL",
}
"""Every metric of an iteration and its formula."""


def sampled_metrics(
    sampled: GroupSampled, *, samples: int, kl_coefficient: float, eos_id: int
) -> dict[str, float]:
    """The metrics that the rollout and its scores determine, before anything is learned.

    Args:
        samples: G, rows per prompt.
    """
    experience = sampled.experience
    common = ppo_metrics.rollout_metrics(
        experience, sampled.rollout, sampled.sampler_gap, kl_coefficient=kl_coefficient, eos_id=eos_id
    )
    score, ret = experience.score.view(-1, samples), experience.ret.view(-1, samples)
    return common | numbers(
        {
            "group/score_std": score.std(1).mean(),
            "group/return_std": ret.std(1).mean(),
            "group/no_spread": (score == score[:, :1]).all(1).float().mean(),
        }
    )
