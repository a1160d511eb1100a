"""gelu by a pass of its own: torch's numbers, its derivatives, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import activations, cpu
from minirlhf.kernels.activations import gelu_tanh

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

SIZES = [1, 15, 16, 17, 1000]


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_SMALLEST", 1)


def spread(size: int) -> Tensor:
    return torch.linspace(-12, 12, size) if size > 1 else torch.tensor([0.7])


def plain(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("size", SIZES)
def test_values_are_those_of_fp64(size: int) -> None:
    x = spread(size)
    torch.testing.assert_close(gelu_tanh(x).double(), plain(x.double()), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_fp64(size: int) -> None:
    x, by_y = spread(size), torch.randn(size, generator=torch.Generator().manual_seed(0))
    (got,) = torch.func.vjp(gelu_tanh, x)[1](by_y)
    (exact,) = torch.func.vjp(plain, x.double())[1](by_y.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)


def test_second_derivatives_are_those_of_torch() -> None:
    x = spread(50)
    got, exact = (torch.func.grad(lambda x, f=f: torch.func.grad(lambda x: f(x).square().sum())(x).sum())(x)
                  for f in (gelu_tanh, plain))  # fmt: skip
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_vmap_is_one_after_the_other(place: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([torch.func.grad(lambda x: gelu_tanh(x).square().sum())(row) for row in x])
    moved = x if place == 0 else x.T.contiguous()
    got = torch.func.vmap(torch.func.grad(lambda x: gelu_tanh(x).square().sum()), place)(moved)
    assert torch.equal(got, alone)


def test_a_cotangent_alone_may_be_mapped() -> None:
    x, by_y = spread(20), torch.eye(20)
    jacobian = torch.func.vmap(torch.func.vjp(gelu_tanh, x)[1])(by_y)[0]
    torch.testing.assert_close(jacobian, torch.diag(torch.func.vjp(plain, x)[1](torch.ones(20))[0]))


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([torch.nan, torch.inf, 1.0])
    y = gelu_tanh(x)
    assert bool(y[0].isnan())
    assert y[1] == torch.inf
    assert bool(y[2].isfinite())


def test_layouts_and_other_types_are_taken_as_they_come() -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gelu_tanh(x.T), plain(x.T))
    torch.testing.assert_close(gelu_tanh(x[:, ::2]), plain(x[:, ::2]))
    assert torch.equal(gelu_tanh(x.double()), plain(x.double()))
    assert torch.equal(gelu_tanh(x.bfloat16()), plain(x.bfloat16()))
