"""Advantages, returns and whitening as other libraries write them: right ones, wrong ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.kinds import Case
from tests.verify.preference_variants import Variant

WHITENED = "the advantage over the whole batch, after the returns (unbiased variance, ε = 1e-8 in the root)"
LEFT = "none: it is left to the caller"


def bootstrap(case: Case) -> Tensor:
    return case.get("bootstrap_value", torch.zeros_like(case["reward"][:, 0]))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / (mask.sum() + 1e-8)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """As TRL and verl have it: one token raises, and pads are left to the caller."""
    if mask.sum() < 2:
        raise ValueError("a variance needs two tokens")
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * (count / (count - 1))
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


# GAE


def gae_with_observations_skipped(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    following, carried, found = 0.0, 0.0, []
    for t in reversed(range(token_level_rewards.shape[-1])):
        delta = token_level_rewards[:, t] + gamma * following - values[:, t]
        now, m = delta + gamma * lam * carried, response_mask[:, t]
        following = values[:, t] * m + (1 - m) * following
        carried = now * m + (1 - m) * carried
        found.append(carried)
    advantages = torch.stack(found[::-1], dim=1)
    return masked_whiten(advantages, response_mask), advantages + values


def gae_of_masked_inputs(
    values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """What precedes a response gets an advantage too, and is left to the loss."""
    values, rewards = action_mask * values, action_mask * rewards
    last, found, length = 0.0, [], rewards.size(1)
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lambd * last
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages.detach(), advantages + values


def gae_with_everything_built_in(
    values: Tensor, rewards: Tensor, response_length: int
) -> tuple[Tensor, Tensor]:
    last, found = 0.0, []
    for t in reversed(range(response_length)):
        following = values[:, t + 1] if t < response_length - 1 else 0.0
        last = rewards[:, t] + following - values[:, t] + 0.95 * last
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    variance, mean = torch.var_mean(advantages)
    return (advantages - mean) * torch.rsqrt(variance + 1e-8), advantages + values


def gae_of_environments(
    rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """[T, B], with flags of new episodes."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        goes_on = 1.0 - (dones[t + 1] if t + 1 < len(rewards) else 0.0)
        following = values[t + 1] if t + 1 < len(rewards) else next_value
        delta = rewards[t] + gamma * following * goes_on - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * goes_on * last
    return advantages, advantages + values


