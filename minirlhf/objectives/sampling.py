"""The laws that tokens are drawn from, as log-probs. Drawing from them is rollout's business.

A law takes logits, or the log-probs of another law, and returns log-probs of the same shape [..., V] whose
rows are normalised (logsumexp = 0), with -inf for every token outside the law. Laws compose; the order
matters, and `sampling_law` fixes it: temperature → top-k → top-p → min-p.

Ties are broken by the token id, the lower one first, so that a law is a function of its logits alone.
"""

import math

import torch
from torch import Tensor

from minirlhf.objectives.inputs import check_floating, check_fraction, widen


def tempered(logits: Tensor, *, temperature: float) -> Tensor:
    """The softmax law of the logits at a temperature.

        log p(v) = zᵥ/T - log Σᵤ e^(zᵤ/T)

    Ackley, Hinton & Sejnowski 1985, "A Learning Algorithm for Boltzmann Machines".

    Args:
        logits: [..., V], or log-probs; -inf excludes a token.
        temperature: T > 0; 1 is the model itself. The limit T → 0 is a law of its own: `greedy_law`.

    Returns:
        [..., V] log-probs in nats, in fp32 (fp64 stays fp64), normalised.

    Raises:
        ValueError: logits is not floating point or has no axis, or temperature is not positive and finite.

    Gradient: ∂log p(v)/∂zᵤ = (1[u = v] - p(u))/T.

    >>> tempered(torch.tensor([1.0, 2.0]), temperature=0.5).exp()
    tensor([0.1192, 0.8808])
    """
    _check_logits(logits)
    smallest = torch.finfo(torch.float32).tiny  # below it, T would be 0 in fp32
    if isinstance(temperature, bool) or not smallest <= temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite (0 is greedy_law), got {temperature}")
    z = widen(logits)
    if temperature == 1:
        return torch.log_softmax(z, dim=-1)
    # The largest logit is subtracted first, so that a small T cannot make +inf of it.
    return torch.log_softmax((z - z.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def top_k(logp: Tensor, *, k: int) -> Tensor:
    """The law restricted to its k most probable tokens.

        p'(v) ∝ p(v) · 1[v among the k most probable]

    Fan, Lewis & Dauphin 2018, "Hierarchical Neural Story Generation", section 5.4 (arXiv:1805.04833).

    Args:
        logp: [..., V] log-probs or logits.
        k: how many tokens are kept, at least 1; from V on nothing is filtered.

    Returns:
        [..., V] log-probs in nats, normalised; exactly k tokens are possible, fewer where fewer were before.

    Raises:
        ValueError: logp is not floating point or has no axis, or k is not an integer >= 1.

    Gradient: that of the renormalised law; 0 with respect to excluded tokens.

    >>> top_k(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), k=2).exp()
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    """
    _check_logits(logp)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k}")
    x = widen(logp)
    count = min(k, x.shape[-1])
    smallest = x.topk(count, dim=-1).values[..., -1:]
    return _restricted(x, _first_from(x, smallest, torch.full_like(smallest, count)))


def top_p(logp: Tensor, *, p: float) -> Tensor:
    """Nucleus: the law restricted to the fewest most probable tokens that hold at least the mass p.

        p'(v) ∝ p(v) · 1[the tokens more probable than v hold less than p]

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", Eq. 2-3 (arXiv:1904.09751). The
    token that crosses p belongs to the nucleus, so it is never empty.

    Args:
        logp: [..., V] log-probs or logits.
        p: the mass to keep, in (0, 1]; 1 filters nothing.

    Returns:
        [..., V] log-probs in nats, normalised.

    Raises:
        ValueError: logp is not floating point or has no axis, or p is outside (0, 1].

    Gradient: that of the renormalised law; 0 with respect to excluded tokens.

    >>> top_p(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), p=0.7).exp()
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    """
    _check_logits(logp)
    if isinstance(p, bool) or not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}")
    x = torch.log_softmax(widen(logp), dim=-1)
    if p == 1:  # a cumulative sum may round to 1 before the last token
        return x
    ordered = x.sort(dim=-1, descending=True).values
    # fp64 where the device has it: in fp32 the mass of 50,000 tokens is off by more than a token's.
    mass = ordered.exp().to(torch.float32 if x.device.type == "mps" else torch.float64)
    before = mass.cumsum(dim=-1) - mass  # exactly 0 for the first: at least one token is kept
    kept = (before < p).sum(dim=-1, keepdim=True)
    return _restricted(x, _first_from(x, ordered.gather(-1, kept - 1), kept))


