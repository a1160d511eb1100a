"""The inverse CDF gives each token exactly its probability, and nothing outside the law."""

import pytest
import torch

from minirlhf.objectives.sampling import greedy_law, sampling_law
from minirlhf.rollout.draw import check_law, inverse_cdf
from tests.rollout.known_models import LAWS


def law_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize("options", LAWS.values(), ids=LAWS)
def test_over_an_even_grid_of_uniforms_each_token_gets_exactly_its_probability(options: dict) -> None:
    count = 2**16
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(2)) * 2
    law = sampling_law(logits, **options)
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token = inverse_cdf(law.expand(count, -1), grid).token
    share = torch.bincount(token, minlength=23).double() / count
    assert (share - law[0].double().exp()).abs().max() <= 1.01 / count, "off by the grid's width at most"
    assert (share[law[0] == -torch.inf] == 0).all()


def test_an_interval_contains_its_lower_end_and_not_its_upper() -> None:
    law = law_of([0.25, 0.0, 0.5, 0.25, 0.0]).expand(6, -1)
    below = 1 - 2**-24
    uniform = torch.tensor([0.0, 0.25, 0.75, 0.25 - 2**-24, 0.75 - 2**-24, below], dtype=torch.float64)
    assert inverse_cdf(law, uniform).token.tolist() == [0, 2, 3, 0, 2, 3]


def test_a_uniform_above_the_rounded_total_takes_the_last_token_with_mass() -> None:
    short = law_of([0.5, 0.4999, 0.0, 0.0])  # as if rounding had lost 1e-4
    assert inverse_cdf(short, torch.tensor([0.99995])).token.tolist() == [1]


def test_a_token_of_probability_zero_at_the_start_is_not_drawn_by_uniform_zero() -> None:
    draw = inverse_cdf(law_of([0.0, 0.0, 1.0]), torch.tensor([0.0]))
    assert draw.token.tolist() == [2]
    assert draw.near_boundary.tolist() == [False], "no other token has mass"


def test_the_greedy_law_draws_the_argmax_whatever_the_uniform_and_is_never_near_a_boundary() -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0, 1 - 2**-24, 64, dtype=torch.float64)
    draw = inverse_cdf(greedy_law(logits), uniform)
    assert torch.equal(draw.token, logits.argmax(-1))
    assert not draw.near_boundary.any()


def test_near_a_boundary_means_within_1e_5_of_another_tokens_interval() -> None:
    inside, outside = 0.9e-5, 1.1e-5
    uniform = [0.0, 0.25 - outside, 0.25 - inside, 0.25 + inside, 0.25 + outside, 1 - inside]
    law = law_of([0.25, 0.75]).expand(6, -1)
    draw = inverse_cdf(law, torch.tensor(uniform, dtype=torch.float64))
    assert draw.token.tolist() == [0, 0, 0, 1, 1, 1]
    assert draw.near_boundary.tolist() == [False, False, True, True, False, False]


def test_rare_tokens_at_the_end_of_a_large_vocabulary_keep_their_intervals() -> None:
    size = 50_257
    law = torch.log_softmax(torch.zeros(1, size), dim=-1)
    token = torch.tensor([0, 1, 25_000, 50_000, 50_255, 50_256])
    centre = (token.double() + 0.5) / size
    assert inverse_cdf(law.expand(6, -1), centre).token.tolist() == token.tolist()


def test_intervals_narrower_than_fp32_can_tell_apart_keep_their_place() -> None:
    width, many = 2e-8, 1000  # fp32 has a step of 6e-8 at 0.9
    law = law_of([0.9, *[width] * many, 0.1 - width * many])
    token = torch.tensor([1, 2, 500, 999, 1000, 1001])
    centre = 0.9 + (token.double() - 0.5) * width
    assert inverse_cdf(law.expand(6, -1), centre).token.tolist() == token.tolist()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[3\]"):
        inverse_cdf(torch.zeros(2, 3), torch.zeros(3))


def test_check_law_refuses_another_shape_unnormalised_rows_and_nan() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    check_law(sampling_law(logits, top_k=2), logits)
    check_law(greedy_law(logits), logits)
    with pytest.raises(ValueError, match=r"law must keep the shape \[4, 6\], got \[4, 5\]"):
        check_law(sampling_law(logits)[:, :5], logits)
    with pytest.raises(ValueError, match="normalised log-probs"):
        check_law(logits, logits)
    one_bad = sampling_law(logits).index_fill(0, torch.tensor([2]), torch.nan)
    with pytest.raises(ValueError, match="logsumexp is off by nan"):
        check_law(one_bad, logits)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000, 1024])
def test_summing_by_blocks_draws_what_one_sum_over_the_vocabulary_does(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    law = torch.rand(200, vocabulary, generator=generator, dtype=torch.float64) ** 8
    for row in range(200):  # whole blocks without mass, at both ends and in the middle
        start = int(torch.randint(0, vocabulary, (1,), generator=generator))
        empty = torch.zeros(vocabulary, dtype=torch.bool)
        empty[start : start + 600] = row % 2 == 0
        law[row] = torch.where(empty, 0.0, law[row]) if not empty.all() else law[row]
    law = (law / law.sum(1, keepdim=True)).log()
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    cumulative = law.exp().cumsum(1)
    draw = inverse_cdf(law, uniform)
    clear = ((cumulative - uniform[:, None]).abs() > 1e-12).all(1)
    expected = torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]
    assert torch.equal(draw.token[clear], expected[clear]) and clear.sum() > 190
    assert (law[torch.arange(200), draw.token] > -torch.inf).all()
    inner = (cumulative > 1e-12) & (cumulative < 1 - 1e-12)  # boundaries between two tokens with mass
    near = (((cumulative - uniform[:, None]).abs() < 1e-5) & inner).any(1)
    assert torch.equal(draw.near_boundary, near)