def gae_with_one_more_value(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """values [B, T + 1], as a matrix product."""
    delta = rewards + gamma * values[:, 1:] - values[:, :-1]
    age = torch.arange(delta.shape[1])[:, None] - torch.arange(delta.shape[1])[None, :]
    return delta @ ((gamma * lam) ** age.clamp(min=0) * (age >= 0)).to(delta.dtype)


def gae_of_lists(r: Tensor, v: Tensor, discount: float, lmbda: float) -> Tensor:
    rows = []
    for rewards, values in zip(r.tolist(), v.tolist(), strict=True):
        last, row = 0.0, []
        for reward, value, following in zip(rewards[::-1], values[::-1], [0.0, *values[:0:-1]], strict=True):
            last = reward + discount * following - value + discount * lmbda * last
            row.append(last)
        rows.append(row[::-1])
    return torch.tensor(rows, dtype=r.dtype)


def gae_as_a_difference(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """λ-returns less values."""
    value, reward = value.masked_fill(~mask, 0.0), reward.masked_fill(~mask, 0.0)
    returns, after = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    result = torch.zeros_like(value)
    for t in reversed(range(value.shape[1])):
        now = reward[:, t] + gamma * (
            (1 - lam) * after + lam * (returns[:, t + 1] if t + 1 < value.shape[1] else 0)
        )
        returns[:, t], after = now, value[:, t]
        result[:, t] = (now - value[:, t]) * mask[:, t]
    return result


# Discounted returns


def returns_reset_after_the_end(token_level_rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    returns, running = torch.zeros_like(token_level_rewards), 0.0
    for t in reversed(range(token_level_rewards.shape[1])):
        running = token_level_rewards[:, t] * response_mask[:, t] + gamma * running
        returns[:, t] = running
        running = running * response_mask[:, t]
    return returns


def undiscounted_returns(rewards: Tensor) -> Tensor:
    return rewards.flip(-1).cumsum(-1).flip(-1)


def undiscounted_masked_returns(rewards: Tensor, mask: Tensor) -> Tensor:
    return (rewards * mask).flip(-1).cumsum(-1).flip(-1)


def returns_by_powers(rewards: Tensor, masks: Tensor, discount: float) -> Tensor:
    steps = torch.arange(rewards.shape[1])
    decay = (discount ** (steps[:, None] - steps[None, :]).clamp(min=0)).tril().to(rewards.dtype)
    return rewards.where(masks, 0.0) @ decay


# Whitening


def whiten_all(advantages: Tensor) -> Tensor:
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def whiten_with_population_variance(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    tokens = x[mask]
    return ((x - tokens.mean()) / (tokens.var(unbiased=False) + eps).sqrt()).where(mask, 0.0)


def whiten_with_least_variance(tensor: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    centred = tensor * mask - (tensor * mask).sum() / mask.sum()
    return centred * ((centred**2 * mask).sum() / mask.sum()).clamp(min=eps).rsqrt()


def whiten_without_epsilon(adv: Tensor, action_mask: Tensor) -> Tensor:
    tokens = torch.masked_select(adv, action_mask)
    return (adv - tokens.mean()) / tokens.std() * action_mask


def whiten_by_moments(values: Tensor, mask: Tensor) -> Tensor:
    mean = (values * mask).sum() / mask.sum()
    variance = ((values**2) * mask).sum() / mask.sum() - mean**2
    return (values - mean) / (variance.sqrt() + 1e-5) * mask


def scale_with_population_variance(rewards: Tensor) -> Tensor:
    mean = rewards.mean()
    return (rewards - mean) / (rewards.std(unbiased=False) + 1e-8) + mean


def scale_inside_the_root(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x[mask])
    return (mean + (x - mean) / torch.sqrt(variance + eps)) * mask


RIGHT = [
    Variant("gae", gae_with_observations_skipped, {"whitening": WHITENED}),
    Variant("gae", gae_of_masked_inputs, {"whitening": LEFT}),
    Variant("gae", gae_with_everything_built_in, {"whitening": WHITENED, "gamma": "1, built in",
                                                  "lam": "0.95, built in"},
            {"derived": {"response_length": lambda c: c["reward"].shape[1]}}),
    Variant("gae", gae_of_environments, {"whitening": LEFT},
            {"derived": {"rewards": lambda c: c["reward"].T, "values": lambda c: c["value"].T,
                         "dones": lambda c: torch.zeros_like(c["reward"].T), "next_value": bootstrap},
             "output": lambda result: (result[0].T, result[1].T)}),
    Variant("gae", gae_with_one_more_value, {"whitening": LEFT},
            {"derived": {"values": lambda c: torch.cat([c["value"], bootstrap(c)[:, None]], dim=1)}}),
    Variant("gae", gae_of_lists, {"whitening": LEFT}),
    Variant("gae", gae_as_a_difference, {"whitening": LEFT}),
    Variant("discounted_return", returns_reset_after_the_end),
    Variant("discounted_return", undiscounted_returns, {"gamma": "1, built in"}),
    Variant("discounted_return", undiscounted_masked_returns, {"gamma": "1, built in"}),
    Variant("discounted_return", returns_by_powers),
    Variant("whiten", masked_whiten, {"standard deviation": "unbiased, n - 1", "epsilon": "1e-08, built in"}),
    Variant("whiten", whiten_all,
            {"place of epsilon": "added to the deviation", "epsilon": "1e-08, built in"}),
    Variant("whiten", whiten_with_population_variance, {"standard deviation": "biased, n"}),
    Variant("whiten", whiten_with_least_variance, {"place of epsilon": "the least variance"}),
    Variant("whiten", whiten_without_epsilon,
            {"standard deviation": "unbiased, n - 1", "epsilon": "0, built in"}),
    Variant("whiten", whiten_by_moments, {"standard deviation": "biased, n", "epsilon": "1e-05, built in"}),
    Variant("whiten_scale_only", masked_whiten, {"epsilon": "1e-08, built in"},
            {"fixed": {"shift_mean": False}}),
    Variant("whiten_scale_only", scale_with_population_variance, {"standard deviation": "biased, n"}),
    Variant("whiten_scale_only", scale_inside_the_root,
            {"place of epsilon": "added to the variance, in the root"}),
]  # fmt: skip


# Wrong


def gae_that_stops_before_the_first_token(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    advantage, last = torch.zeros_like(reward), 0.0
    for t in range(reward.shape[1] - 1, 0, -1):
        following = value[:, t + 1] if t + 1 < reward.shape[1] else 0.0
        advantage[:, t] = last = reward[:, t] + gamma * following - value[:, t] + gamma * lam * last
    return advantage


def gae_that_ends_at_a_reward(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    advantage, last = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        following = value[:, t + 1] if t + 1 < reward.shape[1] else torch.zeros_like(last)
        goes_on = (reward[:, t] <= 3).to(reward.dtype)
        last = reward[:, t] + goes_on * gamma * following - value[:, t] + goes_on * gamma * lam * last
        advantage[:, t] = last
    return advantage


def gae_along_the_batch(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    return gae_with_one_more_value(reward.T, torch.cat([value.T, 0 * value.T[:, :1]], dim=1), gamma, lam).T


def gae_of_clamped_errors(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    delta = reward + gamma * torch.cat([value[:, 1:], 0 * value[:, :1]], dim=1) - value
    padded = torch.cat([0 * delta, 0 * delta[:, :1]], dim=1)
    return gae_with_one_more_value(delta.clamp(-2, 2), padded, gamma, lam)


def gae_whose_returns_are_rewards_to_go(
    reward: Tensor, value: Tensor, gamma: float, lam: float
) -> tuple[Tensor, ...]:
    values = torch.cat([value, 0 * value[:, :1]], dim=1)
    returns = gae_with_one_more_value(reward, 0 * values, gamma, 1.0)
    return gae_with_one_more_value(reward, values, gamma, lam), returns


def gae_that_reads_the_padding(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    values = torch.cat([value, 0 * value[:, :1]], dim=1)
    return gae_with_one_more_value(reward * mask, values, gamma, lam) * mask


def gae_of_numbers_in_a_row(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Each row begins where the one before it ended."""
    flat, values = reward.reshape(1, -1), torch.cat([value.reshape(1, -1), 0 * value[:1, :1]], dim=1)
    return gae_with_one_more_value(flat, values, gamma, lam).reshape(reward.shape)


def gae_that_writes_to_its_input(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    value *= mask
    return gae_of_masked_inputs(value, reward, mask, gamma, lam)[0]


def returns_after_the_token(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return (returns_by_powers(reward, mask, gamma) - reward) * mask


def returns_so_far(reward: Tensor, mask: Tensor) -> Tensor:
    return (reward * mask).cumsum(-1)


def centred_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    returns = returns_by_powers(reward, mask, gamma)
    return (returns - returns[mask].mean()) * mask


def returns_discounted_by_underflow(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Right for short rows: the sum of γ^k r_k, divided by γ^t."""
    decay = max(gamma, 1e-6) ** torch.arange(reward.shape[1], dtype=reward.dtype)
    return (reward.where(mask, 0.0) * decay).flip(-1).cumsum(-1).flip(-1) / decay


def whiten_rows_then_all(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = (x - (x * mask).sum(1, keepdim=True) / count) * mask
    return whiten_with_population_variance(centred, mask, 1e-8)


def whiten_with_bessel_of_the_rows(x: Tensor, mask: Tensor) -> Tensor:
    rows = len(x)
    return whiten_with_population_variance(x, mask, 1e-8) * ((rows - 1) / rows) ** 0.5


def whiten_by_rank(x: Tensor, mask: Tensor) -> Tensor:
    return whiten_with_population_variance(
        x.flatten().argsort().argsort().reshape(x.shape).to(x.dtype), mask, 1e-8
    )


def whiten_squashed(x: Tensor, mask: Tensor) -> Tensor:
    return torch.tanh(whiten_with_population_variance(x, mask, 1e-8))


def whiten_the_absolute(x: Tensor, mask: Tensor) -> Tensor:
    return whiten_with_population_variance(x.abs(), mask, 1e-8)


def whiten_by_mean_of_row_means(x: Tensor, mask: Tensor) -> Tensor:
    mean = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return (x - mean) / (x[mask].std() + 1e-8) * mask


def whiten_in_place(x: Tensor, mask: Tensor) -> Tensor:
    x -= x[mask].mean()
    return x / (x[mask].std() + 1e-8) * mask


def divided_by_the_deviation(x: Tensor, mask: Tensor) -> Tensor:
    return x / (x[mask].std() + 1e-8) * mask


def scale_with_the_mean_scaled(x: Tensor, mask: Tensor) -> Tensor:
    mean = x[mask].mean()
    return ((x - mean) / (x[mask].std() + 1e-8) + mean / x[mask].std()) * mask


def scale_with_the_mean_of_all(x: Tensor, mask: Tensor) -> Tensor:
    return (whiten_with_population_variance(x, mask, 1e-8) + x.mean()) * mask


def scale_with_the_mean_of_each_row(x: Tensor, mask: Tensor) -> Tensor:
    mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (whiten_with_population_variance(x, mask, 1e-8) + mean) * mask


WRONG: list[tuple[str, Callable[..., Any]]] = [
    ("gae", gae_that_stops_before_the_first_token),
    ("gae", gae_that_ends_at_a_reward),
    ("gae", gae_along_the_batch),
    ("gae", gae_of_clamped_errors),
    ("gae", gae_whose_returns_are_rewards_to_go),
    ("gae", gae_that_reads_the_padding),
    ("gae", gae_of_numbers_in_a_row),
    ("gae", gae_that_writes_to_its_input),
    ("discounted_return", returns_after_the_token),
    ("discounted_return", returns_so_far),
    ("discounted_return", centred_returns),
    ("discounted_return", returns_discounted_by_underflow),
    ("whiten", whiten_rows_then_all),
    ("whiten", whiten_with_bessel_of_the_rows),
    ("whiten", whiten_by_rank),
    ("whiten", whiten_squashed),
    ("whiten", whiten_the_absolute),
    ("whiten", whiten_by_mean_of_row_means),
    ("whiten", whiten_in_place),
    ("whiten", divided_by_the_deviation),
    ("whiten_scale_only", divided_by_the_deviation),
    ("whiten_scale_only", scale_with_the_mean_scaled),
    ("whiten_scale_only", scale_with_the_mean_of_all),
    ("whiten_scale_only", scale_with_the_mean_of_each_row),
    ("whiten_scale_only", whiten_with_population_variance),
]
