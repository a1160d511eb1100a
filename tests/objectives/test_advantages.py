"""GAE, returns and whitening: against loops, limits, impulse responses, exact expectations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, vmap

from minirlhf.objectives.advantages import (
    AdvantageEstimate,
    discounted_return,
    gae,
    whiten,
    whiten_scale_only,
)
from minirlhf.objectives.masked import token_mean, token_variance
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.enumeration import (
    MASK,
    PREFIXES,
    REWARD,
    SEQUENCES,
    STATES,
    another_policy,
    sequence_logp,
    token_logp,
)
from tests.objectives.strategies import Batch, batches, numbers

fractions = st.sampled_from([0.0, 0.3, 0.7, 0.95, 0.99, 1.0])


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def full(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def generic(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[0.0 if x is None else x for x in row] for row in rows], dtype=torch.float64)


def looped_gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor
) -> AdvantageEstimate:
    rows = zip(reward.tolist(), value.tolist(), mask.tolist(), bootstrap.tolist(), strict=True)
    both = [oracles.gae(r, v, m, gamma, lam, b) for r, v, m, b in rows]
    return AdvantageEstimate(filled([a for a, _ in both]), filled([g for _, g in both]))


# GAE


def test_gae_golden_numbers() -> None:
    advantage = gae(t(0, 0, 1)[None], t(0.5, 0.5, 0.5)[None], full(1, 3), gamma=1, lam=0.95).advantage
    assert advantage[0].tolist() == pytest.approx([0.45125, 0.475, 0.5])
    reward, value = t(0, 0, 0, 1)[None], t(0.2, 0.4, 0.6, 0.8)[None]
    estimate = gae(reward, value, full(1, 4), gamma=0.99, lam=0.95)
    assert estimate.advantage[0].tolist() == pytest.approx([0.714671, 0.551484, 0.3801, 0.2], abs=5e-7)
    assert estimate.ret[0].tolist() == pytest.approx([0.914671, 0.951484, 0.9801, 1.0], abs=5e-7)


@given(batches(tensors=2), fractions, fractions, st.data())
def test_gae_equals_the_loop(batch: Batch, gamma: float, lam: float, data: st.DataObject) -> None:
    reward, value = batch.tensors
    bootstrap = data.draw(numbers(batch.mask.shape[0]))
    got = gae(reward, value, batch.mask, gamma=gamma, lam=lam, bootstrap_value=bootstrap)
    close(got, looped_gae(reward, value, batch.mask, gamma, lam, bootstrap))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1024])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.1), (0.0, 0.5), (1.0, 0.0)])
def test_gae_equals_the_loop_at_any_length(length: int, gamma: float, lam: float) -> None:
    reward, value, bootstrap = generic(3, length), generic(3, length, seed=1), generic(3, seed=2)
    mask = generic(3, length, seed=3) > -1
    got = gae(reward, value, mask, gamma=gamma, lam=lam, bootstrap_value=bootstrap)
    close(got, looped_gae(reward, value, mask, gamma, lam, bootstrap))


def test_gae_in_fp32_stays_close_to_fp64_over_a_thousand_tokens() -> None:
    reward, value, mask = generic(2, 1024), generic(2, 1024, seed=1), full(2, 1024)
    exact = gae(reward, value, mask, gamma=1.0, lam=0.95)
    single = gae(reward.float(), value.float(), mask, gamma=1.0, lam=0.95)
    assert single.advantage.dtype == torch.float32
    assert (single.advantage.double() - exact.advantage).abs().max().item() < 1e-4


def test_a_hyperparameter_is_not_rounded_to_fp32() -> None:
    estimate = gae(t(0, 1)[None], t(0, 0)[None], full(1, 2), gamma=0.1, lam=0.7)
    assert estimate.advantage[0, 0].item() == pytest.approx(0.07, abs=1e-16)
    assert discounted_return(t(0, 1)[None], full(1, 2), gamma=0.1)[0, 0].item() == 0.1


@given(batches(tensors=2), fractions)
def test_gae_with_lambda_zero_is_the_td_error(batch: Batch, gamma: float) -> None:
    reward, value = batch.tensors
    got = gae(reward, value, batch.mask, gamma=gamma, lam=0.0).advantage
    for b, row in enumerate(batch.mask.tolist()):
        counted = [i for i, flag in enumerate(row) if flag]
        for i, place in enumerate(counted):
            after = value[b, counted[i + 1]].item() if i + 1 < len(counted) else 0.0
            expected = reward[b, place].item() + gamma * after - value[b, place].item()
            assert got[b, place].item() == pytest.approx(expected, abs=1e-12)


@given(batches(tensors=2), fractions, st.data())
def test_gae_with_lambda_one_is_return_minus_value(batch: Batch, gamma: float, data: st.DataObject) -> None:
    reward, value = batch.tensors
    bootstrap = data.draw(numbers(batch.mask.shape[0]))
    estimate = gae(reward, value, batch.mask, gamma=gamma, lam=1.0, bootstrap_value=bootstrap)
    returns = discounted_return(reward, batch.mask, gamma=gamma, bootstrap_value=bootstrap)
    close(estimate.ret, returns)
    close(estimate.advantage, torch.where(batch.mask, returns - value, 0.0))


@given(batches(tensors=2), fractions, fractions)
def test_returns_are_advantage_plus_value_where_it_counts(batch: Batch, gamma: float, lam: float) -> None:
    reward, value = batch.tensors
    estimate = gae(reward, value, batch.mask, gamma=gamma, lam=lam)
    expected = torch.where(batch.mask, estimate.advantage + value, 0.0)
    close(estimate.ret, expected)


def test_gae_is_the_exponential_mixture_of_n_step_advantages() -> None:
    reward, value, gamma, lam, length = generic(6), generic(6, seed=1), 0.9, 0.6, 6

    def n_step(start: int, n: int) -> float:
        stop = min(start + n, length)
        rewards = sum(gamma ** (k - start) * reward[k].item() for k in range(start, stop))
        tail = gamma ** (stop - start) * value[stop].item() if stop < length else 0.0
        return rewards + tail - value[start].item()

    got = gae(reward[None], value[None], full(1, 6), gamma=gamma, lam=lam).advantage[0]
    for start in range(length):
        last = length - start
        mixture = sum((1 - lam) * lam ** (n - 1) * n_step(start, n) for n in range(1, last))
        mixture += lam ** (last - 1) * n_step(start, last)
        assert got[start].item() == pytest.approx(mixture, abs=1e-12)


def test_gae_impulse_responses_have_their_closed_form() -> None:
    gamma, lam, length = 0.9, 0.6, 5
    reward, value, bootstrap = generic(length), generic(length, seed=1), t(0.4)[0]

    def advantage(r: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return gae(r, v, full(length), gamma=gamma, lam=lam, bootstrap_value=b).advantage

    by_reward, by_value, by_bootstrap = jacrev(advantage, argnums=(0, 1, 2))(reward, value, bootstrap)
    for start in range(length):
        for k in range(length):
            ahead = k - start
            credit = (gamma * lam) ** ahead if ahead >= 0 else 0.0
            assert by_reward[start, k].item() == pytest.approx(credit, abs=1e-12)
            later = gamma * (1 - lam) * (gamma * lam) ** (ahead - 1) if ahead > 0 else 0.0
            expected = -1.0 if ahead == 0 else later
            assert by_value[start, k].item() == pytest.approx(expected, abs=1e-12)
        expected = gamma * (gamma * lam) ** (length - 1 - start)
        assert by_bootstrap[start].item() == pytest.approx(expected, abs=1e-12)


@given(batches(tensors=4), fractions, fractions)
def test_gae_is_linear_in_rewards_and_values_together(batch: Batch, gamma: float, lam: float) -> None:
    r, v, s, w = batch.tensors

    def advantage(reward: Tensor, value: Tensor) -> Tensor:
        return gae(reward, value, batch.mask, gamma=gamma, lam=lam).advantage

    close(advantage(r + 2 * s, v + 2 * w), advantage(r, v) + 2 * advantage(s, w))


@given(batches(tensors=3, holes=False), fractions, fractions)
def test_potential_shaping_leaves_the_advantages_unchanged(batch: Batch, gamma: float, lam: float) -> None:
    reward, value, potential = batch.tensors
    inside = torch.where(batch.mask, potential, 0.0)
    after = torch.cat([inside[:, 1:], torch.zeros_like(inside[:, :1])], dim=1)
    shaped = gae(reward + gamma * after - inside, value - inside, batch.mask, gamma=gamma, lam=lam)
    plain = gae(reward, value, batch.mask, gamma=gamma, lam=lam)
    close(shaped.advantage, plain.advantage)


def test_masked_interior_tokens_are_stepped_over_undecayed() -> None:
    mask = torch.tensor([[True, False, False, True, True]])
    reward, value = t(0.1, 9, 9, 0.2, 1.0)[None], t(0.3, 9, 9, 0.4, 0.5)[None]
    got = gae(reward, value, mask, gamma=0.9, lam=0.8)
    short = gae(t(0.1, 0.2, 1.0)[None], t(0.3, 0.4, 0.5)[None], full(1, 3), gamma=0.9, lam=0.8)
    close(got.advantage[mask], short.advantage[0])
    assert got.advantage[0, 1:3].tolist() == [0.0, 0.0]


def test_a_garbage_value_beyond_the_end_does_not_leak() -> None:
    mask = torch.tensor([[True, True, False]])
    estimate = gae(t(0, 1, 100)[None], t(0.5, 0.5, 100)[None], mask, gamma=1.0, lam=0.95)
    assert estimate.advantage[0].tolist() == pytest.approx([0.475, 0.5, 0.0])


def test_truncated_rows_bootstrap_and_finished_rows_do_not() -> None:
    reward, value = t(0, 0).expand(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    estimate = gae(reward, value, full(2, 2), gamma=0.5, lam=1.0, bootstrap_value=t(0.0, 4.0))
    assert estimate.ret.tolist() == [[0.0, 0.0], [1.0, 2.0]]


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_cutting_a_rollout_and_bootstrapping_changes_nothing_that_it_should_not(cut: int) -> None:
    reward, value, mask = generic(1, 7), generic(1, 7, seed=1), full(1, 7)
    for lam, tail in ((0.0, value[:, cut]), (1.0, discounted_return(reward, mask, gamma=0.9)[:, cut])):
        whole = gae(reward, value, mask, gamma=0.9, lam=lam).advantage[:, :cut]
        head = (reward[:, :cut], value[:, :cut], mask[:, :cut])
        torch.testing.assert_close(gae(*head, gamma=0.9, lam=lam, bootstrap_value=tail).advantage, whole)
        assert not torch.allclose(gae(*head, gamma=0.9, lam=lam).advantage, whole)


def test_a_score_on_the_last_token_reaches_it_whole() -> None:
    estimate = gae(t(0, 0, 1)[None], t(0, 0, 0)[None], full(1, 3), gamma=1.0, lam=0.95)
    assert estimate.advantage[0].tolist() == pytest.approx([0.9025, 0.95, 1.0])


def exact_values(logits: Tensor) -> Tensor:
    """[7] V of each prefix under a policy: expected final reward of the sequences that begin with it."""
    weight = sequence_logp(logits).exp()
    through = torch.stack([torch.tensor([s[: len(p)] == p for s in SEQUENCES]) for p in PREFIXES])
    return (through * weight * REWARD).sum(dim=-1) / (through * weight).sum(dim=-1)


def expected_policy_gradient(logits: Tensor, value: Tensor, lam: float) -> Tensor:
    """E[Σ_t A_t ∇ log π], exactly, for values of the 7 prefixes."""
    last = MASK.sum(dim=-1, keepdim=True) - 1
    reward = torch.where(torch.arange(3) == last, REWARD[:, None], 0.0)
    advantage = gae(reward, value[STATES], MASK, gamma=1.0, lam=lam).advantage
    weight = sequence_logp(logits).exp()[:, None]
    return torch.func.grad(lambda x: (weight * advantage * token_logp(x)).sum())(logits)


def test_gae_gradients_are_unbiased_exactly_when_theory_says_so() -> None:
    logits = another_policy()
    true = torch.func.grad(lambda x: (sequence_logp(x).exp() * REWARD).sum())(logits)
    right, wrong = exact_values(logits), exact_values(logits) + generic(7)
    for lam in (0.0, 0.5, 0.95, 1.0):
        torch.testing.assert_close(expected_policy_gradient(logits, right, lam), true, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(expected_policy_gradient(logits, wrong, 1.0), true, rtol=1e-9, atol=1e-13)
    for lam in (0.0, 0.5):
        error = (expected_policy_gradient(logits, wrong, lam) - true).norm() / true.norm()
        assert error.item() > 0.05, "with a wrong critic and λ < 1 the estimate is biased"


def test_gae_compiles_as_one_full_graph_and_equals_eager() -> None:
    torch._dynamo.reset()
    reward, value, mask = generic(3, 64), generic(3, 64, seed=1), generic(3, 64, seed=2) > -1

    def call(r: Tensor, v: Tensor, m: Tensor) -> AdvantageEstimate:
        return gae(r, v, m, gamma=0.99, lam=0.95)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(reward, value, mask), call(reward, value, mask))


def test_the_graph_of_gae_grows_with_the_logarithm_of_time() -> None:
    def operations(length: int) -> int:
        counted: list[int] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            counted.append(len(graph.graph.nodes))
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda r: gae(r, r, full(1, length), gamma=0.9, lam=0.9), fullgraph=True, backend=backend
        )
        compiled(generic(1, length))
        return counted[0]

    sizes = [operations(length) for length in (16, 64, 256, 1024)]
    steps = {later - earlier for earlier, later in zip(sizes, sizes[1:], strict=False)}
    assert len(steps) == 1 and sizes[-1] < 600


def test_many_gammas_at_once_by_vmap() -> None:
    reward, value, grid = generic(2, 5), generic(2, 5, seed=1), t(0.5, 0.9, 1.0)
    got = vmap(lambda g: gae(reward, value, full(2, 5), gamma=g, lam=g).advantage)(grid)
    looped = [gae(reward, value, full(2, 5), gamma=g, lam=g).advantage for g in grid.tolist()]
    close(got, torch.stack(looped))


# returns


@given(batches(tensors=1), fractions, st.data())
def test_discounted_return_equals_the_explicit_sum(batch: Batch, gamma: float, data: st.DataObject) -> None:
    (reward,), mask = batch.tensors, batch.mask
    bootstrap = data.draw(numbers(mask.shape[0]))
    rows = zip(reward.tolist(), mask.tolist(), bootstrap.tolist(), strict=True)
    expected = filled([oracles.discounted_return(r, m, gamma, b) for r, m, b in rows])
    got = discounted_return(reward, mask, gamma=gamma, bootstrap_value=bootstrap)
    close(got, expected)
    without = discounted_return(reward, mask, gamma=gamma)
    torch.testing.assert_close(
        without, discounted_return(reward, mask, gamma=gamma, bootstrap_value=0 * bootstrap)
    )


# whitening


def test_whitening_golden_numbers_use_the_unbiased_variance() -> None:
    x = t(1, 2, 3)[None]
    torch.testing.assert_close(whiten(x, full(1, 3), epsilon=0.0), t(-1, 0, 1)[None])
    pair = whiten(t(0, 1)[None], full(1, 2), epsilon=0.0)
    assert pair[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    with_epsilon = whiten(t(0, 1)[None], full(1, 2), epsilon=0.5)
    assert with_epsilon[0].tolist() == pytest.approx([-0.5, 0.5])
    default = whiten(t(0, 2e-4)[None], full(1, 2))  # σ² = 2e-8, ε = 1e-8
    assert default[0, 1].item() == pytest.approx(1e-4 / math.sqrt(3e-8))


@given(batches(tensors=1))
def test_whitened_tokens_have_mean_zero_and_variance_one_over_the_whole_batch(batch: Batch) -> None:
    (x,), mask = batch.tensors, batch.mask
    white, scaled = whiten(x, mask), whiten_scale_only(x, mask)
    varies = token_variance(x, mask).item() > 0
    assert token_mean(white, mask).item() == pytest.approx(0.0, abs=1e-9)
    assert token_variance(white, mask).item() == pytest.approx(float(varies), abs=1e-5)
    assert token_mean(scaled, mask).item() == pytest.approx(token_mean(x, mask).item(), abs=1e-9)
    assert token_variance(scaled, mask).item() == pytest.approx(float(varies), abs=1e-5)


@given(batches(tensors=1), st.sampled_from([0.5, 2.0, 3.0]), st.sampled_from([-1.0, 0.0, 4.0]))
def test_whitening_undoes_positive_affine_maps_and_keeps_the_order(
    batch: Batch, scale: float, shift: float
) -> None:
    (x,), mask = batch.tensors, batch.mask
    white = whiten(x, mask)
    torch.testing.assert_close(whiten(scale * x + shift, mask), white, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(whiten(-x, mask), -white, rtol=1e-9, atol=1e-9)
    for whitened in (white, whiten_scale_only(x, mask)):
        order = x[mask].argsort(stable=True)
        assert bool((whitened[mask][order].diff() >= -1e-12).all())
        assert bool(((x[mask][order].diff() > 0) == (whitened[mask][order].diff() > 1e-12)).all())


def test_whitening_is_over_the_batch_not_over_rows() -> None:
    white = whiten(t(1, 1, 5, 5).reshape(2, 2), full(2, 2))
    assert white[0, 0].item() == white[0, 1].item() < 0 < white[1, 0].item()


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_input_and_a_single_token_whiten_to_zero(constant: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 3), constant, dtype=dtype)
    one = torch.tensor([[True, False, False], [False, False, False]])
    for mask in (full(2, 3), one):
        assert whiten(x, mask).abs().max().item() < 0.2
        assert whiten(x, one).abs().max().item() == 0.0
        kept = whiten_scale_only(x, mask)[mask]
        torch.testing.assert_close(kept, x[mask], rtol=0.0, atol=0.2 if dtype == torch.float32 else 1e-5)


# errors


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf])
def test_a_discount_outside_zero_to_one_is_refused(bad: float) -> None:
    x, mask = torch.zeros(1, 2), full(1, 2)
    with pytest.raises(ValueError, match=rf"gamma must lie in \[0, 1\], got {bad}"):
        gae(x, x, mask, gamma=bad, lam=0.5)
    with pytest.raises(ValueError, match=rf"lam must lie in \[0, 1\], got {bad}"):
        gae(x, x, mask, gamma=0.5, lam=bad)
    with pytest.raises(ValueError, match=rf"gamma must lie in \[0, 1\], got {bad}"):
        discounted_return(x, mask, gamma=bad)


def test_a_bootstrap_value_that_is_not_one_per_row_is_refused() -> None:
    x, mask = torch.zeros(2, 2), full(2, 2)
    expectation = r"bootstrap_value must have shape \[2\] \(one per row of mask \[2, 2\]\), got \[2, 2\]"
    with pytest.raises(ValueError, match=expectation):
        gae(x, x, mask, gamma=1.0, lam=1.0, bootstrap_value=x)
    with pytest.raises(ValueError, match="bootstrap_value must be a floating-point tensor, got torch.int64"):
        discounted_return(x, mask, gamma=1.0, bootstrap_value=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1e-8, math.nan])
def test_a_negative_epsilon_is_refused(bad: float) -> None:
    for function in (whiten, whiten_scale_only):
        with pytest.raises(ValueError, match=f"epsilon must be at least 0 and finite, got {bad}"):
            function(torch.zeros(1, 2), full(1, 2), epsilon=bad)
