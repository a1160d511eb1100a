"""The fused log-prob against its plain form, however it is cut, compiled, vmapped or differentiated."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf.kernels import cpu, fused, library, passes
from minirlhf.kernels.fused import log_prob
from minirlhf.kernels.passes import log_prob_plain

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(
    *,
    m: int = 23,
    d: int = 6,
    v: int = 41,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """states [M, D], unembedding [V, D], ids, mask [M]; NaN states and impossible ids under the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, generator=g) < 0.7
    states = torch.randn(m, d, generator=g, dtype=torch.float64) * scale
    unembedding = torch.randn(v, d, generator=g, dtype=torch.float64)
    ids = torch.randint(v, (m,), generator=g)
    poisoned = torch.where(mask[:, None], states, torch.nan)
    return poisoned.to(dtype), unembedding.to(dtype), torch.where(mask, ids, -100), mask


def weighted(
    function: Callable[..., Any], states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor, **given: Any
) -> Tensor:
    """A sum in which each token's log-prob and entropy has a weight of its own."""
    logp, entropy = function(states, unembedding, ids, mask, **given)[:2]
    weight = torch.linspace(-1.0, 2.0, mask.shape[-1], dtype=logp.dtype)
    return (weight * logp + weight.flip(0) * entropy).sum()


fused_sum = partial(weighted, log_prob, temperature=0.8, entropy=True)
plain_sum = partial(weighted, log_prob_plain, temperature=0.8)


