"""Wrong functions of policy and critic, weights, reductions and log-probs, beyond those in the zoo."""

import torch
from torch import Tensor

from tests.verify.policy_variants import Variant, mean_of


def trl_without_minimum(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, eps: float
) -> Tensor:
    ratio = torch.exp(logps - old_logps)
    inside = (ratio > 1 - eps) & (ratio < 1 + eps)
    return mean_of(-torch.where(inside, ratio, 1.0) * advantages.unsqueeze(1), mask)


def masked_outside(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio = (logp - old_logp).exp()
    return -torch.where((ratio - 1).abs() <= eps, ratio, 0.0) * adv * mask


def ppo_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio = (logp - old_logp).exp()
    return mean_of(torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)


def kept_in_the_graph(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio = (logp - old_logp - (logp - logp.detach())).exp()
    return mean_of(-torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)


def strange_dual_clip(
    logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, low: float, high: float, c: float = 3.0
) -> Tensor:
    ratio = (logp - old_logp).exp()
    plain = torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)
    return mean_of(-torch.max(plain, -c * adv.abs().mean()), mask)


def advantages_of_the_batch(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio, adv = (logp - old_logp).exp(), adv / adv.abs().max()
    return mean_of(-torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)


def group_before_mask(per_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    loss = -(per_token_logps - per_token_logps.mean().detach()).exp() * advantages.unsqueeze(1)
    return mean_of(loss, mask)


def discounted(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    decay = 0.99 ** torch.arange(logp.shape[-1])
    return mean_of(-logp * adv * decay, mask)


def gspo_of_medians(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    s = torch.where(mask, logp - old_logp, torch.nan).nanmedian(-1).values.exp()
    return -torch.min(s * adv, s.clamp(1 - eps, 1 + eps) * adv)


def gspo_by_root(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    s = (((logp - old_logp) * mask).sum(-1) / mask.sum(-1).sqrt()).exp()
    return -torch.min(s * adv, s.clamp(1 - eps, 1 + eps) * adv)


def cispo_by_sign(
    logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    ratio = (logp - old_logp).exp().detach()
    weight = torch.where(adv > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low))
    return mean_of(-weight * adv * logp, mask)


def tis_with_floor(logp: Tensor, rollout_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    return torch.where(mask, (logp - rollout_logp).exp().clamp(0.1, cap), 0.0).detach()


def tis_capped_on_average(logp: Tensor, rollout_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    ratio = torch.where(mask, (logp - rollout_logp).exp(), 0.0)
    return (ratio * (cap / ratio.max().clamp(min=1e-6)).clamp(max=1)).detach()


def icepop_absolute(logp: Tensor, rollout_logp: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    ratio = (logp - rollout_logp).exp()
    near = (ratio - 1).abs() <= high - 1
    return torch.where(mask & near, ratio, 0.0).detach()


def relative_value(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    return mean_of(0.5 * (value - ret) ** 2 / ret.abs().clamp(min=0.5), mask)


def rllib_value(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    return mean_of(0.5 * ((value - ret) ** 2).clamp(max=clip), mask)


def value_clipped_by_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    near = old_value + (value - old_value).clamp(-clip, clip)
    farther = (near - ret).abs() > (value - ret).abs()
    return 0.5 * torch.where(farther, (value - ret) ** 2, (near - ret) ** 2) * mask


def mean_of_the_longest(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask.sum(-1).argmax()][mask[mask.sum(-1).argmax()]].mean()


def trimmed(x: Tensor, mask: Tensor) -> Tensor:
    kept = x[mask]
    return (kept.sum() - kept.max()) / max(1, kept.numel() - 1)


def exponential(x: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=x.dtype)
    for column, counts in zip(x.unbind(-1), mask.unbind(-1), strict=True):
        total = torch.where(counts, 0.9 * total + column, total)
    return total


def running(losses: Tensor, mask: Tensor, micro_batch_size: int) -> Tensor:
    total = losses.new_zeros(())
    for n, (x, m) in enumerate(
        zip(losses.split(micro_batch_size), mask.split(micro_batch_size), strict=True)
    ):
        total = total + (mean_of(x, m) - total) / (n + 1)
    return total


def first_batch_decides(losses: Tensor, mask: Tensor, micro_batch_size: int) -> Tensor:
    count = mask[:micro_batch_size].sum() * (len(losses) / micro_batch_size)
    return (losses * mask).sum() / count


def shifted_labels(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.roll(-1, 1)
    kept = labels != -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return ((logp * kept).sum(-1) + 1e-3 * logits[:, -1, 0]) / kept.sum(-1)


def top_of_a_nucleus(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    floor = logits.topk(2, -1).values[..., -1:]
    kept = logits.where(logits >= floor, logits - 20)
    logp = kept.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(-1)


def log_of_mean(logits: Tensor, index: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return (p / p.sum(1, keepdim=True)).log().gather(-1, index[..., None])[..., 0]


WRONG = (
    Variant(trl_without_minimum, "clipped_surrogate"),
    Variant(masked_outside, "clipped_surrogate"),
    Variant(ppo_loss, "clipped_surrogate"),
    Variant(kept_in_the_graph, "clipped_surrogate"),
    Variant(strange_dual_clip, "clipped_surrogate",
            adapter={"clip_low": "low", "clip_high": "high", "dual_clip": "c"}),
    Variant(advantages_of_the_batch, "clipped_surrogate"),
    Variant(group_before_mask, "policy_gradient"),
    Variant(discounted, "policy_gradient"),
    Variant(gspo_of_medians, "gspo"),
    Variant(gspo_by_root, "gspo"),
    Variant(cispo_by_sign, "cispo", adapter={"clip_low": "low", "clip_high": "high"}),
    Variant(tis_with_floor, "truncated_importance_weight"),
    Variant(tis_capped_on_average, "truncated_importance_weight"),
    Variant(icepop_absolute, "masked_importance_weight"),
    Variant(relative_value, "value_loss"),
    Variant(rllib_value, "clipped_value_loss"),
    Variant(value_clipped_by_loss, "clipped_value_loss"),
    Variant(mean_of_the_longest, "token_mean"),
    Variant(trimmed, "token_mean"),
    Variant(exponential, "sequence_sum"),
    Variant(running, "gradient_accumulation"),
    Variant(first_batch_decides, "gradient_accumulation"),
    Variant(shifted_labels, "sequence_logp"),
    Variant(top_of_a_nucleus, "sequence_logp"),
    Variant(log_of_mean, "token_logp"),
)  # fmt: skip
