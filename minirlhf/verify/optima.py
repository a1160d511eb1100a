"""What is best in an enumerable world: the optima of E r - β KL(π‖π_ref) and its kin, exactly.

A law over responses is a tensor of log-probs [X, N]; `world.tabulate` makes logits of it.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.objectives.inputs import check_positive
from minirlhf.verify.world import World, lengths, objective, response_logp


class SoftOptimum(NamedTuple):
    """The best logits [X, K, V], and the value [X, K] of each prefix."""

    logits: Tensor
    value: Tensor


def soft_bellman(w: World, *, beta: float, gamma: float = 1.0) -> SoftOptimum:
    """The best policy by dynamic programming, from the last token back to the first.

        Q(s, v) = r at the end of a response, γ V(s v) before it
        V(s) = β log Σ_v π_ref(v|s) e^{Q(s, v)/β},   logits(s, v) = log π_ref(v|s) + Q(s, v)/β

    Ziebart 2010 (soft value iteration). At γ = 1 its law is `optimal_law`; below, each state is best for what
    *it* expects to be paid, discounted.
    """
    check_positive(beta=beta)
    words, base = w.config.vocab_size - 1, torch.log_softmax(w.ref_logits.double(), dim=-1)
    logits, value = torch.empty_like(base), torch.empty_like(base[..., 0])
    end, following = w.config.prefixes, w.gold[:, w.config.prefixes :].double()  # what a word leads to
    for depth in reversed(range(w.config.length)):
        here = slice(end - words**depth, end)
        q = torch.cat([w.gold[:, here, None].double(), following.unflatten(1, (-1, words))], dim=-1)
        logits[:, here] = base[:, here] + q / beta
        value[:, here] = beta * torch.logsumexp(logits[:, here], dim=-1)
        end, following = here.start, gamma * value[:, here]
    return SoftOptimum(logits, value)


def tilted(w: World, exponent: Tensor) -> Tensor:
    """The law π ∝ π_ref e^{exponent}, the exponent being [X, N]: log-probs [X, N]."""
    return torch.log_softmax(response_logp(w.ref_logits, w) + exponent, dim=1)


def optimal_law(w: World, *, beta: float) -> Tensor:
    """π* ∝ π_ref e^{r/β}, the maximum of E r - β KL(π‖π_ref): log-probs [X, N]."""
    check_positive(beta=beta)
    return tilted(w, w.gold / beta)


def best_objective(w: World, *, beta: float) -> Tensor:
    """J* = β E_x log Σ_y π_ref(y|x) e^{r/β}: []."""
    check_positive(beta=beta)
    return beta * torch.logsumexp(response_logp(w.ref_logits, w) + w.gold / beta, dim=1).mean()


def regret(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """J* - J(π), which is β KL(π‖π*): []."""
    return best_objective(w, beta=beta) - objective(logits, w, beta=beta)


def regret_fraction(logits: Tensor, w: World, *, beta: float) -> Tensor:
    """(J* - J(π)) / (J* - J(π_ref)): 0 at the optimum, 1 where nothing was gained: []."""
    return regret(logits, w, beta=beta) / regret(w.ref_logits, w, beta=beta)


def per_token_tilted(w: World, exponent: Tensor) -> Tensor:
    """The law π = π_ref e^{|y| (exponent + c)} with the c [X] that normalises it: log-probs [X, N]."""
    ref, size = response_logp(w.ref_logits, w), lengths(w)
    bound = exponent.abs().max(dim=1, keepdim=True).values  # at c = ∓ bound the mass is at most, at least 1
    c = falling_root(
        lambda c: -torch.logsumexp(ref + size * (exponent + c), dim=1, keepdim=True), low=-bound, high=bound
    )
    return torch.log_softmax(ref + size * (exponent + c), dim=1)


def point_mass(score: Tensor) -> Tensor:
    """The law that always gives a response of the highest score [X, N]; ties share it: log-probs [X, N]."""
    best = (score == score.max(dim=1, keepdim=True).values).double()
    return (best / best.sum(dim=1, keepdim=True)).log()


def forward_kl_optimum(w: World, *, beta: float) -> Tensor:
    """The maximum of E r - β KL(π_ref‖π), where k3 as a *loss* leads: log-probs [X, N].

        π = β π_ref / (λ - r),   λ = β + E_π r by normalisation

    Vojnovic & Yun 2025 (arXiv:2502.18548).
    """
    check_positive(beta=beta)
    ref = response_logp(w.ref_logits, w)
    highest = w.gold.max(dim=1, keepdim=True).values
    excess = falling_root(  # λ - max r: the mass falls from ∞ to at most 1 as it grows from 0 to β
        lambda excess: (ref.exp() * beta / (highest + excess - w.gold)).sum(1, keepdim=True) - 1,
        low=torch.zeros_like(highest),
        high=torch.full_like(highest, beta),
    )
    return torch.log_softmax(ref - (highest + excess - w.gold).log(), dim=1)


def frontier(divergence: Tensor, w: World) -> Tensor:
    """R*(K), the highest E r of any policy with KL(π‖π_ref) <= K: [...] nats -> [...] reward.

    The law at K is π_ref e^{t r}, for the t that has this KL; beyond the KL of the best responses alone
    R* is the highest reward.
    """
    if not bool((divergence >= 0).all()):
        raise ValueError("divergence must be at least 0 nats everywhere, got a negative number or NaN")
    ref = response_logp(w.ref_logits, w)

    def reward_and_kl(t: Tensor) -> tuple[Tensor, Tensor]:  # t [M] -> [M], [M]
        law = torch.log_softmax(ref + t[:, None, None] * w.gold, dim=-1)
        reward = (law.exp() * w.gold).sum(-1).mean(-1)
        return reward, (law.exp() * (law - ref)).sum(-1).mean(-1)

    wanted = divergence.double().flatten()
    t = falling_root(
        lambda t: wanted - reward_and_kl(t)[1], torch.zeros_like(wanted), torch.full_like(wanted, 1e6)
    )
    return reward_and_kl(t)[0].reshape(divergence.shape)


def best_of_n_law(law: Tensor, score: Tensor, *, n: int) -> Tensor:
    """The law of the best of n draws by score; ties are split in proportion to the law: log-probs [X, N].

        P(y) = [F(y)ⁿ - F⁻(y)ⁿ] p(y) / [F(y) - F⁻(y)],   F(y) = P(score <= score(y)), F⁻ without "="

    Beirami et al. 2024 (arXiv:2401.01879).
    """
    if not n >= 1:
        raise ValueError(f"n must be at least 1, got {n}")
    below = score[:, None, :] < score[:, :, None]
    equal = score[:, None, :] == score[:, :, None]
    log_below = torch.where(below, law[:, None, :], -torch.inf).logsumexp(-1)
    log_tied = torch.where(equal, law[:, None, :], -torch.inf).logsumexp(-1)
    log_upto = torch.logaddexp(log_below, log_tied)
    # F^n (1 - (F⁻/F)^n), in logs: the difference of two n-th powers would lose all digits.
    gain = torch.log1p(-torch.exp(n * (log_below - log_upto)))
    return torch.where(law > -torch.inf, n * log_upto + gain + law - log_tied, -torch.inf)


def expected_group_gradient(
    logits: Tensor, w: World, reward: Tensor, advantage: Callable[[Tensor], Tensor], *, size: int
) -> Tensor:
    """E over all groups of (1/G) Σ_i A_i ∂log π(y_i|x)/∂logits, by listing the N^G of them: [X, K, V].

    Args:
        reward: [X, N] of each response.
        advantage: rewards of groups [M, G] -> advantages [M, G].
        size: G; N^G groups must fit into memory.
    """
    logp = response_logp(logits.detach(), w)
    groups = torch.tensor(list(product(range(reward.shape[1]), repeat=size)))  # [N^G, G]
    weight = torch.zeros_like(logp)
    for x, (law, paid) in enumerate(zip(logp, reward.double(), strict=True)):
        share = law[groups].sum(1).exp()[:, None] * advantage(paid[groups]) / size
        weight[x].index_add_(0, groups.flatten(), share.flatten())
    free = logits.detach().double().requires_grad_()
    return torch.autograd.grad((weight * response_logp(free, w)).sum(1).mean(), free)[0]


def falling_root(falling: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a falling function crosses 0, element by element, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        above = falling(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
