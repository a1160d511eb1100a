"""Bradley-Terry and Plackett-Luce: golden numbers, closed-form gradients, the laws of rankings, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, vmap

from minirlhf.objectives.ranking import bradley_terry_loss, plackett_luce_loss
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.strategies import Batch, batches, numbers


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


smoothings = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.49])


# Bradley-Terry


@pytest.mark.parametrize(
    ("gap", "loss", "slope"),
    [
        (4.0, 0.018150, -0.017986),
        (-4.0, 4.018150, -0.982014),
        (2.0, 0.126928, -0.119203),
        (1.3, 0.241008, -0.214165),
        (1.0, 0.313262, -0.268941),
        (0.0, 0.693147, -0.5),
    ],
)
def test_bradley_terry_golden_numbers(gap: float, loss: float, slope: float) -> None:
    assert bradley_terry_loss(t(gap), t(0.0)).item() == pytest.approx(loss, abs=5e-7)
    chosen, rejected = grad(lambda c, r: bradley_terry_loss(c, r).sum(), argnums=(0, 1))(t(gap), t(0.0))
    assert chosen.item() == pytest.approx(slope, abs=5e-7)
    assert rejected.item() == -chosen.item()


def test_bradley_terry_golden_margin_and_smoothing() -> None:
    assert bradley_terry_loss(t(4.0), t(0.0), margin=t(1.0)).item() == pytest.approx(0.048587, abs=5e-7)
    assert bradley_terry_loss(t(4.0), t(0.0), label_smoothing=0.1).item() == pytest.approx(0.418150, abs=5e-7)
    assert bradley_terry_loss(t(4.0, -4.0), t(0.0, 0.0)).mean().item() == pytest.approx(2.018150, abs=5e-7)


@given(numbers(4), numbers(4), numbers(4, low=0), smoothings)
def test_bradley_terry_equals_the_scalar_oracle(
    chosen: Tensor, rejected: Tensor, margin: Tensor, smoothing: float
) -> None:
    got = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=smoothing)
    rows = zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    expected = t(*(oracles.bradley_terry(c, r, m, smoothing) for c, r, m in rows))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(numbers(4), numbers(4), st.floats(-100, 100))
def test_bradley_terry_knows_only_the_gap_and_its_swap_differs_by_the_gap(
    chosen: Tensor, rejected: Tensor, shift: float
) -> None:
    loss = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + shift, rejected + shift), loss, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(loss - bradley_terry_loss(rejected, chosen), rejected - chosen)
    assert bool((loss > 0).all())


def test_a_margin_is_a_handicap_of_the_chosen_reward() -> None:
    chosen, rejected, margin = t(1.0, -2.0, 0.5), t(0.0, 1.0, 0.5), t(0.0, 1.0, 2.5)
    with_margin = bradley_terry_loss(chosen, rejected, margin=margin)
    torch.testing.assert_close(with_margin, bradley_terry_loss(chosen - margin, rejected))
    assert torch.equal(
        bradley_terry_loss(chosen, rejected), bradley_terry_loss(chosen, rejected, margin=t(0, 0, 0))
    )


def test_bradley_terry_is_stable_far_out() -> None:
    assert bradley_terry_loss(t(-1e3), t(0.0)).item() == 1e3
    assert bradley_terry_loss(t(1e3), t(0.0)).item() == 0.0
    for gap in (1e4, -1e4):
        slope = grad(lambda c: bradley_terry_loss(c, torch.zeros(1)).sum())(torch.tensor([gap]))
        assert bool(slope.isfinite().all())


def test_bradley_terry_is_convex_with_curvature_of_the_logistic_law() -> None:
    gap = torch.linspace(-5, 5, 41, dtype=torch.float64)
    curvature = vmap(grad(grad(lambda g: bradley_terry_loss(g, torch.zeros_like(g)))))(gap)
    p = torch.sigmoid(gap)
    torch.testing.assert_close(curvature, p * (1 - p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.3])
def test_label_smoothing_moves_the_optimum_to_the_log_odds_of_the_labels(smoothing: float) -> None:
    best = t(math.log((1 - smoothing) / smoothing))

    def loss(gap: Tensor) -> Tensor:
        return bradley_terry_loss(gap, torch.zeros_like(gap), label_smoothing=smoothing).sum()

    assert grad(loss)(best).abs().item() < 1e-15
    entropy = -(smoothing * math.log(smoothing) + (1 - smoothing) * math.log(1 - smoothing))
    assert loss(best).item() == pytest.approx(entropy, abs=1e-12)
    assert grad(loss)(best - 0.1).item() < 0 < grad(loss)(best + 0.1).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_by_both_rewards_and_the_margin_is_the_probability_of_error(smoothing: float) -> None:
    chosen, rejected, margin = t(1.0, -2.0, 0.5), t(0.0, 1.0, 0.5), t(0.25, 1.0, 2.5)

    def loss(c: Tensor, r: Tensor, m: Tensor) -> Tensor:
        return bradley_terry_loss(c, r, margin=m, label_smoothing=smoothing).sum()

    by_chosen, by_rejected, by_margin = grad(loss, argnums=(0, 1, 2))(chosen, rejected, margin)
    wrong = torch.sigmoid(-(chosen - rejected - margin))
    flipped = torch.sigmoid(-(rejected - chosen - margin))
    close(by_chosen, -(1 - smoothing) * wrong + smoothing * flipped)
    close(by_rejected, -by_chosen)
    close(by_margin, (1 - smoothing) * wrong + smoothing * flipped)


def test_bradley_terry_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="chosen_reward must be a floating-point tensor, got torch.int64"):
        bradley_terry_loss(torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="rejected_reward must be a tensor, got list"):
        bradley_terry_loss(t(1.0), [0.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected equal shapes, got .* margin \[2\]"):
        bradley_terry_loss(t(1.0), t(0.0), margin=t(1.0, 1.0))
    for bad in (-0.01, 0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"label_smoothing must lie in \[0, 0.5\), got {bad}"):
            bradley_terry_loss(t(1.0), t(0.0), label_smoothing=bad)


# Plackett-Luce


def ranked(*reward: float) -> Tensor:
    """The loss of one ranking without masked items: []."""
    row = t(*reward)[None]
    return plackett_luce_loss(row, torch.ones_like(row, dtype=torch.bool))[0]


@given(batches(tensors=1))
def test_plackett_luce_equals_the_scalar_oracle(batch: Batch) -> None:
    (reward,), mask = batch.tensors, batch.mask
    got = plackett_luce_loss(reward, mask)
    for row in range(mask.shape[0]):
        assert got[row].item() == pytest.approx(
            oracles.plackett_luce(reward[row, mask[row]].tolist()), rel=1e-12, abs=1e-12
        )


@given(numbers(5), numbers(5))
def test_a_ranking_of_two_is_bradley_terry_to_the_bit(chosen: Tensor, rejected: Tensor) -> None:
    reward = torch.stack([chosen, rejected], dim=-1)
    loss = plackett_luce_loss(reward, torch.ones(5, 2, dtype=torch.bool))
    assert torch.equal(loss, bradley_terry_loss(chosen, rejected))
    holed = torch.stack([chosen, torch.full_like(chosen, torch.nan), rejected], dim=-1)
    mask = torch.tensor([True, False, True]).expand(5, 3)
    assert torch.equal(plackett_luce_loss(holed, mask), loss)


@given(numbers(4))
def test_the_probabilities_of_all_rankings_sum_to_one(reward: Tensor) -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    every = plackett_luce_loss(reward[orders], torch.ones(orders.shape, dtype=torch.bool))
    assert (-every).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@given(numbers(4), st.permutations(range(4)))
def test_pairwise_marginals_of_a_ranking_are_bradley_terry(reward: Tensor, pair: list[int]) -> None:
    first, second = pair[:2]
    orders = [o for o in itertools.permutations(range(4)) if o.index(first) < o.index(second)]
    rows = reward[torch.tensor(orders)]
    probability = (-plackett_luce_loss(rows, torch.ones(rows.shape, dtype=torch.bool))).exp().sum()
    assert probability.item() == pytest.approx(oracles.sigmoid((reward[first] - reward[second]).item()))


@given(batches(tensors=1), st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_no_ranking(batch: Batch, shift: float) -> None:
    loss = plackett_luce_loss(batch.tensors[0], batch.mask)
    close(plackett_luce_loss(batch.tensors[0] + shift, batch.mask), loss)
    assert bool((loss >= 0).all())


@given(batches(tensors=1))
def test_the_gradient_is_the_probability_of_being_chosen_less_the_choice(batch: Batch) -> None:
    (reward,), mask = batch.tensors, batch.mask
    slope = grad(lambda r: plackett_luce_loss(r, mask).sum())(reward)
    expected = torch.zeros_like(reward)
    for row in range(mask.shape[0]):
        items = mask[row].nonzero()[:, 0]
        for k in range(len(items)):
            expected[row, items[k:]] += torch.softmax(reward[row, items[k:]], dim=-1)
            expected[row, items[k]] -= 1
    close(slope, expected)
    close(slope.sum(dim=-1), torch.zeros(len(mask), dtype=torch.float64))


def test_equal_rewards_cost_the_log_of_all_orders_and_one_item_costs_nothing() -> None:
    for n in range(1, 7):
        assert ranked(*[3.0] * n).item() == pytest.approx(math.lgamma(n + 1), abs=1e-12)
    assert ranked(5.0).item() == 0.0
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert plackett_luce_loss(torch.full((1, 3), torch.nan), nothing).tolist() == [0.0]


def test_a_better_order_costs_less_and_the_loss_is_convex() -> None:
    assert ranked(3, 2, 1).item() < ranked(3, 1, 2).item() < ranked(1, 2, 3).item()
    mask = torch.ones(1, 4, dtype=torch.bool)
    slope = grad(lambda r: plackett_luce_loss(r[None], mask).sum())
    curvature = jacrev(slope)(t(0.3, -1.0, 0.9, 0.1))
    assert torch.linalg.eigvalsh(curvature).min().item() > -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ranking_is_stable_far_out_and_keeps_the_digits_of_a_sure_stage(dtype: torch.dtype) -> None:
    reward = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    mask = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    expected = torch.tensor([0.0, 3e4, math.log(2)], dtype=dtype)
    torch.testing.assert_close(plackett_luce_loss(reward, mask), expected)
    slope = grad(lambda r: plackett_luce_loss(r, mask).sum())(reward)
    torch.testing.assert_close(slope[:2], torch.tensor([[0.0, 0, 0], [-1, -1, 2]], dtype=dtype))
    # Both stages are sure: as log-sum-exp less the chosen reward, no digit of this would be left in fp32.
    sure = torch.tensor([[60.0, 30.0, 0.0]], dtype=dtype)
    whole = torch.ones(1, 3, dtype=torch.bool)
    exact = math.log1p(math.exp(-30) + math.exp(-60)) + math.log1p(math.exp(-30))
    assert plackett_luce_loss(sure, whole).item() == pytest.approx(exact, rel=1e-6, abs=0)
    slope = grad(lambda r: plackett_luce_loss(r, whole).sum())(sure)
    assert slope[0, 0].item() == pytest.approx(-math.exp(-30), rel=1e-6, abs=0)


def test_nan_where_there_is_an_item_is_not_swallowed() -> None:
    for position in range(3):
        reward = t(1.0, 0.0, -1.0)
        reward[position] = math.nan
        assert ranked(*reward.tolist()).isnan().item()


def test_the_population_optimum_of_rankings_is_the_reward_up_to_a_constant() -> None:
    truth = t(0.3, -1.0, 0.9, 0.1)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    mask = torch.ones(orders.shape, dtype=torch.bool)
    weight = (-plackett_luce_loss(truth[orders], mask)).exp()

    def loss(reward: Tensor) -> Tensor:
        return (weight * plackett_luce_loss(reward[orders], mask)).sum()

    assert grad(loss)(truth + 7).abs().max().item() < 1e-14
    assert grad(loss)(torch.zeros_like(truth)).abs().max().item() > 1e-2
