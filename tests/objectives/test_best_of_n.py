"""Best of n: its law against every tuple of draws, its KL against the bound, the maximum without bias."""

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.best_of_n import best_of_n_kl_bound, best_of_n_law, expected_maximum
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.enumeration import REFERENCE, REWARD, sequence_logp
from tests.objectives.strategies import numbers

LAW = sequence_logp(REFERENCE)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def larger_world() -> tuple[Tensor, Tensor]:
    """(log-probs, rewards) of the 121 sequences over 4 tokens of at most 4, by closed forms."""
    prefixes = [p for n in range(4) for p in product(range(1, 4), repeat=n)]
    logits = t(*(0.8 * math.sin(0.7 + 1.3 * k + 2.1 * v) for k in range(len(prefixes)) for v in range(4)))
    logp = torch.log_softmax(logits.reshape(-1, 4), dim=-1)
    sequences = [(*p, 0) for p in prefixes] + list(product(range(1, 4), repeat=4))
    law = t(*(sum(logp[prefixes.index(s[:i]), s[i]].item() for i in range(len(s))) for s in sequences))
    reward = t(*(1.5 * math.sin(1.7 * i) + 0.5 * math.cos(0.3 * i * i) for i in range(len(sequences))))
    return law, reward


def kl(law: Tensor, other: Tensor) -> float:
    p = law.exp()
    return torch.where(p > 0, p * (law - other), 0.0).sum().item()


laws = numbers(5).map(lambda x: torch.log_softmax(x, dim=-1))
scores = st.lists(st.integers(0, 3), min_size=5, max_size=5).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


# the law


@given(laws, scores, st.integers(1, 4))
def test_the_law_equals_an_enumeration_of_every_tuple_of_draws(logp: Tensor, score: Tensor, n: int) -> None:
    expected = oracles.best_of_n(logp.exp().tolist(), score.tolist(), n)
    close(best_of_n_law(logp, score, n=n).exp(), t(*expected))


@given(laws, scores, st.sampled_from([1, 2, 16, 1000, 10**6]))
def test_the_law_is_normalised_and_one_draw_is_the_law_itself(logp: Tensor, score: Tensor, n: int) -> None:
    for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        law = best_of_n_law(logp.to(dtype), score.to(dtype), n=n)
        assert law.exp().sum().item() == pytest.approx(1.0, abs=rounding)
        torch.testing.assert_close(
            law.double().exp(), best_of_n_law(logp, score, n=n).exp(), rtol=1e-6, atol=1e-6
        )
    close(best_of_n_law(logp, score, n=1), logp)
    close(best_of_n_law(logp + 3.0, score, n=n), best_of_n_law(logp, score, n=n))


@given(laws, scores, st.integers(2, 9))
def test_only_the_order_of_the_scores_matters_and_ties_share_in_proportion(
    logp: Tensor, score: Tensor, n: int
) -> None:
    law = best_of_n_law(logp, score, n=n)
    assert torch.equal(best_of_n_law(logp, score.exp() * 7 - 100, n=n), law)
    close(best_of_n_law(logp, torch.zeros_like(score), n=n), logp)
    for i, j in combinations(range(5), 2):
        if score[i] == score[j]:
            close(law[i] - law[j], logp[i] - logp[j])


@given(laws, scores, st.permutations(range(5)))
def test_permuting_the_responses_permutes_the_law(logp: Tensor, score: Tensor, order: list[int]) -> None:
    index = torch.tensor(order)
    close(best_of_n_law(logp[index], score[index], n=3), best_of_n_law(logp, score, n=3)[index])


@given(laws, scores)
def test_more_draws_raise_the_expected_score_up_to_the_maximum(logp: Tensor, score: Tensor) -> None:
    means = [(best_of_n_law(logp, score, n=n).exp() * score).sum().item() for n in (1, 2, 4, 64, 10**7)]
    assert all(later >= earlier - 1e-12 for earlier, later in zip(means, means[1:], strict=False))
    best = torch.where(score == score.max(), logp, -torch.inf)
    many = best_of_n_law(logp, score, n=10**9)
    torch.testing.assert_close(many.exp(), torch.softmax(best, dim=-1), rtol=1e-6, atol=1e-6)


def test_an_impossible_response_stays_impossible_and_changes_nothing() -> None:
    logp, score = t(0.5, 0.5).log(), t(0.0, 1.0)
    wider, more = t(-math.inf, math.log(0.5), -math.inf, math.log(0.5)), t(9.0, 0.0, -9.0, 1.0)
    law = best_of_n_law(wider, more, n=3)
    assert law[0].item() == law[2].item() == -math.inf
    close(law[[1, 3]], best_of_n_law(logp, score, n=3))
    for response in (1, 3):
        slope = grad(lambda x, i=response: best_of_n_law(x, more, n=3)[i])(wider)
        assert bool(slope.isfinite().all()) and slope[0].item() == slope[2].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rare", [-30.0, -39.9, -40.1, -100.0, -2000.0])
