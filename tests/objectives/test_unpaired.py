"""KTO: golden numbers, closed-form gradients, the reference point, batches of one kind, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from minirlhf.objectives.unpaired import kto_loss, kto_reference_point
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.strategies import numbers


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


logps = numbers(4, low=-40, high=0)
labels = st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor)
betas = st.sampled_from([0.01, 0.1, 1.0])
points = st.sampled_from([0.0, 0.2, 3.0]).map(lambda x: torch.tensor(x, dtype=torch.float64))
BOTH = torch.tensor([True, False])
Z = torch.tensor(0.2, dtype=torch.float64)


def test_kto_golden_numbers() -> None:
    loss = kto_loss(t(-10, -10), t(-15, -15), BOTH, Z, beta=0.1)
    assert loss.tolist() == pytest.approx([0.382252, 0.617748], abs=5e-7)
    weighted = kto_loss(
        t(-10, -10), t(-15, -15), BOTH, Z, beta=0.1, desirable_weight=2, undesirable_weight=0.5
    )
    assert weighted.tolist() == pytest.approx([2 * 0.382252, 0.5 * 0.617748], abs=1e-6)


@given(logps, logps, labels, points, betas, st.sampled_from([0.5, 1.0, 4 / 3]), st.sampled_from([0.0, 1.0]))
def test_kto_equals_the_scalar_oracle(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> None:
    got = kto_loss(
        logp,
        ref_logp,
        desirable,
        kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    rows = zip(logp.tolist(), ref_logp.tolist(), desirable.tolist(), strict=True)
    expected = [
        oracles.kto(a, b, d, kl.item(), beta, desirable_weight if d else undesirable_weight)
        for a, b, d in rows
    ]
    close(got, t(*expected))


@given(logps, logps, labels, points, betas)
def test_kto_gradient_is_the_slope_of_the_logistic_and_bounded(
    logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor, beta: float
) -> None:
    def loss(a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return kto_loss(a, b, desirable, z, beta=beta, desirable_weight=1.25, undesirable_weight=0.75).sum()

    by_logp, by_ref, by_point = grad(loss, argnums=(0, 1, 2))(logp, ref_logp, kl)
    p = torch.sigmoid(beta * (logp - ref_logp - kl))
    sign = torch.where(desirable, t(-1.25), t(0.75))
    close(by_logp, sign * beta * p * (1 - p))
    close(by_ref, -by_logp)
    assert by_point.item() == 0.0, "the reference point gets no gradient"
    assert bool((by_logp.abs() <= sign.abs() * beta / 4 + 1e-15).all())


def test_kto_is_one_half_at_the_reference_point_with_the_steepest_slope() -> None:
    logp, ref_logp = t(-3.0, -3.0), t(-3.2, -3.2)  # s = 0.2 = z₀
    close(kto_loss(logp, ref_logp, BOTH, Z, beta=0.1), t(0.5, 0.5))
    slope = grad(lambda x: kto_loss(x, ref_logp, BOTH, Z, beta=0.1).sum())(logp)
    close(slope, t(-0.025, 0.025))


@given(logps, logps, labels, points)
def test_a_desirable_response_is_the_mirror_image_of_an_undesirable_one(
    logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor
) -> None:
    loss = kto_loss(logp, ref_logp, desirable, kl, beta=0.3)
    s = logp - ref_logp
    reflected = kto_loss(ref_logp + 2 * kl - s, ref_logp, ~desirable, kl, beta=0.3)
    close(reflected, loss)
    close(kto_loss(logp, ref_logp, ~desirable, kl, beta=0.3), 1 - loss)


def test_a_batch_of_one_kind_is_finite_and_the_other_weight_does_nothing() -> None:
    logp, ref_logp = t(-3.0, -5.0), t(-4.0, -4.0)
    for kind in (True, False):
        labels = torch.tensor([kind, kind])

        def loss(x: Tensor, weight: float, labels: Tensor = labels, kind: bool = kind) -> Tensor:
            ours, other = ("desirable_weight", "undesirable_weight")[:: 1 if kind else -1]
            return kto_loss(x, ref_logp, labels, Z, beta=0.1, **{ours: 1.0, other: weight})

        assert bool(loss(logp, 1.0).isfinite().all())
        assert torch.equal(loss(logp, 0.0), loss(logp, 7.0))
        assert bool(grad(lambda x, f=loss: f(x, 1.0).sum())(logp).isfinite().all())


def test_a_small_kto_loss_keeps_its_digits_in_fp32() -> None:
    zeros = torch.zeros(2)
    loss = kto_loss(torch.tensor([30.0, -30.0]), zeros, BOTH, torch.tensor(0.0), beta=1.0)
    torch.testing.assert_close(loss, torch.full((2,), math.exp(-30.0)), rtol=1e-6, atol=0.0)


def test_the_reference_point_is_the_mean_log_ratio_and_never_negative() -> None:
    assert kto_reference_point(t(-10, -12), t(-11, -11.5)).item() == 0.25
    assert kto_reference_point(t(-10, -12), t(-9, -11.5)).item() == 0.0
    # Clamped as a whole, not each: a part below 0 counts.
    assert kto_reference_point(t(4.0, -2.0), t(0.0, 0.0)).item() == 1.0
    assert kto_reference_point(torch.ones(3).bfloat16(), torch.zeros(3).bfloat16()).dtype == torch.float32


def test_the_reference_point_gets_no_gradient_anywhere() -> None:
    logp, ref_logp = t(-10, -12), t(-11, -11.5)
    slopes = grad(kto_reference_point, argnums=(0, 1))(logp, ref_logp)
    assert not any(bool(slope.any()) for slope in slopes)

    def loss(x: Tensor, through: bool) -> Tensor:
        point = kto_reference_point(x, ref_logp) if through else torch.tensor(0.25, dtype=torch.float64)
        return kto_loss(x, ref_logp, BOTH, point, beta=0.5).sum()

    close(grad(lambda x: loss(x, True))(logp), grad(lambda x: loss(x, False))(logp))

    def undetached(x: Tensor) -> Tensor:
        return kto_loss(x, ref_logp, BOTH, (x - ref_logp).mean(), beta=0.5).sum()

    close(grad(undetached)(logp), grad(lambda x: loss(x, False))(logp))


def test_one_reference_point_serves_the_whole_batch() -> None:
    logp, ref_logp = t(-3.0, -5.0), t(-4.0, -4.0)
    assert torch.equal(
        kto_loss(logp, ref_logp, BOTH, Z, beta=0.1)[:1],
        kto_loss(logp[:1], ref_logp[:1], BOTH[:1], Z, beta=0.1),
    )
    further = kto_loss(logp, ref_logp, BOTH, Z + 1, beta=0.1)
    shifted = kto_loss(logp - 1, ref_logp, BOTH, Z, beta=0.1)
    close(further, shifted)


def test_kto_names_what_is_wrong() -> None:
    logp, ref_logp = t(-3.0, -5.0), t(-4.0, -4.0)
    with pytest.raises(ValueError, match=r"desirable must be a bool tensor .* got torch.int64"):
        kto_loss(logp, ref_logp, torch.tensor([1, 0]), Z, beta=0.1)
    with pytest.raises(ValueError, match=r"desirable must be a bool tensor .* got list"):
        kto_loss(logp, ref_logp, [True, False], Z, beta=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"logp \[2\], ref_logp \[2\], desirable \[1\]"):
        kto_loss(logp, ref_logp, torch.tensor([True]), Z, beta=0.1)
    with pytest.raises(ValueError, match=r"kl must be a tensor \[\], got shape \[2\]"):
        kto_loss(logp, ref_logp, BOTH, logp, beta=0.1)
    with pytest.raises(ValueError, match="kl must be a tensor, got float"):
        kto_loss(logp, ref_logp, BOTH, 0.2, beta=0.1)  # pyright: ignore[reportArgumentType]
    for bad in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"beta must be positive and finite, got {bad}"):
            kto_loss(logp, ref_logp, BOTH, Z, beta=bad)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got -1"):
            kto_loss(logp, ref_logp, BOTH, Z, beta=0.1, **{name: -1.0})


def test_a_reference_point_of_nothing_or_of_unequal_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logp must hold at least one sequence, got shape \[0\]"):
        kto_reference_point(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"got logp \[2\], ref_logp \[1\]"):
        kto_reference_point(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="ref_logp must be a floating-point tensor, got torch.int64"):
        kto_reference_point(torch.zeros(2), torch.tensor([0, 0]))
