"""Importance weights: exact expectations by enumeration, what truncation and masking cost, errors."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import grad, jacrev, vmap

from minirlhf.objectives.importance import masked_importance_weight, truncated_importance_weight
from minirlhf.objectives.policy import ratio
from tests.objectives.assertions import close
from tests.objectives.enumeration import (
    MASK,
    REFERENCE,
    REWARD,
    SEQUENCES,
    another_policy,
    sequence_logp,
    token_logp,
)
from tests.objectives.strategies import Batch, batches

POLICY = another_policy()
WHOLE = torch.ones(len(SEQUENCES), dtype=torch.bool)
BEHAVIOUR = sequence_logp(REFERENCE)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_weights() -> None:
    logp, mask = t(1.5, 0.5, 4.0, 0.1).log(), torch.tensor([True, True, True, True])
    behaviour = torch.zeros_like(logp)
    assert truncated_importance_weight(logp, behaviour, mask, cap=2.0).tolist() == pytest.approx(
        [1.5, 0.5, 2.0, 0.1]
    )
    assert masked_importance_weight(
        logp, behaviour, mask, low=0.5 - 1e-9, high=2.0
    ).tolist() == pytest.approx([1.5, 0.5, 0.0, 0.0])


@given(batches(tensors=2))
def test_weights_equal_python_over_the_tokens_that_count(batch: Batch) -> None:
    (logp, behaviour), mask = batch.tensors, batch.mask
    truncated = truncated_importance_weight(logp, behaviour, mask, cap=1.5)
    banded = masked_importance_weight(logp, behaviour, mask, low=0.5, high=2.0)
    rho = [math.exp(a - b) for a, b in zip(logp[mask].tolist(), behaviour[mask].tolist(), strict=True)]
    close(truncated[mask], t(*(min(r, 1.5) for r in rho)))
    close(banded[mask], t(*(r if 0.5 <= r <= 2.0 else 0.0 for r in rho)))
    assert bool((truncated <= 1.5).all()) and bool((truncated >= 0).all())
    assert bool(((banded == 0) | ((banded >= 0.5) & (banded <= 2.0))).all())


@given(batches(tensors=2))
def test_without_bounds_both_are_the_plain_ratio(batch: Batch) -> None:
    logp, behaviour = batch.tensors
    plain = ratio(logp, behaviour, batch.mask)
    assert torch.equal(truncated_importance_weight(logp, behaviour, batch.mask, cap=math.inf), plain)
    assert torch.equal(masked_importance_weight(logp, behaviour, batch.mask, low=0, high=math.inf), plain)


@given(batches(tensors=1))
def test_where_the_policies_agree_every_weight_is_one(batch: Batch) -> None:
    (logp,), mask = batch.tensors, batch.mask
    assert torch.equal(truncated_importance_weight(logp, logp, mask, cap=1.0), mask.double())
    assert torch.equal(masked_importance_weight(logp, logp, mask, low=1.0, high=1.0), mask.double())


def test_both_bounds_belong_to_the_band() -> None:
    logp, mask = t(math.log(2), math.log(2)), torch.tensor([True, True])
    zero = torch.zeros_like(logp)
    two = math.exp(math.log(2))
    assert masked_importance_weight(logp, zero, mask, low=two, high=two).tolist() == [two, two]
    assert masked_importance_weight(logp, zero, mask, low=0.0, high=1.999).tolist() == [0.0, 0.0]
    assert masked_importance_weight(logp, zero, mask, low=2.001, high=3.0).tolist() == [0.0, 0.0]


def test_the_weights_get_no_gradient() -> None:
    logp, behaviour, mask = t(0.3, -0.4), t(0.0, 0.0), torch.tensor([True, True])
    for weight in (
        lambda a, b: truncated_importance_weight(a, b, mask, cap=5.0),
        lambda a, b: masked_importance_weight(a, b, mask, low=0.1, high=5.0),
    ):
        for slope in grad(lambda a, b, w=weight: w(a, b).sum(), argnums=(0, 1))(logp, behaviour):
            assert not bool(slope.any())
        # As a constant in a loss: the gradient is the weight times that of the loss.
        product = grad(lambda a, w=weight: (w(a, behaviour) * a.square()).sum())(logp)
        close(product, weight(logp, behaviour) * 2 * logp)


# expectations, by enumeration


def policy_gradient(weight: Tensor) -> Tensor:
    """E_behaviour[w r ∇log π] with the weights held fixed."""
    return grad(lambda z: (BEHAVIOUR.exp() * weight * REWARD * sequence_logp(z)).sum())(POLICY)


def test_the_plain_ratio_gives_the_policy_gradient_from_the_samples_of_another_policy() -> None:
    exact = grad(lambda z: (sequence_logp(z).exp() * REWARD).sum())(POLICY)
    weight = truncated_importance_weight(sequence_logp(POLICY), BEHAVIOUR, WHOLE, cap=math.inf)
    close(policy_gradient(weight), exact)
    without = policy_gradient(torch.ones_like(weight))
    assert (without - exact).norm().item() > 0.1
    close((BEHAVIOUR.exp() * weight).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_product_of_token_weights_is_the_weight_of_the_sequence() -> None:
    per_token = truncated_importance_weight(token_logp(POLICY), token_logp(REFERENCE), MASK, cap=math.inf)
    product = torch.where(MASK, per_token, 1.0).prod(dim=-1)
    close(product, truncated_importance_weight(sequence_logp(POLICY), BEHAVIOUR, WHOLE, cap=math.inf))


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 5.0])
def test_truncation_costs_the_mass_above_the_cap_and_its_bias_is_bounded_by_it(cap: float) -> None:
    rho = (sequence_logp(POLICY) - BEHAVIOUR).exp()
    weight = truncated_importance_weight(sequence_logp(POLICY), BEHAVIOUR, WHOLE, cap=cap)
    lost = (BEHAVIOUR.exp() * (rho - cap).clamp(min=0)).sum()
    assert 1 - (BEHAVIOUR.exp() * weight).sum().item() == pytest.approx(lost.item(), abs=1e-12)
    exact = policy_gradient(rho)
    bias = (policy_gradient(weight) - exact).norm().item()
    scores = jacrev(sequence_logp)(POLICY)
    largest = (REWARD.abs() * scores.flatten(1).norm(dim=-1)).max().item()
    assert bias <= lost.item() * largest + 1e-12
    assert (bias < 1e-12) == (cap >= rho.max().item())


def test_masking_drops_exactly_the_sequences_outside_the_band() -> None:
    rho = (sequence_logp(POLICY) - BEHAVIOUR).exp()
    weight = masked_importance_weight(sequence_logp(POLICY), BEHAVIOUR, WHOLE, low=0.5, high=2.0)
    outside = (rho < 0.5) | (rho > 2.0)
    assert 0 < outside.sum().item() < len(rho)
    mass = (sequence_logp(POLICY).exp() * ~outside).sum().item()
    assert (BEHAVIOUR.exp() * weight).sum().item() == pytest.approx(mass, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_ratios_are_cut_or_dropped_not_overflown(dtype: torch.dtype) -> None:
    logp, mask = torch.tensor([1e4, 200.0, -200.0, -1e4], dtype=dtype), torch.ones(4, dtype=torch.bool)
    zero = torch.zeros_like(logp)
    truncated = truncated_importance_weight(logp, zero, mask, cap=2.0)
    torch.testing.assert_close(truncated, torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=dtype))
    assert not bool(masked_importance_weight(logp, zero, mask, low=0.5, high=2.0).any())
    slope = grad(lambda x: (truncated_importance_weight(x, zero, mask, cap=2.0) * x).sum())(logp)
    torch.testing.assert_close(slope, truncated)


def test_nan_where_it_counts_does_not_pass_as_a_weight_of_a_kept_token() -> None:
    logp, mask = t(math.nan, 0.0), torch.tensor([True, True])
    zero = torch.zeros_like(logp)
    assert truncated_importance_weight(logp, zero, mask, cap=2.0).isnan().tolist() == [True, False]


def test_bounds_may_be_tensors_and_many_run_at_once() -> None:
    logp, mask = t(1.5, 0.5, 4.0, 0.1).log(), torch.ones(4, dtype=torch.bool)
    zero, grid = torch.zeros_like(logp), t(0.3, 1.2, 2.5)
    for call in (
        lambda x: truncated_importance_weight(logp, zero, mask, cap=x),
        lambda x: masked_importance_weight(logp, zero, mask, low=0.2, high=x),
        lambda x: masked_importance_weight(logp, zero, mask, low=x, high=9.0),
    ):
        looped = torch.stack([call(x) for x in grid.tolist()])
        close(vmap(call)(grid), looped)
        assert not torch.equal(looped[0], looped[-1])


def test_bounds_out_of_range_are_refused() -> None:
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"cap must be positive, got {bad}"):
            truncated_importance_weight(logp, logp, mask, cap=bad)
        with pytest.raises(ValueError, match=f"high must be positive, got {bad}"):
            masked_importance_weight(logp, logp, mask, low=0.0, high=bad)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"low must be at least 0 and finite, got {bad}"):
            masked_importance_weight(logp, logp, mask, low=bad, high=2.0)
    with pytest.raises(ValueError, match=r"low must be at most high = 0.5, got 2.0"):
        masked_importance_weight(logp, logp, mask, low=2.0, high=0.5)
