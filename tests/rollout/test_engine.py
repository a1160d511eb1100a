"""Continuous batching and shared prompts change which work is done together, and nothing that is sampled."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from minirlhf.kernels.logprob import token_logp
from minirlhf.kernels.memory import Room
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.models.packing import pack
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.cache import Cache
from minirlhf.rollout.pages import PAGE
from minirlhf.rollout.parts import Part
from minirlhf.rollout.sampler import Rollout, generate, response_mask, stream
from minirlhf.rollout.weights import as_they_are
from minirlhf.runs import InputError
from tests.models.cases import CASES, Case, tiny_model
from tests.rollout.known_models import rows, tiny_gpt2

CONTEXT = 4 * PAGE


def a_model(dtype: torch.dtype = torch.float64) -> tuple[LanguageModel, Params]:
    model, params = tiny_gpt2(context=CONTEXT)
    return model, tree_map(lambda leaf: leaf.to(dtype), params)


def text(length: int, *, seed: int = 0) -> list[int]:
    return torch.randint(1, 31, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def draw(
    model: LanguageModel,
    params: Params,
    prompts: list[list[int]],
    *,
    limit: int | list[int] = 50,
    slots: int | None = None,
) -> Rollout:
    index = torch.arange(len(prompts))
    return generate(
        model, params, prompts, law=sampling_law, max_new_tokens=limit, stop_ids=[0], seed=3,
        prompt_index=index, sample_index=index, slots=slots, weights=as_they_are,
    )  # fmt: skip


def gap_to_uncached(model: LanguageModel, params: Params, rollout: Rollout) -> float:
    """The largest difference of a recorded log-prob to the uncached model's, in nats."""
    mask = response_mask(rollout)
    states = aligned(model.hidden(params, rollout.tokens))
    recomputed = token_logp(states, model.unembedding(params), rollout.tokens, mask)
    return float((recomputed - rollout.logp).abs().max())


EDGES = [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1]
BEGINNING = text(2 * PAGE, seed=9)
SETS = {
    "lengths around a page": [text(length, seed=length) for length in EDGES],
    "one prompt, many samples": [text(PAGE + 5)] * 9,
    "a prompt of whole pages, many samples": [text(2 * PAGE)] * 5,
    "a short prompt, many samples": [text(3)] * 7,
    "a common beginning": [BEGINNING + text(n, seed=n) for n in (1, 2, 9)],
    "a prompt that is the common beginning": [BEGINNING, BEGINNING + text(3), BEGINNING + text(4, seed=1)],
    "a common beginning and samples": [BEGINNING[:PAGE] + text(n, seed=n) for n in (PAGE + 3, 4, 4, 4, PAGE)]
    * 2,
    "a common beginning of less than a page": [BEGINNING[: PAGE - 1] + [n] for n in (1, 2, 3)],
}


# fp32 on a CPU goes through the compiled kernels, where there is a compiler; fp64 through torch's operations.
BOTH = pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])


@BOTH
@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("slots", [2, 3, None])
def test_any_number_of_slots_gives_the_rows_of_one_slot(
    prompts: list[list[int]], slots: int | None, dtype: torch.dtype, rounding: float
) -> None:
    model, params = a_model(dtype)
    alone, together = draw(model, params, prompts, slots=1), draw(model, params, prompts, slots=slots)
    different = sum(one != other for one, other in zip(rows(alone), rows(together), strict=True))
    assert different <= min(int(alone.boundary_draws), int(together.boundary_draws))
    assert torch.equal(alone.stop_reason, together.stop_reason) or different
    assert gap_to_uncached(model, params, together) < rounding


@BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_family_decodes_from_pages_as_it_does_from_the_whole_row(
    case: Case, dtype: torch.dtype, rounding: float
) -> None:
    longer = {name: 4 * PAGE for name in ("n_positions", "max_position_embeddings") if name in case.entries}
    model, params = tiny_model(case._replace(entries=case.entries | longer), dtype=dtype)
    assert model.config.n_positions == 4 * PAGE
    row = torch.randint(1, 61, (2 * PAGE,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [row[:PAGE] + row[:n] for n in (1, 3, PAGE, PAGE)]  # a common beginning, and two samples
    index = torch.arange(4)
    for some in (prompts, [[5, *row[: PAGE + 7]], row[:2]]):
        rollout = generate(
            model, params, some, law=sampling_law, max_new_tokens=2 * PAGE, stop_ids=[], seed=3,
            prompt_index=index[: len(some)], sample_index=index[: len(some)], slots=3, weights=as_they_are,
        )  # fmt: skip
        assert gap_to_uncached(model, params, rollout) < rounding


def test_a_slot_that_is_free_is_given_to_the_next_prompt_at_once() -> None:
    model, params = a_model()
    prompts, live = [text(5, seed=seed) for seed in range(40)], []

    def states(params, tokens, positions, attend):
        read = 5 * int((positions == 0).sum())  # every prompt that joins begins at 0
        live.append(tokens.numel() - read)
        return model.states(params, tokens, positions, attend)

    rollout = draw(model._replace(states=states), params, prompts, slots=4)
    sampled = int((rollout.lengths - rollout.prompt_lengths).sum())
    assert sum(live) == sampled - 40, "each token but a row's last is read once"
    assert max(live) <= 4
    tail = int((rollout.lengths - rollout.prompt_lengths).max())
    assert len(live) <= sampled / 4 + tail, "all slots are busy until the queue is empty"


def reading(model: LanguageModel) -> tuple[LanguageModel, list[tuple[int, ...]]]:
    """The model, and the shapes of the tokens that it reads."""
    read: list[tuple[int, ...]] = []

    def states(params, tokens, positions, attend):
        read.append(tuple(tokens.shape))
        return model.states(params, tokens, positions, attend)

    return model._replace(states=states), read


def test_samples_of_a_prompt_read_it_once_and_keep_its_whole_pages_once() -> None:
    model, params = a_model()
    noting, read = reading(model)
    prompt = text(2 * PAGE + 3)
    rollout = draw(noting, params, [prompt] * 8, limit=4)
    assert read[0] == (1, len(prompt)) and all(shape[1] == 1 for shape in read[1:])
    assert rollout.cache is not None and rollout.cache.pages == 2 + 8
    assert rollout.cache.tokens == 2 * PAGE + 8 * 3, "when it was first so full"


def test_a_common_beginning_is_read_once() -> None:
    model, params = a_model()
    noting, read = reading(model)
    prompts = [BEGINNING + text(n, seed=n) for n in (4, 5, 6)]
    draw(noting, params, prompts, limit=2, slots=1)
    assert [shape for shape in read if shape[1] > 1] == [(1, 2 * PAGE), (1, 6), (1, 5), (1, 4)]


def test_prompts_are_read_without_padding_and_what_some_begin_with_once() -> None:
    model, params = a_model()
    noting, read = reading(model)
    some = text(20, seed=7)
    prompts = [text(70), [*some, 1, 2], [*some, 3], [9]]
    rollout = draw(noting, params, prompts, limit=3)
    assert read[0] == (1, 70 + 20 + 2 + 1 + 1)
    assert gap_to_uncached(model, params, rollout) < 1e-5


@BOTH
def test_newcomers_are_read_in_the_pass_that_decodes_the_others(dtype: torch.dtype, rounding: float) -> None:
    model, params = a_model(dtype)
    noting, read = reading(model)
    prompts, limits = [text(9, seed=1), text(8, seed=2), text(PAGE + 2, seed=3), [5]], [9, 2, PAGE + 9, 4]
    index = torch.arange(4)
    rollout = generate(
        noting, params, prompts, law=sampling_law, max_new_tokens=limits, stop_ids=[], seed=3,
        prompt_index=index, sample_index=index, slots=2, weights=as_they_are,
    )  # fmt: skip
    # Longest prompts first: 34 + 9 are read, then 8 beside a live row, then 1 beside one.
    assert [shape for shape in read if shape[0] == 1 and shape[1] > 1] == [(1, PAGE + 11), (1, 9), (1, 2)]
    assert len(read) == PAGE + 9, "no round has a second pass"
    assert (rollout.lengths - rollout.prompt_lengths).tolist() == limits
    assert gap_to_uncached(model, params, rollout) < rounding


def test_prompts_beyond_what_a_pass_may_read_join_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirlhf.rollout.engine.PREFILL_TOKENS", 20)
    model, params = a_model()
    noting, read = reading(model)
    prompts = [text(40, seed=1), *(text(9, seed=seed) for seed in range(2, 6))]
    rollout = draw(noting, params, prompts, limit=6)
    assert [tokens for _, tokens in read[:3]] == [40, 1 + 18, 3 + 18], (
        "alone; two beside it; two beside three"
    )
    assert gap_to_uncached(model, params, rollout) < 1e-5


def test_a_page_holds_tokens_of_its_own_row_alone() -> None:
    """Behind a row's end, too: what is masked there, a NaN of another row, would still be a NaN."""
    model, _ = a_model()
    prompts = [text(PAGE + 5, seed=1), text(7, seed=2), text(3, seed=3)]
    parts = [Part(tuple(prompt), (row,)) for row, prompt in enumerate(prompts)]
    limits, lengths = np.full(3, 4), np.array([len(prompt) for prompt in prompts])
    cache = Cache(model.cache, parts, 0, 3, limits, dtype=torch.float64, device=torch.device("cpu"))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in prompts], batch_first=True)
    packing = pack(padded, torch.from_numpy(lengths))
    assert packing is not None
    (place,) = cache.place(lengths, np.ones(3, dtype=np.int64), np.arange(3), packing.slots)
    readers = place.arena.readers[place.there, 0].tolist()
    assert readers == [0, 0, 1, 2]
    for row, tokens in zip(readers, place.tokens.tolist(), strict=True):
        assert set(tokens) <= set(packing.slots[row, : lengths[row]].tolist())


