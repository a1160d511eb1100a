"""What a rollout contains: known outputs, stops, input order, refusals, and no trace left behind."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import greedy_law, sampling_law
from minirlhf.rollout.request import default_slots
from minirlhf.rollout.sampler import (
    EOS,
    LENGTH,
    STOP,
    generate,
    response_mask,
    responses,
)
from minirlhf.runs import InputError
from tests.rollout.known_models import (
    CountingConfig,
    counting_model,
    ragged_prompts,
    rows,
    sample,
    tiny_gpt2,
)

SIZE = CountingConfig().vocab_size


class Bound(NamedTuple):
    model: LanguageModel
    params: Params


@pytest.fixture
def counting() -> Bound:
    model = counting_model()
    return Bound(model, model.init(torch.Generator()))


def counted(prompt: list[int], stops: list[int], limit: int) -> tuple[list[int], int]:
    """The counting model's response and stop reason, in plain Python."""
    response: list[int] = []
    while len(response) < limit:
        response.append(((prompt + response)[-1] + prompt[0]) % SIZE)
        if response[-1] in stops:
            return response, EOS if response[-1] == stops[0] else STOP
    return response, LENGTH


@pytest.mark.parametrize("slots", [1, 2, 7, 64, None])
def test_ragged_rows_of_a_counting_model_come_back_whole_and_in_input_order(counting: Bound, slots) -> None:
    prompts, _ = ragged_prompts(60, vocabulary=SIZE)
    stops, limit = [0, 17, 33], 20
    rollout = sample(
        counting.model, counting.params, prompts, stop_ids=stops, max_new_tokens=limit, slots=slots
    )
    expected = [counted(prompt, stops, limit) for prompt in prompts]
    assert rows(rollout) == [
        prompt + response for prompt, (response, _) in zip(prompts, expected, strict=True)
    ]
    assert rollout.stop_reason.tolist() == [reason for _, reason in expected]
    assert set(rollout.stop_reason.tolist()) == {EOS, STOP, LENGTH}, "the test must reach all three"
    assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert rollout.tokens.shape[1] == int(rollout.lengths.max())
    assert (rollout.tokens[torch.arange(rollout.tokens.shape[1]) >= rollout.lengths[:, None]] == 0).all()
    assert rollout.boundary_draws == 0, "a certain law has no boundary"


def test_mask_and_responses_follow_the_lengths(counting: Bound) -> None:
    prompts = [[1, 5], [2, 8, 10], [3]]
    rollout = sample(counting.model, counting.params, prompts, stop_ids=[8, 14], max_new_tokens=4)
    assert rows(rollout) == [[1, 5, 6, 7, 8], [2, 8, 10, 12, 14], [3, 6, 9, 12, 15]]
    assert rollout.stop_reason.tolist() == [EOS, STOP, LENGTH]
    assert responses(rollout) == [[6, 7], [12], [6, 9, 12, 15]]
    assert response_mask(rollout).tolist() == [
        [False, False, True, True, True],
        [False, False, False, True, True],
        [False, True, True, True, True],
    ]


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_eos_drawn_exactly_at_the_limit_is_eos_and_one_token_earlier_is_length(
    counting: Bound, limit
) -> None:
    rollout = sample(counting.model, counting.params, [[1, 5]], stop_ids=[9], max_new_tokens=limit)  # 6 7 8 9
    assert rollout.stop_reason.tolist() == [LENGTH if limit < 4 else EOS]
    assert int(rollout.lengths) == 2 + min(limit, 4)


def test_every_stop_id_stops_and_only_the_first_is_eos(counting: Bound) -> None:
    for position, stop in enumerate([7, 17, 27]):
        rollout = sample(
            counting.model, counting.params, [[1, stop - 3]], stop_ids=[7, 17, 27], max_new_tokens=3
        )
        assert responses(rollout) == [[stop - 2, stop - 1]]
        assert rollout.stop_reason.tolist() == [EOS if position == 0 else STOP]


def test_a_stop_id_inside_or_at_the_end_of_a_prompt_is_an_ordinary_token(counting: Bound) -> None:
    rollout = sample(
        counting.model, counting.params, [[1, 0, 0], [2, 0], [4, 0, 4]], stop_ids=[0, 4], max_new_tokens=3
    )
    assert responses(rollout) == [[1, 2, 3], [2], [8, 12, 16]]
    assert rollout.stop_reason.tolist() == [LENGTH, STOP, LENGTH]


