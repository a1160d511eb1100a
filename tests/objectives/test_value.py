"""The critic's losses and the explained variance."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import grad

from minirlhf.objectives.value import clipped_value_loss, explained_variance, value_loss
from tests.objectives import oracles
from tests.objectives.strategies import Batch, batches


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """(value, old value, return), stratified so that every region of the clip is met on both sides."""
    points = torch.cartesian_prod(
        t(0.5, 0.19, 0.01, -0.01, -0.19, -0.5), t(-1.0, 0.0, 2.0), t(1, 0.3, -0.3, -1)
    )
    old = points[:, 1]
    return old + points[:, 0], old, old + points[:, 2]


@pytest.mark.parametrize(("ret", "loss", "slope"), [(1.0, 0.32, 0.0), (-1.0, 1.125, 1.5)])
def test_clipped_value_loss_golden_numbers(ret: float, loss: float, slope: float) -> None:
    def call(v: Tensor) -> Tensor:
        return clipped_value_loss(v, t(0.0), t(ret), torch.tensor([True]), clip=0.2).sum()

    assert call(t(0.5)).item() == pytest.approx(loss)
    assert grad(call)(t(0.5)).item() == pytest.approx(slope)


def test_value_loss_is_half_the_squared_error() -> None:
    mask = torch.tensor([True, True, False])
    loss = value_loss(t(0.5, 2.0, 7.0), t(0.0, 1.0, 0.0), mask)
    assert loss.tolist() == [0.125, 0.5, 0.0]
    slope = grad(lambda v: value_loss(v, t(0.0, 1.0, 0.0), mask).sum())(t(0.5, 2.0, 7.0))
    assert slope.tolist() == [0.5, 1.0, 0.0]


def test_clipped_value_loss_equals_the_scalar_oracle_on_a_stratified_grid() -> None:
    value, old, ret = grid()
    rows = zip(value.tolist(), old.tolist(), ret.tolist(), strict=True)
    expected = t(*(oracles.clipped_value(*row, 0.2) for row in rows))
    mask = torch.ones(value.shape, dtype=torch.bool)
    got = clipped_value_loss(value, old, ret, mask, clip=0.2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_clipped_value_gradient_dies_exactly_where_the_clipped_error_is_larger() -> None:
    value, old, ret = grid()
    mask = torch.ones(value.shape, dtype=torch.bool)
    slope = grad(lambda v: clipped_value_loss(v, old, ret, mask, clip=0.2).sum())(value)
    near = old + (value - old).clamp(-0.2, 0.2)
    dead = ((value - old).abs() > 0.2) & ((near - ret).square() > (value - ret).square())
    torch.testing.assert_close(slope, torch.where(dead, 0.0, value - ret), rtol=1e-9, atol=1e-12)
    assert bool(dead.any()) and not bool(dead.all())


@given(batches(tensors=3))
def test_clipped_value_loss_is_pessimistic_and_reduces_to_the_plain_one(batch: Batch) -> None:
    value, old, ret = batch.tensors
    plain = value_loss(value, ret, batch.mask)
    clipped = clipped_value_loss(value, old, ret, batch.mask, clip=0.3)
    assert bool((clipped >= plain).all())
    assert torch.equal(clipped_value_loss(value, old, ret, batch.mask, clip=math.inf), plain)
    assert torch.equal(clipped_value_loss(value, value, ret, batch.mask, clip=0.3), plain)


@given(batches(tensors=3))
def test_clipped_value_loss_is_translation_invariant_and_quadratic(batch: Batch) -> None:
    value, old, ret = batch.tensors
    loss = clipped_value_loss(value, old, ret, batch.mask, clip=0.25)
    shifted = clipped_value_loss(value + 2, old + 2, ret + 2, batch.mask, clip=0.25)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)
    scaled = clipped_value_loss(2 * value, 2 * old, 2 * ret, batch.mask, clip=0.5)
    torch.testing.assert_close(scaled, 4 * loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_value_clip_that_is_not_positive_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=f"clip must be positive, got {bad}"):
        clipped_value_loss(t(0), t(0), t(0), torch.tensor([True]), clip=bad)


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic() -> None:
    ret, mask = t(1.0, 2.0, 4.0, 99.0)[None], torch.tensor([[True, True, True, False]])
    assert explained_variance(ret, ret, mask).item() == 1.0
    assert explained_variance(ret + 5, ret, mask).item() == pytest.approx(1.0)  # the bias is not variance
    assert explained_variance(torch.full_like(ret, 3.0), ret, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-ret, ret, mask).item() == pytest.approx(-3.0)


def test_explained_variance_is_zero_where_there_is_nothing_to_explain() -> None:
    ret, mask = t(2.0, 2.0, 9.0)[None], torch.tensor([[True, True, False]])
    assert explained_variance(t(1.0, 3.0, 0.0)[None], ret, mask).item() == 0.0
    assert explained_variance(ret, ret, torch.tensor([[True, False, False]])).item() == 0.0


@given(batches(tensors=2))
def test_explained_variance_equals_its_definition(batch: Batch) -> None:
    value, ret = batch.tensors
    counted, errors = ret[batch.mask].tolist(), (ret - value)[batch.mask].tolist()
    spread = oracles.variance(counted, 1)
    expected = 1 - oracles.variance(errors, 1) / spread if spread > 0 else 0.0
    assert explained_variance(value, ret, batch.mask).item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
