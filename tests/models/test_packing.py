"""Packed rows: the pool holds each distinct prefix once; states and gradients are those of padded rows."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.models import packing as page
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.packing import Packing, hidden, pack, unpacked
from tests.models.cases import CASES, Case, tiny_model
from tests.models.tiny import tiny, valid

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)

# Rows of the kinds that stages have; the context of the tiny models is 24.
BATCHES = {
    "pairs": [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 2, 3, 4], [1, 2, 3], [1, 2, 4, 5, 6, 6, 6]],
    "sides that begin alike": [[5, 6, 7, 7, 1, 1], [5, 6, 7, 7, 1, 2, 3], [8, 1], [8, 1, 1]],
    "prompts of one token": [[9, 1, 2], [9, 3], [4, 1], [4, 1, 5, 5, 5, 5]],
    "a group of one prompt": [[5, 6, *[7] * 9, i, i + 1][: 12 + i % 2] for i in range(5)],
    "the whole context": [list(range(24)), [*range(20), 60], [3]],
    "no common beginning": [[1, 5, 5, 5, 5, 5, 5], [2, 5], [3, 5, 5], [4]],
    "the same row twice": [[7, 8, 9], [7, 8, 9], [7, 8, 9, 1]],
    "one row within another": [[1, 2, 3, 4, 5], [1, 2, 3], [1]],
    "one row": [[1, 2, 3, 1, 2]],
}
every_batch = pytest.mark.parametrize("name", list(BATCHES))


def padded(rows: list[list[int]], *, padding: int = 0, more: int = 0) -> tuple[Tensor, Tensor]:
    """tokens [R, T] and lengths [R]; `more` columns hold padding only."""
    width = max(len(row) for row in rows) + more
    tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def packed(tokens: Tensor, lengths: Tensor) -> Packing:
    """The packing, whatever it saves."""
    found = pack(tokens, lengths, worth=1.0)
    assert found is not None
    return found


def random_rows(seed: int) -> list[list[int]]:
    """Ragged rows of only two ids, so that many begin alike."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    return [generator.integers(0, 2, int(generator.integers(1, 8))).tolist() for _ in range(count)]


@pytest.mark.parametrize("rows", [*BATCHES.values(), *[random_rows(seed) for seed in range(40)]])
def test_the_pool_is_the_set_of_prefixes_and_every_token_finds_its_own(rows: list[list[int]]) -> None:
    found = packed(*padded(rows, padding=1))
    place = {
        tuple(row[: t + 1]): int(found.slots[i, t]) for i, row in enumerate(rows) for t in range(len(row))
    }
    assert sorted(place.values()) == list(range(len(found.tokens)))  # as many places as prefixes, none twice
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            slot = int(found.slots[i, t])
            assert slot == place[tuple(row[: t + 1])]
            assert int(found.tokens[slot]) == token and int(found.positions[slot]) == t


@pytest.mark.parametrize("rows", [*BATCHES.values(), *[random_rows(seed) for seed in range(40)]])
def test_blocks_hold_every_row_once_and_each_token_is_picked_where_it_stands(rows: list[list[int]]) -> None:
    tokens, lengths = padded(rows, more=2)
    found = packed(tokens, lengths)
    whole = [tuple(row[:length]) for row, length in zip(found.slots.tolist(), lengths.tolist(), strict=True)]
    in_blocks = [tuple(row) for block in found.blocks for row in block.tolist()]
    for row in whole:
        match = next(each for each in in_blocks if each[: len(row)] == row and not any(each[len(row) :]))
        in_blocks.remove(match)
    assert not in_blocks
    assert torch.equal(
        torch.cat([block.flatten() for block in found.blocks])[found.picked], torch.arange(len(found.tokens))
    )


def test_a_picked_position_is_never_padding() -> None:
    """Its entry is that of the pool's first token, so the test above does not tell."""
    for seed in range(40):
        tokens, lengths = padded(random_rows(seed))
        found, falling = packed(tokens, lengths), lengths.sort(descending=True).values
        filled, start = [], 0
        for block in found.blocks:
            filled.append(
                (torch.arange(block.shape[1]) < falling[start : start + len(block), None]).flatten()
            )
            start += len(block)
        assert torch.cat(filled)[found.picked].all()


def test_the_cut_into_blocks_is_the_cheapest_of_all() -> None:
    def work(lengths: list[int], sizes: tuple[int, ...]) -> float:
        total, start = 0.0, 0
        for size in sizes:
            total += size * lengths[start] * (lengths[start] + 40) + 4096
            start += size
        return total

    generator = np.random.default_rng(0)
    for count in range(1, 10):
        for _ in range(10):
            lengths = sorted(generator.integers(1, 400, count).tolist(), reverse=True)
            cuts: list[tuple[int, ...]] = [(count,)]
            for blocks in range(2, 5):
                for inner in combinations(range(1, count), blocks - 1):
                    edges = (0, *inner, count)
                    cuts.append(tuple(b - a for a, b in zip(edges[:-1], edges[1:], strict=True)))
            least = min(work(lengths, cut) for cut in cuts if min(cut) >= 2 or len(cut) == 1)
            found = tuple(page._block_sizes(np.array(lengths), page.BLOCKS))
            assert len(found) == 1 or min(found) >= 2
            assert sum(found) == count and work(lengths, found) == least


