"""What wrong variants have asked for: each claim refuses a mutant that all other tests let through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacrev

from minirlhf.kernels import logprob

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "token_logp": logprob.token_logp,
    "token_logp_and_entropy": logprob.token_logp_and_entropy,
    "token_report": logprob.token_report,
    "token_logp_dense": logprob.token_logp_dense,
    "token_logp_and_entropy_dense": logprob.token_logp_and_entropy_dense,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
with_entropy = pytest.mark.parametrize(
    "function",
    [logprob.token_logp_and_entropy, logprob.token_logp_and_entropy_dense],
    ids=["compact", "dense"],
)

MASK = torch.tensor([[False, True, True, False], [False, False, True, True]])
TOKENS = torch.tensor([[0, 4, 2, 1], [3, 3, 0, 2]])


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """States [2, 4, 3] and unembedding [5, 3]."""
    g = torch.Generator().manual_seed(11)
    states, unembedding = torch.randn(2, 4, 3, generator=g), torch.randn(5, 3, generator=g)
    return states.to(dtype), unembedding.to(dtype)


def first(result: Any) -> Tensor:
    """The log-probs, whatever stands beside them."""
    return result if isinstance(result, Tensor) else result[0]


@every_function
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_divides_the_logits_whatever_it_is(
    function: Callable[..., Any], temperature: float
) -> None:
    def exact(states: Tensor, unembedding: Tensor) -> Tensor:
        law = torch.log_softmax(states @ unembedding.T / temperature, dim=-1)
        return torch.where(MASK, law.gather(-1, TOKENS[..., None])[..., 0], 0.0)

    def measured(states: Tensor, unembedding: Tensor) -> Tensor:
        return first(function(states, unembedding, TOKENS, MASK, temperature=temperature))

    torch.testing.assert_close(measured(*drawn()), exact(*drawn()))
    gradients = [grad(lambda *pair, of=of: of(*pair).sum(), (0, 1))(*drawn()) for of in (measured, exact)]
    torch.testing.assert_close(*gradients)


@every_function
def test_without_a_temperature_it_is_one(function: Callable[..., Any]) -> None:
    states, unembedding = drawn()
    given = function(states, unembedding, TOKENS, MASK, temperature=1.0)
    default = function(states, unembedding, TOKENS, MASK)
    torch.testing.assert_close(default, given, rtol=0, atol=0)


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_the_values_and_the_gradients_of_fp32(
    function: Callable[..., Any], dtype: torch.dtype
) -> None:
    half = drawn(dtype)
    wide = tuple(x.float() for x in half)

    def total(states: Tensor, unembedding: Tensor) -> Tensor:
        return first(function(states, unembedding, TOKENS, MASK)).sum()

    got, right = (first(function(*pair, TOKENS, MASK)) for pair in (half, wide))
    assert got.dtype == torch.float32 and int(MASK.sum()) == int((got != 0).sum())
    torch.testing.assert_close(got, right, rtol=0.05, atol=0.05)
    for a, b in zip(grad(total, (0, 1))(*half), grad(total, (0, 1))(*wide), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)
        assert bool(b.any())


@with_entropy
def test_the_entropy_is_differentiable_in_states_and_unembedding(function: Callable[..., Any]) -> None:
    arguments = tuple(x.requires_grad_() for x in drawn())
    assert gradcheck(lambda s, u: function(s, u, TOKENS, MASK, temperature=0.7)[1], arguments)


@with_entropy
def test_the_curvature_of_the_entropy_at_the_uniform_law_is_minus_the_fisher_matrix(
    function: Callable[..., Any],
) -> None:
    unembedding, mask = torch.eye(4, dtype=torch.float64), torch.tensor([[True]])
    p = torch.full((4,), 0.25, dtype=torch.float64)

    def entropy(state: Tensor) -> Tensor:
        return function(state[None, None], unembedding, torch.tensor([[2]]), mask)[1].sum()

    curvature = jacrev(grad(entropy))(torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(curvature, p[:, None] * p - torch.diag(p))


def test_a_report_is_differentiable_in_the_unembedding_too() -> None:
    arguments = tuple(x.requires_grad_() for x in drawn())
    assert gradcheck(lambda s, u: logprob.token_report(s, u, TOKENS, MASK).logp, arguments)


@every_function
def test_states_or_an_unembedding_with_another_number_of_axes_are_refused(
    function: Callable[..., Any],
) -> None:
    states, unembedding = drawn()
    for wrong in (
        (states[0], unembedding, TOKENS[0], MASK[0]),
        (states[None], unembedding, TOKENS[None], MASK[None]),
        (states, unembedding[..., None], TOKENS, MASK),
        (states, unembedding[0], TOKENS, MASK),
        (states, unembedding[:, :2], TOKENS, MASK),
        (states, unembedding, TOKENS[:, :3], MASK),
        (states, unembedding, TOKENS, MASK[:, :3]),
    ):
        with pytest.raises(ValueError, match=r"expected states \[B, T, D\]"):
            function(*wrong)
    with pytest.raises(ValueError, match="mask must be bool"):
        function(states, unembedding, TOKENS, MASK.long())
