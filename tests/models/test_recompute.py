"""Recomputed blocks: the same gradients, fewer tensors kept, under every transform of torch.func."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.interface import LanguageModel, Params, causal
from minirlhf.models.opened import opened
from minirlhf.models.recompute import recomputed, recomputing
from tests.models.cases import CASES, Case, tiny_model
from tests.models.tiny import ragged, tiny

SLOW_ATTENTION = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def score(model: LanguageModel, params: Params, tokens: Tensor) -> Tensor:
    """A sum over all states that no symmetry cancels."""
    states = model.hidden(params, tokens)
    return (states * torch.linspace(-1, 2, states.numel(), dtype=states.dtype).view_as(states)).sin().sum()


def same_bits(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_gradient_of_every_family_is_the_same_up_to_the_order_of_sums(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, _ = ragged()
    plain, value = torch.func.grad_and_value(partial(score, model))(params, tokens)
    again, same = torch.func.grad_and_value(partial(score, recomputing(model)))(params, tokens)
    assert torch.equal(value, same)
    for a, b in zip(tree_leaves(again), tree_leaves(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert sum(bool(leaf.any()) for leaf in tree_leaves(again)) >= len(tree_leaves(again)) - 1  # but a head


def test_under_autograd_too() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, _ = ragged()
    leaves = [tree_map(lambda x: x.clone().requires_grad_(), params) for _ in range(2)]
    score(model, leaves[0], tokens).backward()
    score(recomputing(model), leaves[1], tokens).backward()
    grads = [[leaf.grad for leaf in tree_leaves(tree)] for tree in leaves]
    assert all(grad is not None for grad in grads[1]) and same_bits(*grads)


@SLOW_ATTENTION
def test_gradients_of_many_rows_by_vmap() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, _ = ragged(rows=4, longest=6)

    def by_row(model: LanguageModel) -> Params:
        each = torch.func.grad(lambda params, row: score(model, params, row[None]))
        return torch.func.vmap(each, in_dims=(None, 0))(params, tokens)

    for a, b in zip(tree_leaves(by_row(model)), tree_leaves(by_row(recomputing(model))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@SLOW_ATTENTION
def test_gradients_of_many_parameters_by_vmap() -> None:
    model, _ = tiny(dtype=torch.float64)
    many = tree_map(lambda *x: torch.stack(x), *(tiny(seed, dtype=torch.float64)[1] for seed in range(3)))
    tokens, _ = ragged(rows=2, longest=5)

    def by_seed(model: LanguageModel) -> Params:
        return torch.func.vmap(torch.func.grad(lambda params: score(model, params, tokens)))(many)

    for a, b in zip(tree_leaves(by_seed(model)), tree_leaves(by_seed(recomputing(model))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives() -> None:
    model, params = tiny(dtype=torch.float64, n_layer=1)
    tokens, _ = ragged(rows=2, longest=4)
    along = tree_map(torch.ones_like, params)

    def curvature(model: LanguageModel) -> Params:
        def slope(params: Params) -> Tensor:
            grads = torch.func.grad(partial(score, model))(params, tokens)
            return sum((g * d).sum() for g, d in zip(tree_leaves(grads), tree_leaves(along), strict=True))  # pyright: ignore[reportReturnType]

        return torch.func.grad(slope)(params)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        plain, again = curvature(model), curvature(recomputing(model))
    for a, b in zip(tree_leaves(plain), tree_leaves(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(again)) > 1


def kept_entries(run: Callable[[], Any]) -> int:
    """Entries of all tensors that autograd keeps for the backward pass of what `run` computes."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = run()
    assert held is not None
    return sum(tensor.numel() for tensor in kept.values())


def test_a_block_keeps_its_inputs_and_nothing_else() -> None:
    width, batch = 8, 5
    weights = [torch.randn(width, width, requires_grad=True) for _ in range(2)]
    x = torch.randn(batch, width, requires_grad=True)

    def block(params: list[Tensor], x: Tensor) -> Tensor:
        for weight in params:
            x = (x @ weight).exp().sin().exp()
        return x

    assert kept_entries(lambda: recomputed(block, weights, x))  # pyright: ignore[reportArgumentType] == 2 * width**2 + batch * width
    # Else both exponentials of each weight, too.
    assert kept_entries(lambda: block(weights, x)) == 2 * width**2 + 5 * batch * width