def test_without_stop_ids_every_response_has_the_full_length(counting: Bound) -> None:
    rollout = sample(counting.model, counting.params, [[1, 5], [7]], stop_ids=[], max_new_tokens=60 - 2)
    assert (rollout.lengths - rollout.prompt_lengths).tolist() == [58, 58]
    assert rollout.stop_reason.tolist() == [LENGTH, LENGTH]


def test_a_prompt_and_response_that_fill_the_context_exactly_are_sampled(counting: Bound) -> None:
    prompt = [1] + [5] * (CountingConfig().n_positions - 4)
    assert responses(sample(counting.model, counting.params, [prompt], max_new_tokens=3)) == [[6, 7, 8]]


def test_rows_that_ended_cost_no_forward_pass(counting: Bound) -> None:
    model, params = counting
    read: list[int] = []

    def states(params, tokens, positions, attend):
        read.append(tokens.numel())
        return model.states(params, tokens, positions, attend)

    prompts = [[1, SIZE - n] for n in (1, 4, 2, 4, 3)]  # row i draws EOS (0) as its n-th token
    sample(model._replace(states=states), params, prompts, max_new_tokens=30)
    # First the four different prompts, their common token once; then live rows, and nothing after the last.
    assert read == [1 + 4, 4, 3, 2]


def test_progress_counts_the_tokens_sampled_so_far(counting: Bound) -> None:
    seen: list[int] = []
    prompts = [[1, SIZE - n] for n in (1, 3, 2)]
    sample(counting.model, counting.params, prompts, slots=2, progress=seen.append)
    assert seen[-1] == 6 and seen == sorted(seen) and len(seen) > 2


def test_greedy_equals_the_argmax_loop_over_uncached_logits() -> None:
    model, params = tiny_gpt2()
    prompts, _ = ragged_prompts(12)
    rollout = sample(model, params, prompts, law=greedy_law)
    for prompt, got in zip(prompts, rows(rollout), strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + 12 and (len(row) == len(prompt) or row[-1] != 0):
            logits = model.hidden(params, torch.tensor([row]))[0, -1] @ model.unembedding(params).T
            row.append(int(logits.argmax()))
        assert got == row
    assert (rollout.sampled_logp == 0).all()
    assert (rollout.logp[response_mask(rollout)] < 0).all()


def test_two_calls_agree_bitwise_and_leave_parameters_and_prompts_as_they_were() -> None:
    model, params = tiny_gpt2()
    prompts, index = ragged_prompts(20)
    params_before, prompts_before = tree_map(torch.clone, params), [list(prompt) for prompt in prompts]
    first, second = sample(model, params, prompts), sample(model, params, prompts)
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert torch.equal(one, other)
    assert first.cache == second.cache
    for before, after in zip(tree_leaves(params_before), tree_leaves(params), strict=True):
        assert torch.equal(before, after)
    assert prompts == prompts_before and torch.equal(index, torch.arange(20))


def test_new_weights_are_used_at_once_and_old_weights_give_the_old_rollout_again() -> None:
    model, old = tiny_gpt2(seed=0)
    _, new = tiny_gpt2(seed=5)
    prompts, _ = ragged_prompts(8)
    before, changed = sample(model, old, prompts), sample(model, new, prompts)
    fresh = sample(tiny_gpt2(seed=5)[0], tree_map(torch.clone, new), prompts)
    assert rows(changed) == rows(fresh) != rows(before)
    assert rows(sample(model, old, prompts)) == rows(before)


def test_another_seed_or_sample_index_gives_another_response() -> None:
    model, params = tiny_gpt2()
    prompts = [[4, 5, 6]] * 16
    same = torch.zeros(16, dtype=torch.int64)
    equal = rows(sample(model, params, prompts, prompt_index=same))
    assert all(row == equal[0] for row in equal), "equal indices: equal uniforms"
    by_sample = rows(sample(model, params, prompts, prompt_index=same, sample_index=torch.arange(16)))
    assert by_sample[0] == equal[0] and len({tuple(row) for row in by_sample}) > 10
    assert rows(sample(model, params, prompts, prompt_index=same, seed=4)) != equal


def test_a_rollout_is_ordinary_data_for_autograd() -> None:
    model, params = tiny_gpt2()
    trained = tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    rollout = sample(model, trained, [[1, 2], [3]])
    assert not any(field.requires_grad or field.is_inference() for field in rollout[:-1])
    loss = (model.hidden(trained, rollout.tokens)[..., 0] * rollout.logp).sum()
    loss.backward()
    assert trained["wte"]["weight"].grad is not None


def test_parameters_in_bf16_give_fp32_log_probs_of_their_own_law() -> None:
    model, params = tiny_gpt2()
    half = tree_map(lambda leaf: leaf.bfloat16(), params)
    rollout = sample(model, half, [[1, 2], [3]])
    assert rollout.logp.dtype == rollout.sampled_logp.dtype == torch.float32
    assert torch.isfinite(rollout.logp).all()


BAD_REQUESTS = [
    ({"prompts": []}, "no prompts to sample from"),
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    (
        {"prompts": [[1], [2] * 37]},
        "prompt 1 has 37 tokens; with max_new_tokens 12 that exceeds the context of 48",
    ),
    ({"prompts": [[1], [2, 31]]}, r"prompt 1 has ids 2 .. 31, outside the vocabulary of 31"),
    ({"prompts": [[-1, 3]]}, r"prompt 0 has ids -1 .. 3"),
    ({"stop_ids": [0, 31]}, "stop id 31 is outside the vocabulary of 31"),
    ({"stop_ids": [-1]}, "stop id -1 is outside"),
]
BAD_CALLS = [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"slots": 0}, "slots must be at least 1, got 0"),
    ({"prompt_index": torch.arange(3)}, r"prompt_index must have shape \[2\], got \[3\]"),
    (
        {"sample_index": torch.zeros(2, 1, dtype=torch.int64)},
        r"sample_index must have shape \[2\], got \[2, 1\]",
    ),
    ({"prompt_index": torch.tensor([0, -1])}, "prompt_index must lie in"),
    ({"seed": -1}, "seed must lie in"),
]


