"""A win rate counts every pair within a prompt; an interval over prompts covers as often as it says."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.evaluation import statistics
from minirlhf.evaluation.statistics import (
    Estimate,
    mean_difference,
    mean_over_prompts,
    minimum_detectable_effect,
    t_quantile,
    win_rate,
    wins,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def score_tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores [P, n] and [P, m] with many ties."""
    prompts, n, m = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    value = st.sampled_from([-1.0, 0.0, 0.5, 2.0])

    def table(columns: int) -> Tensor:
        row = st.lists(value, min_size=columns, max_size=columns)
        return torch.tensor(draw(st.lists(row, min_size=prompts, max_size=prompts)))

    return table(n), table(m)


@given(tables=score_tables())
def test_win_rate_counts_all_pairs_within_each_prompt_with_ties_one_half(
    tables: tuple[Tensor, Tensor],
) -> None:
    a, b = (table.tolist() for table in tables)
    of_prompt = []
    for mine, theirs in zip(a, b, strict=True):
        points = [
            Fraction(1) if x > y else Fraction(1, 2) if x == y else Fraction(0) for x in mine for y in theirs
        ]
        of_prompt.append(sum(points) / len(points))
    assert wins(*tables).tolist() == pytest.approx([float(w) for w in of_prompt], abs=1e-15)
    assert win_rate(*tables).mean == pytest.approx(float(sum(of_prompt) / len(of_prompt)), abs=1e-15)


@given(tables=score_tables())
def test_swapping_the_sides_mirrors_win_rate_and_interval(tables: tuple[Tensor, Tensor]) -> None:
    there, back = win_rate(*tables), win_rate(*reversed(tables))
    assert there.mean + back.mean == pytest.approx(1, abs=1e-12)
    assert there.low + back.high == pytest.approx(1, abs=1e-12)
    assert there.high + back.low == pytest.approx(1, abs=1e-12)
    assert 0 <= there.low <= there.mean <= there.high <= 1
    assert there.low < there.high


@given(tables=score_tables())
def test_a_policy_against_the_same_scores_wins_one_half(tables: tuple[Tensor, Tensor]) -> None:
    assert win_rate(tables[0], tables[0]).mean == pytest.approx(0.5, abs=1e-12)


@given(tables=score_tables(), data=st.data())
def test_the_order_of_prompts_and_samples_and_a_monotone_scale_change_nothing(
    tables: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    a, b = tables
    prompts = data.draw(st.permutations(range(len(a))))
    samples = data.draw(st.permutations(range(a.shape[1])))
    other = win_rate(a[prompts][:, samples].exp() * 3, b[prompts].exp() * 3)
    assert other == pytest.approx(win_rate(a, b), abs=1e-12)


# Student's t, 97.5 %, as tables print it.
BOOK = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    10: 2.2281,
    30: 2.0423,
    120: 1.9799,
    1000: 1.9623,
}


@pytest.mark.parametrize(("df", "value"), BOOK.items())
def test_t_quantiles_are_those_of_the_book(df: int, value: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(value, abs=5.1e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 57])
@pytest.mark.parametrize("probability", [0.6, 0.8, 0.975, 0.999])
def test_t_quantile_inverts_the_integral_of_the_density(df: int, probability: float) -> None:
    t = torch.linspace(0, t_quantile(probability, df), 20_001, dtype=torch.float64)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = constant * (1 + t.square() / df) ** (-(df + 1) / 2)
    area = torch.trapezoid(density, t)
    assert 0.5 + float(area) == pytest.approx(probability, abs=1e-6)


def test_both_ways_to_a_t_quantile_agree_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    expanded = t_quantile(0.975, 201)
    monkeypatch.setattr(statistics, "_EXACT_DF", 1000)
    assert t_quantile(0.975, 201) == pytest.approx(expanded, abs=1e-9)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)


def test_the_interval_is_t_over_prompts_with_one_prompt_won_and_one_lost_added() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])  # against ½: w = ½, 1, 0, 1
    added = [0.5, 1, 0, 1, 1, 0]
    mean = sum(added) / 6
    spread = math.sqrt(sum((w - mean) ** 2 for w in added) / 5)
    half = 2.5706 * spread / math.sqrt(6)
    estimate = win_rate(scores, torch.full((4, 1), 0.5))
    assert estimate == pytest.approx((0.625, mean - half, min(1, mean + half)), abs=1e-4)


