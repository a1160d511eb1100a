"""What holds for every objective of log-probs or rewards per response, each checked over the whole list."""

import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives import preference, ranking, reference_free, unpaired
from minirlhf.objectives.preference import (
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    ipo_summed_loss,
    robust_dpo_loss,
)
from minirlhf.objectives.ranking import bradley_terry_loss
from minirlhf.objectives.reference_free import orpo_loss, simpo_loss
from minirlhf.objectives.unpaired import kto_loss
from tests.objectives.assertions import close

Loss = Callable[..., Tensor]
MASKED = {"plackett_luce_loss"}  # in tests/objectives/catalogue.py
WHOLE_BATCH = {"kto_reference_point"}  # in test_unpaired.py


class Case(NamedTuple):
    """One objective of four tensors [B] of log-probs; it may ignore some. hyper: its numbers by name."""

    name: str
    call: Loss
    hyper: dict[str, float]


def _bradley_terry(a: Tensor, b: Tensor, c: Tensor, d: Tensor, **hyper: float | Tensor) -> Tensor:
    return bradley_terry_loss(a, b, margin=c, **hyper)  # pyright: ignore[reportArgumentType]


def _implicit(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, beta: float | Tensor) -> Tensor:
    return implicit_reward(a, b, beta=beta)


def _with_lengths(loss: Loss, tensors: int) -> Loss:
    def call(a: Tensor, b: Tensor, c: Tensor, d: Tensor, **hyper: float | Tensor) -> Tensor:
        lengths = (torch.full_like(a, 3, dtype=torch.int64), torch.full_like(b, 2, dtype=torch.int64))
        return loss(*(a, b, c, d)[:tensors], *lengths, **hyper)

    return call


def _kto(a: Tensor, b: Tensor, c: Tensor, d: Tensor, **hyper: float | Tensor) -> Tensor:
    return kto_loss(a, b, c < d, torch.tensor(0.25, dtype=a.dtype), **hyper)  # pyright: ignore[reportArgumentType]


