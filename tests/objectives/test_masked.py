"""Masked reductions against plain Python over the tokens that count, and the supervised loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.objectives.masked import (
    scaled_sum,
    select,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
    token_variance,
)
from minirlhf.objectives.supervised import token_loss
from tests.objectives import oracles
from tests.objectives.strategies import Batch, batches


@given(batches(tensors=1))
def test_token_reductions_equal_python_over_the_tokens_that_count(batch: Batch) -> None:
    (x,), mask = batch.tensors, batch.mask
    counted = x[mask].tolist()
    assert token_sum(x, mask).item() == pytest.approx(sum(counted), abs=1e-12)
    assert token_mean(x, mask).item() == pytest.approx(oracles.mean(counted), abs=1e-12)
    for correction in (0, 1):
        got = token_variance(x, mask, correction=correction).item()
        assert got == pytest.approx(oracles.variance(counted, correction), abs=1e-12)
    assert token_variance(x, mask).item() == token_variance(x, mask, correction=1).item()
    assert scaled_sum(x, mask, constant=2.5).item() == pytest.approx(sum(counted) / 2.5, abs=1e-12)


@given(batches(tensors=1))
def test_sequence_reductions_equal_python_over_each_row(batch: Batch) -> None:
    (x,), mask = batch.tensors, batch.mask
    rows = [x[b, mask[b]].tolist() for b in range(mask.shape[0])]
    assert sequence_sum(x, mask).tolist() == pytest.approx([sum(r) for r in rows], abs=1e-12)
    assert sequence_mean(x, mask).tolist() == pytest.approx([oracles.mean(r) for r in rows], abs=1e-12)


def test_token_mean_and_sequence_mean_weight_long_rows_differently() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_mean(x, mask).item() == 2.0
    assert sequence_mean(x, mask).mean().item() == 3.0
    assert sequence_sum(x, mask).mean().item() == 4.0


@given(batches(tensors=1), st.integers(0, 4))
def test_parts_of_a_batch_add_up_to_its_token_mean(batch: Batch, cut: int) -> None:
    (x,), mask = batch.tensors, batch.mask
    count = mask.sum().clamp(min=1)
    parts = [scaled_sum(x[rows], mask[rows], constant=count) for rows in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(parts[0] + parts[1], token_mean(x, mask))


def test_variance_of_one_token_is_zero_and_its_convention_is_bessel() -> None:
    mask = torch.tensor([[True, True, False]])
    x = torch.tensor([[0.0, 1.0, 50.0]])
    assert token_variance(x, mask).item() == 0.5
    assert token_variance(x, mask, correction=0).item() == 0.25
    assert token_variance(x, torch.tensor([[True, False, False]])).item() == 0.0


def test_select_guards_trailing_axes_by_the_mask_of_tokens() -> None:
    x = torch.full((2, 2, 3), torch.nan)
    x[0, 1] = 4.0
    mask = torch.tensor([[False, True], [False, False]])
    assert select(x, mask).sum().item() == 12.0
    square = torch.arange(8.0).reshape(2, 2, 2)
    assert select(square, mask).tolist() == [[[0, 0], [2, 3]], [[0, 0], [0, 0]]]
    with pytest.raises(ValueError, match=r"mask \[2, 2\] must match the leading axes of x \[2, 3, 2\]"):
        select(torch.zeros(2, 3, 2), mask)


def test_the_supervised_loss_is_the_negative_log_prob_of_trained_tokens() -> None:
    logp = torch.tensor([[-0.5, -2.0, math.nan]])
    loss = token_loss(logp, torch.tensor([[False, True, False]]))
    assert loss.tolist() == [[0.0, 2.0, 0.0]]
    assert not bool(loss.signbit().any())


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
def test_a_constant_that_is_not_positive_is_refused(bad: float) -> None:
    x, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"constant must be positive and finite, got {bad}"):
        scaled_sum(x, mask, constant=bad)
    with pytest.raises(ValueError, match=r"constant must be a number or a tensor \[\], got shape \[1\]"):
        scaled_sum(x, mask, constant=torch.ones(1))


def test_inputs_that_are_no_tensors_or_have_no_axis_are_refused() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="x must be a tensor, got list"):
        token_sum([[1.0, 2.0]], mask)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mask must be a bool tensor .* got list"):
        token_sum(torch.ones(1, 2), [[True, True]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"mask must have a token axis, got shape \[\]"):
        token_sum(torch.tensor(1.0), torch.tensor(True))
    for bad in (2, -1, 0.5):
        with pytest.raises(ValueError, match=f"correction must be 0 or 1, got {bad}"):
            token_variance(torch.ones(1, 2), mask, correction=bad)  # pyright: ignore[reportArgumentType]
