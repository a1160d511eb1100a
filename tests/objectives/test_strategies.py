"""The strategies produce what they promise: a blind strategy makes every property vacuous."""

import torch
from hypothesis import find, given

from tests.objectives.strategies import Batch, batches, masks, numbers, poisoned


def test_masks_reach_empty_rows_full_rows_holes_and_square_shapes() -> None:
    assert find(masks(), lambda m: bool((m.sum(-1) == 0).any()) and m.shape[0] > 1).shape[0] > 1
    assert find(masks(), lambda m: m.shape[0] > 1 and bool(m[:, -1].any()) and not bool(m.all())) is not None
    assert find(masks(), lambda m: m.shape[0] == m.shape[1] > 2).shape[0] > 2
    holey = find(masks(), lambda m: bool((~m[:, 1:-1] & m[:, :-2] & m[:, 2:]).any()))
    assert holey.shape[1] >= 3


def test_masks_reach_rows_of_unequal_prompt_and_response() -> None:
    found = find(masks(), lambda m: len({tuple(row.tolist()) for row in m}) >= 3)
    assert found.dtype == torch.bool and found.shape[0] >= 3


@given(masks(holes=False))
def test_masks_without_holes_are_one_span_per_row(mask: torch.Tensor) -> None:
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0].long()
    assert bool((starts <= 1).all())


@given(batches(tensors=2))
def test_batches_hold_bounded_exact_numbers_in_the_shape_of_the_mask(batch: Batch) -> None:
    assert len(batch.tensors) == 2
    for tensor in batch.tensors:
        assert tensor.shape == batch.mask.shape and tensor.dtype == torch.float64
        assert bool((tensor.abs() <= 4).all()) and bool((tensor * 8 == (tensor * 8).round()).all())
        assert torch.equal(tensor, tensor.to(torch.bfloat16).double())


def test_numbers_reach_both_signs() -> None:
    assert find(numbers(3), lambda x: bool((x < 0).any() and (x > 0).any())).shape == (3,)


@given(batches(tensors=1))
def test_poison_lies_exactly_under_the_mask(batch: Batch) -> None:
    x = poisoned(batch.tensors[0], batch.mask)
    assert torch.equal(x.isnan(), ~batch.mask)
    wide = poisoned(batch.tensors[0][..., None].expand(*batch.mask.shape, 2), batch.mask)
    assert torch.equal(wide.isnan().all(-1), ~batch.mask)