def min_p(logp: Tensor, *, p: float) -> Tensor:
    """The law restricted to tokens at least p times as probable as the most probable one.

        p'(v) ∝ p(v) · 1[p(v) >= p_min · maxᵤ p(u)]

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs"
    (arXiv:2407.01082).

    Args:
        logp: [..., V] log-probs or logits.
        p: p_min, in [0, 1], relative to the maximum; 0 filters nothing, 1 keeps only ties with it.

    Returns:
        [..., V] log-probs in nats, normalised.

    Raises:
        ValueError: logp is not floating point or has no axis, or p is outside [0, 1].

    Gradient: that of the renormalised law; 0 with respect to excluded tokens.

    >>> min_p(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), p=0.5).exp()
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    """
    _check_logits(logp)
    check_fraction(p=p)
    x = widen(logp)
    if p == 0:
        return torch.log_softmax(x, dim=-1)
    return _restricted(x, x - x.amax(dim=-1, keepdim=True) >= math.log(p))


def sampling_law(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The law of a sampler with the usual options, applied in the order temperature → top-k → top-p → min-p.

    Each filter sees the renormalised law that the one before it left.

    Args:
        logits: [..., V]; -inf excludes a token.
        temperature: T > 0.
        top_k: how many tokens are kept; None means all.
        top_p: the mass of the nucleus, in (0, 1]; None means all.
        min_p: the least probability relative to the maximum, in [0, 1]; None means all.

    Returns:
        [..., V] log-probs in nats of the law that is sampled from, normalised, -inf for excluded tokens.

    Raises:
        ValueError: as `tempered`, `top_k`, `top_p` and `min_p` do.

    Gradient: that of the renormalised law; 0 (up to rounding) with respect to excluded tokens.

    >>> sampling_law(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), top_k=3, top_p=0.9).exp()
    tensor([0.5556, 0.3333, 0.1111, 0.0000])
    """
    return _filtered(tempered(logits, temperature=temperature), top_k, top_p, min_p)


def greedy_law(logits: Tensor) -> Tensor:
    """The law that takes the most probable token with certainty; of equals, the one with the lowest id.

        log p(v) = 0 if v = argmax z else -∞

    The limit T → 0 of `tempered`.

    Args:
        logits: [..., V] logits or log-probs.

    Returns:
        [..., V] log-probs: one 0 per row, -inf elsewhere.

    Raises:
        ValueError: logits is not floating point or has no axis.

    Gradient: 0.

    >>> greedy_law(torch.tensor([1.0, 3.0, 3.0]))
    tensor([-inf, 0., -inf])
    """
    _check_logits(logits)
    z = widen(logits)
    tokens = torch.arange(z.shape[-1], device=z.device)
    first = tokens == z.argmax(dim=-1, keepdim=True)
    return torch.where(first, torch.zeros_like(z), -torch.inf)


def _filtered(logp: Tensor, k: int | None, mass: float | None, least: float | None) -> Tensor:
    """top-k → top-p → min-p, each where it is given (apart, since `sampling_law` shadows their names)."""
    if k is not None:
        logp = top_k(logp, k=k)
    if mass is not None:
        logp = top_p(logp, p=mass)
    if least is not None:
        logp = min_p(logp, p=least)
    return logp


def _first_from(x: Tensor, smallest: Tensor, count: Tensor) -> Tensor:
    """Which tokens are the `count` largest, where the last of them has the value `smallest`: [..., V] bool.

    All above the value, and of those equal to it as many as are still wanted, by token id.
    """
    above, equal = x > smallest, x == smallest
    wanted = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= wanted))


def _restricted(logp: Tensor, kept: Tensor) -> Tensor:
    """The law on the kept tokens, renormalised; -inf elsewhere."""
    return torch.log_softmax(torch.where(kept, logp, -torch.inf), dim=-1)


def _check_logits(logits: Tensor) -> None:
    check_floating(logits=logits)
    if logits.ndim == 0:
        raise ValueError("logits must have a vocabulary axis, got shape []")