@BOTH
def test_garbage_in_new_memory_reaches_no_state(
    dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = a_model(dtype)
    prompts = [text(length, seed=length) for length in (3, PAGE, 40)] * 3
    expected, taken, take = draw(model, params, prompts, slots=4), [], Room.take

    def garbage(room: Room, *given, **named) -> torch.Tensor:
        taken.append(take(room, *given, **named).fill_(torch.nan))
        return taken[-1]

    monkeypatch.setattr(Room, "take", garbage)
    assert rows(draw(model, params, prompts, slots=4)) == rows(expected) and taken


def test_a_stream_gives_each_response_once_as_soon_as_it_has_ended() -> None:
    model, params = a_model()
    prompts = [text(length, seed=length) for length in (3, 9, 40, 5, 6, 7)]
    index = torch.arange(len(prompts))
    whole = draw(model, params, prompts, slots=2)
    finished = list(
        stream(
            model, params, prompts, law=sampling_law, max_new_tokens=50, stop_ids=[0], seed=3,
            prompt_index=index, sample_index=index, slots=2, weights=as_they_are,
        )
    )  # fmt: skip
    assert sorted(each.prompt for each in finished) == list(range(6))
    assert [each.prompt for each in finished] != list(range(6)), "the order is that of finishing"
    for each in finished:
        span = slice(int(whole.prompt_lengths[each.prompt]), int(whole.lengths[each.prompt]))
        assert torch.equal(each.tokens, whole.tokens[each.prompt, span])
        assert torch.equal(each.logp, whole.logp[each.prompt, span])
        assert torch.equal(each.sampled_logp, whole.sampled_logp[each.prompt, span])
        assert each.stop_reason == whole.stop_reason[each.prompt]


def test_a_stream_refuses_a_bad_request_at_the_call() -> None:
    model, params = a_model()
    index = torch.arange(1)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        stream(
            model, params, [[1]], law=sampling_law, max_new_tokens=5, stop_ids=[0], seed=3,
            prompt_index=index, sample_index=index, slots=0,
        )  # fmt: skip


def test_pages_in_use_are_those_of_the_live_tokens() -> None:
    model, params = a_model()
    prompts = [text(length, seed=length) for length in (3, 30, 31, 32, 60, 64, 5, 70)] * 4
    use = draw(model, params, prompts, slots=8).cache
    assert use is not None
    assert use.tokens <= use.pages * PAGE <= use.tokens + 8 * (PAGE - 1)
    assert use.pages <= use.allocated <= 8 * -(-(70 + 50) // PAGE)
    assert use.page_bytes == 2 * 2 * PAGE * 16 * 8, "keys and values, layers, tokens, width, bytes"


def test_half_precision_pages_hold_half_precision() -> None:
    model, params = a_model(torch.bfloat16)
    rollout = draw(model, params, [text(40), text(3)])
    assert rollout.logp.dtype == torch.float32
    assert rollout.cache is not None and rollout.cache.page_bytes == 2 * 2 * PAGE * 16 * 2
    assert gap_to_uncached(model, params, rollout) < 0.15


def test_every_law_is_drawn_from_in_every_slot() -> None:
    model, params = a_model()
    law = partial(sampling_law, temperature=0.6, top_k=7)
    index = torch.arange(12)
    rollout = generate(
        model, params, [text(5)] * 12, law=law, max_new_tokens=20, stop_ids=[0], seed=3,
        prompt_index=index, sample_index=index, slots=5, weights=as_they_are,
    )  # fmt: skip
    mask = response_mask(rollout)
    logits = aligned(model.hidden(params, rollout.tokens)) @ model.unembedding(params).T
    under = law(logits.float()).gather(-1, rollout.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampled_logp[mask], under[mask], atol=1e-5, rtol=0)


def test_each_row_may_have_a_limit_of_its_own() -> None:
    model, params = a_model()
    prompts, limits = [text(40), text(3), text(3), text(9, seed=4)], [3, 50, 1, 20]
    index = torch.arange(4)
    rollout = generate(
        model, params, prompts, law=sampling_law, max_new_tokens=limits, stop_ids=[], seed=3,
        prompt_index=index, sample_index=index, slots=2, weights=as_they_are,
    )  # fmt: skip
    assert (rollout.lengths - rollout.prompt_lengths).tolist() == limits
    longest = draw(model, params, prompts, limit=50)
    for one, other, length in zip(rows(rollout), rows(longest), rollout.lengths.tolist(), strict=True):
        assert one[: len(other)] == other[:length], "until the stop, which the limit does not change"
    with pytest.raises(ValueError, match=r"max_new_tokens must be one number, or 4, got 3"):
        draw(model, params, prompts, limit=[1, 2, 3])
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1, got 0"):
        draw(model, params, prompts, limit=[1, 2, 3, 0])
    with pytest.raises(InputError, match="prompt 0 has 40 tokens; with max_new_tokens 100 that exceeds"):
        draw(model, params, prompts, limit=[100, 2, 3, 4])
