"""The edges of a draw: what wrong variants of it have asked for beyond `test_draw.py`."""

import pytest
import torch

from minirlhf.rollout.draw import check_law, inverse_cdf


def test_the_lower_boundary_of_a_token_is_the_end_of_the_one_before_it() -> None:
    law = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64).log().expand(6, -1)
    inside, outside = 0.9e-5, 1.1e-5
    uniform = [0.5 + inside, 0.5 + outside, 0.5, 0.75 + inside, 0.75 + outside, 0.6]
    draw = inverse_cdf(law, torch.tensor(uniform, dtype=torch.float64))
    assert draw.token.tolist() == [2, 2, 2, 3, 3, 2]
    assert draw.near_boundary.tolist() == [True, False, True, True, False, False]


def test_a_law_in_fp32_keeps_intervals_narrower_than_fp32_can_tell_apart() -> None:
    width, many = 2.0**-26, 1000  # fp32 has a step of 2⁻²⁴ above one half
    law = torch.tensor([[0.75, *[width] * many, 0.25 - many * width]]).log()
    assert law.dtype == torch.float32
    ends = law[0].exp().double().cumsum(0)
    token = torch.tensor([1, 2, 3, 500, 999, 1000])
    centre = (ends[token] + ends[token - 1]) / 2
    assert inverse_cdf(law.expand(6, -1), centre).token.tolist() == token.tolist()


def test_a_uniform_in_fp32_draws_the_same_token_as_in_fp64() -> None:
    law = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().expand(3, -1)
    for dtype in (torch.float32, torch.float64):
        assert inverse_cdf(law, torch.tensor([0.25, 0.5, 0.875], dtype=dtype)).token.tolist() == [0, 1, 2]


def test_a_law_with_more_or_fewer_than_two_axes_is_refused() -> None:
    for law in (torch.zeros(2, 1, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"expected law_logp \[B, V\] and uniform \[B\]"):
            inverse_cdf(law, torch.zeros(2, dtype=torch.float64))


def test_one_row_that_is_not_normalised_is_refused_among_rows_that_are() -> None:
    law = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    for off, fits in ((0.5e-4, True), (-0.5e-4, True), (1.5e-4, False), (-1.5e-4, False), (1e-3, False)):
        shifted = law.clone()
        shifted[1] += off
        if fits:
            check_law(shifted, law)
        else:
            with pytest.raises(ValueError, match="logsumexp is off by"):
                check_law(shifted, law)


def test_the_end_of_a_block_of_tokens_is_a_boundary_like_any_other() -> None:
    law = torch.full((1, 1024), 1 / 1024, dtype=torch.float64).log().expand(6, -1)
    inside, outside = 0.9e-5, 1.1e-5
    uniform = [0.25, 0.25 - inside, 0.25 - outside, 0.25 + inside, 0.25 + outside, 1 - inside]
    draw = inverse_cdf(law, torch.tensor(uniform, dtype=torch.float64))
    assert draw.token.tolist() == [256, 255, 255, 256, 256, 1023]
    assert draw.near_boundary.tolist() == [True, True, False, True, False, False]
