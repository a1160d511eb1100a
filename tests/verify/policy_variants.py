"""Right functions of policy and critic, weights, reductions and log-probs, as other libraries write them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Variant(NamedTuple):
    """fn as `kind`, with what `certify` is told of it; conventions: some of what it has to report."""

    fn: Any
    kind: str
    conventions: dict[str, str] = {}
    adapter: dict[str, Any] = {}


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / (mask.sum() + 1e-8)


# The clipped surrogate.
def cleanrl(newlogprob: Tensor, mb_logprobs: Tensor, mb_advantages: Tensor, clip_coef: float = 0.2) -> Tensor:
    ratio = (newlogprob - mb_logprobs).exp()
    unclipped = -mb_advantages * ratio
    return torch.max(unclipped, -mb_advantages * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)).mean()


def spinning_up(logp: Tensor, logp_old: Tensor, adv: Tensor, clip_ratio: float) -> Tensor:
    limit = torch.where(adv > 0, (1 + clip_ratio) * adv, (1 - clip_ratio) * adv)
    return -torch.min((logp - logp_old).exp() * adv, limit).mean()


def trl_grpo(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
) -> Tensor:
    coef_1 = torch.exp(per_token_logps - old_per_token_logps)
    coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    return ((loss * completion_mask).sum(-1) / completion_mask.sum(-1).clamp(min=1.0)).mean()


def either_advantage(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    adv = adv[:, None] if adv.ndim == 1 else adv
    ratio = (logp - old_logp).exp()
    return mean_of(-torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)


def verl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
) -> tuple[Tensor, Tensor]:
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    assert low is not None and high is not None
    ratio = torch.exp(torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0))
    plain, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high)
    upper = torch.maximum(plain, clipped)
    lower = torch.min(-advantages * clip_ratio_c, upper)
    return mean_of(torch.where(advantages < 0, lower, upper), response_mask), torch.zeros(())


class OpenRLHF(torch.nn.Module):
    """Widths and dual clip in the constructor."""

    def __init__(self, low: float, high: float, dual: float | None) -> None:
        super().__init__()
        self.low, self.high, self.dual = low, high, dual

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor
    ) -> Tensor:
        ratio = (log_probs - old_log_probs).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)
        if self.dual is not None:
            loss = torch.where(advantages < 0, torch.min(loss, -self.dual * advantages), loss)
        return (loss * action_mask).sum(-1).mean()


def objective(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio = (logp - old_logp).exp()
    return torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv) * mask


def of_a_ratio(ratio: Tensor, advantages: Tensor, loss_mask: Tensor, clip_eps: float) -> Tensor:
    gain = torch.min(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    return -(gain * loss_mask).sum() / loss_mask.shape[-1]


def in_single_precision(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (log_probs.float() - old_log_probs.float()).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.85, 1.15) * advantages)
    return mean_of(-gain, mask)


# REINFORCE.
def reinforce(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -mean_of(logprobs * advantages, mask)


def on_policy_grpo(per_token_logps: Tensor, advantages: Tensor, completion_mask: Tensor) -> Tensor:
    ratio = (per_token_logps - per_token_logps.detach()).exp()
    return -(ratio * advantages.unsqueeze(1) * completion_mask).sum(-1).mean()


def a2c(log_prob: Tensor, adv: Tensor) -> Tensor:
    return (log_prob * adv.detach()).mean()


# GSPO and CISPO.
def trl_gspo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2
) -> Tensor:
    weight = (((logps - old_logps) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1).exp()
    clipped = torch.clamp(weight, 1 - epsilon, 1 + epsilon)
    loss = -torch.min(weight * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1))
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def verl_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Tensor:
    length = response_mask.sum(-1).clamp(min=1)
    mean = ((log_prob - old_log_prob) * response_mask).sum(-1) / length
    ratio = torch.clamp(log_prob - log_prob.detach() + mean.detach().unsqueeze(-1), max=10.0).exp()
    clipped = torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return ((loss * response_mask).sum(-1) / length).mean()


def gspo_rows(logp: Tensor, old_logp: Tensor, adv: Tensor) -> Tensor:
    s = (logp - old_logp).mean(-1, keepdim=True).exp()
    return -torch.min(s * adv[:, None], s.clamp(1 - 3e-4, 1 + 4e-4) * adv[:, None])


def trl_cispo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon_high: float = 5.0
) -> Tensor:
    weight = torch.clamp(torch.exp(logps - old_logps), max=epsilon_high).detach()
    return mean_of(-weight * advantages.unsqueeze(1) * logps, mask)


def minimax(new_logprobs: Tensor, old_logprobs: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    weight = torch.clamp((new_logprobs - old_logprobs).exp().detach(), max=1.35)
    return torch.where(mask, adv * weight * new_logprobs, 0.0)


def cispo_one_eps(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    weight = (logp.detach() - old_logp).exp().clamp(1 - eps, 1 + eps)
    return -(weight * adv * logp * mask).sum(-1).mean()


# Importance weights.
def trl_tis(old_per_token_logps: Tensor, sampling_per_token_logps: Tensor, cap: float) -> Tensor:
    return torch.clamp(torch.exp(old_per_token_logps - sampling_per_token_logps).detach(), max=cap)


def verl_tis(
    old_log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor, threshold: float
) -> Tensor:
    gap = torch.clamp(old_log_prob - rollout_log_prob, -20, 20)
    return (gap.exp().clamp(max=threshold) * response_mask).detach()


def sequence_tis(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    whole = ((logp - old_logp) * mask).sum(-1, keepdim=True).exp()
    return (whole.clamp(max=3.5) * mask).detach()


def icepop(old_log_probs: Tensor, rollout_log_probs: Tensor, low: float, high: float) -> Tensor:
    weight = torch.exp(old_log_probs - rollout_log_probs).detach()
    return weight * ((weight >= low) & (weight <= high))


def sequence_masked(
    log_prob: Tensor, rollout_log_prob: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    gap = (log_prob - rollout_log_prob) * mask
    mean = (gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).exp()
    return (gap.exp() * ((mean >= low) & (mean <= high)) * mask).detach()


def rejection(old_log_prob: Tensor, rollout_log_prob: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(old_log_prob - rollout_log_prob)
    return (mask * ((ratio > 0.4) & (ratio < 2.5))).double().detach()


# The critic.
def cleanrl_value(newvalue: Tensor, b_returns: Tensor, b_values: Tensor, clip_coef: float) -> Tensor:
    clipped = b_values + torch.clamp(newvalue - b_values, -clip_coef, clip_coef)
    return 0.5 * torch.max((newvalue - b_returns) ** 2, (clipped - b_returns) ** 2).mean()


def trl_value(
    vpreds: Tensor, returns: Tensor, values: Tensor, mask: Tensor, cliprange_value: float
) -> Tensor:
    clipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
    return 0.5 * mean_of(torch.max(torch.square(vpreds - returns), torch.square(clipped - returns)), mask)


def built_in_value_clip(values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor) -> Tensor:
    clipped = old_values + (values - old_values).clamp(-0.4, 0.4)
    loss = torch.max((clipped - returns) ** 2, (values - returns) ** 2)
    return (loss * action_mask).sum(-1).mean()


def mean_squared(pred: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(pred, target)


def weighted_value(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * 0.5 * ((values - returns).pow(2) * mask).sum() / mask.sum()


# Reductions.
def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    if axis is None:
        return (values * mask).sum() / (mask.sum() + 1e-8)
    return (values * mask).sum(dim=axis) / (mask.sum(dim=axis) + 1e-8)


def selected(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask.bool()].mean()


def grpo_aggregation(loss_mat: Tensor, loss_mask: Tensor) -> Tensor:
    return ((loss_mat * loss_mask).sum(-1) / loss_mask.sum(-1)).mean()


def summed(loss_mat: Tensor, loss_mask: Tensor) -> Tensor:
    return (loss_mat * loss_mask).sum(-1).sum()


def by_chunks(losses: Tensor, mask: Tensor, steps: int) -> Tensor:
    parts = zip(losses.chunk(steps), mask.chunk(steps), strict=True)
    return torch.stack([((x * m).sum(-1) / m.sum(-1)).sum() for x, m in parts]).sum() / len(losses)


def by_rows(losses: Tensor, accumulation_steps: int) -> Tensor:
    parts = losses.split(-(-len(losses) // accumulation_steps))
    return torch.stack([part.mean() * len(part) / len(losses) for part in parts]).sum()


# Log-probs.
def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    labels, logits = labels[:, 1:].clone(), logits[:, :-1]
    kept = labels != -100
    labels[~kept] = 0
    logp = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return (logp * kept).sum(-1) / kept.sum(-1) if average_log_prob else (logp * kept).sum(-1)


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, labels[:, 1:].reshape(-1), ignore_index=-100)


def shorter(logits: Tensor, input_ids: Tensor) -> Tensor:
    read = logits[:, :-1].float() / 0.7
    return read.gather(-1, input_ids[:, 1:, None])[..., 0] - read.logsumexp(-1)


def with_temperature(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, temp: float) -> Tensor:
    logp = F.log_softmax(logits[:, :-1] / temp, -1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logp * attention_mask[:, 1:]).sum(-1)


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


_BAND = {"band": "the weight is cut at 1 - clip_low and at 1 + clip_high"}
_LABELS = {"tokens": "labels: -100 where the mask is False"}
_SEQUENCE = {"advantage": "one per sequence, [B]"}
RIGHT = (
    Variant(cleanrl, "clipped_surrogate", {"sign": "loss, to minimise"}),
    Variant(spinning_up, "clipped_surrogate"),
    Variant(trl_grpo, "clipped_surrogate", _SEQUENCE | {"aggregation": "mean over sequences of token means"}),
    Variant(either_advantage, "clipped_surrogate", {"aggregation": "token mean"}),
    Variant(verl, "clipped_surrogate", {"aggregation": "token mean"}),
    Variant(OpenRLHF(0.2, 0.27, None), "clipped_surrogate",
            {"clip_low": "0.2, built in", "clip_high": "0.27, built in",
             "aggregation": "mean over sequences of token sums"}),
    Variant(OpenRLHF(0.17, 0.33, 4.0), "clipped_surrogate",
            {"dual_clip": "4, built in", "clip_low": "0.17, built in"}),
    Variant(objective, "clipped_surrogate", {"sign": "objective, to maximise"}),
    Variant(of_a_ratio, "clipped_surrogate",
            {"aggregation": "token sum over the padded length (it depends on how far the batch is padded)"},
            {"derived": {"ratio": lambda c: (c["logp"] - c["old_logp"]).exp()}}),
    Variant(in_single_precision, "clipped_surrogate", {"precision": "single, whatever the input"}),
    Variant(reinforce, "policy_gradient", {"value": "-A log π", "aggregation": "token mean"}),
    Variant(on_policy_grpo, "policy_gradient",
            {"value": "-A π/sg(π), the gradient's value is -A", **_SEQUENCE}),
    Variant(a2c, "policy_gradient", {"sign": "objective, to maximise"}),
    Variant(trl_gspo, "gspo", {"aggregation": "mean over the batch"}),
    Variant(verl_gspo, "gspo", {"advantage": "one per token, the same along the sequence, [B, T]"}),
    Variant(gspo_rows, "gspo", {"layout": "[B, 1]", "clip_low": "0.0003, built in",
                                "clip_high": "0.0004, built in"}),
    Variant(trl_cispo, "cispo", {"band": "the weight is cut at clip_high itself only", **_SEQUENCE}),
    Variant(minimax, "cispo", {"clip_low": "1, built in", "clip_high": "0.35, built in",
                               "sign": "objective, to maximise"}),
    Variant(cispo_one_eps, "cispo", _BAND),
    Variant(trl_tis, "truncated_importance_weight", {"level": "the ratio of each token"}),
    Variant(verl_tis, "truncated_importance_weight"),
    Variant(sequence_tis, "truncated_importance_weight",
            {"level": "the ratio of the whole sequence, on each of its tokens", "cap": "3.5, built in"}),
    Variant(icepop, "masked_importance_weight",
            {"band": "it is each token's ratio that must be in the band"}),
    Variant(sequence_masked, "masked_importance_weight",
            {"band": "it is the geometric mean over the sequence that must be in the band"}),
    Variant(rejection, "masked_importance_weight",
            {"level": "what is kept weighs 1", "low": "0.4, built in", "high": "2.5, built in"}),
    Variant(cleanrl_value, "clipped_value_loss", {"factor": "half the squared error"}),
    Variant(trl_value, "clipped_value_loss", {"aggregation": "token mean"}),
    Variant(built_in_value_clip, "clipped_value_loss",
            {"clip": "0.4, built in", "factor": "the squared error"}),
    Variant(mean_squared, "value_loss", {"factor": "the squared error"}),
    Variant(weighted_value, "value_loss", {"factor": "a quarter of the squared error"}),
    Variant(masked_mean, "token_mean"),
    Variant(selected, "token_mean"),
    Variant(masked_mean, "sequence_mean", {"aggregation": "one value per element"}, {"fixed": {"axis": -1}}),
    Variant(grpo_aggregation, "sequence_mean", {"aggregation": "mean over the batch"}),
    Variant(summed, "sequence_sum", {"aggregation": "sum over the batch"}),
    Variant(by_chunks, "gradient_accumulation", {"equals": "the mean over sequences of token means"},
            {"micro_batch_size": "steps"}),
    Variant(by_rows, "gradient_accumulation", {"equals": "the token mean of the whole batch"}),
    Variant(get_batch_logps, "sequence_logp", _LABELS | {"aggregation": "token sum per sequence"}),
    Variant(get_batch_logps, "sequence_logp", _LABELS | {"aggregation": "token mean per sequence"},
            {"fixed": {"average_log_prob": True}}),
    Variant(supervised, "sequence_logp", _LABELS | {"factor": "negative log-likelihoods"}),
    Variant(shorter, "sequence_logp", {"temperature": "0.7, built in",
                                       "layout": "[B, T-1]: slot j is the log-prob of token j + 1"}),
    Variant(with_temperature, "sequence_logp", {"factor": "log-probs"}),
    Variant(selective_log_softmax, "token_logp"),
    Variant(token_cross_entropy, "token_logp", _LABELS | {"factor": "negative log-likelihoods"}),
)  # fmt: skip
