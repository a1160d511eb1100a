"""Large products by tiles: against fp64, beside torch's, and what torch.func makes of them."""

import pytest
import torch
from torch import Tensor

from minirlhf.kernels import cpu, products

TILES = cpu.available() and "tiles" in cpu.layouts()
needs_tiles = pytest.mark.skipif(not TILES, reason="the processor has no tiles (AMX)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.T.contiguous().T if turned else matrix


def near(got: Tensor, x: Tensor, w: Tensor, more: Tensor | float = 0.0) -> bool:
    """Within the rounding of fp32, for each output by the size of what was summed for it."""
    scale = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=0)
    return bool(((got.double() - x.double() @ w.double() - more).abs() <= 1e-6 * (scale + 1)).all())


@needs_tiles
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 100, 1041])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (31, 33), (32, 16), (65, 200), (800, 47), (1600, 97)])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_is_the_product(rows: int, depth: int, columns: int, turned: tuple[bool, bool]) -> None:
    x, w = normal(rows, depth), normal(depth, columns, seed=1)
    bias, before = normal(columns, seed=2), normal(rows, columns, seed=3)
    given = stored(x, turned[0]), stored(w, turned[1])
    assert near(cpu.matmul(*given), x, w)
    assert near(cpu.matmul(*given, bias=bias), x, w, bias.double())
    assert near(cpu.matmul(*given, out=before.clone(), more=True), x, w, before.double())


@needs_tiles
@pytest.mark.parametrize(("rows", "depth", "columns"), [(3000, 100, 70), (70, 100, 3000), (40, 5000, 40)])
def test_what_does_not_fit_into_the_caches_is_taken_in_pieces(rows: int, depth: int, columns: int) -> None:
    x, w = normal(rows, depth), normal(depth, columns, seed=1)
    assert near(cpu.matmul(x, w), x, w)


@needs_tiles
def test_only_the_rows_asked_for_are_written() -> None:
    room = torch.full((70, 140), 7.0)
    out = room[1:-1, 5:-5]
    x, w = normal(68, 100), normal(100, 130, seed=1)
    assert near(cpu.matmul(x, w, out=out), x, w)
    out.fill_(7.0)
    assert bool((room == 7).all())


@needs_tiles
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("columns", [20, 40, 70])
def test_any_number_of_threads_gives_the_same_numbers(threads: int, columns: int) -> None:
    """More than there are columns for: some share them, of other rows."""
    x, w = normal(150, 900), normal(900, columns, seed=1)
    before, alone = torch.get_num_threads(), cpu.matmul(x, w)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.matmul(x, w), alone)
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_a_row_does_not_depend_on_the_others_beside_it() -> None:
    x, w = normal(200, 900), normal(900, 200, seed=1)
    together = cpu.matmul(x, w)
    for row in (0, 17, 199):
        alone = torch.full_like(x, torch.nan)
        alone[row] = x[row]
        assert torch.equal(cpu.matmul(alone, w)[row], together[row])
    assert torch.equal(cpu.matmul(x[:33], w), together[:33])


@needs_tiles
@pytest.mark.parametrize("depth", [768, 3072, 20_000])
def test_it_rounds_no_more_than_torch_does(depth: int) -> None:
    """A part that is left out would show in a short sum; one chain of additions, in a long one."""
    w = normal(depth, 96, seed=1)
    x = normal(96, depth) * torch.logspace(-15, 15, 96)[:, None]
    exact, scale = x.double() @ w.double(), x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=0)
    got, plain = (
        ((each.double() - exact) / scale).square().mean().sqrt() for each in (cpu.matmul(x, w), x @ w)
    )
    assert got < 1.2 * plain


@needs_tiles
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, w = normal(100, 100), normal(100, 100, seed=1)
    x[3, 5] = bad
    y = cpu.matmul(x, w)
    assert not bool(y[3].isfinite().any())
    assert bool(y[4].isfinite().all())


