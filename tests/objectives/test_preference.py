"""DPO, conservative and robust DPO, hinge and IPO: golden numbers, gradients, identities, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.preference import (
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    ipo_summed_loss,
    robust_dpo_loss,
)
from minirlhf.objectives.ranking import bradley_terry_loss
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.strategies import numbers


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIR = (t(-10.0), t(-12.0), t(-15.0), t(-11.0))
Four = tuple[Tensor, Tensor, Tensor, Tensor]
rows_of_logps = numbers(3, low=-40, high=0)
quadruples = st.tuples(rows_of_logps, rows_of_logps, rows_of_logps, rows_of_logps)
betas = st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0])
smoothings = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.49])


# DPO


def test_dpo_golden_pair() -> None:
    assert implicit_reward(PAIR[0], PAIR[2], beta=0.1).item() == pytest.approx(0.5)
    assert implicit_reward(PAIR[1], PAIR[3], beta=0.1).item() == pytest.approx(-0.1)
    for beta, loss in ((0.1, 0.437488), (0.01, 0.663597), (0.5, 0.048587), (1.0, 0.002476)):
        assert dpo_loss(*PAIR, beta=beta).item() == pytest.approx(loss, abs=5e-7)
    slopes = grad(lambda a, b, c, d: dpo_loss(a, b, c, d, beta=0.1).sum(), argnums=(0, 1, 2, 3))(*PAIR)
    golden = (-0.035434, 0.035434, 0.035434, -0.035434)
    assert [s.item() for s in slopes] == pytest.approx(golden, abs=5e-7)


@given(quadruples, betas, smoothings)
def test_dpo_and_conservative_dpo_equal_the_scalar_oracle(logps: Four, beta: float, smoothing: float) -> None:
    rows = torch.stack(logps, dim=-1).tolist()
    plain = t(*(oracles.dpo(*row, beta=beta) for row in rows))
    torch.testing.assert_close(dpo_loss(*logps, beta=beta), plain, rtol=1e-12, atol=1e-12)
    smooth = t(*(oracles.conservative_dpo(*row, beta=beta, smoothing=smoothing) for row in rows))
    got = conservative_dpo_loss(*logps, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(got, smooth, rtol=1e-12, atol=1e-12)


@given(quadruples, betas)
def test_dpo_is_bradley_terry_on_implicit_rewards(logps: Four, beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    rewards = (
        implicit_reward(chosen, ref_chosen, beta=beta),
        implicit_reward(rejected, ref_rejected, beta=beta),
    )
    expected = bradley_terry_loss(*rewards)
    torch.testing.assert_close(dpo_loss(*logps, beta=beta), expected, rtol=1e-12, atol=1e-12)


@given(quadruples, betas)
def test_dpo_swap_identity(logps: Four, beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=beta)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(dpo_loss(*logps, beta=beta) - swapped, -beta * h, rtol=1e-9, atol=1e-9)


@given(quadruples, betas, st.sampled_from([(0, 1), (2, 3), (0, 2), (1, 3)]))
def test_dpo_ignores_constants_of_the_prompt_and_of_a_response(
    logps: Four, beta: float, pair: tuple[int, int]
) -> None:
    a, b, c, d = (x + 2.5 if i in pair else x for i, x in enumerate(logps))
    torch.testing.assert_close(dpo_loss(a, b, c, d, beta=beta), dpo_loss(*logps, beta=beta))


@given(quadruples, betas)
def test_dpo_depends_on_beta_times_the_margin_only(logps: Four, beta: float) -> None:
    a, b, c, d = (x / 2 for x in logps)
    halved = dpo_loss(a, b, c, d, beta=2 * beta)
    torch.testing.assert_close(halved, dpo_loss(*logps, beta=beta))


@given(quadruples, betas)
def test_dpo_gradient_is_beta_times_the_probability_of_error(logps: Four, beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    expected = -beta * torch.sigmoid(-beta * h)
    slopes = grad(lambda a, b, c, d: dpo_loss(a, b, c, d, beta=beta).sum(), argnums=(0, 1))(*logps)
    torch.testing.assert_close(slopes[0], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes[1], -expected, rtol=1e-9, atol=1e-12)


def test_dpo_is_log_two_where_policy_and_reference_agree_and_sees_the_reference() -> None:
    logp = t(-3.0, -7.0)
    same = dpo_loss(logp, logp - 4, logp, logp - 4, beta=0.3)
    torch.testing.assert_close(same, torch.full_like(logp, math.log(2)))
    assert not torch.equal(dpo_loss(logp, logp - 4, logp - 1, logp - 4, beta=0.3), same)


def test_one_step_down_the_dpo_loss_raises_the_margin() -> None:
    slopes = grad(lambda c, r: dpo_loss(c, r, *PAIR[2:], beta=0.1).sum(), argnums=(0, 1))(*PAIR[:2])
    chosen, rejected = PAIR[0] - slopes[0], PAIR[1] - slopes[1]
    assert (chosen - rejected).item() > (PAIR[0] - PAIR[1]).item()


def test_many_betas_at_once_by_vmap() -> None:
    grid = t(0.01, 0.1, 1.0)
    looped = torch.stack([dpo_loss(*PAIR, beta=b) for b in grid.tolist()])
    torch.testing.assert_close(vmap(lambda b: dpo_loss(*PAIR, beta=b))(grid), looped)
    ipo_looped = torch.stack([ipo_summed_loss(*PAIR, tau=b) for b in grid.tolist()])
    torch.testing.assert_close(vmap(lambda b: ipo_summed_loss(*PAIR, tau=b))(grid), ipo_looped)


# conservative DPO


def test_conservative_dpo_golden_pair_and_reduction_to_dpo() -> None:
    smooth = conservative_dpo_loss(*PAIR, beta=0.1, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.497488, abs=5e-7)
    assert torch.equal(conservative_dpo_loss(*PAIR, beta=0.1, label_smoothing=0), dpo_loss(*PAIR, beta=0.1))


@pytest.mark.parametrize(("smoothing", "least"), [(0.05, 0.1985), (0.1, 0.3251), (0.3, 0.6109)])
def test_conservative_dpo_has_its_minimum_at_the_log_odds_over_beta(smoothing: float, least: float) -> None:
    best, zero = t(math.log((1 - smoothing) / smoothing) / 0.2), t(0.0)

    def loss(h: Tensor) -> Tensor:
        return conservative_dpo_loss(h, zero, zero, zero, beta=0.2, label_smoothing=smoothing).sum()

    assert grad(loss)(best).abs().item() < 1e-15
    assert round(loss(best).item(), 4) == least
    assert grad(loss)(best - 0.5).item() < 0 < grad(loss)(best + 0.5).item()


# robust DPO


def test_robust_dpo_golden_pair_and_reduction_to_dpo() -> None:
    robust = robust_dpo_loss(*PAIR, beta=0.1, label_smoothing=0.1)
    assert robust.item() == pytest.approx(0.362488, abs=5e-7)
    assert torch.equal(robust_dpo_loss(*PAIR, beta=0.1, label_smoothing=0), dpo_loss(*PAIR, beta=0.1))
    # It has no lower bound: at a larger margin it is negative.
    assert robust_dpo_loss(*PAIR, beta=0.5, label_smoothing=0.1).item() == pytest.approx(-0.326413, abs=5e-7)


@given(quadruples, betas, smoothings)
def test_robust_dpo_equals_the_scalar_oracle(logps: Four, beta: float, smoothing: float) -> None:
    rows = torch.stack(logps, dim=-1).tolist()
    expected = t(*(oracles.robust_dpo(*row, beta=beta, smoothing=smoothing) for row in rows))
    close(robust_dpo_loss(*logps, beta=beta, label_smoothing=smoothing), expected)


@given(quadruples, betas, smoothings)
def test_the_expectation_of_robust_dpo_under_flipped_labels_is_the_clean_loss(
    logps: Four, beta: float, smoothing: float
) -> None:
    def noisy(chosen: Tensor, rejected: Tensor) -> Tensor:
        kept = robust_dpo_loss(chosen, rejected, *logps[2:], beta=beta, label_smoothing=smoothing)
        flipped = robust_dpo_loss(rejected, chosen, logps[3], logps[2], beta=beta, label_smoothing=smoothing)
        return (1 - smoothing) * kept + smoothing * flipped

    close(noisy(*logps[:2]), dpo_loss(*logps, beta=beta))
    slopes = grad(lambda c, r: noisy(c, r).sum(), argnums=(0, 1))(*logps[:2])
    clean = grad(lambda c, r: dpo_loss(c, r, *logps[2:], beta=beta).sum(), argnums=(0, 1))(*logps[:2])
    close(slopes, clean)


def test_the_expectation_of_conservative_dpo_under_flipped_labels_is_not_the_clean_loss() -> None:
    a, b, c, d = PAIR
    kept = conservative_dpo_loss(a, b, c, d, beta=0.1, label_smoothing=0.1)
    flipped = conservative_dpo_loss(b, a, d, c, beta=0.1, label_smoothing=0.1)
    assert abs((0.9 * kept + 0.1 * flipped - dpo_loss(*PAIR, beta=0.1)).item()) > 0.1


@given(quadruples, betas, smoothings)
def test_robust_dpo_gradient_never_changes_sign(logps: Four, beta: float, smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = -beta * ((1 - smoothing) * torch.sigmoid(-x) + smoothing * torch.sigmoid(x))
    expected = expected / (1 - 2 * smoothing)

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return robust_dpo_loss(a, b, c, d, beta=beta, label_smoothing=smoothing).sum()

    slopes = grad(loss, argnums=(0, 1, 2, 3))(*logps)
    close(slopes, (expected, -expected, -expected, expected))
    assert bool((slopes[0] < 0).all())


# hinge


def test_hinge_golden_pair() -> None:
    assert hinge_loss(*PAIR, beta=0.1).item() == pytest.approx(0.4)
    slopes = grad(lambda a, b, c, d: hinge_loss(a, b, c, d, beta=0.1).sum(), argnums=(0, 1, 2, 3))(*PAIR)
    assert [s.item() for s in slopes] == [-0.1, 0.1, 0.1, -0.1]
    assert hinge_loss(*PAIR, beta=0.5).item() == 0.0


@given(quadruples, betas)
def test_hinge_equals_the_scalar_oracle(logps: Four, beta: float) -> None:
    rows = torch.stack(logps, dim=-1).tolist()
    close(hinge_loss(*logps, beta=beta), t(*(oracles.hinge(*row, beta=beta) for row in rows)))


@given(quadruples, betas)
def test_hinge_gradient_is_minus_beta_until_the_margin_is_reached_and_zero_from_there(
    logps: Four, beta: float
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    short = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)) < 1
    slopes = grad(lambda a, b, c, d: hinge_loss(a, b, c, d, beta=beta).sum(), argnums=(0, 1, 2, 3))(*logps)
    expected = torch.where(short, -beta, torch.zeros_like(chosen))
    close(slopes, (expected, -expected, -expected, expected))


def test_hinge_leaves_a_pair_alone_from_a_margin_of_one_over_beta_on() -> None:
    zero = t(0.0)
    for h, loss, slope in ((3.999, 0.00025, -0.25), (4.0, 0.0, 0.0), (4.001, 0.0, 0.0), (-2.0, 1.5, -0.25)):
        assert hinge_loss(t(h), zero, zero, zero, beta=0.25).item() == pytest.approx(loss, abs=1e-12)
        got = grad(lambda x: hinge_loss(x, zero, zero, zero, beta=0.25).sum())(t(h))
        assert got.item() == slope


@given(quadruples, betas)
def test_hinge_and_dpo_differ_by_at_most_one_and_order_pairs_alike(logps: Four, beta: float) -> None:
    # softplus(-x) lies between max(0, -x) and max(0, 1 - x).
    difference = hinge_loss(*logps, beta=beta) - dpo_loss(*logps, beta=beta)
    assert bool((difference <= 1).all()) and bool((difference >= -math.log(1 + math.exp(-1))).all())


# IPO


def test_ipo_golden_pair() -> None:
    assert ipo_summed_loss(*PAIR, tau=0.1).item() == pytest.approx(1.0)
    slopes = grad(lambda a, b, c, d: ipo_summed_loss(a, b, c, d, tau=0.1).sum(), argnums=(0, 1, 2, 3))(*PAIR)
    assert [s.item() for s in slopes] == pytest.approx([2.0, -2.0, -2.0, 2.0])


lengths = st.lists(st.integers(1, 20), min_size=3, max_size=3).map(torch.tensor)


@given(quadruples, lengths, lengths, betas)
def test_ipo_equals_the_scalar_oracle(
    logps: Four, chosen_length: Tensor, rejected_length: Tensor, tau: float
) -> None:
    rows = torch.stack(logps, dim=-1).tolist()
    summed = t(*(oracles.ipo(*row, tau=tau) for row in rows))
    torch.testing.assert_close(ipo_summed_loss(*logps, tau=tau), summed, rtol=1e-12, atol=1e-12)
    pairs = list(zip(chosen_length.tolist(), rejected_length.tolist(), strict=True))
    averaged = t(*(oracles.ipo(*row, tau=tau, lengths=pair) for row, pair in zip(rows, pairs, strict=True)))
    got = ipo_loss(*logps, chosen_length, rejected_length, tau=tau)
    torch.testing.assert_close(got, averaged, rtol=1e-12, atol=1e-12)


@given(quadruples, lengths, lengths, st.integers(2, 5))
def test_averaged_ipo_does_not_change_when_every_token_is_repeated(
    logps: Four, chosen_length: Tensor, rejected_length: Tensor, times: int
) -> None:
    once = ipo_loss(*logps, chosen_length, rejected_length, tau=0.3)
    a, b, c, d = (times * x for x in logps)
    repeated = ipo_loss(a, b, c, d, times * chosen_length, times * rejected_length, tau=0.3)
    torch.testing.assert_close(repeated, once)


def test_averaged_and_summed_ipo_agree_on_single_tokens_only() -> None:
    one, two = torch.ones(1, dtype=torch.int64), torch.full((1,), 2)
    assert torch.equal(ipo_loss(*PAIR, one, one, tau=0.1), ipo_summed_loss(*PAIR, tau=0.1))
    assert ipo_loss(*PAIR, two, one, tau=0.1).item() != ipo_loss(*PAIR, one, two, tau=0.1).item()


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 1.0])
def test_ipo_gradient_vanishes_at_the_target_margin_and_restores_on_both_sides(tau: float) -> None:
    zero, target = t(0.0), t(1 / (2 * tau))

    def slope(h: Tensor) -> float:
        return grad(lambda x: ipo_summed_loss(x, zero, zero, zero, tau=tau).sum())(h).item()

    assert slope(target) == 0.0
    for distance in (1e-3, 1.0, 100.0):
        assert slope(target + distance) == pytest.approx(2 * distance, rel=1e-6)
        assert slope(target - distance) == pytest.approx(-2 * distance, rel=1e-6)


@pytest.mark.parametrize(("p", "tau", "best"), [(0.6, 0.1, 1.0), (0.75, 0.1, 2.5), (0.9, 0.1, 4.0)])
def test_ipo_with_noisy_labels_has_its_optimum_at_p_minus_one_half_over_tau(
    p: float, tau: float, best: float
) -> None:
    zero = t(0.0)

    def expected(h: Tensor) -> Tensor:
        right = ipo_summed_loss(h, zero, zero, zero, tau=tau)
        return (p * right + (1 - p) * ipo_summed_loss(zero, h, zero, zero, tau=tau)).sum()

    assert best == pytest.approx((p - 0.5) / tau)
    assert grad(expected)(t(best)).abs().item() < 1e-12


# errors


def test_pair_errors_name_the_argument_the_expectation_and_what_came() -> None:
    for loss in (dpo_loss, hinge_loss):
        with pytest.raises(
            ValueError, match=r"got chosen_logp \[1\], rejected_logp \[2\], ref_chosen_logp \[1\]"
        ):
            loss(PAIR[0], t(1.0, 2.0), PAIR[2], PAIR[3], beta=0.1)
    with pytest.raises(
        ValueError, match=r"got chosen_logp \[1\], chosen_length \[2\], rejected_length \[1\]"
    ):
        ipo_loss(*PAIR, t(1, 2), t(1), tau=0.1)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_a_weight_that_is_not_positive_and_finite_is_refused(bad: float) -> None:
    for call, name in (
        (lambda: dpo_loss(*PAIR, beta=bad), "beta"),
        (lambda: conservative_dpo_loss(*PAIR, beta=bad, label_smoothing=0.1), "beta"),
        (lambda: robust_dpo_loss(*PAIR, beta=bad, label_smoothing=0.1), "beta"),
        (lambda: hinge_loss(*PAIR, beta=bad), "beta"),
        (lambda: implicit_reward(PAIR[0], PAIR[1], beta=bad), "beta"),
        (lambda: ipo_summed_loss(*PAIR, tau=bad), "tau"),
        (lambda: ipo_loss(*PAIR, t(1), t(1), tau=bad), "tau"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {bad}"):
            call()


@pytest.mark.parametrize("bad", [-0.01, 0.5, 1.0, math.nan])
def test_label_smoothing_outside_zero_to_one_half_is_refused(bad: float) -> None:
    for loss in (conservative_dpo_loss, robust_dpo_loss):
        with pytest.raises(ValueError, match=rf"label_smoothing must lie in \[0, 0.5\), got {bad}"):
            loss(*PAIR, beta=0.1, label_smoothing=bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, torch.ones(2)])
def test_a_weight_that_is_no_number_is_refused(bad: object) -> None:
    for loss in (dpo_loss, hinge_loss):
        with pytest.raises(ValueError, match="beta must be a number"):
            loss(*PAIR, beta=bad)  # pyright: ignore[reportArgumentType]