CASES = [
    Case("bradley_terry_loss", _bradley_terry, {"label_smoothing": 0.1}),
    Case("implicit_reward", _implicit, {"beta": 0.2}),
    Case("dpo_loss", dpo_loss, {"beta": 0.2}),
    Case("conservative_dpo_loss", conservative_dpo_loss, {"beta": 0.2, "label_smoothing": 0.1}),
    Case("robust_dpo_loss", robust_dpo_loss, {"beta": 0.2, "label_smoothing": 0.1}),
    Case("hinge_loss", hinge_loss, {"beta": 0.2}),
    Case("ipo_loss", _with_lengths(ipo_loss, 4), {"tau": 0.2}),
    Case("ipo_summed_loss", ipo_summed_loss, {"tau": 0.2}),
    Case("simpo_loss", _with_lengths(simpo_loss, 2), {"beta": 2.0, "gamma": 0.5}),
    Case("orpo_loss", _with_lengths(orpo_loss, 2), {"weight": 0.3}),
    Case("kto_loss", _kto, {"beta": 0.2, "desirable_weight": 1.25, "undesirable_weight": 0.75}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DRAWS = -torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4 - 0.125


def test_the_list_holds_every_public_function_of_these_modules() -> None:
    public = {
        name
        for module in (preference, ranking, reference_free, unpaired)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == {case.name for case in CASES} | MASKED | WHOLE_BATCH


@every_case
def test_responses_are_independent_unreduced_and_work_under_vmap(case: Case) -> None:
    result = case.call(*DRAWS, **case.hyper)
    assert result.shape == (5,)
    alone = [case.call(*DRAWS[:, i : i + 1], **case.hyper)[0] for i in range(5)]
    assert torch.equal(torch.stack(alone), result)
    close(vmap(lambda *xs: case.call(*xs, **case.hyper))(*DRAWS), result)
    order = torch.tensor([3, 0, 4, 2, 1])
    close(case.call(*DRAWS[:, order], **case.hyper), result[order])


@every_case
def test_gradients_equal_finite_differences_and_per_example_gradients_a_loop(case: Case) -> None:
    def loss(*xs: Tensor) -> Tensor:
        return case.call(*xs, **case.hyper)

    assert torch.autograd.gradcheck(loss, tuple(DRAWS.clone().requires_grad_().unbind()))
    one = grad(loss, argnums=(0, 1, 2, 3))
    together = vmap(one)(*DRAWS)
    for i in range(5):
        close(tuple(x[i] for x in together), one(*DRAWS[:, i]))


@every_case
def test_value_and_gradient_compile_as_one_full_graph(case: Case) -> None:
    torch._dynamo.reset()

    def loss(*xs: Tensor) -> Tensor:
        return case.call(*xs, **case.hyper)

    def slope(*xs: Tensor) -> Tensor:
        return grad(lambda a, b, c, d: loss(a, b, c, d).sum())(*xs)

    for function in (loss, slope):
        compiled: Loss = torch.compile(function, fullgraph=True, backend="aot_eager")
        close(compiled(*DRAWS), function(*DRAWS))


@every_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_and_returned_in_fp32(case: Case, half: torch.dtype) -> None:
    inputs = DRAWS.to(half)
    result = case.call(*inputs, **case.hyper)
    assert result.dtype == torch.float32
    assert torch.equal(result, case.call(*inputs.float(), **case.hyper))
    exact = case.call(*inputs.double(), **case.hyper)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_out_every_value_and_gradient_is_finite(case: Case, dtype: torch.dtype) -> None:
    corners = list(itertools.product((-1e-30, -1.0, -1e4), repeat=4))
    inputs = torch.tensor(corners, dtype=dtype).T

    def loss(*xs: Tensor) -> Tensor:
        return case.call(*xs, **case.hyper)

    assert bool(loss(*inputs).isfinite().all())
    for slope in grad(lambda a, b, c, d: loss(a, b, c, d).sum(), argnums=(0, 1, 2, 3))(*inputs):
        assert bool(slope.isfinite().all())


@every_case
def test_numbers_may_be_tensors_and_many_values_run_at_once(case: Case) -> None:
    for name, value in case.hyper.items():
        others = {k: v for k, v in case.hyper.items() if k != name}
        grid = torch.tensor([value, value / 2, value / 4], dtype=torch.float64)

        def call(x: Tensor, name: str = name, others: dict[str, float] = others) -> Tensor:
            return case.call(*DRAWS, **others, **{name: x})

        looped = torch.stack([case.call(*DRAWS, **others, **{name: x}) for x in grid.tolist()])
        close(vmap(call)(grid), looped)
        assert not torch.equal(looped[0], looped[1]), f"{name} does nothing"


@every_case
def test_nan_is_not_swallowed(case: Case) -> None:
    for position in range(4):
        inputs = DRAWS.clone()
        inputs[position, 2] = torch.nan
        slopes = grad(lambda *xs: case.call(*xs, **case.hyper).sum(), argnums=(0, 1, 2, 3))(*DRAWS)
        if bool(slopes[position].any()):  # an argument that it reads
            assert case.call(*inputs, **case.hyper).isnan().tolist() == [False, False, True, False, False]


@every_case
def test_a_column_beside_a_row_is_refused_not_broadcast(case: Case) -> None:
    with pytest.raises(ValueError, match=r"expected equal shapes, got .* \[5\], .* \[5, 1\]"):
        case.call(DRAWS[0], DRAWS[1][:, None], DRAWS[2], DRAWS[3][:, None], **case.hyper)


@every_case
def test_integers_and_numbers_that_are_none_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="must be a floating-point tensor, got torch.int64"):
        case.call(*DRAWS.long(), **case.hyper)
    for name in case.hyper:
        for bad in ("0.1", True, torch.ones(2)):
            with pytest.raises(ValueError, match=f"{name} must be a number"):
                case.call(*DRAWS, **{**case.hyper, name: bad})