def test_a_response_too_rare_to_represent_gets_n_times_its_probability(
    dtype: torch.dtype, rare: float
) -> None:
    logp, n = torch.tensor([rare, 0.0], dtype=dtype), 64
    best = best_of_n_law(logp, torch.tensor([1.0, 0.0], dtype=dtype), n=n)
    torch.testing.assert_close(
        best, torch.tensor([rare + math.log(n), 0.0], dtype=dtype), rtol=1e-6, atol=1e-6
    )
    for score, factor in (([1.0, 0.0], 1), ([0.0, 1.0], n)):
        slope = grad(lambda x, r=score: best_of_n_law(x, torch.tensor(r, dtype=dtype), n=n)[0])(logp)
        torch.testing.assert_close(slope, torch.tensor([factor, -factor], dtype=dtype), rtol=1e-6, atol=1e-6)
    worst = best_of_n_law(logp, torch.tensor([0.0, 1.0], dtype=dtype), n=n)
    torch.testing.assert_close(worst, torch.tensor([n * rare, 0.0], dtype=dtype), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_law_equals_finite_differences_and_its_own_for_one_draw() -> None:
    logp, score = t(0.3, -1.0, 0.9, 0.1, -0.4), t(0.0, 2.0, 1.0, 2.0, 3.0)
    for n in (1, 2, 7):
        leaf = logp.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, n=n: best_of_n_law(x, score, n=n), (leaf,))
    slope = grad(lambda x: best_of_n_law(x, score, n=1)[2])(logp)
    close(slope, torch.nn.functional.one_hot(torch.tensor(2), 5) - torch.softmax(logp, dim=-1))


def test_many_prompts_and_half_precision_and_compile() -> None:
    torch._dynamo.reset()
    logp = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = torch.tensor([[0.0, 1, 1, 2, 0, 3], [5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 9]])

    def law(x: Tensor, r: Tensor) -> Tensor:
        return best_of_n_law(x, r, n=5)

    together = law(logp, score)
    close(together, torch.stack([law(x, r) for x, r in zip(logp, score, strict=True)]))
    close(vmap(law)(logp, score), together)
    compiled = torch.compile(law, fullgraph=True, backend="aot_eager")
    close(compiled(logp, score), together)
    assert law(logp.bfloat16(), score).dtype == torch.float32
    assert torch.equal(law(logp.bfloat16(), score.bfloat16()), law(logp.bfloat16().float(), score))


# its KL


GOLDEN = [
    (2, 0.18796, 0.19315, 0.66068),
    (4, 0.60374, 0.63629, 0.78614),
    (8, 1.14323, 1.20444, 0.87582),
    (16, 1.75046, 1.83509, 0.93033),
    (64, 2.34794, 3.17451, 0.95264),
    (1024, 2.35918, 5.93245, 0.95275),
]


@pytest.mark.parametrize(("n", "exact", "bound", "win"), GOLDEN)
def test_golden_kl_bound_and_win_rate_on_121_sequences(
    n: int, exact: float, bound: float, win: float
) -> None:
    logp, reward = larger_world()
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-12) and len(logp) == 121
    law = best_of_n_law(logp, reward, n=n)
    assert kl(law, logp) == pytest.approx(exact, abs=6e-6)
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=6e-6)
    beaten = (reward[:, None] > reward).double() + 0.5 * (reward[:, None] == reward)
    rate = (law.exp()[:, None] * logp.exp() * beaten).sum().item()
    assert rate == pytest.approx(win, abs=6e-6) and rate <= n / (n + 1)
    assert law.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_the_kl_saturates_at_minus_the_log_prob_of_the_best_response() -> None:
    logp, reward = larger_world()
    saturated = -logp[reward.argmax()].item()
    assert saturated == pytest.approx(2.35918, abs=6e-6)
    assert kl(best_of_n_law(logp, reward, n=10**6), logp) == pytest.approx(saturated, abs=1e-9)
    even = t(0.5, 0.5).log()
    assert kl(best_of_n_law(even, t(0.0, 1.0), n=64), even) == pytest.approx(math.log(2), abs=1e-9)
    assert best_of_n_kl_bound(64) == pytest.approx(3.174508, abs=5e-7)


@given(laws, scores, st.integers(1, 40))
def test_the_kl_never_exceeds_the_bound(logp: Tensor, score: Tensor, n: int) -> None:
    assert kl(best_of_n_law(logp, score, n=n), logp) <= best_of_n_kl_bound(n) + 1e-12


def test_the_bound_is_zero_for_one_draw_and_approached_by_many_small_responses() -> None:
    assert best_of_n_kl_bound(1) == 0.0
    assert best_of_n_kl_bound(4) == pytest.approx(0.636294, abs=5e-7)
    uniform = torch.full((2000,), -math.log(2000), dtype=torch.float64)
    exact = kl(best_of_n_law(uniform, torch.arange(2000).double(), n=4), uniform)
    assert 0.999 * best_of_n_kl_bound(4) < exact < best_of_n_kl_bound(4)


