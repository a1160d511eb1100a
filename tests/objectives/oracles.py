"""Scalar oracles, written from the papers with loops over Python floats: no torch, no vectors, no tricks.

A row is a list of numbers with a list of bools beside it; the result has None where the mask is False.
"""

import math
from collections.abc import Sequence

Row = Sequence[float]
Flags = Sequence[bool]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def bradley_terry(chosen: float, rejected: float, margin: float = 0.0, smoothing: float = 0.0) -> float:
    kept = softplus(-(chosen - rejected - margin))
    flipped = softplus(-(rejected - chosen - margin))
    return (1 - smoothing) * kept + smoothing * flipped


def plackett_luce(rewards: Row) -> float:
    """The product of the stages' probabilities, each the share of the chosen item among what is left."""
    probability = 1.0
    for k in range(len(rewards)):
        probability *= math.exp(rewards[k]) / math.fsum(math.exp(r) for r in rewards[k:])
    return -math.log(probability)


def dpo(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float) -> float:
    return bradley_terry(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))


def conservative_dpo(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, smoothing: float
) -> float:
    kept = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)
    flipped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
    return (1 - smoothing) * kept + smoothing * flipped


def robust_dpo(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, smoothing: float
) -> float:
    kept = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)
    flipped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def hinge(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float) -> float:
    return max(0.0, 1 - (beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)))


def simpo(
    chosen: float, rejected: float, chosen_length: float, rejected_length: float, beta: float, gamma: float
) -> float:
    return softplus(-(beta / chosen_length * chosen - beta / rejected_length * rejected - gamma))


def orpo(
    chosen: float, rejected: float, chosen_length: float, rejected_length: float, weight: float
) -> float:
    """By the probabilities and their odds, as the paper defines them."""

    def odds(p: float) -> float:
        return p / (1 - p)

    p, q = math.exp(chosen / chosen_length), math.exp(rejected / rejected_length)
    return -math.log(p) - weight * math.log(sigmoid(math.log(odds(p) / odds(q))))


def kto(
    logp: float, ref_logp: float, desirable: bool, reference_point: float, beta: float, weight: float = 1.0
) -> float:
    """λ - v, where the value v is λ σ(β (r - z₀)) for a gain and λ σ(β (z₀ - r)) for a loss."""
    r = logp - ref_logp
    felt = sigmoid(beta * (r - reference_point) if desirable else beta * (reference_point - r))
    return weight - weight * felt


def ipo(
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    tau: float,
    lengths: tuple[int, int] = (1, 1),
) -> float:
    h = (chosen - ref_chosen) / lengths[0] - (rejected - ref_rejected) / lengths[1]
    return (h - 1 / (2 * tau)) ** 2


