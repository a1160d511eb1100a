"""SimPO and ORPO: golden numbers, closed-form gradients, optima, and odds of what is nearly certain."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from minirlhf.objectives.preference import dpo_loss
from minirlhf.objectives.ranking import bradley_terry_loss
from minirlhf.objectives.reference_free import orpo_loss, simpo_loss
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.strategies import numbers


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


logps = numbers(3, low=-40, high=-0.125)
lengths = st.lists(st.integers(1, 20), min_size=3, max_size=3).map(torch.tensor)
betas = st.sampled_from([0.1, 1.0, 2.0, 2.5])
gammas = st.sampled_from([0.0, 0.5, 1.6])
weights = st.sampled_from([0.0, 0.1, 1.0])


# SimPO


def test_simpo_golden_pair() -> None:
    loss = simpo_loss(t(-4.0), t(-2.0), t(5), t(2), beta=2, gamma=1)  # -0.8 and -1.0 per token
    assert loss.item() == pytest.approx(1.037488, abs=5e-7)


@given(logps, logps, lengths, lengths, betas, gammas)
def test_simpo_equals_the_scalar_oracle(
    chosen: Tensor,
    rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float,
    gamma: float,
) -> None:
    rows = torch.stack([chosen, rejected, chosen_length, rejected_length], dim=-1).tolist()
    expected = t(*(oracles.simpo(*row, beta=beta, gamma=gamma) for row in rows))
    close(simpo_loss(chosen, rejected, chosen_length, rejected_length, beta=beta, gamma=gamma), expected)


@given(logps, logps, lengths, lengths, betas, gammas)
def test_simpo_gradient_is_beta_per_token_times_the_probability_of_error(
    chosen: Tensor,
    rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float,
    gamma: float,
) -> None:
    def loss(c: Tensor, r: Tensor) -> Tensor:
        return simpo_loss(c, r, chosen_length, rejected_length, beta=beta, gamma=gamma).sum()

    z = beta * (chosen / chosen_length - rejected / rejected_length)
    wrong = torch.sigmoid(gamma - z)
    by_chosen, by_rejected = grad(loss, argnums=(0, 1))(chosen, rejected)
    close(by_chosen, -beta * wrong / chosen_length)
    close(by_rejected, beta * wrong / rejected_length)


@given(logps, logps, lengths, lengths, st.integers(2, 5))
def test_neither_loss_changes_when_every_token_is_repeated(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, times: int
) -> None:
    once = (chosen, rejected, chosen_length, rejected_length)
    repeated = tuple(times * x for x in once)
    close(simpo_loss(*repeated, beta=2.0, gamma=0.5), simpo_loss(*once, beta=2.0, gamma=0.5))
    close(orpo_loss(*repeated, weight=0.3), orpo_loss(*once, weight=0.3))


@given(logps, logps, betas, gammas)
def test_simpo_on_single_tokens_is_bradley_terry_with_a_margin_and_dpo_under_a_uniform_reference(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float
) -> None:
    one = torch.ones(3)
    with_margin = bradley_terry_loss(beta * chosen, beta * rejected, margin=torch.full_like(chosen, gamma))
    close(simpo_loss(chosen, rejected, one, one, beta=beta, gamma=gamma), with_margin)
    uniform = torch.full_like(chosen, -math.log(50_257))
    plain = simpo_loss(chosen, rejected, one, one, beta=beta, gamma=0)
    close(plain, dpo_loss(chosen, rejected, uniform, uniform, beta=beta))


def test_the_lengths_of_the_two_responses_are_not_interchangeable() -> None:
    chosen, rejected, one, two = t(-3.0), t(-5.0), t(1), t(2)
    for loss in (
        lambda *xs: simpo_loss(*xs, beta=1.0, gamma=0.0),
        lambda *xs: orpo_loss(*xs, weight=0.5),
    ):
        assert loss(chosen, rejected, one, two).item() != loss(chosen, rejected, two, one).item()


@pytest.mark.parametrize(
    ("p", "gamma", "best"), [(0.6, 0.5, 0.5332), (0.75, 1.0, 1.7820), (0.9, 1.5, 3.5864), (0.75, 0.0, 1.0986)]
)
def test_simpo_with_a_margin_has_its_optimum_away_from_the_log_odds(
    p: float, gamma: float, best: float
) -> None:
    q, g = p / (1 - p), math.exp(-gamma)
    u = ((q - 1) + math.sqrt((q - 1) ** 2 + 4 * g * g * q)) / (2 * g)
    assert round(math.log(u), 4) == best
    one = t(1)

    def expected(chosen: Tensor) -> Tensor:
        right = simpo_loss(chosen, t(0.0), one, one, beta=1.0, gamma=gamma)
        return (p * right + (1 - p) * simpo_loss(t(0.0), chosen, one, one, beta=1.0, gamma=gamma)).sum()

    assert grad(expected)(t(math.log(u))).abs().item() < 1e-14
    assert (abs(math.log(u) - math.log(q)) < 1e-9) == (gamma == 0)


# ORPO


def test_orpo_golden_pair() -> None:
    loss = orpo_loss(t(-3.5), t(-2.2), t(5), t(2), weight=0.1)  # -0.7 and -1.1 per token
    assert loss.item() == pytest.approx(0.740934, abs=5e-7)


@given(logps, logps, lengths, lengths, weights)
def test_orpo_equals_the_scalar_oracle(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, weight: float
) -> None:
    rows = torch.stack([chosen, rejected, chosen_length, rejected_length], dim=-1).tolist()
    expected = t(*(oracles.orpo(*row, weight=weight) for row in rows))
    close(orpo_loss(chosen, rejected, chosen_length, rejected_length, weight=weight), expected)


@given(logps, logps, lengths, lengths, weights)
def test_orpo_gradient_is_likelihood_plus_the_odds_ratio_over_the_chance_of_another_token(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, weight: float
) -> None:
    def loss(c: Tensor, r: Tensor) -> Tensor:
        return orpo_loss(c, r, chosen_length, rejected_length, weight=weight).sum()

    p, q = (chosen / chosen_length).exp(), (rejected / rejected_length).exp()
    wrong = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    by_chosen, by_rejected = grad(loss, argnums=(0, 1))(chosen, rejected)
    close(by_chosen, (-1 - weight * wrong / (1 - p)) / chosen_length)
    close(by_rejected, weight * wrong / (1 - q) / rejected_length)
    assert bool((by_chosen < 0).all()) and bool((by_rejected >= 0).all())


def test_orpo_of_two_equal_responses_is_the_likelihood_and_a_coin() -> None:
    logp, length = t(-3.0, -0.5), t(2, 1)
    expected = -logp / length + 0.25 * math.log(2)
    close(orpo_loss(logp, logp, length, length, weight=0.25), expected)
    close(orpo_loss(logp, logp - 1, length, length, weight=0.0), -logp / length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_odds_of_a_nearly_certain_response_keep_their_digits_and_slope(dtype: torch.dtype) -> None:
    near = torch.tensor([-1e-30, -1e-12, -1e-8, -1e-4, -0.5, -20.0, -80.0], dtype=dtype)
    other, one = torch.full_like(near, -math.log(2)), torch.ones_like(near)  # even odds: log odds 0
    exact = [math.log(-math.expm1(x)) - x for x in near.double().tolist()]  # minus the log odds

    def rejected_term(x: Tensor) -> Tensor:
        return orpo_loss(other, x, one, one, weight=1.0) - math.log(2)

    expected = torch.tensor([math.log1p(math.exp(-z)) for z in exact], dtype=torch.float64)
    torch.testing.assert_close(rejected_term(near).double(), expected, rtol=1e-6, atol=1e-6)
    slope = grad(lambda x: rejected_term(x).sum())(near).double()
    wanted = [
        oracles.sigmoid(-z) / -math.expm1(x) for x, z in zip(near.double().tolist(), exact, strict=True)
    ]
    torch.testing.assert_close(slope, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2**-8)], ids=str
)
def test_a_log_prob_that_has_rounded_to_zero_makes_no_nan(dtype: torch.dtype, rounding: float) -> None:
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    other, one = torch.tensor([-1.0], dtype=dtype), torch.ones(1)
    for loss, side in (
        (orpo_loss(certain, other, one, one, weight=1.0), "chosen"),
        (orpo_loss(other, certain, one, one, weight=1.0), "rejected"),
        (orpo_loss(certain, certain, one, one, weight=1.0), "both"),
    ):
        (slope,) = torch.autograd.grad(loss.sum(), certain)
        assert bool(loss.isfinite().all()) and bool(slope.isfinite().all())
        if side == "chosen":  # the limit: the likelihood term, and the odds of the other response
            assert slope.item() == pytest.approx(-1 - 1 / math.expm1(1), rel=rounding)
        if side == "rejected":
            assert slope.item() > 1e5, "it is pushed down hard"


def test_a_positive_log_prob_is_no_log_prob_and_gives_nan() -> None:
    one = t(1)
    assert orpo_loss(t(0.1), t(-1.0), one, one, weight=1.0).isnan().item()
    assert orpo_loss(t(-1.0), t(0.1), one, one, weight=1.0).isnan().item()


# errors


def test_lengths_of_another_shape_are_refused() -> None:
    expectation = r"chosen_logp \[1\], rejected_logp \[1\], chosen_length \[2\], rejected_length \[1\]"
    with pytest.raises(ValueError, match=expectation):
        simpo_loss(t(-1), t(-1), t(1, 2), t(1), beta=1.0, gamma=0.0)
    with pytest.raises(ValueError, match=expectation):
        orpo_loss(t(-1), t(-1), t(1, 2), t(1), weight=1.0)


def test_numbers_out_of_range_are_refused() -> None:
    pair = (t(-1), t(-1), t(1), t(1))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta must be positive and finite, got {bad}"):
            simpo_loss(*pair, beta=bad, gamma=0.0)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"gamma must be at least 0 and finite, got {bad}"):
            simpo_loss(*pair, beta=1.0, gamma=bad)
        with pytest.raises(ValueError, match=f"weight must be at least 0 and finite, got {bad}"):
            orpo_loss(*pair, weight=bad)