def test_at_equal_kl_the_tilted_policy_has_at_least_the_reward_of_best_of_n() -> None:
    law = best_of_n_law(LAW, REWARD, n=4)
    target, reward = kl(law, LAW), (law.exp() * REWARD).sum().item()
    low, high = 1e-3, 1e3
    tilted = LAW
    for _ in range(200):
        beta = math.sqrt(low * high)
        tilted = torch.log_softmax(LAW + REWARD / beta, dim=-1)
        low, high = (beta, high) if kl(tilted, LAW) > target else (low, beta)
    assert kl(tilted, LAW) == pytest.approx(target, abs=1e-9)
    assert (tilted.exp() * REWARD).sum().item() > reward + 1e-3


# the expected maximum


@given(st.integers(1, 6).flatmap(lambda size: st.tuples(numbers(3, size), st.integers(1, size))))
def test_the_expected_maximum_is_the_mean_over_all_subsets(drawn: tuple[Tensor, int]) -> None:
    score, n = drawn
    close(expected_maximum(score, n=n), t(*(oracles.expected_maximum(row, n) for row in score.tolist())))


@given(st.integers(1, 6).flatmap(lambda size: numbers(3, size)))
def test_the_expected_maximum_goes_from_the_mean_to_the_maximum(score: Tensor) -> None:
    size = score.shape[-1]
    close(expected_maximum(score, n=1), score.mean(dim=-1))
    close(expected_maximum(score, n=size), score.amax(dim=-1))
    values = torch.stack([expected_maximum(score, n=n) for n in range(1, size + 1)])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    close(expected_maximum(3 * score + 5, n=size), 3 * expected_maximum(score, n=size) + 5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_expected_maximum_is_unbiased_over_every_sample_of_three_sequences(n: int) -> None:
    groups = torch.tensor(list(product(range(len(LAW)), repeat=3)))
    weight = LAW.exp()[groups].prod(dim=-1)
    estimated = (weight * expected_maximum(REWARD[groups], n=n)).sum().item()
    exact = (best_of_n_law(LAW, REWARD, n=n).exp() * REWARD).sum().item()
    assert estimated == pytest.approx(exact, abs=1e-12)
    if (
        n == 2
    ):  # the maximum of one fixed pair is unbiased too, but the mean of maxima over all three is not it
        assert (weight * REWARD[groups].amax(dim=-1)).sum().item() > exact + 0.05


def test_of_right_and_wrong_answers_it_is_pass_at_n() -> None:
    for size, right, n in ((10, 3, 2), (10, 3, 8), (200, 5, 100), (1000, 1, 500)):
        score = (torch.arange(size) < right).double()[None]
        exact = 1 - math.comb(size - right, n) / math.comb(size, n)
        assert expected_maximum(score, n=n).item() == pytest.approx(exact, abs=1e-12)


def test_the_gradient_of_the_expected_maximum_is_the_weight_of_each_place() -> None:
    score = t(3.0, 0.0, 1.0, 2.0)[None]
    slope = grad(lambda x: expected_maximum(x, n=2).sum())(score)
    close(slope, t(3 / 6, 0, 1 / 6, 2 / 6)[None])


def test_the_expected_maximum_works_in_half_precision_under_vmap_and_compiled() -> None:
    torch._dynamo.reset()
    score = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def call(x: Tensor) -> Tensor:
        return expected_maximum(x, n=3)

    torch.testing.assert_close(vmap(call)(score), call(score))
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(score), call(score))
    assert call(score.bfloat16()).dtype == torch.float32 and call(score.double()).dtype == torch.float64
    assert bool(call(torch.where(score > 1, torch.nan, score)).isnan().any()), "NaN is not swallowed"


# errors


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_a_count_of_draws_that_is_not_a_positive_integer_is_refused(bad: int) -> None:
    for call in (
        lambda: best_of_n_law(LAW, REWARD, n=bad),
        lambda: best_of_n_kl_bound(bad),
        lambda: expected_maximum(REWARD[None], n=bad),
    ):
        with pytest.raises(ValueError, match=f"n must be an integer of at least 1, got {bad}"):
            call()


def test_too_few_samples_and_unequal_shapes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"score must hold at least n = 4 samples a prompt, got shape \[2, 3\]"
    ):
        expected_maximum(torch.zeros(2, 3), n=4)
    with pytest.raises(ValueError, match=r"samples a prompt, got shape \[\]"):
        expected_maximum(torch.tensor(0.0), n=1)
    with pytest.raises(ValueError, match="score must be a floating-point tensor, got torch.int64"):
        expected_maximum(torch.zeros(2, 3).long(), n=1)
    with pytest.raises(ValueError, match=r"got logp \[3\], score \[2\]"):
        best_of_n_law(torch.zeros(3), torch.zeros(2), n=2)
    with pytest.raises(ValueError, match=r"logp must have an axis of responses, got shape \[\]"):
        best_of_n_law(torch.tensor(0.0), torch.tensor(0.0), n=2)
    with pytest.raises(ValueError, match="score must be a floating-point tensor, got torch.int64"):
        best_of_n_law(torch.zeros(3), torch.zeros(3).long(), n=2)
