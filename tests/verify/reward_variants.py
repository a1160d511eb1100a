"""Group advantages, shaped rewards and controllers as other libraries write them: right ones, wrong ones."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.verify.kinds import Case
from tests.verify.preference_variants import Variant


def size(case: Case) -> int:
    return case["reward"].shape[1]


def flat(case: Case) -> Tensor:
    return case["reward"].flatten()


FLAT = {"derived": {"rewards": flat, "num_generations": size}}
BY_INDEX = {
    "derived": {
        "token_level_rewards": lambda c: flat(c)[:, None],
        "index": lambda c: [p for p in range(len(c["reward"])) for _ in range(size(c))],
    },
    "output": lambda result: result[:, 0],
}


def grouped(token_level_rewards: Tensor, index: list[int]) -> dict[int, Tensor]:
    scores = defaultdict(list)
    for score, prompt in zip(token_level_rewards.sum(-1), index, strict=True):
        scores[prompt].append(score)
    return {prompt: torch.stack(values) for prompt, values in scores.items()}


# Groups


def rloo_of_rows(scores: Tensor) -> Tensor:
    return scores - (scores.sum(-1, keepdim=True) - scores) / (scores.shape[-1] - 1)


def rloo_of_flat_rewards(rewards: Tensor, num_generations: int) -> Tensor:
    return rloo_of_rows(rewards.view(-1, num_generations)).reshape(-1)


def rloo_by_index(token_level_rewards: Tensor, index: list[int]) -> Tensor:
    """A lone sample keeps its reward."""
    groups, result = grouped(token_level_rewards, index), token_level_rewards.clone()
    for i, prompt in enumerate(index):
        n = len(groups[prompt])
        if n > 1:
            result[i] = (token_level_rewards[i] - groups[prompt].mean()) * n / (n - 1)
    return result


def rloo_of_the_scored(rewards: Tensor, scored: Tensor) -> Tensor:
    n, total = scored.sum(1, keepdim=True), (rewards * scored).sum(1, keepdim=True)
    return (rewards * n - total) / (n - 1) * scored


def centred_rows(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(dim=1, keepdim=True)


def centred_flat(rewards: Tensor, num_generations: int) -> Tensor:
    return rewards - rewards.view(-1, num_generations).mean(dim=1).repeat_interleave(num_generations, dim=0)


def centred_by_index(token_level_rewards: Tensor, index: list[int]) -> Tensor:
    groups = grouped(token_level_rewards, index)
    return token_level_rewards - torch.stack([groups[prompt].mean() for prompt in index])[:, None]


def centred_without_the_unscored(rewards: Tensor, num_generations: int) -> Tensor:
    groups = rewards.view(-1, num_generations)
    return torch.nan_to_num(groups - groups.nanmean(dim=1, keepdim=True)).flatten()


def normalised_flat(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    groups = rewards.view(-1, num_generations)
    std = groups.std(dim=1).repeat_interleave(num_generations) if scale_rewards == "group" else rewards.std()
    return centred_flat(rewards, num_generations) / (std + 1e-4)


def normalised_with_population_deviation(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, unbiased=False) + 1e-8)


def normalised_inside_the_root(rewards: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(rewards, dim=-1, keepdim=True)
    return (rewards - mean) * torch.rsqrt(variance + eps)


def normalised_where_it_varies(r: Tensor, valid: Tensor) -> Tensor:
    """No ε: a prompt whose rewards are equal is left out."""
    result = torch.zeros_like(r)
    for p, keep in enumerate(valid):
        scored = r[p, keep]
        if len(scored) > 1 and scored.std() > 1e-12:
            result[p, keep] = (scored - scored.mean()) / scored.std()
    return result


def normalised_by_index(token_level_rewards: Tensor, index: list[int], epsilon: float = 1e-6) -> Tensor:
    groups = grouped(token_level_rewards, index)
    std = torch.stack([groups[p].std() if len(groups[p]) > 1 else groups[p][0] * 0 + 1 for p in index])
    mean = torch.stack([groups[p].mean() if len(groups[p]) > 1 else groups[p][0] * 0 for p in index])
    return (token_level_rewards - mean[:, None]) / (std[:, None] + epsilon)


def normalised_over_the_batch(rewards: Tensor) -> Tensor:
    centred = centred_rows(rewards)
    return (centred - centred.mean()) / (centred.std() + 1e-9)


# Shaped rewards


def last_index(case: Case) -> Tensor:
    return (case["mask"] * torch.arange(case["mask"].shape[1])).argmax(1)


def shaped_by_scatter(r: Tensor, kl_coef: float, kl: Tensor, action_mask: Tensor) -> Tensor:
    """Pads are charged, which the caller's mask removes."""
    eos = action_mask.size(1) - 1 - action_mask.long().fliplr().argmax(dim=1, keepdim=True)
    return torch.zeros_like(kl).scatter_(1, eos, r.unsqueeze(1)) - kl_coef * kl


