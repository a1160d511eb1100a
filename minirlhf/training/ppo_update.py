"""The learning half of a PPO iteration: two losses, and the epochs of minibatches that descend them.

A loss here is what `training.update` asks for: the sum over a micro-batch divided by the token count of the
whole minibatch, so that micro-batches add up to exactly the minibatch's token mean.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from minirlhf.kernels.logprob import token_logp_and_entropy
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.models.packing import hidden
from minirlhf.objectives.divergence import kl_k2, kl_k3
from minirlhf.objectives.masked import scaled_sum
from minirlhf.objectives.policy import clip_indicator, clipped_surrogate_loss, log_ratio, ratio
from minirlhf.objectives.value import clipped_value_loss, value_loss
from minirlhf.training.device import device_of, numbers
from minirlhf.training.experience import Experience, PolicyRows, Rows, take_rows, value_of
from minirlhf.training.gradients import differentiate_by, model_of_loss, work_of
from minirlhf.training.guards import check_first_minibatch, tolerance_for
from minirlhf.training.packed import account, ids_of, pack_for, part_of, together
from minirlhf.training.ppo_config import OnPolicyConfig, PPOConfig
from minirlhf.training.trained import FULL, Whole
from minirlhf.training.update import Differentiate, Loss, TrainState, adamw, differentiated, update


class Learners(NamedTuple):
    """The two models that PPO trains, each with its own optimiser state."""

    policy: TrainState
    critic: TrainState


class Minibatch(NamedTuple, Generic[Rows]):
    """Rows of an experience, cut for memory, and the number of response tokens that all of them hold."""

    micro_batches: list[Rows]
    tokens: Tensor


def policy_loss(model: LanguageModel, config: PPOConfig, *, tolerance: float) -> Loss:
    """(params, rows, token count) -> clipped surrogate less the entropy bonus, token mean; and its metrics.

    The entropy is the exact one of each tempered law: -log π(token) has zero expected gradient.

    Args:
        tolerance: nats of |log ratio| above which a token counts as off-policy in `guard/off_policy_tokens`.
    """

    def loss(params: Params, rows: Experience, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        _, aux = surrogate(
            model, params, rows, tokens, config, dual_clip=config.dual_clip, tolerance=tolerance
        )
        total = aux["loss/policy_avg"]  # token mean over the minibatch
        if config.entropy_coefficient is not None:
            total = total - config.entropy_coefficient * aux["policy/entropy_avg"]
        return total, aux

    return loss


def surrogate(
    model: LanguageModel,
    params: Params,
    rows: PolicyRows,
    tokens: Tensor,
    config: OnPolicyConfig,
    *,
    dual_clip: float | None,
    tolerance: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of each token [b, T], unreduced, and this micro-batch's share of the metrics.

    Args:
        tokens: [] response tokens of the whole minibatch; metrics are means over them.
        tolerance: as in `policy_loss`.
    """
    mean = partial(scaled_sum, mask=rows.mask, constant=tokens)
    states = aligned(hidden(model, params, rows.tokens, rows.packing))
    logp, entropy = token_logp_and_entropy(
        states, model.unembedding(params), rows.tokens, rows.mask, temperature=config.temperature
    )
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    element = clipped_surrogate_loss(
        logp, rows.old_logp, rows.advantage, rows.mask, **clip, dual_clip=dual_clip
    )
    clipped = clip_indicator(logp, rows.old_logp, rows.advantage, rows.mask, **clip)
    moved = log_ratio(logp, rows.old_logp, rows.mask).abs() > tolerance
    metrics = {
        "loss/policy_avg": mean(element),
        "policy/entropy_avg": mean(entropy),
        "policy/approxkl_avg": mean(kl_k2(logp, rows.old_logp, rows.mask)),
        "policy/approxkl_k3_avg": mean(kl_k3(rows.old_logp, logp, rows.mask)),
        "policy/clipfrac_avg": mean(clipped.float()),
        "val/ratio": mean(ratio(logp, rows.old_logp, rows.mask)),
        "guard/off_policy_tokens": mean(moved.float()),
    }
    return element, metrics