@pytest.fixture(params=["kept", "in pieces"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in pieces":
        monkeypatch.setattr(passes, "KEPT", 0)
    return request.param


@pytest.fixture(params=["our kernels", "torch's operations"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "our kernels":
        assert cpu.available(), "no C++ compiler here"
    else:
        monkeypatch.setattr(library, "_library", lambda: None)
    return request.param


def in_pieces_of(width: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KEPT", 0)
    monkeypatch.setattr(passes, "_NARROWEST", 1)
    monkeypatch.setattr(passes, "PIECE", width * rows * dtype.itemsize)


@pytest.mark.parametrize("width", [1, 2, 7, 16, 17, 40, 41, 1000])
def test_values_and_both_gradients_in_fp64_for_every_width_of_a_piece(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batch()
    in_pieces_of(width, int(given[3].sum()), torch.float64, monkeypatch)
    for temperature in (0.3, 1.0, 4.0):
        got = log_prob(*given, temperature, entropy=True)
        for a, b in zip(got, log_prob_plain(*given, temperature), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    got = grad(fused_sum, argnums=(0, 1))(*given)
    for a, b in zip(got, grad(plain_sum, argnums=(0, 1))(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert a.any() and a.isfinite().all()


@pytest.mark.parametrize("largest", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("width", [5, 64, 300])
def test_in_fp32_it_is_exact_to_a_millionth_of_the_largest_logit(
    largest: float, width: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, unembedding, ids, mask = batch(m=40, d=16, v=300, dtype=torch.float32)
    states = states * (largest / (states[mask] @ unembedding.T).abs().max())
    given = (states, unembedding, ids, mask)
    exact = (states.double(), unembedding.double(), ids, mask)
    in_pieces_of(width, int(mask.sum()), torch.float32, monkeypatch)
    for a, b in zip(log_prob(*given, 1.0, entropy=True)[:2], log_prob_plain(*exact, 1.0)[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6 * largest)
    got, right = (
        grad(partial(weighted, function, **named), argnums=(0, 1))(*args)
        for function, args, named in (
            (log_prob, given, {"temperature": 1.0, "entropy": True}),
            (log_prob_plain, exact, {"temperature": 1.0}),
        )
    )
    # By the logits it is that exact; by one factor of theirs, times the other.
    for a, b, other in zip(got, right, (unembedding, states[mask]), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=1e-6 * largest * max(1.0, float(other.abs().max()))
        )


def test_kept_logits_and_pieces_give_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(v=700, dtype=torch.float32)
    kept = log_prob(*given, 0.8, entropy=True), grad(fused_sum, argnums=(0, 1))(*given)
    in_pieces_of(100, 23, torch.float32, monkeypatch)
    pieces = log_prob(*given, 0.8, entropy=True), grad(fused_sum, argnums=(0, 1))(*given)
    for a, b in zip((*kept[0], *kept[1]), (*pieces[0], *pieces[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_most_probable_tokens_are_known(memory: str, backend: str) -> None:
    states, unembedding, _, mask = batch(dtype=torch.float32)
    best = (torch.where(mask[:, None], states, 0.0) @ unembedding.T).argmax(1)
    ids = torch.where(torch.arange(23) % 3 == 0, best, (best + 1) % 41)
    got = log_prob(states, unembedding, ids, mask, 1.0, entropy=False)[2]
    assert torch.equal(got, mask & (torch.arange(23) % 3 == 0))


def test_half_precision_is_accumulated_in_fp32(memory: str, backend: str) -> None:
    given = batch(v=300, d=64, dtype=torch.bfloat16)
    wide = (given[0].double(), given[1].double(), *given[2:])
    logp, entropy, _ = log_prob(*given, 0.8, entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    for a, b in zip((logp, entropy), log_prob_plain(*wide, 0.8)[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)
    got, right = grad(fused_sum, argnums=(0, 1))(*given), grad(plain_sum, argnums=(0, 1))(*wide)
    for a, b in zip(got, right, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-4)  # rounded once, at the end


def test_a_batch_that_is_masked_throughout_gives_zeros(memory: str) -> None:
    states, unembedding, ids, mask = batch()
    nothing = (states, unembedding, ids, torch.zeros_like(mask))
    assert all(not each.any() for each in log_prob(*nothing, 1.0, entropy=True))
    assert all(not each.any() for each in grad(fused_sum, argnums=(0, 1))(*nothing))


@pytest.mark.parametrize("wrong", [-1, 41])
def test_an_id_outside_the_vocabulary_is_named_unless_it_is_masked(wrong: int, memory: str) -> None:
    states, unembedding, ids, mask = batch()
    for place in range(23):
        changed = torch.where(torch.arange(23) == place, wrong, ids)
        if mask[place]:
            with pytest.raises(IndexError, match=f"token id {wrong} under the mask .* vocabulary of 41"):
                log_prob(states, unembedding, changed, mask, 1.0, entropy=False)
        else:
            log_prob(states, unembedding, changed, mask, 1.0, entropy=False)


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given, kept, forward = batch(), [], fused._log_prob
    monkeypatch.setattr(fused, "_log_prob", lambda *args: kept.append(args[-1]) or forward(*args))
    grad(fused_sum, argnums=1)(*given)
    with torch.no_grad():
        log_prob(*given, 1.0, entropy=True)
    monkeypatch.setattr(passes, "KEPT", 0)
    grad(fused_sum, argnums=1)(*given)
    assert kept == [int(given[3].sum()), 0, 0]  # rooms for the positions under the mask alone


class Products(TorchDispatchMode):
    """Flops of products, and the largest result of one."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        got = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            self.largest = max(self.largest, got.numel())
        return got


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    """Watches the passes themselves: as operators they are hidden from modes."""
    watch = Products()
    monkeypatch.setattr(fused, "_log_prob", passes.forward_pass)
    monkeypatch.setattr(fused, "_log_prob_gradient", passes.backward_pass)
    with watch:
        yield watch


@pytest.mark.parametrize(("kept", "forward", "backward"), [(2**28, 1, 2), (0, 1, 3)])
def test_masked_positions_cost_no_product_and_frozen_inputs_none_of_theirs(
    kept: int, forward: int, backward: int, products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "KEPT", kept)
    states, unembedding, ids, mask = batch(v=300, dtype=torch.float32)
    one = 2 * int(mask.sum()) * 6 * 300
    log_prob(states, unembedding, ids, mask, 1.0, entropy=True)
    assert products.flops == forward * one
    for argnums, less in (((0, 1), 0), ((0,), 1), ((1,), 1)):
        products.flops = 0
        grad(fused_sum, argnums=argnums)(states, unembedding, ids, mask)
        assert products.flops == (forward + backward - less) * one, argnums


def test_under_vmap_over_examples_tokens_and_masks() -> None:
    some = [batch(seed=seed) for seed in range(4)]
    states, _, ids, mask = (torch.stack(each) for each in zip(*some, strict=True))
    unembedding = some[0][1]
    alone = [
        log_prob(s, unembedding, i, m, 0.8, entropy=True) for s, i, m in zip(states, ids, mask, strict=True)
    ]
    together = vmap(lambda s, i, m: log_prob(s, unembedding, i, m, 0.8, entropy=True))(states, ids, mask)
    for number, one in enumerate(alone):
        for a, b in zip(one, together, strict=True):
            assert torch.equal(a, b[number])
    each = vmap(grad(fused_sum, argnums=(0, 1)), in_dims=(0, None, 0, 0))(states, unembedding, ids, mask)
    for number, (s, i, m) in enumerate(zip(states, ids, mask, strict=True)):
        right = grad(plain_sum, argnums=(0, 1))(s, unembedding, i, m)
        for a, b in zip(each, right, strict=True):
            torch.testing.assert_close(a[number], b, rtol=0, atol=1e-10)


def test_the_gradient_of_a_vmap_is_the_sum_over_its_elements() -> None:
    some = [batch(seed=seed) for seed in range(3)]
    states, _, ids, mask = (torch.stack(each) for each in zip(*some, strict=True))

    def total(function: Callable[..., Tensor], unembedding: Tensor) -> Tensor:
        return vmap(lambda s, i, m: function(s, unembedding, i, m))(states, ids, mask).sum()

    got = grad(partial(total, fused_sum))(some[0][1])
    right = sum(
        grad(plain_sum, argnums=1)(s, some[0][1], i, m) for s, i, m in zip(states, ids, mask, strict=True)
    )
    torch.testing.assert_close(got, right, rtol=0, atol=1e-10)


def test_under_vmap_over_models() -> None:
    states, _, ids, mask = batch()
    models = torch.randn(3, 41, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, gradients = vmap(
        lambda unembedding: (
            fused_sum(states, unembedding, ids, mask),
            grad(fused_sum, argnums=1)(states, unembedding, ids, mask),
        )
    )(models)
    for number, unembedding in enumerate(models):
        torch.testing.assert_close(values[number], plain_sum(states, unembedding, ids, mask))
        right = grad(plain_sum, argnums=1)(states, unembedding, ids, mask)
        torch.testing.assert_close(gradients[number], right, rtol=0, atol=1e-10)


def test_jacobians_and_second_derivatives_are_those_of_the_plain_form() -> None:
    states, unembedding, ids, mask = batch(m=5, d=3, v=7)
    fixed = torch.where(mask[:, None], states, 0.0)

    def curvature(function: Callable[..., Tensor]) -> Any:
        def total(states: Tensor, unembedding: Tensor) -> Tensor:
            return function(states, unembedding, ids, mask)

        return jacrev(grad(total, argnums=(0, 1)), argnums=(0, 1))(fixed, unembedding)

    for got, right in zip(curvature(fused_sum), curvature(plain_sum), strict=True):
        for a, b in zip(got, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
            assert a.any()
    leaves = [each.clone().requires_grad_() for each in (fixed, unembedding)]
    assert torch.autograd.gradgradcheck(lambda s, u: log_prob(s, u, ids, mask, 0.8, entropy=True)[:2], leaves)


def test_a_vector_jacobian_product_may_be_asked_for_twice(memory: str) -> None:
    states, unembedding, ids, mask = batch()
    pull = vjp(lambda u: log_prob(states, u, ids, mask, 1.0, entropy=True)[0], unembedding)[1]
    weight = torch.ones(23, dtype=torch.float64)
    assert torch.equal(pull(weight)[0], pull(weight)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("told", [True, False])
def test_inside_a_compiled_step_it_is_one_graph(
    told: bool, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    fused.tell_compiler()
    monkeypatch.setattr(fused, "_known_to_compiler", told)
    given = batch(dtype=torch.float32)
    graphs: list[str] = []

    def step(unembedding: Tensor, states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        def loss(unembedding: Tensor) -> tuple[Tensor, Tensor]:
            logp, entropy, best = log_prob(states * 1.5, unembedding, *given[2:], 0.8, entropy=True)
            return (logp * 2 - entropy).sum(), best

        return grad_and_value(loss, has_aux=True)(unembedding)

    def look(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=look)
    got, right = compiled(given[1], given[0]), step(given[1], given[0])
    torch.testing.assert_close(got, right)
    assert len(graphs) == 1 and ("_whole" in graphs[0]) == told and ("log_softmax" in graphs[0]) != told


def test_a_compiled_body_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    given = batch(v=300, dtype=torch.float32)
    monkeypatch.setattr(library, "_library", lambda: None)
    right = log_prob(*given, 0.8, entropy=True), grad(fused_sum, argnums=(0, 1))(*given)
    used: list[Any] = []
    monkeypatch.setattr(passes, "_COMPILED", 1)
    compiled = partial(torch.compile, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(passes, "_compiled", lambda work: used.append(work) or compiled(work))
    got = log_prob(*given, 0.8, entropy=True), grad(fused_sum, argnums=(0, 1))(*given)
    for a, b in zip((*got[0], *got[1]), (*right[0], *right[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert used


def test_no_piece_is_larger_than_said(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KEPT", 0)
    monkeypatch.setattr(passes, "PIECE", 23 * 256 * 4)
    given = batch(v=3000, dtype=torch.float32)
    grad(fused_sum, argnums=0)(*given)
    rows = int(given[3].sum())
    assert rows * 256 <= products.largest <= 23 * 256
