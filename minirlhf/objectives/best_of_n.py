"""Best of n: the law of the best of n independent draws, how far it is from the policy, what it is worth."""

import math

import torch
from torch import Tensor

from minirlhf.objectives.inputs import check_floating, check_same_shape, widen


def best_of_n_law(logp: Tensor, score: Tensor, *, n: int) -> Tensor:
    """The law of the response with the highest score among n independent draws from a law on N responses.

        p_n(y) = [F(y)ⁿ - F⁻(y)ⁿ] · p(y) / [F(y) - F⁻(y)]
        F(y) = Σ p(y') over scores at most that of y,   F⁻(y) = Σ p(y') over lower scores

    Among the best of the draws one is taken at random, so equal scores share in proportion to p. Beirami et
    al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy", section 3 (arXiv:2401.01879). It
    depends on the scores only through their order.

    Args:
        logp: [..., N] log-probs of the N responses in nats, normalised here; -inf where one is impossible.
        score: [..., N] the score of each, finite.
        n: how many draws, at least 1; 1 is the law itself.

    Returns:
        [..., N] log-probs in nats, normalised, -inf where logp is; exact also where a probability is too
        small to be represented. Takes memory N².

    Raises:
        ValueError: the shapes differ or have no axis, a tensor is not floating point, or n is not an integer
            >= 1.

    Gradient: that of the law with respect to logp; 0 with respect to score.

    >>> best_of_n_law(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.0, 1.0, 2.0]), n=2).exp()
    tensor([0.2500, 0.3125, 0.4375])
    """
    _check_draws(n)
    check_floating(logp=logp, score=score)
    check_same_shape(logp=logp, score=score)
    if logp.ndim == 0:
        raise ValueError("logp must have an axis of responses, got shape []")
    p = torch.log_softmax(widen(logp), dim=-1)
    possible = p > -torch.inf
    ours, theirs = score[..., :, None], score[..., None, :]
    tied = _log_sum(p, possible, theirs == ours)
    reached = _log_sum(p, possible, theirs <= ours)  # log F
    # Times n, the rounding of a log F near 0 would grow: there it is taken from the mass above.
    above = torch.where(theirs > ours, p.exp()[..., None, :], 0.0).sum(dim=-1)
    likely = above < 0.5
    log_f = torch.where(likely, torch.log1p(-torch.where(likely, above, 0.0)), reached)
    return p + n * log_f + _log_share_of_draws(tied - reached, n) - tied


def best_of_n_kl_bound(n: int) -> float:
    """An upper bound on the KL of best of n from the policy that is drawn from.

        KL(π_n‖π) <= log n - (n-1)/n

    Beirami et al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy", section 3
    (arXiv:2401.01879). Often quoted as the KL itself: it is only approached where no single response has much
    probability. In truth the KL stops growing at -log π of the best response.

    Args:
        n: how many draws, at least 1.

    Returns:
        The bound in nats; 0 for n = 1.

    Raises:
        ValueError: n is not an integer >= 1.

    Gradient: none, the bound is a number.

    >>> round(best_of_n_kl_bound(4), 6)
    0.636294
    """
    _check_draws(n)
    return math.log(n) - (n - 1) / n


def expected_maximum(score: Tensor, *, n: int) -> Tensor:
    """The expected best score of n draws, estimated from N >= n scored samples of each prompt without bias.

        Σᵢ r₍ᵢ₎ C(i-1, n-1) / C(N, n),   r₍₁₎ <= … <= r₍N₎

    The mean of the maximum over all subsets of n samples, a U-statistic: Hoeffding 1948, "A Class of
    Statistics with Asymptotically Normal Distribution"; for n samples of a language model it is the
    estimator of Chen et al. 2021, "Evaluating Large Language Models Trained on Code", Eq. 1
    (arXiv:2107.03374), where the scores are 0 and 1 (pass@n).

    Args:
        score: [P, N] the scores of N independent samples for each prompt.
        n: how many draws, from 1 (the mean) to N (the maximum).

    Returns:
        [P] in the units of the score.

    Raises:
        ValueError: score is not floating point or has no axis, or n is not an integer from 1 to N.

    Gradient: the weight C(i-1, n-1) / C(N, n) of each sample's place i in the order.

    >>> expected_maximum(torch.tensor([[0.0, 1.0, 3.0]]), n=2)
    tensor([2.3333])
    """
    _check_draws(n)
    check_floating(score=score)
    if score.ndim == 0 or score.shape[-1] < n:
        raise ValueError(f"score must hold at least n = {n} samples a prompt, got shape {list(score.shape)}")
    size = score.shape[-1]
    weight = [0.0] * size
    weight[-1] = n / size
    for i in range(size - 1, n - 1, -1):  # from C(i-1, n-1) = C(i, n-1) (i-n+1)/i: no factorial overflows
        weight[i - 1] = weight[i] * (i - n + 1) / i
    ordered = widen(score).sort(dim=-1).values
    return (ordered * ordered.new_tensor(weight)).sum(dim=-1)


def _log_sum(logp: Tensor, possible: Tensor, chosen: Tensor) -> Tensor:
    """log Σ p over the chosen responses, for each row of `chosen` [..., N, N]; finite in every row."""
    # The sum of an impossible response may be 0, and the log of 0 leaves NaN in the gradient: it gets any
    # number instead, since its own -inf is added.
    terms = torch.where(chosen, logp[..., None, :], -torch.inf)
    return torch.where(possible[..., :, None], terms, 0.0).logsumexp(dim=-1)


def _log_share_of_draws(log_share: Tensor, n: int) -> Tensor:
    """log(1 - (1 - u)ⁿ) of log u <= 0: at least one of n draws falls into a share u."""
    certain = log_share.exp() >= 1
    rare = log_share < -40  # there it is n u to the last digit, also where u itself underflows
    u = torch.where(certain | rare, -1.0, log_share).exp()
    inside = torch.log(-torch.expm1(n * torch.log1p(-u)))
    return torch.where(certain, 0.0, torch.where(rare, log_share + math.log(n), inside))


def _check_draws(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n}")