def surrogate(rho: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """The objective of PPO (to maximise), as its paper writes it."""
    clipped = min(max(rho, 1 - low), 1 + high)
    objective = min(rho * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return objective


def gspo(logp: Row, old_logp: Row, mask: Flags, advantage: float, low: float, high: float) -> float:
    """PPO's loss at the geometric mean of the ratios; 0 where nothing counts."""
    ratios = [math.exp(a - b) for a, b, m in zip(logp, old_logp, mask, strict=True) if m]
    if not ratios:
        return 0.0
    return -surrogate(math.prod(ratios) ** (1 / len(ratios)), advantage, low, high)


def cispo(logp: float, old_logp: float, advantage: float, low: float, high: float) -> float:
    return -min(max(math.exp(logp - old_logp), 1 - low), 1 + high) * advantage * logp


def leave_one_out(reward: Row, mask: Flags) -> list[float | None]:
    result: list[float | None] = [None] * len(mask)
    for i in range(len(mask)):
        if mask[i]:
            others = [reward[j] for j in range(len(mask)) if mask[j] and j != i]
            result[i] = reward[i] - mean(others) if others else 0.0
    return result


def group_centred(reward: Row, mask: Flags) -> list[float | None]:
    mu = mean([r for r, m in zip(reward, mask, strict=True) if m])
    return [r - mu if m else None for r, m in zip(reward, mask, strict=True)]


def group_normalised(reward: Row, mask: Flags, epsilon: float, correction: int) -> list[float | None]:
    scored = [r for r, m in zip(reward, mask, strict=True) if m]
    if len(set(scored)) <= 1:
        return [0.0 if m else None for m in mask]
    mu, sigma = mean(scored), math.sqrt(variance(scored, correction))
    return [(r - mu) / (sigma + epsilon) if m else None for r, m in zip(reward, mask, strict=True)]


def clipped_value(value: float, old: float, ret: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - ret) ** 2, (near - ret) ** 2)


def gae(
    reward: Row, value: Row, mask: Flags, gamma: float, lam: float, bootstrap: float = 0.0
) -> tuple[list[float | None], list[float | None]]:
    """The backward recursion over the tokens that count: advantages and returns."""
    advantages: list[float | None] = [None] * len(mask)
    returns: list[float | None] = [None] * len(mask)
    next_value, next_advantage = bootstrap, 0.0
    for t in reversed(range(len(mask))):
        if not mask[t]:
            continue
        delta = reward[t] + gamma * next_value - value[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = value[t]
        advantages[t], returns[t] = next_advantage, next_advantage + value[t]
    return advantages, returns


def discounted_return(reward: Row, mask: Flags, gamma: float, bootstrap: float = 0.0) -> list[float | None]:
    """The explicit sum over all later rewards, O(T²)."""
    counted = [t for t in range(len(mask)) if mask[t]]
    result: list[float | None] = [None] * len(mask)
    for i, t in enumerate(counted):
        later = counted[i:]
        total = sum(gamma**n * reward[k] for n, k in enumerate(later))
        result[t] = total + gamma ** len(later) * bootstrap
    return result


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def variance(values: Sequence[float], correction: int) -> float:
    if len(values) <= correction:
        return 0.0
    mu = mean(values)
    return math.fsum((x - mu) ** 2 for x in values) / (len(values) - correction)


def k1(logp: float, ref_logp: float) -> float:
    return logp - ref_logp


def k2(logp: float, ref_logp: float) -> float:
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: float, ref_logp: float) -> float:
    """(r - 1) - log r with r = π_ref/π, the blog's own form."""
    r = math.exp(ref_logp - logp)
    return (r - 1) - math.log(r)


def softmax(logits: Row) -> list[float]:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def kl(logits: Row, ref_logits: Row) -> float:
    pairs = zip(softmax(logits), softmax(ref_logits), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def entropy(logits: Row) -> float:
    return -math.fsum(p * math.log(p) for p in softmax(logits) if p > 0)


def shaped_reward(score: float, kl_row: Row, mask: Flags, beta: float) -> list[float | None]:
    result: list[float | None] = [-beta * kl_row[t] if mask[t] else None for t in range(len(mask))]
    counted = [t for t in range(len(mask)) if mask[t]]
    if counted:
        result[counted[-1]] = -beta * kl_row[counted[-1]] + score
    return result


def adapted(coefficient: float, kl_now: float, target: float, horizon: float, n_steps: float) -> float:
    error = min(max((kl_now - target) / target, -0.2), 0.2)
    return coefficient * (1 + error * n_steps / horizon)


def law(
    logits: Row,
    temperature: float = 1.0,
    k: int | None = None,
    mass: float | None = None,
    least: float | None = None,
) -> list[float]:
    """Probabilities after temperature → top-k → top-p → min-p; the lower id comes first among equals."""
    probabilities = softmax([z / temperature for z in logits])

    def keep(chosen: list[int]) -> list[float]:
        total = math.fsum(probabilities[v] for v in chosen)
        return [probabilities[v] / total if v in chosen else 0.0 for v in range(len(probabilities))]

    def ordered() -> list[int]:
        return sorted(range(len(logits)), key=lambda v: (-probabilities[v], v))

    if k is not None:
        probabilities = keep(ordered()[:k])
    if mass is not None:
        nucleus: list[int] = []
        for v in ordered():
            if nucleus and math.fsum(probabilities[u] for u in nucleus) >= mass:
                break
            nucleus.append(v)
        probabilities = keep(nucleus)
    if least is not None:
        top = max(probabilities)
        probabilities = keep([v for v, p in enumerate(probabilities) if p >= least * top])
    return probabilities


def best_of_n(probabilities: Row, scores: Row, n: int) -> list[float]:
    """Every n-tuple of draws by itself; of its best members one is taken at random."""
    size = len(scores)
    law = [0.0] * size

    def draw(drawn: tuple[int, ...], weight: float) -> None:
        if len(drawn) < n:
            for i in range(size):
                draw((*drawn, i), weight * probabilities[i])
            return
        top = max(scores[i] for i in drawn)
        best = [i for i in drawn if scores[i] == top]
        for i in best:
            law[i] += weight / len(best)

    draw((), 1.0)
    return law


def expected_maximum(scores: Row, n: int) -> float:
    """The mean of the maximum over every subset of n samples."""
    maxima: list[float] = []
    for subset in range(2 ** len(scores)):
        members = [scores[i] for i in range(len(scores)) if subset >> i & 1]
        if len(members) == n:
            maxima.append(max(members))
    return mean(maxima)
