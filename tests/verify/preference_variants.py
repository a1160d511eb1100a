"""Preference losses as other libraries write them: right ones, and wrong ones that no zoo lists.

`RIGHT` holds (kind, function, adapter of certify, conventions that the report has to name); `WRONG` (kind,
function).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Variant(NamedTuple):
    """One right function, how it is pointed at, and what certify has to find out about it."""

    kind: str
    fn: Callable[..., Any]
    conventions: dict[str, str] = {}
    adapter: dict[str, Any] = {}


def margin(w: Tensor, loser: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    return (w - ref_w) - (loser - ref_l)


# DPO


def dpo_of_trl(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = reference_chosen_logps - reference_rejected_logps
    logits = pi_logratios - (0 if reference_free else ref_logratios)
    losses = (
        -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing
    )
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def dpo_as_cross_entropy(
    logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor, beta: float
) -> Tensor:
    logits = beta * margin(logp_w, logp_l, ref_logp_w.detach(), ref_logp_l.detach())
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def dpo_as_softmax(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    rewards = torch.stack([beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)])
    return -rewards.log_softmax(dim=0)[0].sum()


def dpo_with_its_own_beta(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    return F.softplus(-0.07 * margin(pi_w, pi_l, ref_w, ref_l), threshold=50).mean()


def dpo_in_bits(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * margin(pi_w, pi_l, ref_w, ref_l)) / math.log(2)


def dpo_in_single_precision(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * margin(pi_w.float(), pi_l.float(), ref_w.float(), ref_l.float())).mean()


def dpo_of_arrays(a: Tensor, b: Tensor, c: Tensor, d: Tensor, /, beta: float) -> dict[str, Tensor]:
    return {"loss": torch.logaddexp(torch.zeros_like(a), -beta * margin(a, b, c, d)).mean()}


class DPOModule(torch.nn.Module):
    """As torchtune and OpenRLHF have it."""

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logits = margin(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        )
        return -F.logsigmoid(self.beta * logits).mean(), self.beta * logits.detach()


# Flipped labels


def cdpo_as_cross_entropy(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float, epsilon: float
) -> Tensor:
    logits = beta * margin(pi_w, pi_l, ref_w, ref_l)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 1 - epsilon), reduction="none")


def cdpo_with_its_own_numbers(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    logits = 0.15 * margin(pi_w, pi_l, ref_w, ref_l)
    return (F.softplus(-logits) + 0.12 * logits).mean()


def rdpo_of_trl(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    logits = margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    clean = -F.logsigmoid(beta * logits) * (1 - label_smoothing)
    return ((clean + F.logsigmoid(-beta * logits) * label_smoothing) / (1 - 2 * label_smoothing)).mean()


def rdpo_with_its_own_numbers(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    logits = 0.25 * margin(pi_w, pi_l, ref_w, ref_l)
    return F.softplus(-logits) - 0.2 / 0.6 * logits + 0 * pi_w


# Hinge and IPO


def hinge_by_clamp(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    return (1 - beta * margin(pi_w, pi_l, ref_w, ref_l)).clamp(min=0).mean()


def hinge_by_max(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    loss = 1 - 0.3 * margin(pi_w, pi_l, ref_w, ref_l)
    return torch.max(loss, torch.zeros_like(loss)).sum()


def ipo_of_averages(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    logits = margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (logits - 1 / (2 * beta)) ** 2


def ipo_with_lengths(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor, beta: float
) -> Tensor:
    h = pi_w / len_w - pi_l / len_l - ref_w / len_w + ref_l / len_l
    return F.mse_loss(h, torch.full_like(h, 0.5 / beta))


def ipo_without_averaging(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor, tau: float
) -> Tensor:
    return 0.5 * (margin(pi_w, pi_l, ref_w, ref_l) - 1 / (2 * tau)).square().mean()


def ipo_with_its_own_tau(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    return (margin(pi_w, pi_l, ref_w, ref_l) - 1 / (2 * 0.35)).pow(2)


# Without a reference


def simpo_of_its_authors(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, beta: float, gamma_beta_ratio: float
) -> Tensor:
    logits = policy_chosen_logps - policy_rejected_logps - gamma_beta_ratio
    return -F.logsigmoid(beta * logits)


def simpo_of_trl(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, beta: float, simpo_gamma: float
) -> Tensor:
    logits = policy_chosen_logps - policy_rejected_logps - simpo_gamma / beta
    return -F.logsigmoid(beta * logits).mean()


def simpo_with_lengths(
    logp_w: Tensor, logp_l: Tensor, length_w: Tensor, length_l: Tensor, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    w, loser = beta * logp_w / length_w.clamp(min=1), beta * logp_l / length_l.clamp(min=1)
    return torch.logaddexp(loser + gamma, w).sub(w).sum()


def simpo_with_its_own_numbers(pi_w: Tensor, pi_l: Tensor) -> Tensor:
    return F.softplus(1.3 - 2.2 * (pi_w - pi_l), threshold=50).mean()


def log_odds_ratio(w: Tensor, loser: Tensor) -> Tensor:
    return (w - loser) - (torch.log1p(-torch.exp(w)) - torch.log1p(-torch.exp(loser)))


def orpo_of_trl(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    ratio = F.logsigmoid(log_odds_ratio(policy_chosen_logps, policy_rejected_logps))
    return 0.1 * ratio, ratio.mean()


def orpo_with_lengths(
    chosen_logp: Tensor, rejected_logp: Tensor, chosen_len: Tensor, rejected_len: Tensor, lam: float
) -> Tensor:
    w = chosen_logp / chosen_len
    return (-w - lam * F.logsigmoid(log_odds_ratio(w, rejected_logp / rejected_len))).mean()


def orpo_as_cross_entropy(pi_w: Tensor, pi_l: Tensor, weight: float) -> Tensor:
    odds = log_odds_ratio(pi_w, pi_l)
    return -pi_w + weight * F.binary_cross_entropy_with_logits(odds, torch.ones_like(odds), reduction="none")


# Unpaired


def kto_of_trl(logp: Tensor, ref_logp: Tensor, label: Tensor, kl: Tensor, beta: float = 0.1) -> Tensor:
    chosen = 1 - torch.sigmoid(beta * (logp[label] - ref_logp[label] - kl.detach()))
    rejected = 1 - torch.sigmoid(beta * (kl.detach() - (logp[~label] - ref_logp[~label])))
    return torch.cat([chosen, rejected]).mean()


def kto_with_signs(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    z0: Tensor,
    beta: float,
    w_d: float = 1,
    w_u: float = 1,
) -> Tensor:
    sign, weight = labels.double() * 2 - 1, torch.where(labels, float(w_d), float(w_u))
    with torch.no_grad():
        point = z0.clamp(min=0)
    return weight * (1 - torch.sigmoid(sign * beta * (policy_logps - reference_logps - point)))


def kto_with_its_own_numbers(logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
    gain = 0.13 * (logp - ref_logp - kl.item())
    return torch.where(desirable, torch.sigmoid(-gain), 1.33 * torch.sigmoid(gain)).sum()


def point_of_trl(policy_KL_logps: Tensor, reference_KL_logps: Tensor) -> Tensor:
    return (policy_KL_logps - reference_KL_logps).mean().detach().clamp(min=0)


@torch.no_grad()
def point_by_relu(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return torch.relu(logps.mean() - ref_logps.mean())


# Rewards


def implicit_reward_detached(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return 0.3 * (policy_logps.detach() - reference_logps.detach())


def reward_loss_of_openrlhf(
    chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None
) -> Tensor:
    gap = chosen_reward - reject_reward
    return -F.logsigmoid(gap if margin is None else gap - margin).mean()


def reward_loss_as_softmax(rewards_chosen: Tensor, rewards_rejected: Tensor) -> Tensor:
    return F.cross_entropy(torch.stack([rewards_chosen, rewards_rejected], dim=1),
                           torch.zeros(len(rewards_chosen), dtype=torch.int64))  # fmt: skip


def reward_loss_smoothed(
    r_w: Tensor, r_l: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    logits = r_w - r_l - (0 if margin is None else margin)
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


def reward_loss_with_its_own_smoothing(chosen: Tensor, rejected: Tensor) -> Tensor:
    return (F.softplus(rejected - chosen, threshold=50) + 0.07 * (chosen - rejected)).sum()


def ranking_by_logcumsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    there = scores.masked_fill(mask == 0, float("-inf"))
    left = there.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - scores).masked_fill(mask == 0, 0.0).sum(-1).mean()


def ranking_by_log_softmax(rewards: Tensor) -> Tensor:
    stages = [rewards[:, k:].log_softmax(dim=1)[:, 0] for k in range(rewards.shape[1])]
    return -torch.stack(stages).sum(dim=0)


def ranking_by_loop(reward: Tensor, valid: Tensor) -> Tensor:
    total = reward.new_zeros(())
    for items, there in zip(reward, valid, strict=True):
        kept = items[there]
        for k in range(len(kept) - 1):
            total = total - kept[k:].log_softmax(0)[0]
    return total


AVERAGED = "averaged per token (a subject without lengths: of what it is given)"
SUMMED = "summed over the response: the lengths are not used"
ORDER = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "beta")
MEAN, SUM, EACH = "mean over the batch", "sum over the batch", "one value per element"
RIGHT = (
    Variant("dpo", dpo_of_trl, {"aggregation": EACH, "factor": "nats"}),
    Variant("dpo", dpo_as_cross_entropy, {"aggregation": MEAN}),
    Variant("dpo", dpo_as_softmax, {"aggregation": SUM}),
    Variant("dpo", dpo_with_its_own_beta, {"aggregation": MEAN, "beta": "0.07, built in"}),
    Variant("dpo", dpo_in_bits, {"factor": "bits (logarithms to base 2)"}),
    Variant("dpo", dpo_in_single_precision, {"precision": "single, whatever the input"}),
    Variant("dpo", dpo_of_arrays, {"aggregation": MEAN}, {"order": ORDER, "output": "loss"}),
    Variant("dpo", DPOModule(0.2).forward, {"aggregation": MEAN, "beta": "0.2, built in"}),
    Variant("conservative_dpo", dpo_of_trl, {"aggregation": EACH}),
    Variant("conservative_dpo", cdpo_as_cross_entropy, {"aggregation": EACH}),
    Variant("conservative_dpo", cdpo_with_its_own_numbers, {"beta": "0.15, built in",
                                                            "label_smoothing": "0.12, built in"}),
    Variant("conservative_dpo", cdpo_as_cross_entropy, {"label_smoothing": "0.3, built in"},
            {"fixed": {"epsilon": 0.3}}),
    Variant("robust_dpo", rdpo_of_trl, {"aggregation": MEAN}),
    Variant("robust_dpo", rdpo_with_its_own_numbers, {"beta": "0.25, built in",
                                                      "label_smoothing": "0.2, built in"}),
    Variant("hinge", hinge_by_clamp, {"aggregation": MEAN}),
    Variant("hinge", hinge_by_max, {"aggregation": SUM, "beta": "0.3, built in"}),
    Variant("ipo", ipo_of_averages, {"normalisation": AVERAGED}),
    Variant("ipo", ipo_with_lengths, {"normalisation": AVERAGED, "aggregation": MEAN}),
    Variant("ipo", ipo_without_averaging, {"normalisation": SUMMED, "factor": "half the squared error"}),
    Variant("ipo_summed", ipo_of_averages, {"factor": "squared error"}),
    Variant("ipo_summed", ipo_with_its_own_tau, {"tau": "0.35, built in"}),
    Variant("simpo", simpo_of_its_authors, {"gamma": "in nats per token, γ/β of the paper: β (ℓ⁺ - ℓ⁻ - γ)"}),
    Variant("simpo", simpo_of_trl, {"gamma": "in reward units: β (ℓ⁺ - ℓ⁻) - γ"}),
    Variant("simpo", simpo_with_lengths, {"aggregation": SUM}),
    Variant("simpo", simpo_with_its_own_numbers, {"beta": "2.2, built in", "gamma": "1.3, built in"}),
    Variant("orpo", orpo_of_trl, {"likelihood": "the odds ratio alone: -ℓ⁺ is added by the caller",
                                  "weight": "0.1, built in"}, {"output": lambda returned: -returned[0]}),
    Variant("orpo", orpo_with_lengths, {"likelihood": "the loss holds -ℓ⁺", "aggregation": MEAN}),
    Variant("orpo", orpo_as_cross_entropy, {"likelihood": "the loss holds -ℓ⁺"}),
    Variant("kto", kto_of_trl, {"aggregation": MEAN}),
    Variant("kto", kto_with_signs, {"aggregation": EACH}),
    Variant("kto", kto_with_its_own_numbers, {"beta": "0.13, built in",
                                              "undesirable_weight": "1.33, built in"}),
    Variant("kto_reference_point", point_of_trl),
    Variant("kto_reference_point", point_by_relu),
    Variant("implicit_reward", implicit_reward_detached, {"beta": "0.3, built in"}),
    Variant("bradley_terry", reward_loss_of_openrlhf, {"aggregation": MEAN}),
    Variant("bradley_terry", reward_loss_as_softmax, {"aggregation": MEAN}),
    Variant("bradley_terry", reward_loss_smoothed,
            {"smoothed margin": "the margin flips with the label: ε on -log σ(-(g - m))"}),
    Variant("bradley_terry", reward_loss_with_its_own_smoothing, {"label_smoothing": "0.07, built in"}),
    Variant("plackett_luce", ranking_by_logcumsumexp, {"aggregation": MEAN}),
    Variant("plackett_luce", ranking_by_log_softmax, {"aggregation": EACH}),
    Variant("plackett_luce", ranking_by_loop, {"aggregation": SUM}),
)  # fmt: skip


# Wrong, in ways that the zoo does not list


def dpo_of_averages(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * margin(pi_w, pi_l, ref_w, ref_l) / 2).mean()


def dpo_centred(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    h = margin(pi_w, pi_l, ref_w, ref_l)
    return -F.logsigmoid(beta * (h - h.detach().mean()))


def dpo_with_a_clamped_sigmoid(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float
) -> Tensor:
    return -(torch.sigmoid(beta * margin(pi_w, pi_l, ref_w, ref_l)) + 1e-6).log().mean()


def dpo_weighted_by_confidence(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float
) -> Tensor:
    losses = -F.logsigmoid(beta * margin(pi_w, pi_l, ref_w, ref_l))
    return losses * (losses > 0.1)


def dpo_that_writes_to_its_input(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float
) -> Tensor:
    loss = -F.logsigmoid(beta * margin(pi_w, pi_l, ref_w, ref_l))
    ref_w.sub_(ref_l)
    return loss


def dpo_with_a_gradient_of_its_own(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float
) -> Tensor:
    h = margin(pi_w, pi_l, ref_w, ref_l)
    return -F.logsigmoid(beta * h).detach() + (h.detach() - h) * beta


def dpo_with_dropout(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * F.dropout(margin(pi_w, pi_l, ref_w, ref_l), 0.1))


def cdpo_of_smoothed_margins(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    h = margin(pi_w, pi_l, ref_w, ref_l)
    return -F.logsigmoid(beta * h * (1 - label_smoothing) - beta * h * label_smoothing)


def rdpo_divided_inside(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    h = beta * margin(pi_w, pi_l, ref_w, ref_l) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)


def hinge_on_rewards_of_one_side(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float
) -> Tensor:
    return torch.relu(1 - beta * (pi_w - ref_w)) + torch.relu(1 + beta * (pi_l - ref_l))


def ipo_with_total_length(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor, tau: float
) -> Tensor:
    return (2 * margin(pi_w, pi_l, ref_w, ref_l) / (len_w + len_l) - 0.5 / tau) ** 2


def ipo_with_a_huber_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, tau: float) -> Tensor:
    h = margin(pi_w, pi_l, ref_w, ref_l)
    return 2 * F.smooth_l1_loss(h, torch.full_like(h, 0.5 / tau), beta=8.0, reduction="none") * 8


def simpo_with_a_reference(
    logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, beta: float, gamma: float
) -> Tensor:
    return -F.logsigmoid(beta * (logp_w - logp_l) / ((len_w + len_l) / 2) - gamma).mean()


def simpo_with_a_relative_margin(pi_w: Tensor, pi_l: Tensor, beta: float, gamma: float) -> Tensor:
    return -F.logsigmoid(beta * (pi_w - (1 + gamma) * pi_l))


def orpo_of_ratio_of_probabilities(pi_w: Tensor, pi_l: Tensor, weight: float) -> Tensor:
    return -pi_w + weight * F.softplus(pi_l - pi_w)


def orpo_with_the_paper_s_sign_lost(pi_w: Tensor, pi_l: Tensor, weight: float) -> Tensor:
    return -(pi_w + weight * F.logsigmoid(-log_odds_ratio(pi_w, pi_l)))


def kto_of_separate_means(logp: Tensor, ref_logp: Tensor, label: Tensor, kl: Tensor, beta: float) -> Tensor:
    gain = beta * (logp - ref_logp - kl.detach())
    return (1 - gain.sigmoid()[label]).mean() + gain.sigmoid()[~label].mean()


def kto_with_unclamped_own_point(
    logp: Tensor, ref_logp: Tensor, label: Tensor, kl: Tensor, beta: float
) -> Tensor:
    s = logp - ref_logp
    gain = torch.where(label, s - kl.detach(), s.mean().detach() - s)
    return 1 - torch.sigmoid(beta * gain)


def point_of_the_median(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return (logp - ref_logp).median().clamp(min=0).detach()


def reward_loss_of_normalised_rewards(chosen: Tensor, rejected: Tensor) -> Tensor:
    centre = torch.cat([chosen, rejected])
    return -F.logsigmoid((chosen - rejected) / (centre.std() + 1e-6)).mean()


def reward_loss_across_the_batch(chosen: Tensor, rejected: Tensor) -> Tensor:
    return F.softplus(rejected[None, :] - chosen[:, None]).mean()


def reward_loss_that_ignores_ties(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.where(chosen == rejected, 0.0, F.softplus(rejected - chosen, threshold=50))


def ranking_with_positions_discounted(reward: Tensor, mask: Tensor) -> Tensor:
    there = reward.masked_fill(~mask, -1e30)
    left = there.flip(-1).logcumsumexp(-1).flip(-1)
    discount = 1 / torch.arange(2, reward.shape[1] + 2).double().log2()
    return ((left - there).masked_fill(~mask, 0.0) * discount).sum(-1)


def ranking_by_target_distribution(reward: Tensor, mask: Tensor) -> Tensor:
    there = reward.masked_fill(~mask, -1e30)
    target = torch.softmax(
        -torch.arange(reward.shape[1]).double().expand_as(reward).masked_fill(~mask, 1e30), -1
    )
    return -(target * there.log_softmax(-1)).masked_fill(~mask, 0.0).sum(-1)


WRONG = (
    ("dpo", dpo_of_averages),
    ("dpo", dpo_centred),
    ("dpo", dpo_with_a_clamped_sigmoid),
    ("dpo", dpo_weighted_by_confidence),
    ("dpo", dpo_that_writes_to_its_input),
    ("dpo", dpo_with_a_gradient_of_its_own),
    ("dpo", dpo_with_dropout),
    ("conservative_dpo", cdpo_of_smoothed_margins),
    ("robust_dpo", rdpo_divided_inside),
    ("hinge", hinge_on_rewards_of_one_side),
    ("ipo", ipo_with_total_length),
    ("ipo_summed", ipo_with_a_huber_loss),
    ("simpo", simpo_with_a_reference),
    ("simpo", simpo_with_a_relative_margin),
    ("orpo", orpo_of_ratio_of_probabilities),
    ("orpo", orpo_with_the_paper_s_sign_lost),
    ("kto", kto_of_separate_means),
    ("kto", kto_with_unclamped_own_point),
    ("kto_reference_point", point_of_the_median),
    ("bradley_terry", reward_loss_of_normalised_rewards),
    ("bradley_terry", reward_loss_across_the_batch),
    ("bradley_terry", reward_loss_that_ignores_ties),
    ("plackett_luce", ranking_with_positions_discounted),
    ("plackett_luce", ranking_by_target_distribution),
)