def shaped_row_by_row(scores: Tensor, kl_penalty: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    rewards = []
    for score, kl, keep in zip(scores, kl_penalty, mask, strict=True):
        reward = -kl_coef * kl * keep
        if keep.any():
            reward[keep.nonzero()[-1]] += score
        rewards.append(reward)
    return torch.stack(rewards)


def shaped_without_a_mask(scores: Tensor, kl: Tensor) -> Tensor:
    rewards = -0.05 * kl
    rewards[:, -1] += scores
    return rewards


def shaped_from_logprobs(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    sequence_lengths: Tensor,
    kl_coef: float,
    kind: str,
) -> Tensor:
    """The score one slot after the last token, where there is one."""
    ratio = ref_logprobs - logprobs
    rewards = -kl_coef * (-ratio if kind == "k1" else (ratio.exp() - 1) - ratio)
    after = sequence_lengths + 1
    place = torch.where(after < rewards.size(1), after, sequence_lengths)
    rewards[torch.arange(len(rewards)), place] += scores
    return rewards


def shaped_in_the_mse_style(
    score: Tensor, log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    token_scores = torch.zeros_like(log_probs)
    token_scores[torch.arange(len(score)), last_index({"mask": response_mask.bool()})] = score
    return token_scores - beta * 0.5 * (log_probs - ref_log_probs) ** 2 * response_mask


def shaped_by_absolute_value(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor) -> Tensor:
    last = masks.flip(1).cumsum(1).flip(1) == 1
    return (scores[:, None] * last - 0.2 * (logprobs - ref_logprobs).abs()) * masks


# The controller


class Controller:
    """A coefficient with a memory, of numbers."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: float) -> None:
        error = np.clip(current / self.target - 1, -0.2, 0.2)
        self.value *= 1 + error * n_steps / self.horizon


def controlled(coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float) -> float:
    controller = Controller(float(coefficient), target, horizon)
    controller.update(float(kl), n_steps)
    return controller.value


def controlled_with_a_gain(beta: Tensor, current_kl: Tensor, target_kl: float) -> Tensor:
    """The paper's K = .1."""
    return beta * (1 + 0.1 * torch.clamp(current_kl / target_kl - 1, -0.2, 0.2))


def controlled_at_six_nats(kl_coef: Tensor, mean_kl: Tensor, n_steps: float) -> Tensor:
    error = torch.clamp((mean_kl - 6.0) / 6.0, min=-0.2, max=0.2)
    return kl_coef + kl_coef * error * n_steps / 10000


def controlled_by_min_and_max(
    value: Tensor, current: Tensor, target: float, horizon: float, steps: float
) -> Tensor:
    return value * (1.0 + max(min(float(current) / target - 1.0, 0.2), -0.2) * steps / horizon)


GROUP, BATCH = "the samples of the prompt", "the rewards of the whole batch"
OUTSIDE, INSIDE = "added to the deviation", "added to the variance, in the root"
NO_LEASH = "as a reward no regulariser: it drives the policy from its reference"
AFTER = "one slot after it, in the last column where there is none: GAE has to count that slot"
RIGHT = [
    Variant("rloo", rloo_of_rows),
    Variant("rloo", rloo_of_flat_rewards, {}, FLAT),
    Variant("rloo", rloo_by_index, {}, BY_INDEX),
    Variant("rloo", rloo_of_the_scored),
    Variant("group_centred", centred_rows),
    Variant("group_centred", centred_flat, {}, FLAT),
    Variant("group_centred", centred_by_index, {}, BY_INDEX),
    Variant("group_centred", centred_without_the_unscored, {},
            {"derived": {"rewards": lambda c: c["reward"].where(c["mask"], torch.nan).flatten(),
                         "num_generations": size}}),
    Variant("group_normalised", normalised_flat,
            {"standard deviation": "unbiased, n - 1", "taken over": GROUP, "epsilon": "0.0001, built in"},
            FLAT),
    Variant("group_normalised", normalised_flat,
            {"standard deviation": "unbiased, n - 1", "taken over": BATCH},
            {**FLAT, "fixed": {"scale_rewards": "batch"}}),
    Variant("group_normalised", normalised_with_population_deviation,
            {"standard deviation": "biased, n", "epsilon": "1e-08, built in", "place of epsilon": OUTSIDE}),
    Variant("group_normalised", normalised_inside_the_root, {"place of epsilon": INSIDE}),
    Variant("group_normalised", normalised_where_it_varies, {"epsilon": "0, built in", "taken over": GROUP}),
    Variant("group_normalised", normalised_by_index, {"taken over": GROUP, "place of epsilon": OUTSIDE},
            BY_INDEX),
    Variant("group_normalised", normalised_over_the_batch,
            {"taken over": "the whole batch, after each group was centred", "epsilon": "1e-09, built in"}),
    Variant("kl_shaped_reward", shaped_by_scatter, {"reward position": "on the last token that counts"}),
    Variant("kl_shaped_reward", shaped_row_by_row, {"reward position": "on the last token that counts"}),
    Variant("kl_shaped_reward", shaped_without_a_mask, {"beta": "0.05, built in"}),
    Variant("kl_shaped_reward_from_logps", shaped_from_logprobs,
            {"reward position": AFTER, "estimator": "k1, the log ratio"},
            {"derived": {"sequence_lengths": last_index}, "fixed": {"kind": "k1"}}),
    Variant("kl_shaped_reward_from_logps", shaped_from_logprobs,
            {"reward position": AFTER,
             "estimator": f"k3; {NO_LEASH}"},
            {"derived": {"sequence_lengths": last_index}, "fixed": {"kind": "k3"}}),
    Variant("kl_shaped_reward_from_logps", shaped_in_the_mse_style,
            {"estimator": f"k2, half its square; {NO_LEASH}"}),
    Variant("kl_shaped_reward_from_logps", shaped_by_absolute_value,
            {"estimator": f"its absolute value; {NO_LEASH}",
             "beta": "0.2, built in"}),
    Variant("adaptive_kl", controlled),
    Variant("adaptive_kl", controlled_with_a_gain, {"horizon": "10, built in", "n_steps": "1, built in"}),
    Variant("adaptive_kl", controlled_at_six_nats, {"target": "6, built in", "horizon": "10000, built in"}),
    Variant("adaptive_kl", controlled_by_min_and_max),
]  # fmt: skip

# Wrong


def share(rewards: Tensor) -> Tensor:
    return rewards.abs().sum(1, keepdim=True)


def paid(score: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    return score[:, None] * (mask.flip(1).cumsum(1).flip(1) == 1) * mask


WRONG: list[tuple[str, Callable[..., Any]]] = [
    ("rloo", lambda rewards: rewards - rewards.roll(1, dims=1)),
    ("rloo", lambda rewards: rewards - rewards.min(1, keepdim=True).values),
    ("rloo", lambda rewards: rloo_of_rows(rewards.T).T),
    ("rloo", lambda rewards: rloo_of_rows(rewards).sort(dim=1).values),
    ("rloo", lambda rewards: rloo_of_rows(rewards.reshape(1, -1)).reshape(rewards.shape)),
    ("rloo", lambda rewards: rloo_of_rows(rewards).clamp(-1, 1)),
    ("rloo", lambda rewards: rewards - rewards.sum(1, keepdim=True) / (rewards.shape[1] - 1)),
    ("group_centred", lambda rewards: rewards - rewards.mean(0, keepdim=True)),
    ("group_centred", lambda rewards: rewards - rewards.mean()),
    ("group_centred", lambda rewards: rewards - rewards[:, :1]),
    ("group_centred", lambda rewards: centred_rows(rewards) / 2),
    ("group_centred", lambda rewards: centred_rows(rewards.argsort(1).argsort(1).to(rewards.dtype))),
    ("group_centred", lambda rewards: centred_rows(rewards).sign() * centred_rows(rewards).abs().sqrt()),
    ("group_normalised", lambda rewards: (rewards - rewards.mean()) / (rewards.std() + 1e-4)),
    ("group_normalised", lambda rewards: centred_rows(rewards) / (rewards.norm(dim=1, keepdim=True) + 1e-4)),
    ("group_normalised", lambda rewards: centred_rows(rewards) / (share(centred_rows(rewards)) + 1e-4)),
    ("group_normalised", lambda rewards: rewards.softmax(1) - 1 / rewards.shape[1]),
    ("group_normalised", lambda rewards: centred_rows(rewards) / (rewards.std(0, keepdim=True) + 1e-4)),
    ("group_normalised", lambda rewards: normalised_inside_the_root(rewards, 1e-4).abs()),
    ("group_normalised", lambda rewards: centred_rows(rewards) / rewards.std(1, keepdim=True)),
    ("kl_shaped_reward", lambda score, kl, mask, beta: paid(score, kl, mask).clamp(-1, 1) - beta * kl * mask),
    ("kl_shaped_reward", lambda score, kl, mask,
     beta: paid(score, kl, mask) - beta * (kl * mask).cumsum(1) * mask),
    ("kl_shaped_reward", lambda score, kl, mask, beta: paid(score, kl, mask) - beta * kl.roll(1, 1) * mask),
    ("kl_shaped_reward", lambda score, kl, mask,
     beta: (paid(score, kl, mask) - beta * kl * mask) / mask.sum()),
    ("kl_shaped_reward", lambda score, kl, mask, beta: paid(score.abs(), kl, mask) - beta * kl * mask),
    ("kl_shaped_reward", lambda score, kl, mask,
     beta: paid(score, kl, mask) - beta * kl * mask * ~mask.roll(-1, 1)),
    ("kl_shaped_reward_from_logps", lambda score, logp, ref_logp, mask, beta:
        paid(score, logp, mask) - beta * (logp.exp() - ref_logp.exp()) * mask),
    ("kl_shaped_reward_from_logps", lambda score, logp, ref_logp, mask, beta:
        paid(score, logp, mask) - beta * ref_logp.exp() * (ref_logp - logp) * mask),
    ("kl_shaped_reward_from_logps", lambda score, logp, ref_logp, mask, beta:
        paid(score, logp, mask) - beta * (logp - ref_logp).clamp(min=0) * mask),
    ("kl_shaped_reward_from_logps", lambda score, logp, ref_logp, mask, beta:
        paid(score, logp, mask) - beta * (logp - ref_logp).mean() * mask),
    ("kl_shaped_reward_from_logps", lambda score, logp, ref_logp, mask, beta:
        paid(score, logp, mask) - beta * (logp / ref_logp.clamp(max=-0.1)) * mask),
    ("kl_shaped_reward", lambda score, kl, mask, beta: paid(score, kl, mask) + kl.mul_(-beta) * mask),
    ("group_centred", lambda rewards: rewards.sub_(rewards.mean(1, keepdim=True))),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * (2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0)),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * (1 + 0.2 * (kl - target).sign() * n_steps / horizon)),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * (1 + (kl / target).clamp(min=1e-6).log().clamp(-0.2, 0.2) * n_steps / horizon)),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * (1 + (kl / target - 1).clamp(-0.5, 0.5) * n_steps / horizon)),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * ((kl / target - 1).clamp(-0.2, 0.2) * n_steps / horizon).exp()),
    ("adaptive_kl", lambda coefficient, kl, target, horizon, n_steps:
        coefficient * (1 + (kl / target - 1).square().clamp(max=0.2) * n_steps / horizon)),
]  # fmt: skip