@pytest.mark.parametrize(
    ("changed", "message", "kind"),
    [(*bad, InputError) for bad in BAD_REQUESTS] + [(*bad, ValueError) for bad in BAD_CALLS],
)
def test_a_bad_request_is_refused_by_name_before_any_work(changed, message, kind) -> None:
    model, params = tiny_gpt2()

    def never(*_):
        raise AssertionError("the model was run")

    idle = model._replace(states=never)
    request = {"prompts": [[1], [2, 3]]} | changed
    with pytest.raises(kind, match=message):
        sample(idle, params, **request)


def test_a_law_that_is_not_normalised_or_not_finite_is_refused_on_the_first_step() -> None:
    model, params = tiny_gpt2()
    with pytest.raises(ValueError, match="law must give normalised log-probs"):
        sample(model, params, [[1, 2]], law=lambda logits: logits)
    broken = tree_map(lambda leaf: leaf * torch.nan, params)
    with pytest.raises(ValueError, match="logsumexp is off by nan"):
        sample(model, broken, [[1, 2]])


def test_the_default_number_of_slots_shrinks_as_rows_grow_and_what_fits_not_once_is_refused() -> None:
    model, params = tiny_gpt2(context=40_000)
    slots = [default_slots(model, params, longest, 100) for longest in (10, 1000, 5000, 30_000)]
    assert slots == sorted(slots, reverse=True) and len(set(slots)) > 2 and slots[-1] >= 1
    with pytest.raises(InputError, match=r"one row of 30000 \+ 100 tokens takes .* memory is 1,000"):
        default_slots(model, params, 30_000, 100, memory=1000)
    with pytest.raises(InputError, match="one row of 2 \\+ 12 tokens"):
        sample(model, params, [[1, 2]], memory=100)


def test_generate_takes_every_argument_of_the_law_by_partial() -> None:
    model, params = tiny_gpt2()
    law = partial(sampling_law, temperature=0.3, top_k=1)
    index = torch.arange(2)
    rollout = generate(
        model,
        params,
        [[1, 2], [3]],
        law=law,
        max_new_tokens=5,
        stop_ids=[0],
        seed=0,
        prompt_index=index,
        sample_index=index,
    )
    assert rows(rollout) == rows(sample(model, params, [[1, 2], [3]], law=greedy_law, max_new_tokens=5))
