"""The masked log-prob: compact against dense against a loop, values and gradients, NaN, half precision."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.kernels.logprob import (
    token_logp,
    token_logp_and_entropy,
    token_logp_and_entropy_dense,
    token_logp_dense,
    token_report,
)

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
ALL = [token_logp, token_logp_dense, token_logp_and_entropy, token_logp_and_entropy_dense]


def batch(
    seed: int = 0, *, b: int = 3, t: int = 5, d: int = 4, v: int = 7, dtype: torch.dtype = torch.float64
) -> Batch:
    """states, unembedding, tokens, mask: ragged spans [prompt][response][padding], row 0 without response."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(1, t, (b,), generator=g)
    end = start + (torch.rand(b, generator=g) * (t - start + 1)).long()
    end[0] = start[0]
    place = torch.arange(t)
    mask = (place >= start[:, None]) & (place < end[:, None])
    states = torch.randn(b, t, d, generator=g, dtype=torch.float64).to(dtype)
    unembedding = (2 * torch.randn(v, d, generator=g, dtype=torch.float64)).to(dtype)
    return states, unembedding, torch.randint(v, (b, t), generator=g), mask


def oracle(
    states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Token by token on Python numbers, without a tensor operation."""
    logp, entropy = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    table = unembedding.tolist()
    for row in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[row, t]:
                state = states[row, t].tolist()
                z = [sum(s * u for s, u in zip(state, entry, strict=True)) / tau for entry in table]
                log_total = max(z) + math.log(sum(math.exp(each - max(z)) for each in z))
                logp[row, t] = z[int(tokens[row, t])] - log_total
                entropy[row, t] = sum(math.exp(each - log_total) * (log_total - each) for each in z)
    return logp, entropy


def outputs(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]], *args: Tensor, tau: float
) -> list[Tensor]:
    result = function(*args, temperature=tau)
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("function", ALL)
@given(seed=st.integers(0, 10_000), b=st.integers(1, 4), t=st.integers(2, 6), tau=st.floats(0.2, 3.0))
def test_values_equal_the_scalar_loop(
    function: Callable[..., Tensor], seed: int, b: int, t: int, tau: float
) -> None:
    args = batch(seed, b=b, t=t)
    for got, right in zip(outputs(function, *args, tau=tau), oracle(*args, tau), strict=False):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)


def test_golden_values_of_a_law_that_is_known() -> None:
    # Logits [0, log 2, log 5] at every slot: the law is [1/8, 2/8, 5/8].
    states, unembedding = torch.ones(1, 4, 1), torch.tensor([[1.0], [2.0], [5.0]]).log()
    tokens, mask = torch.tensor([[2, 0, 1, 2]]), torch.tensor([[False, True, True, True]])
    logp, entropy = token_logp_and_entropy(states, unembedding, tokens, mask)
    expected = [0.0, math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)]
    torch.testing.assert_close(logp, torch.tensor([expected]))
    uncertainty = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(entropy, torch.tensor([[0.0, uncertainty, uncertainty, uncertainty]]))
    # At temperature 1/2 the law is [1, 4, 25] / 30.
    sharp = token_logp(states, unembedding, tokens, mask, temperature=0.5)
    torch.testing.assert_close(sharp[0, 1:], torch.tensor([1 / 30, 4 / 30, 25 / 30]).log())


def weighted_gradients(function: Callable[..., Tensor], args: Batch, tau: float) -> tuple[Tensor, Tensor]:
    """∂/∂(states, unembedding) of a sum in which every token of every output has its own weight."""
    states, unembedding, tokens, mask = args

    def total(states: Tensor, unembedding: Tensor) -> Tensor:
        parts = outputs(function, states, unembedding, tokens, mask, tau=tau)
        weight = torch.linspace(0.5, 2.0, mask.numel(), dtype=states.dtype).view(mask.shape)
        return torch.stack([(each * weight * (1 - 3 * k)).sum() for k, each in enumerate(parts)]).sum()

    return torch.func.grad(total, argnums=(0, 1))(states, unembedding)


@pytest.mark.parametrize(
    ("compact", "dense"),
    [(token_logp, token_logp_dense), (token_logp_and_entropy, token_logp_and_entropy_dense)],
)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.2, 3.0))
def test_compact_and_dense_have_the_same_values_and_both_gradients(
    compact: Callable[..., Tensor], dense: Callable[..., Tensor], seed: int, tau: float
) -> None:
    args = batch(seed)
    for a, b in zip(outputs(compact, *args, tau=tau), outputs(dense, *args, tau=tau), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(
        weighted_gradients(compact, args, tau), weighted_gradients(dense, args, tau), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", ALL)
def test_both_gradients_pass_the_numerical_check(function: Callable[..., Tensor]) -> None:
    states, unembedding, tokens, mask = batch(1)
    states.requires_grad_()
    unembedding.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, u: tuple(outputs(function, s, u, tokens, mask, tau=0.7)), (states, unembedding)
    )


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_and_impossible_ids_under_the_mask_reach_neither_value_nor_gradient(
    function: Callable[..., Tensor], poison: float
) -> None:
    states, unembedding, tokens, mask = batch(2)
    dirty = torch.where(mask[..., None], states, poison)
    ids = torch.where(mask, tokens, -100)
    args = (dirty, unembedding, ids, mask)
    for got, right in zip(
        outputs(function, *args, tau=1.0),
        outputs(function, states, unembedding, tokens, mask, tau=1.0),
        strict=True,
    ):
        assert torch.equal(got, right)
        assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    by_states, by_unembedding = weighted_gradients(function, args, 1.0)
    clean_states, clean_unembedding = weighted_gradients(function, (states, unembedding, tokens, mask), 1.0)
    assert not by_states[~mask].any()
    assert torch.equal(by_states, clean_states) and torch.equal(by_unembedding, clean_unembedding)


@pytest.mark.parametrize("function", ALL)
def test_a_batch_without_a_single_counted_token_gives_zeros_and_zero_gradients(
    function: Callable[..., Tensor],
) -> None:
    states, unembedding, tokens, mask = batch(3)
    args = (states, unembedding, tokens, torch.zeros_like(mask))
    assert all(not each.any() and each.shape == mask.shape for each in outputs(function, *args, tau=1.0))
    assert all(not gradient.any() for gradient in weighted_gradients(function, args, 1.0))


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_its_softmax_in_fp32(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    states, unembedding, tokens, mask = batch(9, v=400, d=16, dtype=dtype)
    assert mask.any(), "a batch in which nothing counts would claim nothing"
    logits = states.double() @ unembedding.double().T
    right = torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]
    got = outputs(function, states, unembedding, tokens, mask, tau=1.0)
    assert all(each.dtype == torch.float32 for each in got)
    torch.testing.assert_close(got[0][mask], right[mask].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", ALL)
def test_large_logits_stay_accurate(function: Callable[..., Tensor]) -> None:
    states, unembedding, tokens, mask = batch(5, dtype=torch.float32)
    states = states * 2000
    largest = (states @ unembedding.T).abs().max().item()
    right = oracle(states.double(), unembedding.double(), tokens, mask, 1.0)
    for got, exact in zip(outputs(function, states, unembedding, tokens, mask, tau=1.0), right, strict=False):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("function", [token_logp_dense, token_logp_and_entropy_dense])
def test_the_dense_twins_work_under_vmap_of_grad_over_masks_and_weights(
    function: Callable[..., Tensor],
) -> None:
    batches = [batch(seed) for seed in range(4)]
    stacked = tuple(torch.stack(each) for each in zip(*batches, strict=True))
    together = torch.func.vmap(lambda s, u, i, m: weighted_gradients(function, (s, u, i, m), 0.8))(*stacked)
    for index, args in enumerate(batches):
        for many, one in zip(together, weighted_gradients(function, args, 0.8), strict=True):
            torch.testing.assert_close(many[index], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", [token_logp_dense, token_logp_and_entropy_dense])
def test_the_dense_twins_compile_as_one_graph(function: Callable[..., Tensor]) -> None:
    args = batch(10)
    assert args[3].any(), "a batch in which nothing counts would claim nothing"

    def run(states: Tensor, unembedding: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        return outputs(function, states, unembedding, tokens, mask, tau=0.8)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, right in zip(compiled(*args), outputs(function, *args, tau=0.8), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_a_token_report_has_the_same_logp_and_gradient_and_constant_metrics() -> None:
    states, unembedding, tokens, mask = batch(8, b=4, t=9, d=5, v=6)
    logits = states @ unembedding.T / 0.8
    tokens = torch.where(torch.arange(9) % 2 == 0, logits.argmax(-1), tokens)  # some right, some not
    live = states.clone().requires_grad_()
    report = token_report(live, unembedding, tokens, mask, temperature=0.8)
    logp, entropy = token_logp_and_entropy(states, unembedding, tokens, mask, temperature=0.8)
    torch.testing.assert_close(report.logp, logp, rtol=0, atol=0)
    torch.testing.assert_close(report.entropy, entropy, rtol=0, atol=0)
    assert torch.equal(report.is_argmax, mask & (logits.argmax(-1) == tokens))
    assert 0 < int(report.is_argmax.sum()) < int(mask.sum())
    assert report.logp.requires_grad and not report.entropy.requires_grad
    (got,) = torch.autograd.grad(report.logp.sum(), live)
    (right,) = torch.autograd.grad(token_logp(live, unembedding, tokens, mask, temperature=0.8).sum(), live)
    torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", ALL)
def test_mistakes_are_named(function: Callable[..., Tensor]) -> None:
    states, unembedding, tokens, mask = batch()
    with pytest.raises(
        ValueError, match=r"expected states \[B, T, D\], .*; got \(3, 5, 4\), \(7, 4\), \(3, 4\)"
    ):
        function(states, unembedding, tokens[:, 1:], mask)
    with pytest.raises(ValueError, match=r"got \(3, 5, 4\), \(4, 7\)"):
        function(states, unembedding.T, tokens, mask)
    with pytest.raises(ValueError, match="mask must be bool, got torch.int64"):
        function(states, unembedding, tokens, mask.long())
    with pytest.raises(ValueError, match="tokens must be int64, got torch.int32"):
        function(states, unembedding, tokens.int(), mask)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
            function(states, unembedding, tokens, mask, temperature=temperature)
