"""Decode steps as a GPU does them, on a second device made of host memory: tests/second_device.py."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minirlhf.kernels import paged
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import greedy_law, sampling_law
from minirlhf.rollout import recorded
from minirlhf.rollout.pages import PAGE
from minirlhf.rollout.sampler import Rollout, generate, stream
from minirlhf.rollout.upload import Upload
from minirlhf.rollout.weights import int8
from tests.models.cases import CASES, Case, tiny_model
from tests.rollout import plain_paged
from tests.rollout.test_engine import SETS, a_model, text
from tests.second_device import Device, host, moved, second_device

PROMPTS = SETS["a common beginning and samples"]


@contextmanager
def a_gpu(*, record: recorded.Record | None = None) -> Iterator[Device]:
    """A second device that records steps; by `record`, if given. Its attention is the plain one."""
    with (
        second_device() as device,
        mock.patch.object(paged, "available", lambda where: where.type == "cuda"),
        mock.patch.object(paged, "attend", plain_paged.attend),
        mock.patch.object(recorded, "graph_on", lambda where: record or device.record),
    ):
        yield device


def draw(
    model: LanguageModel, params: Params, prompts: list[list[int]], *,
    law: Callable[[Tensor], Tensor] = sampling_law, limit: int = 40, slots: int | None = 5,
) -> Rollout:  # fmt: skip
    index = torch.arange(len(prompts))
    return generate(
        model, params, prompts, law=law, max_new_tokens=limit, stop_ids=[0, 5], seed=3,
        prompt_index=index, sample_index=index, slots=slots,
    )  # fmt: skip


def assert_same(there: Rollout, here: Rollout, rounding: float = 1e-5) -> None:
    torch.testing.assert_close(
        host(there)._replace(cache=None), here._replace(cache=None), rtol=0, atol=rounding
    )
    assert there.cache == here.cache


@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("slots", [2, 9])
def test_recorded_steps_draw_what_the_host_draws(prompts: list[list[int]], slots: int) -> None:
    model, params = a_model()
    here = draw(model, params, prompts, slots=slots)
    with a_gpu():
        there = draw(model, moved(params), prompts, slots=slots)
    assert_same(there, here)


@pytest.mark.parametrize(
    "law", [greedy_law, partial(sampling_law, temperature=0.7, top_k=9), partial(sampling_law, top_p=0.8)]
)
def test_every_law_is_recorded(law: Callable[[Tensor], Tensor]) -> None:
    model, params = a_model()
    here = draw(model, params, PROMPTS, law=law)
    with a_gpu(), warnings.catch_warnings(action="error"):
        assert_same(draw(model, moved(params), PROMPTS, law=law), here)


@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_every_family_is_recorded(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    prompts = [text(length, seed=length) for length in (1, 4, 8, 9)]
    here = draw(model, params, prompts, limit=10, slots=3)
    with a_gpu(), warnings.catch_warnings(action="error"):
        assert_same(draw(model, moved(params), prompts, limit=10, slots=3), here)


def test_without_the_kernel_a_gpu_goes_page_by_page() -> None:
    model, params = a_model()
    here = draw(model, params, PROMPTS)
    with second_device():
        assert_same(draw(model, moved(params), PROMPTS), here)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(mock.Mock(side_effect=OSError("no C compiler\nlong")), "OSError: no C compiler$"),
     (mock.Mock(return_value=False), "its result is wrong")],
)  # fmt: skip
def test_a_kernel_that_fails_is_said_and_not_used(answer: mock.Mock, reason: str) -> None:
    here = torch.device("cuda:7")
    paged.available.cache_clear()
    with (
        mock.patch.object(paged.importlib.util, "find_spec", lambda name: object()),
        mock.patch.object(paged, "knows_a_mean", answer),
    ):
        with pytest.warns(RuntimeWarning, match=f"goes without its Triton kernel, slower: {reason}"):
            assert not paged.available(here)
        assert not paged.available(here) and not paged.available(torch.device("cpu"))
        answer.assert_called_once_with(here)
    paged.available.cache_clear()


def test_a_decode_step_is_one_copy_to_the_device_and_one_back() -> None:
    model, params = a_model()

    def copies(limit: int) -> tuple[int, int]:
        with a_gpu() as device:
            weights = moved(params)
            before = device.count("to device"), device.count("to host"), device.count("index")
            index = torch.arange(8)
            generate(
                model, weights, [text(5)] * 8, law=sampling_law, max_new_tokens=limit, stop_ids=[], seed=0,
                prompt_index=index, sample_index=index, slots=8,
            )  # fmt: skip
        after = device.count("to device"), device.count("to host"), device.count("index")
        assert after[2] == before[2]
        return after[0] - before[0], after[1] - before[1]

    short, long = copies(10), copies(30)
    assert (long[0] - short[0], long[1] - short[1]) == (20, 20)


def test_graphs_are_recorded_once_for_each_number_of_rows() -> None:
    model, params = a_model()
    recordings: list[int] = []
    with a_gpu() as device:

        def record(step: Callable[[], recorded.Drawn]) -> tuple[recorded.Drawn, Callable[[], None]]:
            out, replay = device.record(step)
            recordings.append(len(out.token))
            return out, replay

        limits = [3 + 2 * row for row in range(17)]
        index = torch.arange(17)
        with mock.patch.object(recorded, "graph_on", lambda where: record):
            rollout = generate(
                model, moved(params), [text(4)] * 17, law=sampling_law, max_new_tokens=limits, stop_ids=[],
                seed=0, prompt_index=index, sample_index=index, slots=17,
            )  # fmt: skip
    assert recordings == [17, 4] and host(rollout).lengths.tolist() == [4 + limit for limit in limits]


def test_parameters_that_change_between_calls_are_the_ones_that_are_used() -> None:
    model, params = a_model()
    other = tree_map(lambda leaf: leaf.flip(-1), params)
    with a_gpu():
        weights = moved(params)
        first = draw(model, weights, PROMPTS)
        tree_map(lambda old, new: old.copy_(new), weights, moved(other))  # in place, as an optimiser may
        second = draw(model, weights, PROMPTS)
    assert_same(first, draw(model, params, PROMPTS))
    assert_same(second, draw(model, other, PROMPTS))


def test_after_a_call_its_cache_is_gone_at_once() -> None:
    model, params = a_model()
    kept: list[weakref.ref[object]] = []
    make = recorded.RecordingEngine.__init__

    def noted(engine: recorded.RecordingEngine, *given: Any, **named: Any) -> None:
        make(engine, *given, **named)
        kept.append(weakref.ref(engine.cache))

    gc.disable()  # reference counts alone, as on a GPU whose memory fills up before Python looks for circles
    try:
        with a_gpu(), mock.patch.object(recorded.RecordingEngine, "__init__", noted):
            draw(model, moved(params), PROMPTS)
        assert [each() for each in kept] == [None]
    finally:
        gc.enable()


def test_a_law_that_looks_at_numbers_is_said_and_drawn_from_without_a_graph() -> None:
    def looking(logits: Tensor) -> Tensor:
        return sampling_law(logits, temperature=1.0 if bool(logits.max() > 0) else 1.0)

    model, params = a_model()
    with a_gpu(), pytest.warns(RuntimeWarning, match="decode steps are not recorded.*not permitted") as said:
        there = draw(model, moved(params), PROMPTS, law=looking)
    assert_same(there, draw(model, params, PROMPTS))
    assert len(said) == 1


def test_a_graph_that_draws_other_tokens_is_not_used() -> None:
    written: list[tuple[Tensor, paged.Reads]] = []

    def attend(keys: list[Tensor], values: list[Tensor], reads: paged.Reads, *qkv: Any, **how: Any) -> Tensor:
        written.append((keys[-1], reads))
        return plain_paged.attend(keys, values, reads, *qkv, **how)

    def record(step: Callable[[], recorded.Drawn]) -> tuple[recorded.Drawn, Callable[[], None]]:
        out = step()

        def replay() -> None:
            out.token.add_(1)
            keys, reads = written[-1]
            keys[reads.into, :, reads.position % PAGE] = 7.0

        return out, replay

    model, params = a_model()
    with (
        a_gpu(record=record),
        mock.patch.object(paged, "attend", attend),
        pytest.warns(RuntimeWarning, match="replayed, one drew other tokens"),
    ):
        there = draw(model, moved(params), PROMPTS)
    assert_same(there, draw(model, params, PROMPTS))


def test_a_stream_gives_recorded_responses() -> None:
    model, params = a_model()
    here, index = draw(model, params, PROMPTS), torch.arange(len(PROMPTS))
    with a_gpu():
        finished = list(
            stream(
                model, moved(params), PROMPTS, law=sampling_law, max_new_tokens=40, stop_ids=[0, 5], seed=3,
                prompt_index=index, sample_index=index, slots=4,
            )
        )  # fmt: skip
    for each in finished:
        start, end = int(here.prompt_lengths[each.prompt]), int(here.lengths[each.prompt])
        assert host(each.tokens).tolist() == here.tokens[each.prompt, start:end].tolist()
    assert sorted(each.prompt for each in finished) == index.tolist()


def test_what_is_sent_is_what_is_said() -> None:
    upload = Upload(4, 6, torch.device("cpu"))
    columns = {"position": [7, 40], "into": [2, 5], "row": [11, 12], "drawn": [0, 3]}
    entries = {"first": [0, 1, 3], "arena": [1, 0, 1], "at": [2, 0, 5], "start": [0, 0, PAGE]}
    numbers = {name: np.array(values) for name, values in columns.items()}
    table = {name: np.array(values) for name, values in entries.items()}
    for _ in range(2):  # what an earlier step has left says nothing
        upload.send(table, **numbers, uniform=np.array([0.25, 0.75]))  # pyright: ignore[reportArgumentType]
        said = upload.said(3)
        assert said.reads.position.tolist() == [7, 40, -1] and said.reads.first.tolist() == [0, 1, 3, 3]
        assert said.reads.entries[:3].tolist() == [[1, 2, 0], [0, 0, 0], [1, 5, PAGE]]
        assert said.reads.into[:2].tolist() == [2, 5] and said.where[:, :2].tolist() == [[11, 12], [0, 3]]
        assert said.uniform[:2].tolist() == [0.25, 0.75]
        three = {name: np.append(values, 1) for name, values in numbers.items()}
        wide = {name: np.append(values, 3 if name == "first" else 0) for name, values in table.items()}
        upload.send(wide, **three, uniform=np.ones(3) / 2)  # pyright: ignore[reportArgumentType]


def test_8_bit_weights_are_recorded() -> None:
    model, params = tiny_model(CASES[0], dtype=torch.float32)
    large = tree_map(lambda leaf: leaf, params)
    index = torch.arange(3)

    def run(given: Params) -> Rollout:
        return generate(
            model, given, [[1, 2], [3], [4, 5, 6]], law=sampling_law, max_new_tokens=8, stop_ids=[], seed=1,
            prompt_index=index, sample_index=index, slots=3, weights=int8,
        )  # fmt: skip

    with mock.patch("minirlhf.rollout.weights._SMALLEST", 1500):  # more than the embedding has
        here = run(large)
        with a_gpu(), warnings.catch_warnings(action="error"):
            there = run(moved(large))
    assert_same(there, here, rounding=1e-4)
