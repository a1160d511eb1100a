"""Right and wrong functions about KL, entropy, sampling and best of n, in the styles of other libraries."""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as distributions_kl


class Subject(NamedTuple):
    """fn as `kind`, with what `certify` is told of it; conventions: what it has to report."""

    fn: Any
    kind: str
    adapter: dict[str, Any] = {}
    conventions: dict[str, str] = {}


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


# Estimates of the KL.
def trl_k3(per_token_logps: Tensor, ref_per_token_logps: Tensor) -> Tensor:
    gap = ref_per_token_logps - per_token_logps
    return torch.exp(gap) - gap - 1


def verl_low_variance(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    assert kl_penalty == "low_var_kl"
    kl = torch.clamp(ref_logprob - logprob, min=-20, max=20)
    return torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)


def verl_straight_through(logprob: Tensor, ref_logprob: Tensor, response_mask: Tensor) -> Tensor:
    k2 = 0.5 * (logprob - ref_logprob).square()
    gap = ref_logprob - logprob
    k3 = gap.exp() - gap - 1
    return token_mean(k2 - k2.detach() + k3.detach(), response_mask)


def openrlhf(log_probs: Tensor, log_probs_base: Tensor, action_mask: Tensor) -> Tensor:
    return (log_probs.float() - log_probs_base.float()).clamp(min=-10, max=10) * action_mask


def cleanrl_approx_kl(newlogprob: Tensor, oldlogprob: Tensor) -> Tensor:
    with torch.no_grad():
        logratio = newlogprob - oldlogprob
        return ((logratio.exp() - 1) - logratio).mean()


def nemo_k2(curr_logprobs: Tensor, reference_logprobs: Tensor, token_mask: Tensor) -> Tensor:
    per_row = (0.5 * (curr_logprobs - reference_logprobs) ** 2 * token_mask).sum(-1)
    return (per_row / token_mask.sum(-1)).mean()