def critic_loss(model: LanguageModel, config: PPOConfig) -> Loss:
    """(params, rows, token count) -> coefficient · ½ (V - R)², clipped around the old value, token mean."""

    def loss(params: Params, rows: Experience, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = value_of(model, params, rows.tokens, rows.mask, rows.packing)
        plain = value_loss(value, rows.ret, rows.mask)
        if config.value_clip is None:
            element = plain
        else:
            element = clipped_value_loss(value, rows.old_value, rows.ret, rows.mask, clip=config.value_clip)
        mean = partial(scaled_sum, mask=rows.mask, constant=tokens)  # token mean over the minibatch
        aux = {"loss/value_avg": mean(element), "val/clipfrac_avg": mean((element > plain).float())}
        return config.value_coefficient * mean(element), aux

    return loss


def optimise(
    model: LanguageModel,
    learners: Learners,
    experience: Experience,
    config: PPOConfig,
    *,
    rate: float,
    generator: torch.Generator,
    differentiate: Differentiate = differentiated,
    policy_whole: Whole = FULL,
    critic_whole: Whole = FULL,
) -> tuple[Learners, list[dict[str, float]], bool]:
    """Epochs of minibatches of policy and critic steps.

    The first minibatch is held to the on-policy identities. When a minibatch's approximate KL exceeds
    `config.target_kl`, the remaining ones are skipped (its own step, whose gradient is at hand, is taken).

    Args:
        rate: factor of both learning rates in this iteration.
        generator: CPU generator of the minibatch order; advanced by one permutation per epoch.
        differentiate: see `update.Differentiate`.
        policy_whole, critic_whole: from what is trained to the models' parameters.

    Returns:
        The learners, the metrics of each minibatch, and whether the target KL stopped the iteration.

    Raises:
        GuardError: the first minibatch is off-policy.
        NonFiniteError: a loss or a gradient is not finite.
    """
    tolerance = tolerance_for(policy_whole.cast(learners.policy.params))
    loss = policy_loss(model_of_loss(model, config), config, tolerance=tolerance)
    history: list[dict[str, float]] = []
    for minibatch in minibatches(experience, config, generator=generator):
        policy, sums = minibatch_step(
            learners.policy,
            minibatch,
            loss,
            config,
            rate * config.learning_rate,
            differentiate=differentiate,
            whole=policy_whole,
        )
        policy_metrics = named(sums, "policy")
        if not history:
            check_first_minibatch(policy_metrics, tolerance=tolerance)
        critic, critic_metrics = critic_step(
            model,
            learners.critic,
            minibatch,
            config,
            rate=rate,
            differentiate=differentiate,
            whole=critic_whole,
        )
        learners = Learners(policy, critic)
        history.append(policy_metrics | critic_metrics)
        if config.target_kl is not None and history[-1]["policy/approxkl_k3_avg"] > config.target_kl:
            return learners, history, True
    return learners, history, False


def critic_step(
    model: LanguageModel,
    critic: TrainState,
    minibatch: Minibatch,
    config: PPOConfig,
    *,
    rate: float,
    differentiate: Differentiate = differentiated,
    whole: Whole = FULL,
) -> tuple[TrainState, dict[str, float]]:
    """One Adam step on the value loss."""
    learning_rate = rate * config.critic_learning_rate
    loss = critic_loss(model_of_loss(model, config), config)
    critic, metrics = minibatch_step(
        critic, minibatch, loss, config, learning_rate, differentiate=differentiate, whole=whole
    )
    return critic, named(metrics, "value")


def minibatch_step(
    state: TrainState,
    minibatch: Minibatch,
    loss: Loss,
    config: OnPolicyConfig,
    learning_rate: float,
    differentiate: Differentiate = differentiated,
    whole: Whole = FULL,
) -> tuple[TrainState, dict[str, Tensor]]:
    """One optimiser step on one minibatch; metrics are token means over all of it, and its layout's."""
    state, metrics = update(
        state,
        minibatch.micro_batches,
        minibatch.tokens,
        loss=loss,
        optimiser=partial(adamw, eps=config.adam_epsilon),
        learning_rate=learning_rate,
        max_grad_norm=config.max_grad_norm,
        differentiate=differentiate,
        whole=whole,
    )
    return state, metrics | account((rows, rows.packing) for rows in minibatch.micro_batches)


def minibatches(
    experience: Rows, config: OnPolicyConfig, *, generator: torch.Generator
) -> Iterator[Minibatch[Rows]]:
    """Each epoch's rows in a fresh random order, every row exactly once per epoch.

    Within a minibatch the rows' order changes nothing, so that samples of one prompt go side by side, and
    beyond that rows of like length.
    """
    rows_in_all = len(experience.tokens)
    if rows_in_all % config.minibatches:
        raise ValueError(f"{config.minibatches} minibatches must divide the {rows_in_all} rows of experience")
    ids, device = ids_of(experience), experience.tokens.device
    for _ in range(config.epochs):
        order = torch.randperm(rows_in_all, generator=generator)
        for drawn in order.split(rows_in_all // config.minibatches):
            rows = drawn[together(*(field[drawn] for field in ids))]
            parts = [
                take_rows(experience, part_of(ids, part, device=device, pack=pack_for(config)))
                for part in rows.split(config.micro_batch_size)
            ]
            yield Minibatch(parts, torch.stack([part.mask.sum() for part in parts]).sum())


def named(metrics: dict[str, Tensor], model: str) -> dict[str, float]:
    """The update's own two metrics under names that say whose they are; `loss` is in the aux already."""
    own = {"grad_norm": f"{model}/grad_norm_avg"}
    return numbers({own.get(name, name): value for name, value in metrics.items() if name != "loss"})


def gradients_of(
    params: Params, prompts: Sequence[Sequence[int]], config: OnPolicyConfig, *, rows: int, name: str
) -> Differentiate:
    """How a stage computes its gradients, by `config.compile`.

    Args:
        params: of the policy, on the device to train on.
        rows: read by all gradients of an epoch, those of a critic too.
    """
    rows *= config.iterations * config.epochs
    length = sum(map(len, prompts)) / len(prompts) + config.max_response
    work = work_of(params, tokens=int(rows * length), passes=math.ceil(rows / config.micro_batch_size))
    return differentiate_by(config.compile, work, device_of(params), name=name)