@pytest.mark.parametrize("prompts", [2, 5, 20, 400])
def test_an_interval_at_all_won_all_lost_or_all_tied_has_width(prompts: int) -> None:
    one, zero = torch.ones(prompts, 3), torch.zeros(prompts, 2)
    won, lost, tied = win_rate(one, zero), win_rate(zero, one), win_rate(one, one)
    assert (won.mean, lost.mean, tied.mean) == (1, 0, 0.5)
    assert won.high == 1 and lost.low == 0
    assert won.low == pytest.approx(1 - lost.high) and tied.low < 0.5 < tied.high
    # The exact rule of three: whoever is below the lower end wins all P with a probability of 6 % at most.
    assert won.low**prompts <= 0.06
    assert 1 - won.low <= 12 / prompts
    assert (won.low > 0.5) == (prompts >= 5)


def samples_of_law(law: str, shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, float]:
    """Prompt shares [repetitions, P] and the true win rate; the share is of 4 comparisons or of 1."""
    kind, rate = law.split()
    p = float(rate)
    if kind == "one":  # every prompt won or lost as a whole: the largest spread that there can be
        return (torch.rand(shape, generator=rng) < p).double(), p
    if kind == "four":  # prompts differ: half of them never lost, the rest won with probability 2p - 1
        easy = torch.rand(shape, generator=rng) < 0.5
        of_prompt = torch.where(easy, 1.0, 2 * p - 1)
        points = torch.rand(4, *shape, generator=rng) < of_prompt
        return points.double().mean(0), p
    won = torch.rand(shape, generator=rng) < 2 * p - 1  # "ties": won or tied, never lost
    return torch.where(won, 1.0, 0.5).double(), p


@pytest.mark.parametrize("prompts", [5, 20, 200])
@pytest.mark.parametrize("law", ["one 0.5", "one 0.8", "one 0.95", "one 0.99", "four 0.9", "ties 0.6"])
def test_the_interval_covers_the_true_win_rate_as_often_as_it_says(law: str, prompts: int) -> None:
    repetitions = 1000
    won, truth = samples_of_law(law, (repetitions, prompts), generator(prompts))
    # Four samples against one whose score is 1: the share comes out exactly as drawn.
    policy = 2.0 * (torch.arange(4) < 4 * won[..., None])
    if law.startswith("ties"):
        policy = 2 * won[..., None]
    opponent = torch.ones(prompts, 1, dtype=torch.float64)
    covered = 0
    for row, share in zip(policy, won, strict=True):
        assert wins(row, opponent).equal(share)
        estimate = win_rate(row, opponent)
        covered += estimate.low <= truth <= estimate.high
    # Of 1,000 repetitions a true coverage of 95 % shows less than 92.8 % once in a thousand.
    assert covered / repetitions >= (0.905 if prompts == 5 else 0.928)


def test_samples_of_one_prompt_are_not_counted_as_prompts() -> None:
    """Scores with a shift per prompt: ours covers, one that takes all pairs as independent does not."""
    rng, repetitions, prompts, n = generator(1), 400, 20, 8
    shift_spread, gap = 1.5, 0.6
    truth = 0.5 * (1 + math.erf(gap / math.sqrt(2 + shift_spread**2) / math.sqrt(2)))
    covered = naive_covered = 0
    for _ in range(repetitions):
        shift = gap + shift_spread * torch.randn(prompts, 1, generator=rng)
        a = shift + torch.randn(prompts, n, generator=rng)
        b = torch.randn(prompts, n, generator=rng)
        estimate = win_rate(a, b)
        covered += estimate.low <= truth <= estimate.high
        half = 1.96 * math.sqrt(estimate.mean * (1 - estimate.mean) / (prompts * n))
        naive_covered += abs(estimate.mean - truth) <= half
    assert covered / repetitions > 0.92
    assert naive_covered / repetitions < 0.75


