"""The verdict says hacked after the turning point of a known gold reward, and not before."""

import itertools

import pytest
import torch

from minirlhf.evaluation.statistics import (
    Estimate,
    detectable_win_rate_gain,
    mean_difference,
    win_rate,
)
from minirlhf.evaluation.verdict import verdict

ABOVE, AROUND, BELOW = Estimate(0.5, 0.1, 0.9), Estimate(0.1, -0.3, 0.5), Estimate(-0.5, -0.9, -0.1)


def shifted(estimate: Estimate) -> Estimate:
    return Estimate(*(0.5 + value / 2 for value in estimate))


@pytest.mark.parametrize(
    ("proxy", "judged", "finding"),
    [
        (ABOVE, ABOVE, "improved"),
        (ABOVE, AROUND, "hacked"),
        (ABOVE, BELOW, "hacked"),
        (AROUND, ABOVE, "not hacked"),
        (AROUND, AROUND, "undecided"),
        (AROUND, BELOW, "undecided"),
        (BELOW, ABOVE, "not hacked"),
        (BELOW, AROUND, "no proxy gain"),
        (BELOW, BELOW, "no proxy gain"),
    ],
)
def test_each_pair_of_intervals_has_its_verdict(proxy: Estimate, judged: Estimate, finding: str) -> None:
    found = verdict(proxy, shifted(judged), detectable=0.06)
    assert found.finding == finding
    assert proxy.text() in found.reason and shifted(judged).text(1, scale=100) in found.reason


@pytest.mark.parametrize("proxy_low", [-0.1, 0.0, 1e-9, 0.1])
@pytest.mark.parametrize("win_low", [0.4, 0.5, 0.5 + 1e-9, 0.6])
def test_hacked_is_a_proxy_interval_above_zero_and_a_lower_end_not_above_one_half(
    proxy_low: float, win_low: float
) -> None:
    found = verdict(Estimate(1, proxy_low, 2), Estimate(0.7, win_low, 0.9), detectable=0.1)
    assert (found.finding == "hacked") == (proxy_low > 0 and win_low <= 0.5)


def test_the_reason_tells_worse_from_not_shown_to_be_better() -> None:
    worse = verdict(ABOVE, Estimate(0.3, 0.2, 0.4), detectable=0.06).reason
    unclear = verdict(ABOVE, Estimate(0.51, 0.45, 0.57), detectable=0.06).reason
    below = verdict(ABOVE, Estimate(0.45, 0.38, 0.52), detectable=0.06).reason
    assert "worse than SFT" in worse and "worse" not in unclear + below
    assert "no gain is shown (these prompts would show a win rate of 56.0 % four times in five)" in unclear
    few = verdict(ABOVE, Estimate(0.9, 0.45, 1.0), detectable=0.51).reason
    assert "so few prompts would hardly show a win rate of 100 %" in few
    assert not worse.endswith(".") and "\n" not in worse + unclear


def test_an_interval_that_the_data_do_not_allow_shows_no_gain() -> None:
    none = Estimate(0.5, float("-inf"), float("inf"))
    assert verdict(none, Estimate(0.4, 0.3, 0.45), detectable=0.1).finding == "undecided"


# A world with a turning point: gold rewards the first feature, and pays less and less for the second, which
# the proxy adores. Along the optimum π_β ∝ ref · exp(proxy / β) gold rises and then falls.
RESPONSES = torch.tensor(list(itertools.product([0.0, 1.0], range(9))))
REFERENCE = torch.softmax(-1.0 * RESPONSES[:, 1], 0)
PROXY = RESPONSES[:, 0] + RESPONSES[:, 1]
GOLD = RESPONSES[:, 0] + 0.6 * RESPONSES[:, 1] - 0.15 * RESPONSES[:, 1] ** 2


def optimum(strength: float) -> torch.Tensor:
    return torch.softmax(REFERENCE.log() + strength * PROXY, 0)


def exact_win_rate(law: torch.Tensor) -> float:
    better = (GOLD[:, None] > GOLD).float() + 0.5 * (GOLD[:, None] == GOLD).float()
    return float(law @ better @ REFERENCE)


def test_the_detector_fires_after_the_turning_point_of_the_gold_reward_and_not_before() -> None:
    strengths = torch.linspace(0, 8, 161).tolist()
    gold = [float(optimum(s) @ GOLD) for s in strengths]
    peak = strengths[max(range(len(gold)), key=gold.__getitem__)]
    crossing = next(s for s in strengths if s > peak and exact_win_rate(optimum(s)) < 0.5)
    assert 0.3 < peak < crossing < 7
    rng = torch.Generator().manual_seed(0)
    findings = {}
    # Not from 0 on: a gain too small for the prompts at hand cannot be shown, and a gain not shown is none.
    for strength in [*torch.linspace(0.3, peak, 6).tolist(), crossing + 0.7, crossing + 1.0]:
        mine = torch.multinomial(optimum(strength), 1000 * 4, replacement=True, generator=rng).view(1000, 4)
        sft = torch.multinomial(REFERENCE, 1000 * 4, replacement=True, generator=rng).view(1000, 4)
        findings[strength] = verdict(
            mean_difference(PROXY[mine], PROXY[sft]),
            win_rate(GOLD[mine], GOLD[sft]),
            detectable=detectable_win_rate_gain(GOLD[mine], GOLD[sft]),
        ).finding
    for strength, finding in findings.items():
        assert finding == ("improved" if strength <= peak else "hacked"), (strength, findings)
