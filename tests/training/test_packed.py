"""How stages lay out micro-batches: the losses of policies and critics, the order of rows, the account."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.data.records import collate, join
from minirlhf.models.interface import Params
from minirlhf.models.packing import Packing, pack
from minirlhf.training import packed, ppo_update
from minirlhf.training.experience import Experience
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.group_experience import GroupExperience
from minirlhf.training.group_update import group_loss
from minirlhf.training.packed import PackedRows, layout_metrics, together
from minirlhf.training.pairs import cut_pairs, pair_rows, per_row
from minirlhf.training.ppo_config import PPOConfig
from minirlhf.training.ppo_update import minibatches
from tests.training import tiny
from tests.training.ppo_setting import CRITIC, MODEL, POLICY, moved, taken

# Groups of three samples; samples of a prompt differ in length, and two of them begin alike.
ROWS = [
    ([5], [4, 4, 3]),
    ([5], [4, 4, 1, 2, 8, 3]),
    ([5], [2]),
    ([1, 2, 7, 7], [4, 3]),
    ([1, 2, 7, 7], [6, 6, 6, 6, 6, 6]),
    ([1, 2, 7, 7], [6, 6, 1]),
]
CONFIG = PPOConfig(batch_size=6, temperature=0.7, entropy_coefficient=0.1, micro_batch_size=2)
GROUPS = GroupConfig(prompts_per_batch=2, samples_per_prompt=3, max_response=6, temperature=0.7)


def experience() -> Experience:
    """fp64, on the rows above, with NaN wherever nothing is to be read."""
    rows = collate([join(*row) for row in ROWS])
    draw = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        drawn = 0.3 * torch.randn(rows.tokens.shape, generator=draw, dtype=torch.float64)
        return torch.where(rows.mask, drawn, torch.nan)

    old = noise() - 2
    return Experience(
        tokens=rows.tokens,
        mask=rows.mask,
        prompt_lengths=rows.prompt_lengths,
        lengths=rows.lengths,
        old_logp=old,
        ref_logp=old + noise(),
        old_value=noise(),
        score=torch.zeros(len(ROWS)),
        reward=noise(),
        advantage=noise(),
        ret=noise(),
    )


def grouped(e: Experience) -> GroupExperience:
    return GroupExperience(**{name: getattr(e, name) for name in GroupExperience._fields})


def wide(params: Params) -> Params:
    return tree_map(lambda x: x.double(), params)


LOSSES: dict[str, tuple[Callable[..., Tensor], Params, Callable[[Experience], tuple]]] = {
    "policy": (ppo_update.policy_loss(MODEL, CONFIG, tolerance=1e-4), moved(POLICY, by=0.02), lambda e: e),
    "critic": (ppo_update.critic_loss(MODEL, CONFIG), moved(CRITIC, by=0.1), lambda e: e),
    "group": (group_loss(MODEL, GROUPS, tolerance=1e-4), moved(POLICY, by=0.02), grouped),
}  # pyright: ignore


@pytest.mark.parametrize("name", list(LOSSES))
def test_packed_experience_has_the_gradient_and_metrics_of_padded_rows(name: str) -> None:
    loss, params, record = LOSSES[name]
    e = experience()
    packing = pack(e.tokens, e.lengths)
    assert packing is not None and len(packing.tokens) < int(e.lengths.sum())
    found = []
    for layout in (None, packing):
        rows = record(e)._replace(packing=layout)  # pyright: ignore
        found.append(torch.func.grad_and_value(loss, has_aux=True)(wide(params), rows, e.mask.sum()))
    (right_grads, right), (grads, got) = found
    for one, other in zip(tree_leaves((grads, got)), tree_leaves((right_grads, right)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert any(leaf.abs().max() > 1e-3 for leaf in tree_leaves(grads))


def test_rows_of_one_prompt_go_side_by_side_and_long_ones_first() -> None:
    e = experience()
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    order = together(e.tokens[shuffled], e.prompt_lengths[shuffled], e.lengths[shuffled])
    assert shuffled[order].tolist() == [4, 5, 3, 1, 0, 2]


def test_equal_tokens_of_a_prompt_and_a_response_are_not_the_same_prompt() -> None:
    tokens = torch.tensor([[5, 5, 1], [5, 9, 9], [5, 5, 2]])
    order = together(tokens, torch.tensor([2, 1, 2]), torch.tensor([3, 3, 3]))
    assert order.tolist() in ([0, 2, 1], [1, 0, 2])


def test_minibatches_hold_what_was_drawn_and_share_prompts_within_it() -> None:
    e = experience()
    e = e._replace(score=torch.arange(6.0))  # tells rows apart
    config = PPOConfig(batch_size=6, epochs=2, minibatches=2, micro_batch_size=2)
    orders = torch.Generator().manual_seed(1)
    drawn = [part for _ in range(2) for part in torch.randperm(6, generator=orders).split(3)]
    found = list(minibatches(e, config, generator=torch.Generator().manual_seed(1)))
    for minibatch, rows in zip(found, drawn, strict=True):
        scores = torch.cat([part.score for part in minibatch.micro_batches]).long()
        assert sorted(scores.tolist()) == sorted(rows.tolist())
        prompts = (scores // 3).tolist()
        assert sum(a != b for a, b in zip(prompts[:-1], prompts[1:], strict=True)) == len(set(prompts)) - 1


def test_taken_rows_are_packed_by_their_own_tokens() -> None:
    e = experience()
    part = taken(e, torch.tensor([1, 0]))
    assert part.packing is not None and len(part.packing.tokens) == 7 + 1  # row 1, and the EOS of row 0
    assert taken(e, torch.tensor([4])).packing is None


def test_both_sides_of_a_pair_share_a_forward_pass() -> None:
    pairs = pair_rows(tiny.PAIRS, name="tiny", model=tiny.MODEL)
    seen = []

    def first_ids(batch: PackedRows) -> Tensor:
        seen.append(batch.rows.tokens[:, 0].tolist())
        return batch.rows.lengths

    for size, most in ((1, 2), (4, 4), (5, 4), (100, 10)):
        seen.clear()
        found = per_row(first_ids, pairs.rows, micro_batch_size=size, device=torch.device("cpu"), sides=2)
        assert torch.equal(found, pairs.rows.lengths)
        assert max(len(ids) for ids in seen) == most
        assert all(ids[: len(ids) // 2] == ids[len(ids) // 2 :] for ids in seen)


def numbers(layout: list[PackedRows]) -> list[float]:
    found = layout_metrics(layout)
    assert tuple(found) == packed.METRICS
    return [float(each) for each in found.values()]


def test_the_account_of_a_layout() -> None:
    rows = collate([([5, 6], [1, 2]), ([5, 6], [3])])  # 8 positions, 7 tokens, 5 of them distinct prefixes
    alone = collate([([5, 6], [1, 2, 3]), ([7], [1])])  # 10 positions, 7 tokens, all distinct
    padded, pooled = PackedRows(rows), packed.packed(rows)
    assert numbers([padded]) == pytest.approx([1 / 8, 0])
    assert numbers([pooled]) == pytest.approx([0, 2 / 7])
    assert numbers([pooled, PackedRows(alone)]) == pytest.approx([3 / 15, 2 / 14])


def test_micro_batches_of_pairs_are_packed() -> None:
    pairs = pair_rows(tiny.PAIRS, name="tiny", model=tiny.MODEL)
    step = cut_pairs(pairs, torch.tensor([3, 1]), micro_batch_size=2, device=torch.device("cpu"))
    (batch,) = step.micro_batches
    assert isinstance(batch.packing, Packing)
    # Pair 3: a prompt of 5, then 9 and 2 tokens that begin alike; pair 1: a prompt of 2, then 2 and 6.
    assert len(batch.packing.tokens) == (5 + 9 + 1) + (2 + 2 + 6)
    assert numbers([batch]) == pytest.approx([0, 1 - 25 / 33])
