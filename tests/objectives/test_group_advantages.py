"""Leave-one-out, centred and normalised group advantages: golden numbers, exact bias, invariances, errors."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, vmap

from minirlhf.objectives.group_advantages import (
    group_centred_advantage,
    group_normalised_advantage,
    rloo_advantage,
)
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.enumeration import REFERENCE, REWARD, SEQUENCES, another_policy, sequence_logp
from tests.objectives.strategies import Batch, batches

Advantage = Callable[[Tensor, Tensor], Tensor]


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_scored(reward: Tensor) -> Tensor:
    return torch.ones(reward.shape, dtype=torch.bool)


def normalised(epsilon: float = 0.0, correction: int = 1) -> Advantage:
    return lambda r, m: group_normalised_advantage(r, m, epsilon=epsilon, correction=correction)


EVERY = [rloo_advantage, group_centred_advantage, normalised(1e-4, 1), normalised(0.0, 0)]
every_advantage = pytest.mark.parametrize("advantage", EVERY, ids=["rloo", "centred", "normalised", "biased"])


# values


@pytest.mark.parametrize(
    ("advantage", "right", "wrong"),
    [
        (rloo_advantage, 0.714286, -0.428571),
        (group_centred_advantage, 0.625, -0.375),
        (normalised(0.0, 1), 1.207615, -0.724569),
        (normalised(0.0, 0), 1.290994, -0.774597),
    ],
)
def test_golden_numbers_of_eight_samples_with_three_right(
    advantage: Advantage, right: float, wrong: float
) -> None:
    reward = t(1, 1, 1, 0, 0, 0, 0, 0)[None]
    expected = [right] * 3 + [wrong] * 5
    assert advantage(reward, all_scored(reward))[0].tolist() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("reward", "correction", "expected"),
    [
        ((0, 1), 0, (-1, 1)),
        ((0, 1), 1, (-0.707107, 0.707107)),
        ((1, 1, 1, 0), 0, (0.577350, 0.577350, 0.577350, -1.732051)),
        ((1, 1, 1, 0), 1, (0.5, 0.5, 0.5, -1.5)),
    ],
)
def test_the_standard_deviation_is_unbiased_by_default_and_biased_on_request(
    reward: tuple[float, ...], correction: int, expected: tuple[float, ...]
) -> None:
    row = t(*reward)[None]
    got = group_normalised_advantage(row, all_scored(row), epsilon=0, correction=correction)
    assert got[0].tolist() == pytest.approx(expected, abs=5e-7)
    if correction == 1:
        assert torch.equal(group_normalised_advantage(row, all_scored(row), epsilon=0), got)


def test_the_default_epsilon_is_added_to_the_standard_deviation_not_to_the_variance() -> None:
    reward = t(0.0, 1e-4)[None]
    sigma = 1e-4 / math.sqrt(2)
    got = group_normalised_advantage(reward, all_scored(reward))
    assert got[0].tolist() == pytest.approx([-5e-5 / (sigma + 1e-4), 5e-5 / (sigma + 1e-4)], rel=1e-9)


@given(batches(tensors=1), st.sampled_from([0.0, 1e-4, 0.5]), st.sampled_from([0, 1]))
def test_group_advantages_equal_the_scalar_oracles(batch: Batch, epsilon: float, correction: int) -> None:
    (reward,), mask = batch.tensors, batch.mask
    pairs = (
        (rloo_advantage, oracles.leave_one_out),
        (group_centred_advantage, oracles.group_centred),
        (
            normalised(epsilon, correction),
            lambda r, m: oracles.group_normalised(r, m, epsilon, correction),
        ),
    )
    for advantage, oracle in pairs:
        got = advantage(reward, mask)
        for row in range(mask.shape[0]):
            expected = oracle(reward[row].tolist(), mask[row].tolist())
            close(got[row], t(*(0.0 if x is None else x for x in expected)))


@every_advantage
@given(batches(tensors=1), st.sampled_from([-7.0, 0.375, 100.0]))
def test_each_row_sums_to_zero_and_does_not_see_a_constant(
    advantage: Advantage, batch: Batch, shift: float
) -> None:
    (reward,), mask = batch.tensors, batch.mask
    got = advantage(reward, mask)
    close(got.sum(dim=-1), torch.zeros(len(mask), dtype=torch.float64))
    close(advantage(reward + shift, mask), got)


@every_advantage
@given(batches(tensors=1), st.data())
def test_samples_of_a_prompt_may_come_in_any_order(
    advantage: Advantage, batch: Batch, data: st.DataObject
) -> None:
    (reward,), mask = batch.tensors, batch.mask
    order = torch.tensor(data.draw(st.permutations(range(mask.shape[1]))))
    close(advantage(reward[:, order], mask[:, order]), advantage(reward, mask)[:, order])


@given(batches(tensors=1))
def test_leave_one_out_and_centred_scale_with_the_reward_and_normalised_does_not(batch: Batch) -> None:
    (reward,), mask = batch.tensors, batch.mask
    for advantage in (rloo_advantage, group_centred_advantage):
        close(advantage(4 * reward, mask), 4 * advantage(reward, mask))
        close(advantage(-reward, mask), -advantage(reward, mask))
    close(normalised()(4 * reward, mask), normalised()(reward, mask))
    close(normalised()(-reward, mask), -normalised()(reward, mask))


@given(batches(tensors=1))
def test_leave_one_out_is_the_centred_advantage_times_n_over_n_minus_one(batch: Batch) -> None:
    (reward,), mask = batch.tensors, batch.mask
    n = mask.sum(dim=-1, keepdim=True).double()
    factor = n / (n - 1).clamp(min=1)
    close(rloo_advantage(reward, mask), group_centred_advantage(reward, mask) * factor)
    pair = t(3.0, 1.25)[None]
    assert rloo_advantage(pair, all_scored(pair)).tolist() == [[1.75, -1.75]]


@pytest.mark.parametrize("correction", [0, 1])
@given(batch=batches(tensors=1))
def test_squares_of_a_normalised_row_sum_to_its_degrees_of_freedom(batch: Batch, correction: int) -> None:
    (reward,), mask = batch.tensors, batch.mask
    got = group_normalised_advantage(reward, mask, epsilon=0, correction=correction)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        varies = len(set(reward[row, mask[row]].tolist())) > 1
        assert got[row].square().sum().item() == pytest.approx(n - correction if varies else 0, abs=1e-9)
        if varies:
            bound = (n - 1) / math.sqrt(n) if correction else math.sqrt(n - 1)
            assert got[row].abs().max().item() <= bound + 1e-9


# what cannot be compared


@every_advantage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.77, 1e8, 0.0])
def test_equal_rewards_give_exactly_zero_whatever_their_rounding(
    advantage: Advantage, dtype: torch.dtype, value: float
) -> None:
    for size in (1, 2, 3, 7, 10, 49, 64, 100, 333):
        reward = torch.full((1, size), value, dtype=dtype)
        assert not bool(advantage(reward, all_scored(reward)).any())
        # An unscored sample beside them changes nothing.
        holed = torch.cat([reward, torch.full((1, 1), torch.nan, dtype=dtype)], dim=-1)
        assert not bool(advantage(holed, ~holed.isnan()).any())


@every_advantage
def test_a_single_scored_sample_gives_zero_and_no_nan(advantage: Advantage) -> None:
    reward = t(5.0, torch.nan, torch.inf)[None]
    mask = torch.tensor([[True, False, False]])
    assert advantage(reward, mask).tolist() == [[0.0, 0.0, 0.0]]
    assert advantage(reward, torch.zeros_like(mask)).tolist() == [[0.0, 0.0, 0.0]]
    slope = grad(lambda r: advantage(r, mask).square().sum())(reward)
    assert slope.tolist() == [[0.0, 0.0, 0.0]]


@every_advantage
@given(batch=batches(tensors=1))
def test_unscored_samples_leave_the_others_as_if_they_were_absent(advantage: Advantage, batch: Batch) -> None:
    (reward,), mask = batch.tensors, batch.mask
    got = advantage(torch.where(mask, reward, torch.nan), mask)
    for row in range(len(mask)):
        present = reward[row, mask[row]][None]
        if present.shape[-1]:
            close(got[row, mask[row]], advantage(present, all_scored(present))[0])
    assert not bool(got[~mask].any())


@every_advantage
def test_a_sample_that_was_scored_with_nan_is_not_swallowed(advantage: Advantage) -> None:
    reward = t(1.0, torch.nan, 0.0)[None]
    assert bool(advantage(reward, all_scored(reward)).isnan().all())


@every_advantage
def test_prompts_are_independent(advantage: Advantage) -> None:
    reward = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = advantage(reward, all_scored(reward))
    assert torch.equal(together, torch.cat([advantage(r[None], all_scored(r[None])) for r in reward]))
    assert torch.equal(vmap(advantage)(reward, all_scored(reward)), together)


@every_advantage
def test_a_large_common_reward_does_not_cost_the_digits_of_the_differences(advantage: Advantage) -> None:
    reward = torch.tensor([[0.0, 1.0, 0.0, 3.0]])
    expected = advantage(reward, all_scored(reward))
    assert torch.equal(advantage(reward + 2.0**20, all_scored(reward)), expected)


# derivatives


def test_leave_one_out_has_slope_one_by_its_own_reward_and_none_in_its_baseline() -> None:
    reward = t(0.3, -1.0, 0.9, 0.1)[None]
    slopes = jacrev(lambda r: rloo_advantage(r[None], all_scored(r[None]))[0])(reward[0])
    eye = torch.eye(4, dtype=torch.float64)
    close(slopes, eye - (1 - eye) / 3)
    centred = jacrev(lambda r: group_centred_advantage(r[None], all_scored(r[None]))[0])(reward[0])
    close(centred, eye - 0.25)


def test_the_slope_of_the_normalised_advantage_is_finite_where_rewards_are_equal() -> None:
    reward = torch.full((1, 4), 0.1, dtype=torch.float64)
    for epsilon in (0.0, 1e-4):
        slope = jacrev(lambda r, e=epsilon: normalised(e)(r, all_scored(r)).sum(0))(reward)
        assert bool(slope.isfinite().all())
    # With ε the derivative is that of a deviation over ε.
    slope = jacrev(lambda r: normalised(0.5)(r, all_scored(r))[0])(reward)[:, 0]
    close(slope, (torch.eye(4, dtype=torch.float64) - 0.25) / 0.5)


# bias, by enumeration of every group


def expected_gradient(logits: Tensor, size: int, advantage: Advantage, *, absent: int = 0) -> Tensor:
    """E[Σᵢ Aᵢ ∇log π(yᵢ)/n] over all groups of `size` sequences, of which `absent` could not be scored."""
    groups = torch.tensor(list(itertools.product(range(len(SEQUENCES)), repeat=size)))
    mask = torch.ones(groups.shape, dtype=torch.bool)
    mask[:, :absent] = False
    weight = sequence_logp(logits).exp()[groups].prod(dim=-1)
    held = advantage(REWARD[groups], mask)

    def objective(z: Tensor) -> Tensor:
        return (weight * (held * sequence_logp(z)[groups]).sum(dim=-1)).sum() / (size - absent)

    return grad(objective)(logits)


def true_gradient(logits: Tensor) -> Tensor:
    return grad(lambda z: (sequence_logp(z).exp() * REWARD).sum())(logits)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("logits", [REFERENCE, another_policy()], ids=["reference", "another"])
def test_leave_one_out_gives_the_policy_gradient_without_bias(size: int, logits: Tensor) -> None:
    exact = true_gradient(logits)
    close(expected_gradient(logits, size, rloo_advantage), exact)
    close(expected_gradient(logits, size, group_centred_advantage), exact * (size - 1) / size)
    assert exact.norm().item() > 0.1


def test_leave_one_out_is_unbiased_also_where_a_sample_could_not_be_scored() -> None:
    close(expected_gradient(REFERENCE, 3, rloo_advantage, absent=1), true_gradient(REFERENCE))
    close(expected_gradient(REFERENCE, 3, group_centred_advantage, absent=1), true_gradient(REFERENCE) / 2)


@pytest.mark.parametrize("size", [2, 3])
def test_the_normalised_advantage_points_elsewhere(size: int) -> None:
    exact = true_gradient(REFERENCE)
    biased = expected_gradient(REFERENCE, size, normalised())
    cosine = ((exact * biased).sum() / exact.norm() / biased.norm()).item()
    assert 0.9 < cosine < 0.98


@pytest.mark.parametrize("q", [0.1, 0.341, 0.5])
def test_normalised_binary_rewards_climb_the_arcsine_of_the_success_rate(q: float) -> None:
    """E[Σ A ∇log p(r)/G] / ∇q over the number of successes: 1 at G = 2, to 1/√(q(1-q)) for many samples."""
    multipliers = []
    for size in (2, 4, 8, 16, 64, 256):
        right = torch.arange(size + 1)
        reward = (torch.arange(size)[None] < right[:, None]).double()
        law = t(*(math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(size + 1)))
        score = reward / q - (1 - reward) / (1 - q)
        held = normalised(0.0, 0)(reward, all_scored(reward))
        multipliers.append((law * (held * score).mean(dim=-1)).sum().item())
    assert multipliers[0] == pytest.approx(1.0)
    assert multipliers == sorted(multipliers)
    slope = grad(lambda x: 2 * x.sqrt().asin())(torch.tensor(q, dtype=torch.float64)).item()
    assert slope == pytest.approx(1 / math.sqrt(q * (1 - q)))
    assert 0.99 * slope < multipliers[-1] < slope
    if q == 0.341:
        assert [round(m, 2) for m in multipliers] == [1.0, 1.63, 1.92, 2.03, 2.09, 2.1]


# numbers and errors


def test_many_epsilons_at_once_by_vmap() -> None:
    reward = t(0.3, -1.0, 0.9)[None]
    grid = t(0.0, 1e-4, 0.5)

    def call(epsilon: float | Tensor) -> Tensor:
        return group_normalised_advantage(reward, all_scored(reward), epsilon=epsilon)

    close(vmap(call)(grid), torch.stack([call(e) for e in grid.tolist()]))
    flat = torch.full_like(reward, 0.1)
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert not bool(group_normalised_advantage(flat, all_scored(flat), epsilon=zero).any())


def test_a_negative_epsilon_and_another_correction_are_refused() -> None:
    reward = t(1.0, 0.0)[None]
    for bad in (-1e-4, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"epsilon must be at least 0 and finite, got {bad}"):
            group_normalised_advantage(reward, all_scored(reward), epsilon=bad)
    for correction in (-1, 2):
        with pytest.raises(ValueError, match=f"correction must be 0 or 1, got {correction}"):
            group_normalised_advantage(reward, all_scored(reward), correction=correction)