def states_and_gradient(
    model: LanguageModel, params: Params, tokens: Tensor, lengths: Tensor, packing: Packing | None
) -> tuple[Tensor, list[Tensor]]:
    """States of the valid tokens, and the gradient of their product with fixed random numbers."""
    mask = valid(tokens, lengths)
    weight = torch.randn(int(mask.sum()), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(params: Params) -> tuple[Tensor, Tensor]:
        states = hidden(model, params, tokens, packing)[mask]
        return (states * weight).sum(), states

    gradient, states = torch.func.grad(loss, has_aux=True)(params)
    return states, tree_leaves(gradient)


@every_case
@every_batch
def test_states_and_gradients_are_those_of_padded_rows(case: Case, name: str) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, lengths = padded(BATCHES[name])
    right = states_and_gradient(model, params, tokens, lengths, None)
    rubbish, _ = padded(BATCHES[name], padding=-(10**6))  # an id that no embedding has: it is not looked up
    found = states_and_gradient(model, params, rubbish, lengths, packed(rubbish, lengths))
    torch.testing.assert_close(found[0], right[0], rtol=0, atol=1e-10)
    for one, other in zip(found[1], right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())))


@every_case
def test_the_packing_that_changes_nothing_changes_nothing(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, lengths = padded(BATCHES["pairs"])
    right = states_and_gradient(model, params, tokens, lengths, None)
    layout = unpacked(tokens)
    assert layout.tokens[layout.slots].equal(tokens) and len(layout.tokens) == tokens.numel()
    found = states_and_gradient(model, params, tokens, lengths, layout)
    torch.testing.assert_close(found[0], right[0], rtol=0, atol=1e-10)
    for one, other in zip(found[1], right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())))


def test_several_blocks_are_tried_by_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows above are short, so that one block is the cheapest; here blocks cost nothing."""
    monkeypatch.setattr(page, "_PER_BLOCK", 0)
    for case in CASES:
        model, params = tiny_model(case, dtype=torch.float64)
        tokens, lengths = padded(
            BATCHES["pairs"] + BATCHES["the whole context"] + BATCHES["no common beginning"]
        )
        layout = packed(tokens, lengths)
        assert len(layout.blocks) == 4
        right = states_and_gradient(model, params, tokens, lengths, None)
        found = states_and_gradient(model, params, tokens, lengths, layout)
        torch.testing.assert_close(found[0], right[0], rtol=0, atol=1e-10)
        for one, other in zip(found[1], right[1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())))


def test_every_layer_but_attention_sees_the_pool_and_nothing_else() -> None:
    model, params = tiny()
    seen: list[tuple[int, ...]] = []

    def states(params: Params, tokens: Tensor, positions: Tensor, attend: object) -> Tensor:
        seen.append(tuple(tokens.shape))
        return model.states(params, tokens, positions, attend)  # pyright: ignore[reportArgumentType]

    rows = BATCHES["pairs"]
    tokens, lengths = padded(rows)
    hidden(model._replace(states=states), params, tokens, pack(tokens, lengths))
    assert seen == [(1, len({tuple(row[: t + 1]) for row in rows for t in range(len(row))}))]


def test_rows_that_save_too_little_are_computed_as_they_are() -> None:
    full = torch.arange(40).view(2, 20)
    whole, one_less, two_less = (torch.tensor([20, 20 - less]) for less in (0, 1, 2))
    assert pack(full, whole) is None and pack(full, one_less) is None  # 39 of 40
    found = pack(full, two_less)
    assert found is not None and len(found.tokens) == 38  # 0.95 of 40
    assert pack(full, whole, worth=1.0) is not None
    model, params = tiny()
    assert torch.equal(hidden(model, params, full, None), model.hidden(params, full))


def test_the_context_ends_where_it_does_for_padded_rows() -> None:
    model, params = tiny()
    tokens, lengths = padded([list(range(24)), [1]], more=1)
    with pytest.raises(ValueError, match="sequence of 25 tokens exceeds the context of 24"):
        hidden(model, params, tokens, packed(tokens, lengths))


def test_a_packing_of_other_rows_is_refused() -> None:
    model, params = tiny()
    tokens, lengths = padded(BATCHES["pairs"])
    with pytest.raises(ValueError, match=r"packing of rows \[4, 8\] for tokens \[4, 7\]"):
        hidden(model, params, tokens[:, :7], packed(tokens, lengths))


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 asserts that a size which is a symbol is none"
)
def test_a_compiled_gradient_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_PER_BLOCK", 0)  # several blocks
    model, params = tiny(dtype=torch.float64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    def loss(params: Params, tokens: Tensor, packing: Packing) -> Tensor:
        read = (packing.slots > 0)[..., None]
        return (hidden(model, params, tokens, packing) * read).square().sum()

    def gradient(params: Params, tokens: Tensor, packing: Packing) -> Params:
        return torch.func.grad(loss)(params, tokens, packing)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend=backend)  # static, then dynamic
    for rows in (random_rows(0), random_rows(4)):
        tokens, lengths = padded([[*row, 2, 3] for row in rows])
        layout = packed(tokens, lengths)
        right, found = gradient(params, tokens, layout), compiled(params, tokens, layout)
        for one, other in zip(tree_leaves(found), tree_leaves(right), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert graphs
    torch._dynamo.reset()
