"""Preferences in an enumerable world: every population optimum is where the gradient of its loss is zero."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.verify.optima import best_of_n_law, optimal_law, soft_bellman, tilted
from minirlhf.verify.preferences import (
    averaged_dpo_optimum,
    bradley_terry,
    bradley_terry_fit,
    bradley_terry_population_loss,
    comparisons,
    dpo_optimum,
    dpo_population_loss,
    drawn_pairs,
    ipo_optimum,
    ipo_population_loss,
    ipo_summed_optimum,
    ipo_summed_population_loss,
    strict_order,
    uniform_pairs,
    win_rate,
    win_rate_of_laws,
)
from minirlhf.verify.world import (
    World,
    kl_of_laws,
    lengths,
    response_logp,
    small_world,
    standard_world,
    tabulate,
    world,
)

SMALL = small_world(2)
REF = response_logp(SMALL.ref_logits, SMALL)


def skewed_pairs(w: World, seed: int = 0) -> Tensor:
    """Every pair is shown, some a hundred times as often as others, and in one order more than the other."""
    noise = torch.randn(*w.gold.shape, w.gold.shape[1], generator=torch.Generator().manual_seed(seed))
    return noise.double().exp()


PAIRS: dict[str, Callable[[World], Tensor]] = {
    "uniform": uniform_pairs,
    "reference": lambda w: drawn_pairs(response_logp(w.ref_logits, w)),
    "skewed": skewed_pairs,
}
EVERY_LAW = pytest.mark.parametrize("shown", PAIRS.values(), ids=PAIRS.keys())


def gradient_of(f: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    free = logits.clone().requires_grad_()
    return torch.autograd.grad(f(free), free)[0]


def is_zero(gradient: Tensor, elsewhere: Tensor) -> bool:
    """Zero here, and not because it is zero everywhere."""
    return float(gradient.abs().max()) < 1e-9 * float(elsewhere.abs().max())


def assert_stationary(loss: Callable[..., Tensor], law: Tensor, data: Tensor, **weight: float) -> None:
    torch.testing.assert_close(law.exp().sum(1), torch.ones(len(law)).double())
    found = gradient_of(lambda z: loss(z, SMALL, data, **weight), tabulate(law, SMALL))
    assert is_zero(found, gradient_of(lambda z: loss(z, SMALL, data, **weight), SMALL.ref_logits))


# Who wins.


def test_what_is_preferred_to_a_response_is_not_preferred_by_it() -> None:
    for preference in (bradley_terry(SMALL), strict_order(SMALL)):
        torch.testing.assert_close(preference + preference.transpose(1, 2), torch.ones_like(preference))
        assert (preference.diagonal(dim1=1, dim2=2) == 0.5).all()
    gap = SMALL.gold[1, 3] - SMALL.gold[1, 8]
    assert float(bradley_terry(SMALL)[1, 3, 8]) == pytest.approx(1 / (1 + math.exp(-gap)))
    assert float(strict_order(SMALL)[1, 3, 8]) == float(gap > 0)


def test_win_rates_of_two_policies_add_up_to_one_and_a_policy_draws_with_itself() -> None:
    other = SMALL.ref_logits.flip(2)
    for preference in (bradley_terry(SMALL), strict_order(SMALL)):
        there = win_rate(SMALL.ref_logits, other, SMALL, preference=preference)
        back = win_rate(other, SMALL.ref_logits, SMALL, preference=preference)
        assert float(there + back) == pytest.approx(1) and abs(float(there) - 0.5) > 0.01
        assert float(win_rate(other, other, SMALL, preference=preference)) == pytest.approx(0.5)


def test_strict_and_bradley_terry_win_rates_differ_as_published() -> None:
    w = small_world()
    best = soft_bellman(w, beta=0.3).logits
    assert float(win_rate(best, w.ref_logits, w, preference=strict_order(w))) == pytest.approx(
        0.871, abs=6e-4
    )
    assert float(win_rate(best, w.ref_logits, w, preference=bradley_terry(w))) == pytest.approx(
        0.740, abs=6e-4
    )


def test_selection_among_draws_needs_only_the_order_of_the_scores() -> None:
    bent = best_of_n_law(REF, SMALL.gold.exp(), n=4)
    torch.testing.assert_close(bent, best_of_n_law(REF, SMALL.gold, n=4))
    wins = win_rate_of_laws(bent, REF, preference=strict_order(SMALL))
    assert 0.7 < float(wins) < 4 / 5


# The data.


@EVERY_LAW
def test_comparisons_are_a_law_over_pairs_that_the_labeller_explains(
    shown: Callable[[World], Tensor],
) -> None:
    data = comparisons(shown(SMALL), bradley_terry(SMALL))
    torch.testing.assert_close(data.sum((1, 2)), torch.ones(2).double())
    torch.testing.assert_close(data / (data + data.transpose(1, 2)), bradley_terry(SMALL))
    seen, pairs = data + data.transpose(1, 2), shown(SMALL) + shown(SMALL).transpose(1, 2)
    torch.testing.assert_close(seen / seen[:, :1, :1], pairs / pairs[:, :1, :1])


def test_pairs_are_drawn_independently() -> None:
    assert float(uniform_pairs(SMALL)[0, 3, 4]) == pytest.approx(1 / 225)
    assert float(drawn_pairs(REF)[1, 3, 4]) == pytest.approx(float((REF[1, 3] + REF[1, 4]).exp()))


# Bradley-Terry.


@EVERY_LAW
@pytest.mark.parametrize("w", [SMALL, standard_world()], ids=["small", "standard"])
def test_the_likeliest_rewards_are_the_true_ones_up_to_a_constant_of_the_prompt(
    w: World, shown: Callable[[World], Tensor]
) -> None:
    data = comparisons(shown(w), bradley_terry(w))
    fit = bradley_terry_fit(data)
    torch.testing.assert_close(fit, w.gold - w.gold.mean(1, keepdim=True), rtol=0, atol=1e-9)
    loss = bradley_terry_population_loss(fit, data)
    chance = bradley_terry(w)
    entropy = -(data * chance.log()).sum((1, 2)).mean()
    assert float(loss) == pytest.approx(float(entropy), rel=1e-12)


def test_rewards_are_fitted_to_labels_that_no_rewards_explain() -> None:
    """A share of 60 % for a cycle of three: equal rewards are likeliest."""
    data = torch.tensor([[[0.0, 0.6, 0.4], [0.4, 0.0, 0.6], [0.6, 0.4, 0.0]]]).double() / 3
    torch.testing.assert_close(bradley_terry_fit(data), torch.zeros(1, 3).double())
    skew = comparisons(skewed_pairs(SMALL), 0.9 * strict_order(SMALL) + 0.05)
    slope = gradient_of(lambda r: bradley_terry_population_loss(r, skew), bradley_terry_fit(skew))
    assert float(slope.abs().max()) < 1e-12


def test_the_bayes_accuracy_of_distinct_pairs_drawn_from_the_reference_is_the_published_one() -> None:
    w = small_world()
    pairs = drawn_pairs(response_logp(w.ref_logits, w)) * (1 - torch.eye(15))
    chance = bradley_terry(w)
    best = (pairs * torch.maximum(chance, 1 - chance)).sum() / pairs.sum()
    assert float(best) == pytest.approx(0.7814, abs=5e-5)


def test_data_without_a_likeliest_reward_are_refused() -> None:
    with pytest.raises(ValueError, match="data must let every response win and lose"):
        bradley_terry_fit(comparisons(uniform_pairs(SMALL), strict_order(SMALL)))
    apart = uniform_pairs(SMALL).clone()
    apart[:, :5, 5:] = apart[:, 5:, :5] = 0
    for solve in (
        bradley_terry_fit,
        lambda data: ipo_summed_optimum(SMALL, data, tau=1.0),
        lambda data: ipo_optimum(SMALL, data, tau=1.0),
    ):
        with pytest.raises(ValueError, match="data must compare every response with every other"):
            solve(comparisons(apart, bradley_terry(SMALL)))


# DPO.


@EVERY_LAW
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_has_the_optimal_policy_as_optimum_whoever_shows_the_pairs(
    shown: Callable[[World], Tensor], beta: float
) -> None:
    data = comparisons(shown(SMALL), bradley_terry(SMALL))
    best = optimal_law(SMALL, beta=beta)
    assert_stationary(dpo_population_loss, best, data, beta=beta)
    assert float(kl_of_laws(best, dpo_optimum(SMALL, data, beta=beta))) < 1e-12
    loss = dpo_population_loss(tabulate(best, SMALL), SMALL, data, beta=beta)
    assert float(loss) == pytest.approx(float(bradley_terry_population_loss(SMALL.gold, data)), rel=1e-12)


def test_the_bayes_loss_of_dpo_is_the_published_one() -> None:
    data = comparisons(uniform_pairs(SMALL), bradley_terry(SMALL))
    loss = dpo_population_loss(soft_bellman(SMALL, beta=0.3).logits, SMALL, data, beta=0.3)
    assert float(loss) == pytest.approx(0.4838970044596682, rel=1e-12)
    at_reference = dpo_population_loss(SMALL.ref_logits, SMALL, data, beta=0.3)
    assert float(at_reference) == pytest.approx(math.log(2))


def test_the_first_step_of_dpo_and_of_ipo_climbs_the_win_rate_against_the_reference() -> None:
    data = comparisons(drawn_pairs(REF), bradley_terry(SMALL))
    climb = gradient_of(
        lambda z: win_rate(z, SMALL.ref_logits, SMALL, preference=bradley_terry(SMALL)), SMALL.ref_logits
    )
    step = gradient_of(lambda z: dpo_population_loss(z, SMALL, data, beta=0.3), SMALL.ref_logits)
    torch.testing.assert_close(step, -2 * 0.3 * climb)
    step = gradient_of(lambda z: ipo_summed_population_loss(z, SMALL, data, tau=0.3), SMALL.ref_logits)
    torch.testing.assert_close(step, -4 / 0.3 * climb)
    assert float(climb.norm()) > 0.01


@EVERY_LAW
def test_dpo_on_labels_that_no_rewards_explain_has_its_optimum_too(shown: Callable[[World], Tensor]) -> None:
    data = comparisons(shown(SMALL), 0.8 * strict_order(SMALL) + 0.1)
    assert_stationary(dpo_population_loss, dpo_optimum(SMALL, data, beta=0.7), data, beta=0.7)


def test_dpo_on_averaged_log_probs_ends_where_its_gradient_is_zero() -> None:
    def averaged(logits: Tensor, w: World, data: Tensor, *, beta: float) -> Tensor:
        ratio = (response_logp(logits, w) - response_logp(w.ref_logits, w)) / lengths(w)
        return bradley_terry_population_loss(beta * ratio, data)

    data = comparisons(uniform_pairs(SMALL), bradley_terry(SMALL))
    law = averaged_dpo_optimum(SMALL, data, beta=0.7)
    assert_stationary(averaged, law, data, beta=0.7)
    assert float(kl_of_laws(optimal_law(SMALL, beta=0.7), law)) > 0.05


# IPO.


@EVERY_LAW
@pytest.mark.parametrize("tau", [0.2, 1.0])
@pytest.mark.parametrize(
    ("loss", "optimum"),
    [(ipo_summed_population_loss, ipo_summed_optimum), (ipo_population_loss, ipo_optimum)],
    ids=["summed", "averaged"],
)
def test_ipo_ends_where_its_gradient_is_zero(
    loss: Any, optimum: Any, shown: Callable[[World], Tensor], tau: float
) -> None:
    for preference in (bradley_terry(SMALL), strict_order(SMALL)):
        data = comparisons(shown(SMALL), preference)
        assert_stationary(loss, optimum(SMALL, data, tau=tau), data, tau=tau)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_ipo_on_independent_draws_is_tilted_by_the_chance_to_win(tau: float) -> None:
    mu = torch.log_softmax(SMALL.gold.flip(1), dim=1)
    chance = (bradley_terry(SMALL) * mu.exp()[:, None, :]).sum(2)  # p(y ≻ μ)
    data = comparisons(drawn_pairs(mu), bradley_terry(SMALL))
    torch.testing.assert_close(ipo_summed_optimum(SMALL, data, tau=tau), tilted(SMALL, chance / tau))
    law = ipo_optimum(SMALL, data, tau=tau)
    constant = (law - REF) / lengths(SMALL) - chance / tau
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))


@pytest.mark.parametrize(("tau", "expected"), [(0.1, 0.99331), (0.5, 0.73106), (1.0, 0.62246)])
def test_ipo_on_two_actions_is_the_logistic_of_its_target(tau: float, expected: float) -> None:
    w = world(vocab_size=2, length=1)
    w = w._replace(ref_logits=torch.zeros_like(w.ref_logits))
    data = comparisons(uniform_pairs(w), strict_order(w))
    law = ipo_summed_optimum(w, data, tau=tau)
    assert float(law.exp().max()) == pytest.approx(expected, abs=5e-6)
    torch.testing.assert_close(law, ipo_optimum(w, data, tau=tau))  # every response has one token


def test_betas_and_taus_that_are_not_positive_are_refused() -> None:
    data = comparisons(uniform_pairs(SMALL), bradley_terry(SMALL))
    for solve in (dpo_optimum, averaged_dpo_optimum):
        with pytest.raises(ValueError, match="beta must be positive"):
            solve(SMALL, data, beta=0.0)
    for solve in (ipo_optimum, ipo_summed_optimum):
        with pytest.raises(ValueError, match="tau must be positive"):
            solve(SMALL, data, tau=-1.0)