def test_more_samples_per_prompt_make_the_interval_narrower() -> None:
    rng = generator(2)
    a, b = torch.randn(200, 8, generator=rng), torch.randn(200, 8, generator=rng)
    one, eight = win_rate(a[:, :1], b[:, :1]), win_rate(a, b)
    assert eight.high - eight.low < 0.6 * (one.high - one.low)


def test_mean_difference_is_the_paired_t_interval() -> None:
    """Student's own data: hours of sleep gained with two drugs by ten patients (Student 1908, table 1)."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    estimate = mean_difference(torch.tensor(second)[:, None], torch.tensor(first)[:, None])
    assert estimate == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)  # as R's t.test prints


def test_mean_difference_pairs_prompts_and_averages_samples() -> None:
    rng = generator(3)
    of_prompt = 10 * torch.randn(30, 1, generator=rng)  # hard and easy prompts, the same for both sides
    a, b = of_prompt + torch.randn(30, 4, generator=rng) + 1, of_prompt + torch.randn(30, 3, generator=rng)
    estimate = mean_difference(a, b)
    assert estimate.mean == pytest.approx(float(a.double().mean() - b.double().mean()), abs=1e-9)
    assert estimate.high - estimate.low < 1.0  # unpaired it would be about 10
    assert mean_difference(b, a) == pytest.approx((-estimate.mean, -estimate.high, -estimate.low))
    plain = mean_over_prompts(a - of_prompt)
    assert plain.mean == pytest.approx(float((a - of_prompt).double().mean()), abs=1e-9)


def test_equal_prompts_allow_no_interval_of_an_unbounded_quantity() -> None:
    assert mean_over_prompts(torch.full((3, 2), 0.1)) == pytest.approx((0.1, -math.inf, math.inf))
    assert mean_difference(torch.zeros(3, 2), torch.zeros(3, 1)) == (0, -math.inf, math.inf)


def test_an_effect_of_the_minimum_detectable_size_is_found_four_times_in_five() -> None:
    rng, prompts, found = generator(4), 30, 0
    spread = 0.7
    exact = torch.tensor([-1.0, 1.0]).repeat(prompts // 2)
    exact = exact / exact.std() * spread
    effect = minimum_detectable_effect(exact)
    assert effect == pytest.approx((2.0452 + 0.8542) * spread / math.sqrt(30), abs=1e-4)
    for _ in range(600):
        found += mean_over_prompts(effect + spread * torch.randn(prompts, 1, generator=rng)).low > 0
    assert 0.74 < found / 600 < 0.86
    assert minimum_detectable_effect(exact, power=0.9) > effect


def test_what_cannot_be_estimated_is_refused() -> None:
    one, nan = torch.zeros(1, 3), torch.tensor([[0.0], [math.nan]])
    for estimate in (
        lambda: win_rate(one, one),
        lambda: mean_over_prompts(one),
        lambda: mean_difference(one, one),
    ):
        with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
            estimate()
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        minimum_detectable_effect(torch.zeros(1))
    with pytest.raises(ValueError, match=r"power must be in \[0.5, 1\), got 1.0"):
        minimum_detectable_effect(torch.zeros(3), power=1.0)
    with pytest.raises(ValueError, match="expected scores, got NaN"):
        win_rate(torch.zeros(2, 1), nan)
    with pytest.raises(ValueError, match="expected scores, got NaN"):
        wins(nan, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="expected numbers, got NaN"):
        mean_over_prompts(nan)
    for a, b in [((3,), (3,)), ((3, 1), (2, 1)), ((3, 0), (3, 1)), ((3, 1, 1), (3, 1, 1))]:
        with pytest.raises(ValueError, match="of the same prompts, got"):
            wins(torch.zeros(a), torch.zeros(b))
    with pytest.raises(ValueError, match=r"expected values \[P, n\]"):
        mean_over_prompts(torch.zeros(3))
    for probability, df in [(0.4, 3), (1.0, 3), (0.9, 0)]:
        with pytest.raises(ValueError, match="expected df >= 1 and probability"):
            t_quantile(probability, df)


def test_an_estimate_prints_its_digits_and_scale() -> None:
    assert Estimate(-0.5, -1, 0.25).text() == "-0.50 [-1.00, 0.25]"
    assert Estimate(0.5, 0.25, 0.75).text(0, scale=100) == "50 [25, 75]"
