"""The learning half of an iteration by groups: one loss, and the epochs of minibatches that descend it.

    loss = 1 / (rows · max_response) · Σ_rows Σ_t clipped surrogate        a sum over tokens, a mean over rows

The divisor is the same number for every minibatch, because the gradient of E R is a *sum* over a response's
tokens: Σ_i A_i ∇log π(y_i) = Σ_i A_i Σ_t ∇log π(y_it). Dividing a row by its own length makes a short right
answer count more per token, and a long wrong one less, so that wrong answers grow; dividing by the tokens of
the minibatch correlates the divisor with what was sampled (Liu et al. 2025, "Dr. GRPO", section 3.1,
arXiv:2503.20783). max_response is there for the scale alone: Adam's ε and the largest gradient norm then mean
about what they mean in PPO, whose loss is a token mean.
"""

import torch
from torch import Tensor

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.masked import scaled_sum
from minirlhf.training.gradients import model_of_loss
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupExperience
from minirlhf.training.guards import check_first_minibatch, tolerance_for
from minirlhf.training.ppo_update import minibatch_step, minibatches, named, surrogate
from minirlhf.training.trained import FULL, Whole
from minirlhf.training.update import Differentiate, Loss, TrainState, differentiated


def group_loss(model: LanguageModel, config: GroupConfig, *, tolerance: float) -> Loss:
    """(params, rows, token count) -> the loss above, and its metrics.

    The token count is that of the whole minibatch, and only the metrics are means over it.

    Args:
        tolerance: nats of |log ratio| above which a token counts as off-policy in `guard/off_policy_tokens`.
    """
    constant = config.batch_size // config.minibatches * config.max_response

    def loss(params: Params, rows: GroupExperience, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        element, aux = surrogate(model, params, rows, tokens, config, dual_clip=None, tolerance=tolerance)
        total = scaled_sum(element, rows.mask, constant=constant)
        return total, aux | {"group/loss_avg": total}

    return loss


def optimise(
    model: LanguageModel,
    policy: TrainState,
    experience: GroupExperience,
    config: GroupConfig,
    *,
    rate: float,
    generator: torch.Generator,
    differentiate: Differentiate = differentiated,
    whole: Whole = FULL,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Epochs of minibatches; the first one is held to the on-policy identities.

    Advantages are formed before rows are drawn, so a group need not stay in one minibatch.

    Args:
        rate: factor of the learning rate in this iteration.
        generator: CPU generator of the minibatch order; advanced by one permutation per epoch.
        differentiate: see `update.Differentiate`.
        whole: from what is trained to the policy's parameters.

    Returns:
        The policy, and the metrics of each minibatch.

    Raises:
        GuardError: the first minibatch is off-policy.
        NonFiniteError: a loss or a gradient is not finite.
    """
    tolerance = tolerance_for(whole.cast(policy.params))
    loss = group_loss(model_of_loss(model, config), config, tolerance=tolerance)
    history: list[dict[str, float]] = []
    for minibatch in minibatches(experience, config, generator=generator):
        policy, sums = minibatch_step(
            policy,
            minibatch,
            loss,
            config,
            rate * config.learning_rate,
            whole=whole,
            differentiate=differentiate,
        )
        metrics = named(sums, "policy")
        if not history:
            check_first_minibatch(metrics, tolerance=tolerance)
        history.append(metrics)
    return policy, history
