"""Win rates, differences and their 95 % intervals: what may be said after P prompts.

Prompts are what is drawn independently; several samples of one prompt are not. So every interval here is over
prompts: samples only sharpen the number that a prompt contributes.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_DF = 200  # up to here t quantiles come from the finite series, beyond it from the expansion


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval; infinite ends mean that the data allow none."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2, *, scale: float = 1.0) -> str:
        """For a table.

        >>> Estimate(0.8125, 0.75, 0.8667).text(1, scale=100)
        '81.2 [75.0, 86.7]'
        >>> Estimate(0.5, float("-inf"), float("inf")).text()
        '0.50 [no interval]'
        """
        mean, low, high = (f"{scale * value:.{digits}f}" for value in self)
        return f"{mean} [{low}, {high}]" if math.isfinite(self.high - self.low) else f"{mean} [no interval]"


def wins(policy_scores: Tensor, sft_scores: Tensor) -> Tensor:
    """Share of comparisons that the policy wins at each prompt; a tie counts ½.

        wₚ = 1/(n m) Σᵢⱼ ( 1[aₚᵢ > bₚⱼ] + ½ 1[aₚᵢ = bₚⱼ] )

    Args:
        policy_scores: [P, n] the judge's score of each sample of the policy.
        sft_scores: [P, m] of independent samples of the model it is compared with, at the same prompts.

    Returns:
        fp64 [P] in [0, 1].

    Raises:
        ValueError: other shapes, or a score is NaN.

    >>> wins(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([0.6250], dtype=torch.float64)
    """
    _check_scores(policy_scores, sft_scores)
    a, b = policy_scores[:, :, None], sft_scores[:, None, :]  # [P, n, m]
    return ((a > b).double() + 0.5 * (a == b).double()).mean(dim=(1, 2))


def win_rate(policy_scores: Tensor, sft_scores: Tensor) -> Estimate:
    """Mean of `wins` over prompts, and a 95 % interval for what more prompts would give.

    The interval is Student's t over prompts after adding two, one all won and one all lost (Agresti and Coull
    1998 and Agresti and Caffo 2000 do this for counts; here a prompt may also be won in part):

        w₁ … w_P, 1, 0  ->  mean ± t(0.975; P + 1) · s / √(P + 2), cut to [0, 1]

    Plain t has width 0 when every prompt is won, and also when all are tied, and near the edges it misses
    the truth more often than it says. The two added prompts give 100 % of P prompts a lower end near 1 - 3/P.
    They vanish as 1/P, are symmetric (swapping the sides mirrors the interval), and the mean itself has none
    of them. Coverage is tested by simulation for P from 5 to 200.

    Args:
        policy_scores, sft_scores: [P, n] and [P, m], as for `wins`.

    Raises:
        ValueError: fewer than two prompts (one has no spread), or as `wins`.

    >>> win_rate(torch.ones(30, 1), torch.zeros(30, 1)).text(1, scale=100)
    '100.0 [90.5, 100.0]'
    """
    won = wins(policy_scores, sft_scores)
    _check_several(len(won))
    low, high = _t_interval(_with_two_more(won))
    return Estimate(float(won.mean()), max(0.0, low), min(1.0, high))


def mean_over_prompts(values: Tensor) -> Estimate:
    """Mean of values [P, n], with Student's t interval over the P prompt means.

    Where all prompt means are equal the interval is infinite: what they did not show may be rare and large.

    >>> mean_over_prompts(torch.tensor([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])).text(1)
    '4.0 [-1.0, 9.0]'
    """
    if values.dim() != 2 or not values.shape[1]:
        raise ValueError(f"expected values [P, n], got shape {list(values.shape)}")
    if values.isnan().any():
        raise ValueError("expected numbers, got NaN")
    _check_several(len(values))
    of_prompt = values.double().mean(1)
    return Estimate(float(of_prompt.mean()), *_t_interval(of_prompt))


def mean_difference(policy_values: Tensor, sft_values: Tensor) -> Estimate:
    """Mean of policy [P, n] minus mean of SFT [P, m], paired by prompt, with its interval over prompts.

    >>> mean_difference(torch.tensor([[2.0], [3.0], [9.0]]), torch.tensor([[1.0], [1.0], [6.0]])).text(1)
    '2.0 [-0.5, 4.5]'
    """
    _check_scores(policy_values, sft_values)
    difference = policy_values.double().mean(1) - sft_values.double().mean(1)
    return mean_over_prompts(difference[:, None])


def minimum_detectable_effect(of_prompt: Tensor, *, power: float = 0.8) -> float:
    """The smallest true effect that this many prompts of this spread would show, with the given probability.

        (t(0.975; P - 1) + t(power; P - 1)) · s / √P

    An effect of this size has an interval that excludes "no effect" in `power` of all repetitions. A smaller
    one that was not found has not been shown to be absent.

    Args:
        of_prompt: [P] one number per prompt: `wins`, or a difference.

    >>> round(minimum_detectable_effect(torch.tensor([0.0, 1.0]).repeat(200)), 3)
    0.07
    """
    prompts = len(of_prompt)
    _check_several(prompts)
    if not 0.5 <= power < 1:
        raise ValueError(f"power must be in [0.5, 1), got {power}")
    quantiles = t_quantile(0.975, prompts - 1) + t_quantile(power, prompts - 1)
    return quantiles * float(of_prompt.double().std()) / math.sqrt(prompts)


def detectable_win_rate_gain(policy_scores: Tensor, sft_scores: Tensor) -> float:
    """`minimum_detectable_effect` of a win rate, as a difference from ½, with the two prompts that it adds.

    >>> round(detectable_win_rate_gain(torch.ones(98, 1), torch.zeros(98, 1)), 3)
    0.028
    """
    return minimum_detectable_effect(_with_two_more(wins(policy_scores, sft_scores)))


def t_quantile(probability: float, df: int) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with this probability, in [½, 1).

    By bisection of the distribution function (Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums for whole
    df); for large df by the expansion about the normal quantile (26.7.5), then good to 1e-9.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764
    """
    if df < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"expected df >= 1 and probability in [0.5, 1), got {df} and {probability}")
    if df > _EXACT_DF:
        return _expanded_quantile(NormalDist().inv_cdf(probability), df)
    low, high = 0.0, math.pi / 2  # θ = atan(t / √df)
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, df) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _within(theta: float, df: int) -> float:
    """P(|T| <= t), t = √df · tan θ."""
    cosine, sine, odd = math.cos(theta), math.sin(theta), df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(1, df // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * j - 1 + odd) / (2 * j + odd)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _expanded_quantile(x: float, df: int) -> float:
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / df**power for power, term in enumerate(terms))


def _with_two_more(won: Tensor) -> Tensor:
    return torch.cat([won, won.new_tensor([0.0, 1.0])])


def _t_interval(of_prompt: Tensor) -> tuple[float, float]:
    count, mean, spread = len(of_prompt), float(of_prompt.mean()), float(of_prompt.std())
    if spread <= 1e-12 * abs(mean):  # equal up to rounding
        return -math.inf, math.inf
    half = t_quantile(0.975, count - 1) * spread / math.sqrt(count)
    return mean - half, mean + half


def _check_scores(policy_scores: Tensor, sft_scores: Tensor) -> None:
    shapes = list(policy_scores.shape), list(sft_scores.shape)
    if not (
        len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][0] and all(shapes[0] + shapes[1])
    ):
        raise ValueError(
            f"expected scores [P, n] and [P, m] of the same prompts, got {shapes[0]} and {shapes[1]}"
        )
    if policy_scores.isnan().any() or sft_scores.isnan().any():
        raise ValueError("expected scores, got NaN")


def _check_several(prompts: int) -> None:
    if prompts < 2:
        raise ValueError(
            f"expected at least 2 prompts, got {prompts}: an interval over prompts needs their spread"
        )