def absolute(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    return ((log_probs - ref_log_probs).abs() * mask).sum(dim=-1)


def reversed_k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    s = logp - ref_logp
    return (s.exp() - s - 1) * mask


def mistaken_k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(ref_logp - logp)
    return ((ratio - 1) + torch.log(ratio)) * mask


def k1_of_probabilities(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return token_mean(logp.exp() - ref_logp.exp(), mask)


def k3_per_row_of_the_mean(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    s = ((ref_logp - logp) * mask).sum(-1) / mask.sum(-1)
    return (s.exp() - 1 - s).mean()


def k2_of_the_sum(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * ((logp - ref_logp) * mask).sum(-1).square()


def k3_to_second_order(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    s = logp - ref_logp
    return (s.square() / 2 - s**3 / 6) * mask


# The KL as a loss.
def grpo_kl(per_token_logps: Tensor, ref_per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    kl = trl_k3(per_token_logps, ref_per_token_logps)
    return 0.04 * ((kl * completion_mask).sum(-1) / completion_mask.sum(-1)).mean()


def verl_kl_loss(
    logprob: Tensor, ref_logprob: Tensor, response_mask: Tensor, kl_loss_coef: float = 0.001
) -> Tensor:
    return kl_loss_coef * token_mean(verl_low_variance(logprob, ref_logprob, "low_var_kl"), response_mask)


def reinforced_k1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return token_mean((logp - ref_logp).detach() * logp, mask)


def reinforced_sequence(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    s = ((logp - ref_logp) * mask).sum(-1)
    return beta * (s.detach() * (logp * mask).sum(-1)).mean()


def entropy_of_sequences(logp: Tensor, mask: Tensor) -> Tensor:
    total = (logp * mask).sum(-1)
    return total.detach() * total


def ratio_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return (torch.exp(log_probs - log_probs.detach()) * (log_probs - ref_log_probs)).mean()


def squared_error(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(log_probs, ref_log_probs)


def deepseek_ratio_k3(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    gap = ref_logp - logp
    return beta * (torch.exp(logp - logp.detach()) * (gap.exp() - gap - 1) * mask).sum()


def plain_k1(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    return beta * token_mean(logp - ref_logp, mask)


def subtracted_k2(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return -0.5 * token_mean((logp - ref_logp) ** 2, mask)


def unscaled_mse(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return F.mse_loss(log_probs, ref_log_probs)


def k2_with_dead_policy(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return token_mean(0.5 * (logp.detach() - ref_logp) ** 2, mask)


def smooth_l1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return (F.smooth_l1_loss(logp, ref_logp, reduction="none") * mask).sum()


def k3_of_a_detached_gap(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    gap = (ref_logp - logp).detach()
    return token_mean(gap.exp() - 1 + logp - ref_logp, mask)


# The KL as a reward.
def ppo_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float = 0.05) -> Tensor:
    return -kl_coef * (logprobs - ref_logprobs)


def sequence_penalty(log_probs: Tensor, ref_log_probs: Tensor, action_mask: Tensor) -> Tensor:
    return 0.02 * ((ref_log_probs - log_probs) * action_mask).sum(-1)


def held_penalty(log_probs: Tensor, log_probs_base: Tensor, action_mask: Tensor, kl_coef: float) -> Tensor:
    with torch.no_grad():
        return -kl_coef * (log_probs - log_probs_base).clamp(min=-10, max=10) * action_mask


def float_mask_penalty(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    return beta * (ref_logp - logp) * mask.float()


def k3_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float = 0.05) -> Tensor:
    return -kl_coef * trl_k3(logprobs, ref_logprobs)


def penalty_of_the_mean(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return -0.1 * ((logp - ref_logp) * mask).sum(-1) / mask.sum(-1)


def positive_penalty(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    return beta * (logp - ref_logp) * mask


def penalty_on_the_last_token(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return -(logp - ref_logp) * last


# The exact KL.
def kl_div_with_target(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(ref_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    return token_mean(kl, mask)


def of_distributions(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    return distributions_kl(Categorical(logits=policy_logits), Categorical(logits=reference_logits))


def of_log_probs(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1), 0.0)


def in_bits(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return (p * (p.log2() - q.log2())).sum(-1).mean()


def distillation_forward(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * mask


def kl_div_taken_literally(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(logits.log_softmax(-1), ref_logits.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    return kl * mask


def kl_div_over_everything(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(ref_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
    return kl.mean(-1) * mask


def kl_of_logits(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    return (logits.softmax(-1) * (logits - ref_logits)).sum(-1) * mask


def kl_of_the_first_tokens(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    p, s = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    return (p * s)[..., :3].sum(-1) * mask


# Entropy.
def verl_entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(p * logits, dim=-1)


def categorical_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return token_mean(Categorical(logits=logits).entropy(), mask)


def entropy_of_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1) * mask


def special_entropy(logits: Tensor, response_mask: Tensor) -> Tensor:
    values = torch.special.entr(logits.softmax(-1)).sum(-1)
    return ((values * response_mask).sum(-1) / response_mask.sum(-1)).mean()


def entropy_of_exponentials(logits: Tensor, mask: Tensor) -> Tensor:
    return -(logits.exp() * logits).sum(-1) * mask


def entropy_with_a_floor(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * (p + 1e-3).log()).sum(-1) * mask


def entropy_of_pairs(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1) * mask


def gini(logits: Tensor, mask: Tensor) -> Tensor:
    return (1 - logits.softmax(-1).square().sum(-1)) * mask


def entropy_bonus(logits: Tensor, mask: Tensor, ent_coef: float = 0.01) -> Tensor:
    return ent_coef * token_mean(Categorical(logits=logits).entropy(), mask)


def negative_entropy(logits: Tensor) -> Tensor:
    return -0.01 * Categorical(logits=logits).entropy().mean()


def entropy_loss_upside_down(logits: Tensor, mask: Tensor) -> Tensor:
    return token_mean(Categorical(logits=logits).entropy(), mask)


def entropy_loss_of_fixed_weights(logits: Tensor, mask: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return token_mean((logp.exp().detach() * logp).sum(-1), mask)


def reinforced_entropy(log_probs: Tensor, action_mask: Tensor, entropy_coef: float = 0.01) -> Tensor:
    return entropy_coef * token_mean(log_probs.detach() * log_probs, action_mask)


def ratio_entropy(logp: Tensor) -> Tensor:
    return (torch.exp(logp - logp.detach()) * logp).mean()


def half_square_entropy(logp: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * logp.square() * mask


def sampled_bonus(log_probs: Tensor, mask: Tensor, ent_coef: float = 0.01) -> Tensor:
    return ent_coef * token_mean(log_probs, mask)


def sampled_p_log_p(log_probs: Tensor, mask: Tensor) -> Tensor:
    return token_mean(log_probs.exp() * log_probs, mask)


def surprise(logprobs: Tensor, ent_coef: float = 0.01) -> Tensor:
    return -ent_coef * logprobs


def surprise_of_rows(log_probs: Tensor, action_mask: Tensor) -> Tensor:
    return -(log_probs * action_mask).sum(-1).detach()


def improbability(logp: Tensor, mask: Tensor) -> Tensor:
    return (1 - logp.exp()) * mask


# Sampling laws.
def huggingface(logits: Tensor, temperature: float = 1.0, top_k: int = 50, top_p: float = 1.0) -> Tensor:
    logits = logits / temperature
    if top_k > 0:
        least = torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]
        logits = logits.masked_fill(logits < least, -float("inf"))
    if top_p < 1.0:
        ordered, index = torch.sort(logits, descending=False)
        remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
        remove[..., -1:] = False
        logits = logits.masked_fill(remove.scatter(1, index, remove), -float("inf"))
    return logits


def huggingface_finite(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    filtered = huggingface(logits, temperature, top_k, top_p)
    return filtered.masked_fill(filtered == -float("inf"), -1e10)


def nanogpt(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    logits = logits / temperature
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        logits[logits < v[:, [-1]]] = -float("Inf")
    return F.softmax(logits, dim=-1)


def in_place_top_k(logits: Tensor, top_k: int) -> Tensor:
    logits[logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, [-1]]] = -float("inf")
    return logits


def vllm(logits: Tensor, temperature: float, min_p: float, k: int, p: float) -> Tensor:
    probs = (logits / temperature).softmax(-1)
    logits = (logits / temperature).masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -float("inf"))
    ordered, index = logits.sort(dim=-1, descending=False)
    ordered = ordered.masked_fill(ordered < ordered[:, [ordered.size(1) - k]], -float("inf"))
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[:, -1] = False
    return ordered.masked_fill(drop, -float("inf")).gather(-1, index.argsort(-1)).log_softmax(-1)


def llama_cpp(
    logits: Tensor, temp: float = 0.8, top_k: int = 40, top_p: float = 0.95, min_p: float = 0.05
) -> Tensor:
    logits = huggingface(logits, 1.0, top_k, top_p)
    p = logits.softmax(-1)
    return (logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -float("inf")) / temp).softmax(-1)


def joint(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    p = (logits / temperature).softmax(-1)
    ordered, index = p.sort(dim=-1, descending=True)
    keep = (ordered.cumsum(-1) - ordered < top_p) & (torch.arange(p.shape[-1]) < top_k)
    kept = torch.zeros_like(p).scatter(-1, index, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


def one_temperature(logits: Tensor) -> Tensor:
    return F.log_softmax(logits / 0.7, dim=-1)


def nucleus_only(logits: Tensor, p: float) -> Tensor:
    return huggingface(logits, 1.0, 0, p).log_softmax(-1)


def nucleus_without_the_crossing_token(logits: Tensor, top_p: float) -> Tensor:
    ordered, index = logits.sort(dim=-1, descending=True)
    drop = ordered.softmax(-1).cumsum(-1) > top_p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -float("inf")).log_softmax(-1)


def forgotten_scatter(logits: Tensor, top_p: float) -> Tensor:
    ordered, index = logits.sort(dim=-1, descending=True)
    drop = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) >= top_p
    return ordered.masked_fill(drop, -float("inf")).log_softmax(-1)


def filter_before_temperature_law(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    p = logits.softmax(-1) * (logits >= least)
    return p ** (1 / temperature)


def overflowing_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    e = torch.exp(logits / temperature)
    return e / e.sum(-1, keepdim=True)


def quantile_for_top_k(logits: Tensor, top_k: int) -> Tensor:
    least = logits.quantile(1 - top_k / logits.shape[-1], dim=-1, keepdim=True)
    return logits.masked_fill(logits < least, -float("inf")).log_softmax(-1)


def min_p_of_the_nucleus(logits: Tensor, min_p: float) -> Tensor:
    p = logits.softmax(-1)
    return logits.masked_fill(p <= min_p, -float("inf")).log_softmax(-1)


# Best of n.
def sorted_law(ref_logp: Tensor, rewards: Tensor, n: int) -> Tensor:
    order = rewards.argsort()
    power = ref_logp.exp()[order].cumsum(0) ** n
    mass = torch.cat([power[:1], power.diff()])
    return torch.zeros_like(mass).scatter(0, order, mass)


def best_of_four(logp: Tensor, score: Tensor) -> Tensor:
    p = logp.exp()
    at_most = torch.stack([p[score <= s].sum() for s in score])
    below = torch.stack([p[score < s].sum() for s in score])
    return (p * (at_most**4 - below**4) / (at_most - below)).log()


def enumerated_law(logp: Tensor, score: Tensor, n: int) -> Tensor:
    """By the geometric sum, not by a difference of powers."""
    p = logp.exp()
    at_most = (score[None, :] <= score[:, None]).to(p.dtype) @ p
    below = (score[None, :] < score[:, None]).to(p.dtype) @ p
    return p * sum(at_most**i * below ** (n - 1 - i) for i in range(n))


def tilted_law(logp: Tensor, score: Tensor, n: int) -> Tensor:
    return (logp + math.log(n) * score).softmax(0)


def best_of_n_by_rank(logp: Tensor, score: Tensor, n: int) -> Tensor:
    rank = score.argsort().argsort().to(logp.dtype) + 1
    size = len(score)
    return ((rank / size) ** n - ((rank - 1) / size) ** n).log()


def best_with_a_lucky_last(logp: Tensor, score: Tensor, n: int) -> Tensor:
    p = logp.exp()
    at_most = (score[None, :] <= score[:, None]).to(p.dtype) @ p
    return (p * at_most ** (n - 1)) / (p * at_most ** (n - 1)).sum()


def pass_at_k_style(rewards: Tensor, k: int) -> Tensor:
    ordered, size = rewards.sort(dim=-1).values, rewards.shape[-1]
    shares = [math.comb(i, k - 1) / math.comb(size, k) for i in range(k - 1, size)]
    return torch.stack([ordered[:, k - 1 + i] * share for i, share in enumerate(shares)]).sum(0)


def every_subset(score: Tensor, n: int) -> Tensor:
    subsets = list(itertools.combinations(range(score.shape[-1]), n))
    return torch.stack([score[:, list(s)].amax(-1) for s in subsets]).mean(0).mean()


def bootstrap_maximum(score: Tensor, n: int) -> Tensor:
    """The mean maximum of n draws with replacement."""
    size = score.shape[-1]
    reached = (torch.arange(size + 1, dtype=torch.float64) / size) ** n
    return (score.sort(dim=-1).values * reached.diff().to(score.dtype)).sum(-1)


def maxima_of_blocks(score: Tensor, n: int) -> Tensor:
    blocks = score.shape[-1] // n
    return score[:, : blocks * n].reshape(len(score), blocks, n).amax(-1).mean(-1)


def bound_as_a_tensor(n: int) -> Tensor:
    return torch.tensor(float(n), dtype=torch.float64).log() - 1 + 1 / n


def bound_in_bits(n: int) -> float:
    return math.log2(n) - (n - 1) / (n * math.log(2))


def bound_off_by_one(n: int) -> float:
    return math.log(n + 1) - n / (n + 1)


def harmonic_bound(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1)) - 1


_FORWARD = "that of KL(π_ref‖π), the other direction"
_REVERSE = "that of KL(π‖π_ref): ∂loss"

RIGHT = (
    Subject(trl_k3, "kl_estimator", {}, {"estimator": "k3 = e⁻ˢ", "clamp": "none"}),
    Subject(verl_low_variance, "kl_estimator", {"fixed": {"kl_penalty": "low_var_kl"}},
            {"estimator": "k3 = e⁻ˢ", "clamp": "the estimate is held within ±10"}),
    Subject(verl_straight_through, "kl_estimator", {},
            {"estimator": "k3 = e⁻ˢ", "aggregation": "token mean"}),
    Subject(openrlhf, "kl_estimator", {}, {"estimator": "k1", "precision": "single", "clamp": "the estimate "
                                           "is held"}),
    Subject(cleanrl_approx_kl, "kl_estimator", {"logp": "oldlogprob", "ref_logp": "newlogprob"},
            {"estimator": "k3 = e⁻ˢ"}),
    Subject(nemo_k2, "kl_estimator", {}, {"estimator": "k2", "aggregation": "mean over sequences of token "
                                          "means"}),
    Subject(absolute, "kl_estimator", {}, {"estimator": "|s|", "aggregation": "token sum per sequence"}),
    Subject(reversed_k3, "kl_estimator", {}, {"estimator": "k3 of the other direction"}),
    Subject(reversed_k3, "kl_estimator", {"logp": "ref_logp", "ref_logp": "logp"}, {"estimator": "k3 = e⁻ˢ"}),
    Subject(k2_of_the_sum, "kl_estimator", {}, {"estimator": "k2", "level": "log-probs are summed over the "
                                                "sequence"}),
    Subject(k2_of_the_sum, "kl_loss", {}, {"gradient": _REVERSE, "level": "log-probs are summed over the "
                                           "sequence"}),
    Subject(reinforced_sequence, "kl_loss", {}, {"level": "log-probs are summed over the sequence"}),
    Subject(entropy_of_sequences, "sampled_entropy_loss", {},
            {"level": "log-probs are summed over the sequence"}),
    Subject(grpo_kl, "kl_loss", {}, {"gradient": _FORWARD, "beta": "0.04, built in"}),
    Subject(verl_kl_loss, "kl_loss", {}, {"gradient": _FORWARD, "clamp": "the estimate is held within ±10"}),
    Subject(reinforced_k1, "kl_loss", {}, {"gradient": _REVERSE, "aggregation": "token mean"}),
    Subject(ratio_k1, "kl_loss", {}, {"gradient": "that of KL(π‖π_ref), with noise"}),
    Subject(squared_error, "kl_loss", {}, {"gradient": _REVERSE}),
    Subject(deepseek_ratio_k3, "kl_loss", {}, {"gradient": _REVERSE, "aggregation": "token sum"}),
    Subject(verl_straight_through, "kl_loss", {}, {"gradient": _REVERSE}),
    Subject(ppo_penalty, "kl_reward", {}, {"clamp": "none"}),
    Subject(sequence_penalty, "kl_reward", {}, {"beta": "0.02, built in", "aggregation": "token sum per "
                                                "sequence"}),
    Subject(held_penalty, "kl_reward", {}, {"clamp": "the estimate is held within ±10"}),
    Subject(float_mask_penalty, "kl_reward"),
    Subject(kl_div_with_target, "exact_kl", {}, {"aggregation": "token mean"}),
    Subject(of_distributions, "exact_kl", {}, {"factor": "nats"}),
    Subject(of_log_probs, "exact_kl"),
    Subject(in_bits, "exact_kl", {}, {"factor": "bits"}),
    Subject(distillation_forward, "exact_kl", {"logits": "teacher_logits", "ref_logits": "student_logits"}),
    Subject(verl_entropy, "entropy", {}, {"factor": "nats"}),
    Subject(categorical_entropy, "entropy", {}, {"aggregation": "token mean"}),
    Subject(entropy_of_log_probs, "entropy"),
    Subject(special_entropy, "entropy", {}, {"aggregation": "mean over sequences of token means"}),
    Subject(entropy_bonus, "entropy_loss", {}, {"sign": "objective, to maximise", "aggregation": "token "
                                                "mean"}),
    Subject(negative_entropy, "entropy_loss", {}, {"sign": "loss, to minimise", "beta": "0.01, built in"}),
    Subject(reinforced_entropy, "sampled_entropy_loss", {}, {"gradient": "∂loss/∂log π = log π, as"}),
    Subject(ratio_entropy, "sampled_entropy_loss", {}, {"gradient": "∂loss/∂log π = log π + 1"}),
    Subject(half_square_entropy, "sampled_entropy_loss", {}, {"gradient": "∂loss/∂log π = log π, as"}),
    Subject(surprise, "entropy_reward"),
    Subject(surprise_of_rows, "entropy_reward", {}, {"aggregation": "token sum per sequence"}),
    Subject(huggingface, "sampling_law", {}, {"output": "logits", "order": "temperature → top-k → top-p"}),
    Subject(huggingface_finite, "sampling_law", {}, {"output": "logits"}),
    Subject(nanogpt, "sampling_law", {}, {"output": "probabilities"}),
    Subject(in_place_top_k, "sampling_law", {}, {"output": "logits"}),
    Subject(vllm, "sampling_law", {}, {"output": "log-probs", "order": "temperature → min-p → top-k → "
                                       "top-p"}),
    Subject(llama_cpp, "sampling_law", {}, {"order": "top-k → top-p → min-p → temperature"}),
    Subject(joint, "sampling_law", {}, {"order": "temperature, then every filter on the whole law"}),
    Subject(one_temperature, "sampling_law", {}, {"temperature": "0.7, built in"}),
    Subject(nucleus_only, "sampling_law", {}, {"output": "log-probs"}),
    Subject(quantile_for_top_k, "sampling_law", {}, {"output": "log-probs"}),
    Subject(sorted_law, "best_of_n_law", {}, {"output": "probabilities"}),
    Subject(best_of_four, "best_of_n_law", {}, {"output": "log-probs", "n": "4, built in"}),
    Subject(enumerated_law, "best_of_n_law", {}, {"output": "probabilities"}),
    Subject(pass_at_k_style, "expected_maximum", {}, {"aggregation": "one value per element"}),
    Subject(every_subset, "expected_maximum", {}, {"aggregation": "mean over the batch"}),
    Subject(bound_as_a_tensor, "best_of_n_kl_bound", {}, {"factor": "nats"}),
    Subject(bound_in_bits, "best_of_n_kl_bound", {}, {"factor": "bits"}),
)  # fmt: skip

WRONG = (
    Subject(mistaken_k3, "kl_estimator"),
    Subject(k1_of_probabilities, "kl_estimator"),
    Subject(k3_per_row_of_the_mean, "kl_estimator"),
    Subject(k3_to_second_order, "kl_estimator"),
    Subject(cleanrl_approx_kl, "kl_loss", {"logp": "oldlogprob", "ref_logp": "newlogprob"}),
    Subject(plain_k1, "kl_loss"),
    Subject(subtracted_k2, "kl_loss"),
    Subject(unscaled_mse, "kl_loss"),
    Subject(k2_with_dead_policy, "kl_loss"),
    Subject(smooth_l1, "kl_loss"),
    Subject(k3_of_a_detached_gap, "kl_loss"),
    Subject(k3_penalty, "kl_reward"),
    Subject(penalty_of_the_mean, "kl_reward"),
    Subject(positive_penalty, "kl_reward"),
    Subject(penalty_on_the_last_token, "kl_reward"),
    Subject(distillation_forward, "exact_kl"),
    Subject(kl_div_taken_literally, "exact_kl"),
    Subject(kl_div_over_everything, "exact_kl"),
    Subject(kl_of_logits, "exact_kl"),
    Subject(kl_of_the_first_tokens, "exact_kl"),
    Subject(entropy_of_exponentials, "entropy"),
    Subject(entropy_with_a_floor, "entropy"),
    Subject(entropy_of_pairs, "entropy"),
    Subject(gini, "entropy"),
    Subject(negative_entropy, "entropy"),
    Subject(entropy_loss_upside_down, "entropy_loss"),
    Subject(entropy_loss_of_fixed_weights, "entropy_loss"),
    Subject(categorical_entropy, "entropy_loss"),
    Subject(sampled_bonus, "sampled_entropy_loss"),
    Subject(sampled_p_log_p, "sampled_entropy_loss"),
    Subject(improbability, "entropy_reward"),
    Subject(nucleus_without_the_crossing_token, "sampling_law"),
    Subject(forgotten_scatter, "sampling_law"),
    Subject(filter_before_temperature_law, "sampling_law"),
    Subject(overflowing_softmax, "sampling_law"),
    Subject(min_p_of_the_nucleus, "sampling_law"),
    Subject(tilted_law, "best_of_n_law"),
    Subject(best_of_n_by_rank, "best_of_n_law"),
    Subject(best_with_a_lucky_last, "best_of_n_law"),
    Subject(bootstrap_maximum, "expected_maximum"),
    Subject(maxima_of_blocks, "expected_maximum"),
    Subject(bound_off_by_one, "best_of_n_kl_bound"),
    Subject(harmonic_bound, "best_of_n_kl_bound"),
)
