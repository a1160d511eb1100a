"""The clipped surrogate: truth table, dead zones, pessimism, dual clip, extreme ratios, errors."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.masked import scaled_sum, token_mean
from minirlhf.objectives.policy import clip_indicator, clipped_surrogate_loss, log_ratio, ratio
from tests.objectives import oracles
from tests.objectives.strategies import Batch, batches

LOW, HIGH, DUAL = 0.2, 0.3, 3.0


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_at(
    rho: Tensor,
    advantage: Tensor,
    low: float = LOW,
    high: float = HIGH,
    dual: float | None = None,
) -> Tensor:
    """The loss where the ratio is rho: the log-probs are log rho and 0."""
    mask = torch.ones(rho.shape, dtype=torch.bool)
    return clipped_surrogate_loss(
        rho.log(), torch.zeros_like(rho), advantage, mask, clip_low=low, clip_high=high, dual_clip=dual
    )


def slope_at(rho: Tensor, advantage: Tensor, dual: float | None = None) -> Tensor:
    """∂loss/∂logp of each element."""
    mask = torch.ones(rho.shape, dtype=torch.bool)

    def total(logp: Tensor) -> Tensor:
        zeros = torch.zeros_like(logp)
        return clipped_surrogate_loss(
            logp, zeros, advantage, mask, clip_low=LOW, clip_high=HIGH, dual_clip=dual
        ).sum()

    return grad(total)(rho.log())


# 681 ratios, the neighbourhood of every bound among them, for each of five advantages.
EDGES = [b + d for b in (1 - LOW, 1 + HIGH, DUAL) for d in (-1e-3, -1e-6, 1e-6, 1e-3)]
RHO = torch.cat([torch.linspace(0.05, 4.0, 669, dtype=torch.float64), t(*EDGES)]).repeat(5)
ADVANTAGE = t(-2.0, -1.0, 0.0, 0.5, 3.0).repeat_interleave(681)


@pytest.mark.parametrize(
    ("rho", "advantage", "objective", "slope"),
    [(1.5, 1, 1.2, 0), (1.5, -1, -1.5, -1.5), (0.5, 1, 0.5, 0.5), (0.5, -1, -0.8, 0), (1.1, 2, 2.2, 2.2)],
)
def test_surrogate_golden_truth_table(rho: float, advantage: float, objective: float, slope: float) -> None:
    mask = torch.tensor([True])

    def loss(logp: Tensor) -> Tensor:
        return clipped_surrogate_loss(logp, t(0), t(advantage), mask, clip_low=0.2, clip_high=0.2).sum()

    assert -loss(t(rho).log()).item() == pytest.approx(objective)
    assert -grad(loss)(t(rho).log()).item() == pytest.approx(slope)


@pytest.mark.parametrize(("rho", "objective", "slope"), [(5.0, -3.0, 0.0), (2.0, -2.0, -2.0)])
def test_dual_clip_golden_numbers(rho: float, objective: float, slope: float) -> None:
    assert -loss_at(t(rho), t(-1), 0.2, 0.2, 3.0).item() == pytest.approx(objective)
    assert -slope_at(t(rho), t(-1), 3.0).item() == pytest.approx(slope)


@pytest.mark.parametrize("dual", [None, DUAL])
def test_the_selected_form_equals_the_minimum_of_the_paper_on_a_grid(dual: float | None) -> None:
    pairs = zip(RHO.log().exp().tolist(), ADVANTAGE.tolist(), strict=True)
    expected = t(*(-oracles.surrogate(r, a, LOW, HIGH, dual) for r, a in pairs))
    torch.testing.assert_close(loss_at(RHO, ADVANTAGE, dual=dual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dual", [None, DUAL])
def test_the_gradient_is_minus_ratio_times_advantage_except_in_the_dead_zone(dual: float | None) -> None:
    dead = ((ADVANTAGE > 0) & (RHO > 1 + HIGH)) | ((ADVANTAGE < 0) & (RHO < 1 - LOW))
    if dual is not None:
        dead |= (ADVANTAGE < 0) & (RHO > dual)
    expected = torch.where(dead, 0.0, -RHO * ADVANTAGE)
    torch.testing.assert_close(slope_at(RHO, ADVANTAGE, dual), expected, rtol=1e-12, atol=1e-12)


def test_the_clip_indicator_is_the_dead_zone_of_the_loss() -> None:
    mask = torch.ones(RHO.shape, dtype=torch.bool)
    clipped = clip_indicator(RHO.log(), torch.zeros_like(RHO), ADVANTAGE, mask, clip_low=LOW, clip_high=HIGH)
    assert torch.equal(clipped, (slope_at(RHO, ADVANTAGE) == 0) & (ADVANTAGE != 0))
    assert 0 < clipped.double().mean().item() < 1


def test_the_widths_are_not_interchangeable() -> None:
    rho = t(1.25, 0.75)
    assert torch.equal(loss_at(rho, t(1, -1), 0.2, 0.3), t(-1.25, 0.8))
    torch.testing.assert_close(loss_at(rho, t(1, -1), 0.3, 0.2), t(-1.2, 0.75))


def test_at_ratio_one_the_gradient_is_the_policy_gradient_and_nothing_is_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(50, generator=generator, dtype=torch.float64)
    one = torch.ones_like(advantage)
    assert torch.equal(slope_at(one, advantage), -advantage)
    assert torch.equal(loss_at(one, advantage), -advantage)
    # Additive in the advantage, which a mask taken from the advantages is not.
    other = advantage.flip(0)
    torch.testing.assert_close(
        slope_at(one, advantage + other), slope_at(one, advantage) + slope_at(one, other)
    )


@given(batches(tensors=3))
def test_the_clip_only_ever_makes_the_loss_larger_and_infinity_never_clips(batch: Batch) -> None:
    logp, old_logp, advantage = batch.tensors
    plain = clipped_surrogate_loss(
        logp, old_logp, advantage, batch.mask, clip_low=math.inf, clip_high=math.inf
    )
    weighted = -ratio(logp, old_logp, batch.mask) * advantage
    torch.testing.assert_close(plain, weighted, rtol=1e-12, atol=1e-12)
    clipped = clipped_surrogate_loss(logp, old_logp, advantage, batch.mask, clip_low=LOW, clip_high=HIGH)
    assert bool((clipped >= plain - 1e-12).all())
    indicated = clip_indicator(logp, old_logp, advantage, batch.mask, clip_low=LOW, clip_high=HIGH)
    assert not bool((clipped != plain)[~indicated & ((clipped - plain).abs() > 1e-9)].any())


@given(batches(tensors=3))
def test_the_surrogate_is_homogeneous_in_the_advantage_but_not_odd(batch: Batch) -> None:
    logp, old_logp, advantage = batch.tensors

    def loss(a: Tensor) -> Tensor:
        return clipped_surrogate_loss(logp, old_logp, a, batch.mask, clip_low=LOW, clip_high=HIGH)

    torch.testing.assert_close(loss(3 * advantage), 3 * loss(advantage))
    assert not bool(loss(0 * advantage).any())
    assert loss_at(t(2.0), t(1.0)).item() != -loss_at(t(2.0), t(-1.0)).item()


@given(batches(tensors=3))
def test_the_surrogate_sees_only_the_difference_of_log_probs(batch: Batch) -> None:
    logp, old_logp, advantage = batch.tensors
    keywords = {"clip_low": LOW, "clip_high": HIGH}
    shifted = clipped_surrogate_loss(logp - 2, old_logp - 2, advantage, batch.mask, **keywords)
    torch.testing.assert_close(
        shifted, clipped_surrogate_loss(logp, old_logp, advantage, batch.mask, **keywords)
    )


def test_the_objective_is_concave_in_the_ratio() -> None:
    rho = torch.linspace(0.1, 2.9, 141, dtype=torch.float64)
    for advantage in (-1.5, 2.0):
        objective = -loss_at(rho, torch.full_like(rho, advantage))
        assert bool((objective[2:] - 2 * objective[1:-1] + objective[:-2] < 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_that_overflows_makes_no_nan_where_it_does_not_matter(dtype: torch.dtype) -> None:
    far = torch.tensor([1e4, -1e4, -1e4, 1e4, 1e4], dtype=dtype)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=dtype)
    mask = torch.ones(5, dtype=torch.bool)

    def losses(logp: Tensor) -> Tensor:
        zeros = torch.zeros_like(logp)
        return clipped_surrogate_loss(
            logp, zeros, advantage, mask, clip_low=LOW, clip_high=HIGH, dual_clip=DUAL
        )

    torch.testing.assert_close(losses(far), torch.tensor([-1 - HIGH, 0, 1 - LOW, DUAL, 0], dtype=dtype))
    assert not bool(grad(lambda x: losses(x).sum())(far).any())


def test_nan_where_it_counts_is_not_swallowed() -> None:
    for position in range(3):
        logp, old, advantage = (t(math.nan) if i == position else t(x) for i, x in enumerate((0.1, 0.0, 1.0)))
        loss = clipped_surrogate_loss(
            logp, old, advantage, torch.tensor([True]), clip_low=LOW, clip_high=HIGH, dual_clip=DUAL
        )
        assert bool(loss.isnan().all())


def test_micro_batches_add_up_to_the_batch_under_its_token_count_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, old, advantage = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    loss = clipped_surrogate_loss(logp, old, advantage, mask, clip_low=LOW, clip_high=HIGH)
    whole = token_mean(loss, mask)
    parts = [scaled_sum(loss[i : i + 1], mask[i : i + 1], constant=mask.sum()) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    means = [token_mean(loss[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert abs(((means[0] + means[1]) / 2 - whole).item()) > 1e-3


def test_ratio_is_the_exponential_of_the_log_ratio_and_one_on_the_sampling_policy() -> None:
    logp, old, mask = t(-1.0, -2.0), t(-1.5, -2.0), torch.tensor([True, True])
    assert torch.equal(log_ratio(logp, old, mask), t(0.5, 0.0))
    assert ratio(logp, old, mask).tolist() == [math.exp(0.5), 1.0]
    slopes = grad(lambda a, b: ratio(a, b, mask).sum(), argnums=(0, 1))(logp, old)
    torch.testing.assert_close(slopes[0], t(math.exp(0.5), 1.0))
    torch.testing.assert_close(slopes[1], -t(math.exp(0.5), 1.0))


def test_many_clip_widths_at_once_by_vmap() -> None:
    rho, advantage, widths = t(0.5, 1.5), t(-1.0, 1.0), t(0.1, 0.2, 0.4)
    mask = torch.ones(2, dtype=torch.bool)

    def loss(width: Tensor) -> Tensor:
        return clipped_surrogate_loss(
            rho.log(), t(0, 0), advantage, mask, clip_low=width, clip_high=width, dual_clip=1 + width * 20
        )

    looped = torch.stack([loss_at(rho, advantage, w, w, 1 + w * 20) for w in widths.tolist()])
    torch.testing.assert_close(vmap(loss)(widths), looped)


@pytest.mark.parametrize("bad", [0.0, -0.2, math.nan])
@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_a_width_that_is_not_positive_is_refused(name: str, bad: float) -> None:
    widths = {"clip_low": 0.2, "clip_high": 0.2, name: bad}
    for function in (clipped_surrogate_loss, clip_indicator):
        with pytest.raises(ValueError, match=f"{name} must be positive, got {bad}"):
            function(t(0), t(0), t(1), torch.tensor([True]), **widths)


@pytest.mark.parametrize("bad", [1.0, 0.5])
def test_a_dual_clip_that_would_cut_into_the_surrogate_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=f"dual_clip must be above 1, got {bad}"):
        loss_at(t(1.0), t(1.0), dual=bad)
    with pytest.raises(ValueError, match="dual_clip must be positive and finite, got nan"):
        loss_at(t(1.0), t(1.0), dual=math.nan)