def test_each_block_runs_twice_and_without_a_gradient_once() -> None:
    model, params = tiny()
    tokens, _ = ragged()
    calls: list[int] = []

    def counting(layer: int, *args: Any, **named: Any) -> Tensor:
        calls.append(layer)
        return causal(layer, *args, **named)

    at = torch.arange(tokens.shape[1])

    def states(model: LanguageModel, params: Params) -> Tensor:
        return model.states(params, tokens, at, counting).sum()

    torch.func.grad(partial(states, recomputing(model)))(params)
    assert calls == [0, 1, 1, 0]
    calls.clear()
    with torch.no_grad():
        states(recomputing(model), params)
    assert calls == [0, 1]


class Shifted:
    """A weight that stands for base + shift, as an adapter does."""

    def __init__(self, base: Tensor, shift: Tensor) -> None:
        self.base, self.shift = base, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [each.base + each.shift if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


def test_gradients_reach_what_stands_for_a_weight_and_a_frozen_base_gets_none() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, _ = ragged()
    base = params["h"][1]["mlp"]["c_fc"]["weight"]

    def shifted(shift: Tensor, model: LanguageModel, weight: Callable[[Tensor], Any]) -> Tensor:
        block = params["h"][1]
        c_fc = block["mlp"]["c_fc"] | {"weight": weight(shift)}
        blocks = [params["h"][0], block | {"mlp": block["mlp"] | {"c_fc": c_fc}}]
        return score(model, params | {"h": blocks}, tokens)

    shift = torch.full_like(base, 0.01)
    expected = torch.func.grad(shifted)(shift, model, lambda shift: base + shift)
    found = torch.func.grad(shifted)(shift, recomputing(model), partial(Shifted, base))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.abs().max() > 1e-3


def test_gradients_reach_what_the_block_is_closed_over() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)

    def total(scale: Tensor, bias: Tensor, run: Any) -> Tensor:
        def block(params: Tensor, x: Tensor, add: Any) -> Tensor:
            return add((x * scale).tanh() @ params)

        return (
            run(block, torch.ones(3, 3, dtype=torch.float64), x, partial(torch.add, other=bias)).sin().sum()
        )

    given = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    plain = torch.func.grad(total, argnums=(0, 1))(*given, lambda block, *rest: block(*rest))
    again = torch.func.grad(total, argnums=(0, 1))(*given, recomputed)
    assert same_bits(plain, again) and all(bool(each.all()) for each in again)


# What `opened` finds.


def test_a_thing_is_made_again_of_other_tensors_and_the_first_is_untouched() -> None:
    shift, bias = torch.ones(2), torch.zeros(2)
    weight = Shifted(torch.ones(2, 2), torch.zeros(2, 2))
    thing = {
        "f": lambda x: F.linear(x, cast(Any, weight), bias) + shift,
        "g": partial(torch.mul, shift),
        "n": 3,
    }
    found = opened(thing)
    assert len(found.tensors) == 5
    other = found.rebuild([tensor + 1 for tensor in found.tensors])
    x = torch.tensor([[1.0, 2.0]])
    assert thing["f"](x).tolist() == [[4.0, 4.0]] and thing["g"](x).tolist() == [[1.0, 2.0]]
    assert other["f"](x).tolist() == [[12.0, 12.0]] and other["g"](x).tolist() == [[2.0, 4.0]]
    assert other["n"] == 3


def test_the_form_is_equal_for_equal_things_and_differs_where_more_than_tensors_does() -> None:
    def made(factor: float, size: int, name: str = "a") -> Any:
        w = torch.randn(size)
        return {name: lambda x: factor * w * x}

    assert opened(made(2.0, 3)).form == opened(made(2.0, 4)).form
    assert opened(made(2.0, 3)).form != opened(made(3.0, 3)).form
    assert opened(made(2.0, 3)).form != opened(made(2.0, 3, "b")).form
    assert opened([1, None]).form != opened([True, None]).form
    assert hash(opened({"x": [{1, 2}, torch.ones(1)]}).form) is not None