@needs_tiles
def test_what_does_not_fit_is_refused() -> None:
    for out in (torch.empty(4, 6), torch.empty(7, 4).T, torch.empty(4, 7, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"cannot multiply \[4, 5\] by \[5, 7\] into"):
            cpu.matmul(normal(4, 5), normal(5, 7), out=out)
    with pytest.raises(ValueError, match=r"cannot multiply \[4, 5\] by \[6, 7\]"):
        cpu.matmul(normal(4, 5), normal(6, 7))
    with pytest.raises(ValueError, match="cannot multiply"):
        cpu.matmul(normal(4, 5), normal(5, 7), bias=normal(1))


SHAPE = 128, 512, 640  # rows, in, out: large enough for tiles


@needs_tiles
def test_large_products_of_fp32_are_made_by_tiles() -> None:
    x, w = normal(SHAPE[0], SHAPE[1]), normal(SHAPE[1], SHAPE[2])
    assert cpu.multiplies(x, w)
    assert cpu.multiplies(x.view(8, 16, -1), w)
    assert not cpu.multiplies(x.double(), w)
    assert not cpu.multiplies(x.bfloat16(), w.bfloat16())
    assert not cpu.multiplies(x[:32], w)
    assert not cpu.multiplies(x.to("meta"), w.to("meta"))


def of_both(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Weights [in, out] and [out, in], and rows in several axes."""
    y = products.addmm(bias, x, w)
    return (
        y.square().sum() + (products.linear(x.view(4, -1, x.shape[1]), w.T) * y.view(4, -1, w.shape[1])).sum()
    )


def in_torch(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return (x @ w + bias).square().sum() + ((x @ w) * (x @ w + bias)).sum()


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    rows, depth, columns = SHAPE
    return normal(rows, depth), normal(depth, columns, seed=1) / 20, normal(columns, seed=2)


def close(got: Tensor, exact: Tensor) -> bool:
    return bool((got.double() - exact).norm() <= 2e-6 * exact.norm())


@pytest.mark.parametrize("by", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_are_those_of_torch(by: tuple[int, ...]) -> None:
    exact = torch.func.grad(in_torch, by)(*(each.double() for each in arguments()))
    assert all(map(close, torch.func.grad(of_both, by)(*arguments()), exact))


def test_autograd_without_torch_func_works_too() -> None:
    given = [each.requires_grad_() for each in arguments()]
    exact = torch.func.grad(in_torch, (0, 1, 2))(*(each.detach().double() for each in given))
    assert all(map(close, torch.autograd.grad(of_both(*given), given), exact))


def test_second_derivatives_are_those_of_torch() -> None:
    def curvature(loss, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.func.grad(loss, 1)(x, w, bias).square().sum()

    exact = torch.func.grad(lambda x: curvature(in_torch, x, *(e.double() for e in arguments()[1:])))
    got = torch.func.grad(lambda x: curvature(of_both, x, *arguments()[1:]))
    assert close(got(arguments()[0]), exact(arguments()[0].double()))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0), (1, 2, 0)])
def test_vmap_is_one_after_the_other(in_dims: tuple[int | None, ...]) -> None:
    some, other = arguments(), [each + 0.1 for each in arguments()]
    given = [
        each if place is None else torch.stack([each, more], place)
        for each, more, place in zip(some, other, in_dims, strict=True)
    ]
    got = torch.func.vmap(torch.func.grad(of_both, (0, 1, 2)), in_dims)(*given)
    for i, exact_of in enumerate((some, other)):
        alone = [a if place is None else b for a, b, place in zip(some, exact_of, in_dims, strict=True)]
        exact = torch.func.grad(in_torch, (0, 1, 2))(*(each.double() for each in alone))
        assert all(close(each[i], right) for each, right in zip(got, exact, strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_lies_as_its_weight_does(turned: bool) -> None:
    """The fused optimiser does not read strides; a copy of every gradient is what it would cost."""
    x, w, bias = arguments()
    w = stored(w, turned)
    (by_w,) = torch.autograd.grad(products.addmm(bias, x, w.requires_grad_()).sum(), w)
    assert by_w.stride() == w.stride()


def test_without_derivatives_it_writes_where_it_is_told() -> None:
    x, w, _ = arguments()
    out = torch.empty(len(x), w.shape[1])
    assert products.mm(x, w, out=out) is out
    assert near(out, x, w)
    before = out.double()
    assert near(products.add_mm(x, w, out=out), x, w, before)
