"""What holds for every objective that takes a mask, each checked over the whole catalogue."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf import objectives
from minirlhf.objectives import (
    advantages,
    divergence,
    group_advantages,
    importance,
    kl_usage,
    masked,
    policy,
    policy_variants,
    ranking,
    supervised,
    value,
)
from tests.objectives.assertions import close
from tests.objectives.catalogue import CASES, EXAMPLE_MASK, Case, example
from tests.objectives.strategies import masks, numbers, poisoned

IDS = [case.name for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
every_row_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind != "batch"], ids=[c.name for c in CASES if c.kind != "batch"]
)
# Finite differences do not see a stop-gradient: where there is one, the gradient has a closed form instead.
differentiated = pytest.mark.parametrize("case", [c for c in CASES if c.slopes is None], ids=lambda c: c.name)
stopped = pytest.mark.parametrize("case", [c for c in CASES if c.slopes is not None], ids=lambda c: c.name)
fewer = settings(max_examples=15)  # times the 48 cases of the catalogue
MODULES = (
    advantages,
    divergence,
    group_advantages,
    importance,
    kl_usage,
    masked,
    policy,
    policy_variants,
    ranking,
    supervised,
    value,
)


def total(case: Case, tensors: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """A weighted sum of the result, so that its gradient sees every element apart."""
    result = case.call(*tensors, mask)
    return (result * torch.arange(1, result.numel() + 1, dtype=result.dtype).reshape(result.shape)).sum()


def gradients(case: Case, tensors: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    def scalar(*xs: Tensor) -> Tensor:
        return total(case, xs, mask)

    return grad(scalar, argnums=tuple(range(len(tensors))))(*tensors)


def drawn(data: st.DataObject, case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    mask = data.draw(masks())
    shape = (*mask.shape, 3) if case.vocabulary else tuple(mask.shape)
    return mask, tuple(data.draw(numbers(*shape)) for _ in range(case.tensors))


def test_the_catalogue_holds_every_public_function_that_takes_a_mask() -> None:
    public: set[str] = set()
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "mask" in inspect.signature(function).parameters:
                public.add(name)
    assert public == {case.name.split(":")[0] for case in CASES}


def test_every_page_of_objectives_is_in_a_list_or_has_no_mask() -> None:
    listed = {module.__name__.rsplit(".", 1)[1] for module in MODULES}
    pairs = {"preference", "reference_free", "unpaired"}  # in test_every_pair_objective.py
    no_mask = {"best_of_n", "inputs", "sampling", "__init__"}
    pages = {path.stem for path in Path(objectives.__path__[0]).glob("*.py")}
    assert pages == listed | pairs | no_mask


@every_case
@fewer
@given(data=st.data(), poison=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e300]))
def test_what_lies_under_the_mask_changes_nothing(case: Case, data: st.DataObject, poison: float) -> None:
    mask, tensors = drawn(data, case)
    clean = case.call(*tensors, mask)
    dirty = case.call(*(poisoned(x, mask, poison) for x in tensors), mask)
    assert torch.equal(dirty, clean)
    assert bool(dirty.isfinite().all())


@every_case
@fewer
@given(data=st.data())
def test_masked_tokens_are_exactly_zero_and_get_zero_gradient(case: Case, data: st.DataObject) -> None:
    mask, tensors = drawn(data, case)
    dirty = tuple(poisoned(x, mask) for x in tensors)
    if case.kind in ("token", "row") or case.name.startswith("whiten"):
        assert not bool(case.call(*dirty, mask)[~mask].any())
    if case.boolean:
        return
    for gradient, clean in zip(gradients(case, dirty, mask), gradients(case, tensors, mask), strict=True):
        assert not bool(gradient[~mask].any())
        assert torch.equal(gradient, clean) and bool(gradient.isfinite().all())


@every_case
def test_a_batch_where_nothing_counts_gives_zero_and_no_gradient(case: Case) -> None:
    mask = torch.zeros_like(EXAMPLE_MASK)
    tensors = tuple(torch.full_like(x, torch.nan) for x in example(case))
    assert not bool(case.call(*tensors, mask).any())
    if not case.boolean:
        assert not any(bool(g.any()) for g in gradients(case, tensors, mask))


@every_row_case
@fewer
@given(data=st.data())
def test_a_row_alone_equals_the_row_in_its_batch(case: Case, data: st.DataObject) -> None:
    mask, tensors = drawn(data, case)
    together = case.call(*tensors, mask)
    for row in range(mask.shape[0]):
        alone = case.call(*(x[row : row + 1] for x in tensors), mask[row : row + 1])
        assert torch.equal(alone[0], together[row])


@every_row_case
@fewer
@given(data=st.data())
def test_masking_equals_deleting_the_masked_tokens(case: Case, data: st.DataObject) -> None:
    mask, tensors = drawn(data, case)
    result = case.call(*tensors, mask)
    for row in range(mask.shape[0]):
        kept = mask[row]
        if not bool(kept.any()):
            continue
        short = case.call(*(x[row, kept][None] for x in tensors), kept[kept][None])[0]
        close(short, result[row] if case.kind == "sequence" else result[row, kept])


@every_case
@fewer
@given(data=st.data(), left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_on_either_side_changes_nothing(
    case: Case, data: st.DataObject, left: int, right: int
) -> None:
    mask, tensors = drawn(data, case)
    result = case.call(*tensors, mask)

    def padded(x: Tensor, fill: float | bool) -> Tensor:
        def block(width: int) -> Tensor:
            return torch.full_like(x[:, :1], fill).expand(-1, width, *x.shape[2:])

        return torch.cat([block(left), x, block(right)], dim=1)

    wide = case.call(*(padded(x, torch.nan) for x in tensors), padded(mask, False))
    if result.shape == mask.shape:
        wide = wide[:, left : left + mask.shape[1]]
    close(wide, result)


@every_case
@fewer
@given(data=st.data())
def test_the_order_of_the_rows_does_not_matter(case: Case, data: st.DataObject) -> None:
    mask, tensors = drawn(data, case)
    order = torch.tensor(data.draw(st.permutations(range(mask.shape[0]))))
    result = case.call(*tensors, mask)
    permuted = case.call(*(x[order] for x in tensors), mask[order])
    close(permuted, result[order] if result.ndim > 0 else result)


@every_case
def test_vmap_over_batches_equals_a_loop(case: Case) -> None:
    stacks = [torch.stack(xs) for xs in zip(*(example(case, seed=s) for s in range(3)), strict=True)]
    stacked_masks = torch.stack([EXAMPLE_MASK, EXAMPLE_MASK.flip(0), EXAMPLE_MASK.T])
    looped = [case.call(*(s[i] for s in stacks), stacked_masks[i]) for i in range(3)]
    close(vmap(case.call)(*stacks, stacked_masks), torch.stack(looped))


@every_row_case
def test_vmap_over_rows_equals_the_batch(case: Case) -> None:
    tensors = example(case)
    close(vmap(case.call)(*tensors, EXAMPLE_MASK), case.call(*tensors, EXAMPLE_MASK))


@every_case
def test_per_example_gradients_by_vmap_of_grad_equal_a_loop(case: Case) -> None:
    if case.boolean:
        assert case.call(*example(case), EXAMPLE_MASK).dtype == torch.bool
        return
    stacks = [torch.stack(xs) for xs in zip(*(example(case, seed=s) for s in range(2)), strict=True)]

    def scalar(*xs: Tensor) -> Tensor:
        return total(case, xs[:-1], xs[-1])

    first = grad(scalar)
    batched = torch.stack([EXAMPLE_MASK, EXAMPLE_MASK.flip(1)])
    looped = torch.stack([first(*(s[i] for s in stacks), batched[i]) for i in range(2)])
    close(vmap(first)(*stacks, batched), looped)


@differentiated
def test_gradients_equal_finite_differences(case: Case) -> None:
    if case.boolean:
        assert not case.call(*example(case), EXAMPLE_MASK).requires_grad
        return
    tensors = tuple(x.requires_grad_() for x in example(case))
    assert torch.autograd.gradcheck(lambda *xs: case.call(*xs, EXAMPLE_MASK), tensors, atol=1e-6)


@stopped
@fewer
@given(data=st.data())
def test_gradients_past_a_stop_gradient_are_the_closed_form(case: Case, data: st.DataObject) -> None:
    assert case.slopes is not None and case.kind == "token"
    mask, tensors = drawn(data, case)
    weight = torch.arange(1, mask.numel() + 1, dtype=torch.float64).reshape(mask.shape)
    expected = tuple(torch.where(mask, weight * slope, 0.0) for slope in case.slopes(*tensors))
    close(gradients(case, tensors, mask), expected)


@every_case
@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_half_precision_is_computed_and_returned_in_fp32(
    case: Case, given_dtype: torch.dtype, computed: torch.dtype
) -> None:
    tensors = example(case, dtype=given_dtype)
    result = case.call(*tensors, EXAMPLE_MASK)
    assert result.dtype == (torch.bool if case.boolean else computed)
    wide = case.call(*(x.to(computed) for x in tensors), EXAMPLE_MASK)
    assert torch.equal(result, wide)
    exact = case.call(*example(case), EXAMPLE_MASK)
    torch.testing.assert_close(result.to(exact.dtype), exact, rtol=1e-6, atol=1e-5)


@every_case
def test_the_arguments_are_not_written_to(case: Case) -> None:
    tensors, mask = example(case), EXAMPLE_MASK.clone()
    copies = tuple(x.clone() for x in tensors)
    case.call(*tensors, mask)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    assert torch.equal(mask, EXAMPLE_MASK)


@every_case
def test_it_compiles_as_one_full_graph(case: Case) -> None:
    torch._dynamo.reset()
    tensors = example(case, dtype=torch.float32)
    compiled: Callable[..., Tensor] = torch.compile(case.call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors, EXAMPLE_MASK), case.call(*tensors, EXAMPLE_MASK))


@every_case
def test_its_gradient_compiles_as_one_full_graph(case: Case) -> None:
    torch._dynamo.reset()
    tensors = example(case, dtype=torch.float32)
    if case.boolean:
        assert case.call(*tensors, EXAMPLE_MASK).dtype == torch.bool
        return

    def first(*xs: Tensor) -> Tensor:
        return grad(lambda *ys: case.call(*ys, EXAMPLE_MASK).square().sum())(*xs)

    compiled: Callable[..., Tensor] = torch.compile(first, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors), first(*tensors))


@every_case
def test_a_mask_of_numbers_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"mask must be a bool tensor \(True = counts\), got torch.float64"):
        case.call(*example(case), EXAMPLE_MASK.double())


@every_case
def test_integers_are_refused(case: Case) -> None:
    tensors = tuple(x.long() for x in example(case))
    with pytest.raises(ValueError, match=r"must be a floating-point tensor, got torch.int64"):
        case.call(*tensors, EXAMPLE_MASK)


@every_case
def test_a_mask_of_another_shape_is_refused_with_both_shapes(case: Case) -> None:
    with pytest.raises(ValueError, match=r"\[6, 6") as caught:
        case.call(*example(case), EXAMPLE_MASK[:, :5])
    assert "[6, 5]" in str(caught.value)


@pytest.mark.parametrize("case", [c for c in CASES if c.tensors > 1], ids=lambda c: c.name)
def test_tensors_of_unequal_shapes_are_refused_not_broadcast(case: Case) -> None:
    tensors = list(example(case))
    tensors[1] = tensors[1][:, :1]
    with pytest.raises(ValueError, match=r"expected equal shapes, got .*\[6, 1"):
        case.call(*tensors, EXAMPLE_MASK)
