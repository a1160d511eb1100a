"""What is made again, and gradients of few rows, against torch's own forms in fp64."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.models.embedding import embedded
from minirlhf.models.lean import linear_of

gelu = partial(F.gelu, approximate="tanh")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def lean(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    inner = linear_of(norm, (x, scale, shift), weight, bias)
    return linear_of(gelu, (inner,), weight.T, scale).sin().sum()


def plain(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    inner = norm(x, scale, shift) @ weight + bias
    return (gelu(inner) @ weight.T + scale).sin().sum()


GIVEN = (normal(2, 3, 4), normal(4, seed=1), normal(4, seed=2), normal(4, 7, seed=3), normal(7, seed=4))
ALL = tuple(range(len(GIVEN)))


def table_lean(table: Tensor, factor: Tensor) -> Tensor:
    return (embedded(torch.tensor([[3, 1], [1, 0]]), table) * factor).sin().sum() + (table**2).sum()


def table_plain(table: Tensor, factor: Tensor) -> Tensor:
    return (table[torch.tensor([[3, 1], [1, 0]])] * factor).sin().sum() + (table**2).sum()


TABLE = (normal(5, 3), normal(2, 2, 3, seed=1))
PAIRS = [(lean, plain, GIVEN), (table_lean, table_plain, TABLE)]


@pytest.mark.parametrize(("ours", "theirs", "given"), PAIRS, ids=["linear", "embedding"])
def test_gradients_are_torchs(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> None:
    places = tuple(range(len(given)))
    got, want = (torch.func.grad(each, argnums=places)(*given) for each in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs", "given"), PAIRS, ids=["linear", "embedding"])
def test_second_derivatives_are_torchs(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> None:
    def curvature(work: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def slope(*given: Tensor) -> Tensor:
            return sum(
                ((g**3).sum() for g in torch.func.grad(work, argnums=places)(*given)), torch.tensor(0.0)
            )

        return torch.func.grad(slope, argnums=places)(*given)

    places = tuple(range(len(given)))
    torch.testing.assert_close(curvature(ours), curvature(theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ours", "theirs", "given"), PAIRS, ids=["linear", "embedding"])
def test_per_example_gradients_are_torchs(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> None:
    first = torch.stack([given[0], 2 * given[0], -given[0]])

    def each(work: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        places = tuple(range(len(given)))
        dims = (0, *[None] * (len(given) - 1))
        return torch.func.vmap(torch.func.grad(work, argnums=places), in_dims=dims)(first, *given[1:])

    torch.testing.assert_close(each(ours), each(theirs), rtol=1e-10, atol=1e-10)


def test_what_is_made_again_is_not_kept() -> None:
    kept: list[int] = []
    x, weight, bias = normal(50, 40), normal(40, 40, seed=1), normal(40, seed=2)
    given = [each.requires_grad_() for each in (x, weight, bias)]
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(id(each)) or each, lambda e: e):
        linear_of(gelu, (given[0],), *given[1:]).sum()
    assert set(kept) <= {id(each) for each in given}


_MEMORY = """
import torch
from pathlib import Path
from minirlhf.models.embedding import embedded
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
table = torch.zeros(40_000, 512)  # 82 MB
def loss(table):
    return embedded(torch.arange(0, 40_000, 100), table).sum()
small = torch.func.grad(lambda x: embedded(torch.arange(9), x).sum())(torch.zeros(9, 2))
before = peak()
value, pull, *_ = torch.func.vjp(loss, table)
grad, = pull(torch.ones_like(value), retain_graph=False, create_graph=False)
assert float(grad.sum()) == 400 * 512 and float(grad[100].min()) == 1, grad
print((peak() - before) / table.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_gradient_of_a_table_takes_the_memory_of_the_rows_that_were_read() -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.25
