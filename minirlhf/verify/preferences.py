"""Preferences in an enumerable world: who prefers what, and where each preference loss ends, exactly.

Data are `comparisons` [X, N, N], C[x, i, j] the probability that a pair has i as chosen and j as rejected
response: whatever a preference loss does on average is a function of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.objectives.inputs import check_positive
from minirlhf.verify.optima import per_token_tilted, tilted
from minirlhf.verify.world import World, lengths, response_logp


def bradley_terry(w: World) -> Tensor:
    """P(y ≻ y') = σ(r - r'), who is preferred by a Bradley-Terry labeller: [X, N, N]."""
    return torch.sigmoid(w.gold[:, :, None] - w.gold[:, None, :])


def strict_order(w: World) -> Tensor:
    """1 where the first response has the higher reward, ½ where they are equal: [X, N, N]."""
    gap = w.gold[:, :, None] - w.gold[:, None, :]
    return (gap.sign() + 1) / 2


def win_rate(logits: Tensor, other_logits: Tensor, w: World, *, preference: Tensor) -> Tensor:
    """E_x πᵀ P π', how often a response of the first policy is preferred to one of the second: [].

    Args:
        preference: P [X, N, N], `bradley_terry` or `strict_order`; which one must be said with the number.
    """
    return win_rate_of_laws(response_logp(logits, w), response_logp(other_logits, w), preference=preference)


def win_rate_of_laws(law: Tensor, other: Tensor, *, preference: Tensor) -> Tensor:
    """`win_rate` of two laws, log-probs [X, N]: []."""
    return torch.einsum("xn,xnm,xm->x", law.exp(), preference, other.exp()).mean()


def uniform_pairs(w: World) -> Tensor:
    """The law of two responses drawn uniformly and independently: [X, N, N]."""
    count = w.gold.shape[1]
    return torch.full((*w.gold.shape, count), 1 / count**2, dtype=torch.float64)


def drawn_pairs(law: Tensor) -> Tensor:
    """The law of two independent draws from log-probs [X, N]: [X, N, N]."""
    return (law[:, :, None] + law[:, None, :]).exp()


def comparisons(pairs: Tensor, preference: Tensor) -> Tensor:
    """C[x, i, j], how often i is chosen over j, for pairs shown by a law and judged by P: [X, N, N].

    Args:
        pairs: [X, N, N] how often i and j are shown, in either order; any positive multiple.
        preference: [X, N, N] P(i ≻ j).
    """
    seen = (pairs + pairs.transpose(1, 2)) * preference
    return seen / seen.sum((1, 2), keepdim=True)


def dpo_population_loss(logits: Tensor, w: World, data: Tensor, *, beta: float) -> Tensor:
    """E_C -log σ(β h), h the margin of log π/π_ref, summed over tokens: []."""
    return _population(-F.logsigmoid(beta * _margins(_log_ratio(logits, w))), data)


def ipo_summed_population_loss(logits: Tensor, w: World, data: Tensor, *, tau: float) -> Tensor:
    """E_C (h - 1/(2τ))², h the margin of log π/π_ref, summed over tokens: []."""
    return _population((_margins(_log_ratio(logits, w)) - 1 / (2 * tau)).square(), data)


def ipo_population_loss(logits: Tensor, w: World, data: Tensor, *, tau: float) -> Tensor:
    """E_C (h - 1/(2τ))², h the margin of log π/π_ref, averaged over tokens: []."""
    return _population((_margins(_log_ratio(logits, w) / lengths(w)) - 1 / (2 * tau)).square(), data)


def bradley_terry_population_loss(reward: Tensor, data: Tensor) -> Tensor:
    """E_C -log σ(r⁺ - r⁻) of rewards [X, N]: []."""
    return _population(-F.logsigmoid(_margins(reward)), data)


def bradley_terry_fit(data: Tensor) -> Tensor:
    """The rewards [X, N] of the highest likelihood, with mean 0, by Newton's method.

    Raises:
        ValueError: there is none: some responses always win or always lose, or are never compared.
    """
    _check_connected(data)
    seen = data + data.transpose(1, 2)
    reward = torch.zeros_like(data[..., 0])
    for _ in range(100):
        chance = torch.sigmoid(_margins(reward))
        slope = (data - seen * chance).sum(2)
        curvature = seen * chance * (1 - chance)
        step = _laplacian_solve(curvature, slope)
        # Newton overshoots where the loss is flat; in a step of one log-odd it is nearly quadratic.
        reward = reward + step / step.abs().amax(1, keepdim=True).clamp(min=1)
        if float(step.abs().max()) < 1e-12:
            return reward
    raise ValueError("data must let every response win and lose; the likelihood of these has no maximum")


def dpo_optimum(w: World, data: Tensor, *, beta: float) -> Tensor:
    """π ∝ π_ref e^{r̂/β}, r̂ the Bradley-Terry fit of the data; π* where they are Bradley-Terry: [X, N]."""
    check_positive(beta=beta)
    return tilted(w, bradley_terry_fit(data) / beta)


def averaged_dpo_optimum(w: World, data: Tensor, *, beta: float) -> Tensor:
    """Where DPO ends whose log-probs were averaged over tokens, though they must be summed: [X, N]."""
    check_positive(beta=beta)
    return per_token_tilted(w, bradley_terry_fit(data) / beta)


def ipo_summed_optimum(w: World, data: Tensor, *, tau: float) -> Tensor:
    """The minimum of `ipo_summed_population_loss`, a weighted least-squares problem: log-probs [X, N].

    Where both responses are drawn from μ it is π ∝ π_ref e^{p(y ≻ μ)/τ}. Azar et al. 2023
    (arXiv:2310.12036), Theorem 1.
    """
    return tilted(w, _least_squares(data, tau))


def ipo_optimum(w: World, data: Tensor, *, tau: float) -> Tensor:
    """The minimum of `ipo_population_loss`, on averaged log-probs: log-probs [X, N].

    The same least-squares problem for log π/π_ref *per token*, u + c, where c normalises the law:
    π = π_ref e^{|y| (u + c)}.
    """
    return per_token_tilted(w, _least_squares(data, tau))


def _log_ratio(logits: Tensor, w: World) -> Tensor:
    return response_logp(logits, w) - response_logp(w.ref_logits, w)


def _margins(score: Tensor) -> Tensor:
    """[X, N] -> [X, N, N], first minus second."""
    return score[:, :, None] - score[:, None, :]


def _population(losses: Tensor, data: Tensor) -> Tensor:
    return (data * losses).sum((1, 2)).mean()


def _least_squares(data: Tensor, tau: float) -> Tensor:
    """The u [X, N] of mean 0 with the smallest E_C (u_i - u_j - 1/(2τ))²."""
    check_positive(tau=tau)
    _check_connected(data)
    return _laplacian_solve(data + data.transpose(1, 2), (data - data.transpose(1, 2)).sum(2) / (2 * tau))


def _laplacian_solve(weight: Tensor, right: Tensor) -> Tensor:
    """u [X, N] of mean 0 with Σ_j weight_ij (u_i - u_j) = right_i; not finite where the weights vanish."""
    # A constant may be added to u; adding the same number to each entry makes the mean 0 the one solution.
    scale = weight.sum((1, 2), keepdim=True) / weight.shape[-1] ** 2
    matrix = torch.diag_embed(weight.sum(2)) - weight + scale
    return torch.linalg.solve_ex(matrix, right)[0]


def _check_connected(data: Tensor) -> None:
    """Refuses data that compare some responses with none of the others, not even through third ones."""
    reached = ((data + data.transpose(1, 2)) > 0).double() + torch.eye(data.shape[-1])
    for _ in range(data.shape[-1].bit_length()):
        reached = (reached @ reached > 0).double()
    if not bool(reached.all()):
        raise ValueError("data must compare every response with every other, directly or through others")
