"""KL estimators, exact KL, entropy, KL-shaped rewards and the controller; expectations by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.divergence import (
    KLController,
    adapt_kl,
    entropy,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_reward,
)
from minirlhf.objectives.masked import sequence_sum
from minirlhf.objectives.policy import ratio
from tests.objectives import oracles
from tests.objectives.enumeration import (
    MASK,
    REFERENCE,
    REWARD,
    SEQUENCES,
    STATES,
    another_policy,
    sequence_logp,
    token_logp,
)
from tests.objectives.strategies import Batch, batches, numbers

POLICY = another_policy()
ONE = torch.ones(1, dtype=torch.bool)
WHOLE = torch.ones(len(SEQUENCES), dtype=torch.bool)
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sequence_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL of two policies over whole sequences, from its definition."""
    logp = sequence_logp(logits)
    return (logp.exp() * (logp - sequence_logp(other))).sum()


# estimators, pointwise


@pytest.mark.parametrize(
    ("s", "k1", "k2", "k3"),
    [
        (math.log(2), 0.693147, 0.240227, 0.193147),
        (-math.log(2), -0.693147, 0.240227, 0.306853),
        (1.0, 1.0, 0.5, 0.367879),
        (-1.0, -1.0, 0.5, 0.718282),
        (-6.0, -6.0, 18.0, 396.428793),
    ],
)
def test_estimators_golden_numbers(s: float, k1: float, k2: float, k3: float) -> None:
    got = [k(t(s), t(0.0), ONE).item() for k in (kl_k1, kl_k2, kl_k3)]
    assert got == pytest.approx([k1, k2, k3], abs=5e-7)


@given(batches(tensors=2))
def test_estimators_equal_the_scalar_oracles(batch: Batch) -> None:
    logp, ref_logp = batch.tensors
    for estimator, oracle in ((kl_k1, oracles.k1), (kl_k2, oracles.k2), (kl_k3, oracles.k3)):
        got = estimator(logp, ref_logp, batch.mask)[batch.mask]
        pairs = zip(logp[batch.mask].tolist(), ref_logp[batch.mask].tolist(), strict=True)
        torch.testing.assert_close(got, t(*(oracle(*pair) for pair in pairs)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [-6.0, -1.0, -0.01, 0.0, 0.5, 3.0])
def test_estimators_have_their_pointwise_derivatives(s: float) -> None:
    for estimator, slope in ((kl_k1, 1.0), (kl_k2, s), (kl_k3, 1 - math.exp(-s))):
        by_logp, by_ref = grad(lambda a, b, k=estimator: k(a, b, ONE).sum(), argnums=(0, 1))(t(s), t(0.0))
        assert by_logp.item() == pytest.approx(slope, abs=1e-12)
        assert by_ref.item() == pytest.approx(-slope, abs=1e-12)


def test_k3_gradient_is_never_dead() -> None:
    s = torch.linspace(-20, -0.1, 60, dtype=torch.float64)
    slope = vmap(grad(lambda x: kl_k3(x[None], torch.zeros_like(x)[None], ONE).sum()))(s)
    assert bool((slope.diff() > 0).all()) and bool((slope < 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k3_is_never_negative_near_zero_in_low_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ref_logp = torch.zeros(20_000, dtype=dtype)
    logp = (1e-3 * torch.randn(20_000, generator=generator)).to(dtype)
    k3 = kl_k3(logp, ref_logp, torch.ones(20_000, dtype=torch.bool))
    assert bool((k3 >= 0).all())
    naive = (-logp.float()).exp() - 1 + logp.float()
    assert bool((naive < 0).any()), "the naive form fails, so this test can see something"
    exact = torch.expm1(-logp.double()) + logp.double()
    assert (k3.double() - exact).abs().max().item() < 1e-9


# estimators, in expectation


def test_k1_and_k3_have_the_kl_as_expectation_and_k2_has_not() -> None:
    weight = sequence_logp(POLICY).exp()
    assert weight.sum().item() == pytest.approx(1.0, abs=1e-12)
    exact = sequence_kl(POLICY, REFERENCE).item()
    for level in (
        lambda k: k(sequence_logp(POLICY), sequence_logp(REFERENCE), WHOLE),
        lambda k: sequence_sum(k(token_logp(POLICY), token_logp(REFERENCE), MASK), MASK),
    ):
        expected = {k: (weight * level(k)).sum().item() for k in (kl_k1, kl_k2, kl_k3)}
        assert expected[kl_k1] == pytest.approx(exact, abs=1e-12)
        assert expected[kl_k3] == pytest.approx(exact, abs=1e-12)
        assert abs(expected[kl_k2] - exact) > 0.02


def test_exact_token_kl_adds_up_to_the_kl_of_the_sequences() -> None:
    weight = sequence_logp(POLICY).exp()
    per_token = exact_kl(POLICY[STATES], REFERENCE[STATES], MASK)
    summed = (weight * sequence_sum(per_token, MASK)).sum()
    assert summed.item() == pytest.approx(sequence_kl(POLICY, REFERENCE).item(), abs=1e-12)


def test_entropy_adds_up_to_the_entropy_of_the_sequences() -> None:
    logp = sequence_logp(REFERENCE)
    summed = (logp.exp() * sequence_sum(entropy(REFERENCE[STATES], MASK), MASK)).sum().item()
    assert summed == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-12)
    assert summed == pytest.approx(1.7159072075, abs=1e-9)
    assert (logp.exp() * REWARD).sum().item() == pytest.approx(0.6605679064980368, abs=1e-12)


def gradient_of_estimator(estimator: Estimator, use: str) -> Tensor:
    """Expected gradient of an estimator, sequences sampled from the policy and held fixed."""
    weight = sequence_logp(POLICY).exp()
    ref_logp = sequence_logp(REFERENCE)

    def objective(logits: Tensor) -> Tensor:
        logp = sequence_logp(logits)
        if use == "reward":
            return (weight * estimator(sequence_logp(POLICY), ref_logp, WHOLE) * logp).sum()
        per_sequence = estimator(logp, ref_logp, WHOLE)
        if use == "weighted loss":
            per_sequence = per_sequence * ratio(logp, sequence_logp(POLICY), WHOLE)
        return (weight * per_sequence).sum()

    return grad(objective)(POLICY)


def expected_gradients() -> dict[str, Tensor]:
    def half_square(logits: Tensor) -> Tensor:
        logp = sequence_logp(logits)
        return (logp.exp() * 0.5 * (logp - sequence_logp(REFERENCE)).square()).sum()

    return {
        "reverse": grad(lambda x: sequence_kl(x, REFERENCE))(POLICY),
        "forward": grad(lambda x: sequence_kl(REFERENCE, x))(POLICY),
        "half_square": grad(half_square)(POLICY),
        "zero": torch.zeros_like(POLICY),
    }


@pytest.mark.parametrize(
    ("estimator", "use", "law"),
    [
        (kl_k1, "reward", {"reverse": 1}),
        (kl_k1, "loss", {"zero": 1}),
        (kl_k1, "weighted loss", {"reverse": 1}),
        (kl_k2, "reward", {"half_square": 1, "reverse": -1}),
        (kl_k2, "loss", {"reverse": 1}),
        (kl_k3, "reward", {"reverse": 1, "forward": -1}),
        (kl_k3, "loss", {"forward": 1}),
        (kl_k3, "weighted loss", {"reverse": 1}),
    ],
)
def test_what_the_gradient_of_each_estimator_is_in_expectation(
    estimator: Estimator, use: str, law: dict[str, int]
) -> None:
    known = expected_gradients()
    expected = sum((sign * known[name] for name, sign in law.items()), torch.zeros_like(POLICY))
    torch.testing.assert_close(gradient_of_estimator(estimator, use), expected, rtol=1e-10, atol=1e-14)


def test_the_gradients_of_that_table_differ_from_each_other() -> None:
    known = list(expected_gradients().values())
    for i, one in enumerate(known):
        assert all((one - other).norm().item() > 0.05 for other in known[:i])


# exact KL and entropy


def test_exact_kl_golden_numbers_in_both_directions() -> None:
    even, skewed = t(0.5, 0.5).log()[None], t(0.25, 0.75).log()[None]
    assert exact_kl(even, skewed, ONE).item() == pytest.approx(0.143841, abs=5e-7)
    assert exact_kl(skewed, even, ONE).item() == pytest.approx(0.130812, abs=5e-7)


@given(st.integers(1, 4), st.data())
def test_exact_kl_and_entropy_equal_the_scalar_oracles(size: int, data: st.DataObject) -> None:
    logits, ref_logits = data.draw(numbers(size, size, size)), data.draw(numbers(size, size, size))
    mask = torch.ones(size, size, dtype=torch.bool)
    flat = zip(logits.reshape(-1, size).tolist(), ref_logits.reshape(-1, size).tolist(), strict=True)
    expected = t(*(oracles.kl(a, b) for a, b in flat)).reshape(size, size)
    got = exact_kl(logits, ref_logits, mask)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert bool((got >= -1e-12).all()) and not bool(exact_kl(logits, logits, mask).any())
    rows = t(*(oracles.entropy(row) for row in logits.reshape(-1, size).tolist())).reshape(size, size)
    torch.testing.assert_close(entropy(logits, mask), rows, rtol=1e-12, atol=1e-12)


def test_exact_kl_bounds_every_donsker_varadhan_estimate() -> None:
    logits, ref_logits = POLICY[0], REFERENCE[0]
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    kl = exact_kl(logits[None], ref_logits[None], ONE).item()
    generator = torch.Generator().manual_seed(0)
    for f in torch.randn(50, 3, generator=generator, dtype=torch.float64):
        assert ((p * f).sum() - (q * f.exp()).sum().log()).item() <= kl
    best = p.log() - q.log()
    assert ((p * best).sum() - (q * best.exp()).sum().log()).item() == pytest.approx(kl, abs=1e-12)


def test_entropy_lies_between_zero_and_log_v_and_its_gradient_vanishes_at_the_uniform_law() -> None:
    assert entropy(torch.zeros(1, 4), ONE).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy(t(1e4, 0.0)[None], ONE).item() == 0.0
    slope = grad(lambda x: entropy(x, ONE).sum())(torch.zeros(1, 4, dtype=torch.float64))
    assert slope.abs().max().item() < 1e-15


def test_excluded_tokens_add_nothing_and_make_no_nan() -> None:
    logits, ref_logits = t(0.3, -0.5, -math.inf)[None], t(0.1, 0.4, 0.9)[None]
    assert entropy(logits, ONE).item() == pytest.approx(oracles.entropy([0.3, -0.5]), abs=1e-12)
    assert exact_kl(logits, ref_logits, ONE).item() == pytest.approx(
        oracles.kl([0.3, -0.5, -math.inf], [0.1, 0.4, 0.9]), abs=1e-12
    )
    assert exact_kl(logits, logits, ONE).item() == 0.0
    assert exact_kl(ref_logits, logits, ONE).item() == math.inf
    for slopes in (
        (grad(lambda x: entropy(x, ONE).sum())(logits),),
        grad(lambda x, y: exact_kl(x, y, ONE).sum(), argnums=(0, 1))(logits, ref_logits),
    ):
        assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_exact_kl_gradient_is_the_closed_form() -> None:
    logits, ref_logits = POLICY[:1], REFERENCE[:1]
    p, s = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    by_policy, by_reference = grad(lambda x, y: exact_kl(x, y, ONE).sum(), argnums=(0, 1))(logits, ref_logits)
    torch.testing.assert_close(by_policy, p * (s - (p * s).sum()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_reference, ref_logits.softmax(-1) - p, rtol=1e-9, atol=1e-12)


def test_the_mask_of_logits_must_be_their_shape_without_the_vocabulary() -> None:
    expectation = r"mask must have shape \[2, 3\] \(logits \[2, 3, 4\] without V\), got \[3, 2\]"
    with pytest.raises(ValueError, match=expectation):
        entropy(torch.zeros(2, 3, 4), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got logits \[1, 3\], ref_logits \[1, 4\]"):
        exact_kl(torch.zeros(1, 3), torch.zeros(1, 4), ONE)


# KL-shaped reward


def test_kl_shaped_reward_golden_numbers() -> None:
    mask = torch.tensor([[True, True, True]])
    kl = kl_k1(t(-1, -2, -0.5)[None], t(-1.2, -1.5, -0.5)[None], mask)
    reward = kl_shaped_reward(t(2.0), kl, mask, beta=0.1)
    assert reward[0].tolist() == pytest.approx([-0.02, 0.05, 2.0])
    assert reward.sum().item() == pytest.approx(2.03)


@given(batches(tensors=1), st.sampled_from([0.0, 0.1, 1.0]), st.data())
def test_kl_shaped_reward_equals_the_scalar_oracle(batch: Batch, beta: float, data: st.DataObject) -> None:
    (kl,), mask = batch.tensors, batch.mask
    score = data.draw(numbers(mask.shape[0]))
    got = kl_shaped_reward(score, kl, mask, beta=beta)
    for row in range(mask.shape[0]):
        flags = mask[row].tolist()
        expected = oracles.shaped_reward(score[row].item(), kl[row].tolist(), flags, beta)
        assert [x if f else None for x, f in zip(got[row].tolist(), flags, strict=True)] == expected


@given(batches(tensors=2), st.data())
def test_a_row_of_rewards_sums_to_the_score_less_beta_log_ratio(batch: Batch, data: st.DataObject) -> None:
    logp, ref_logp = batch.tensors
    score = data.draw(numbers(batch.mask.shape[0]))
    reward = kl_shaped_reward(score, kl_k1(logp, ref_logp, batch.mask), batch.mask, beta=0.3)
    log_ratio = sequence_sum(logp, batch.mask) - sequence_sum(ref_logp, batch.mask)
    paid = torch.where(batch.mask.any(dim=-1), score, 0.0)
    torch.testing.assert_close(sequence_sum(reward, batch.mask), paid - 0.3 * log_ratio)


@given(batches(tensors=1))
def test_the_score_is_paid_once_on_the_last_token_that_counts(batch: Batch) -> None:
    score = torch.ones(batch.mask.shape[0], dtype=torch.float64)
    paid = kl_shaped_reward(score, batch.tensors[0], batch.mask, beta=0.0)
    for row, flags in zip(paid.tolist(), batch.mask.tolist(), strict=True):
        places = [place for place, x in enumerate(row) if x != 0]
        assert places == [place for place, flag in enumerate(flags) if flag][-1:]


def test_the_score_of_an_empty_row_is_never_read() -> None:
    mask = torch.tensor([[False, False], [True, False]])
    reward = kl_shaped_reward(t(math.nan, 1.0), torch.zeros(2, 2, dtype=torch.float64), mask, beta=0.1)
    assert reward.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_kl_shaped_reward_takes_the_coefficient_of_a_controller() -> None:
    kl, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    state = KLController(torch.tensor(0.25))
    reward = kl_shaped_reward(torch.zeros(1), kl, mask, beta=state.coefficient)
    assert torch.equal(reward, kl_shaped_reward(torch.zeros(1), kl, mask, beta=0.25))


def test_kl_shaped_reward_names_what_is_wrong() -> None:
    kl, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    expectation = r"score must have shape \[2\] \(one per row of mask \[2, 2\]\), got \[2, 2\]"
    with pytest.raises(ValueError, match=expectation):
        kl_shaped_reward(torch.zeros(2, 2), kl, mask, beta=0.1)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta must be at least 0 and finite, got {bad}"):
            kl_shaped_reward(torch.zeros(2), kl, mask, beta=bad)


# controller


@pytest.mark.parametrize(
    ("kl", "expected"), [(12.0, 0.201024), (6.3, 0.200256), (0.0, 0.198976), (6.0, 0.2), (7.2, 0.201024)]
)
def test_the_controller_golden_numbers(kl: float, expected: float) -> None:
    state = KLController(torch.tensor(0.2, dtype=torch.float64))
    after = adapt_kl(state, torch.tensor(kl, dtype=torch.float64), target=6, horizon=10_000, n_steps=256)
    assert after.coefficient.item() == pytest.approx(expected, abs=1e-12)
    assert after.coefficient.item() == pytest.approx(oracles.adapted(0.2, kl, 6, 10_000, 256), abs=1e-15)
    assert state.coefficient.item() == 0.2


@given(st.floats(0, 1e6), st.floats(1e-3, 100), st.floats(1, 1e5), st.floats(0.01, 4.99))
def test_the_controller_moves_towards_the_target_within_its_bounds(
    kl: float, target: float, horizon: float, share: float
) -> None:
    state = KLController(torch.tensor(0.3, dtype=torch.float64))
    measured = torch.tensor(kl, dtype=torch.float64)
    after = adapt_kl(state, measured, target=target, horizon=horizon, n_steps=share * horizon)
    factor = after.coefficient.item() / 0.3
    assert 0 < factor and abs(factor - 1) <= 0.2 * share + 1e-12
    assert (factor > 1) == (kl > target) or abs(kl / target - 1) < 1e-12


def test_the_controller_holds_the_target_in_a_closed_loop() -> None:
    rewards = REWARD - REWARD.mean()

    def plant(beta: Tensor) -> Tensor:
        """Exact KL of the optimal policy at β: π ∝ π_ref e^(r/β)."""
        ref_logp = sequence_logp(REFERENCE)
        logp = torch.log_softmax(ref_logp + rewards / beta, dim=-1)
        return (logp.exp() * (logp - ref_logp)).sum()

    state = KLController(torch.tensor(3.0, dtype=torch.float64))
    for _ in range(60):
        state = adapt_kl(state, plant(state.coefficient), target=0.5, horizon=100, n_steps=100)
    assert abs(plant(state.coefficient).item() / 0.5 - 1) < 0.01


@pytest.mark.parametrize("name", ["target", "horizon", "n_steps"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_the_controller_refuses_numbers_that_are_not_positive(name: str, bad: float) -> None:
    arguments = {"target": 6.0, "horizon": 100.0, "n_steps": 10.0, name: bad}
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {bad}"):
        adapt_kl(KLController(torch.tensor(0.2)), torch.tensor(1.0), **arguments)


def test_the_controller_refuses_steps_that_could_turn_the_sign() -> None:
    state, kl = KLController(torch.tensor(0.2)), torch.tensor(0.0)
    with pytest.raises(ValueError, match="n_steps must be less than 5 · horizon = 500, got 500"):
        adapt_kl(state, kl, target=1, horizon=100, n_steps=500)
    assert adapt_kl(state, kl, target=1, horizon=100, n_steps=499).coefficient.item() > 0
    with pytest.raises(ValueError, match=r"kl must be a tensor \[\], got shape \[2\]"):
        adapt_kl(state, torch.zeros(2), target=1, horizon=100, n_steps=1)
