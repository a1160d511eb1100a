"""One device name in, one device or one clear line out."""

import pytest
import torch

from minirlhf.data.records import collate
from minirlhf.runs import InputError
from minirlhf.training.device import device_of, move, resolve


def devices(monkeypatch: pytest.MonkeyPatch, *, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    "cuda,mps,expected", [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda"), (1, True, "cuda")]
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    devices(monkeypatch, cuda=cuda, mps=mps)
    assert resolve("auto") == torch.device(expected)


def test_a_device_is_taken_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, cuda=2, mps=True)
    assert [str(resolve(name)) for name in ("cpu", "cuda", "cuda:1", "mps")] == [
        "cpu",
        "cuda",
        "cuda:1",
        "mps",
    ]


@pytest.mark.parametrize(
    "name,complaint",
    [
        ("gpu", "expected --device auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("cuda:x", "expected --device auto, cpu, cuda, cuda:N or mps, got 'cuda:x'"),
        ("cuda:2", "--device cuda:2: this machine has 2 CUDA devices"),
        ("mps", "--device mps: this machine or this build of torch has none; try --device auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    devices(monkeypatch, cuda=2, mps=False)
    with pytest.raises(InputError) as error:
        resolve(name)
    assert str(error.value) == complaint


def test_records_and_parameters_move_whole_and_keep_their_type() -> None:
    batch = collate([([1, 2], [3])])
    moved = move(batch, torch.device("meta"))
    assert type(moved) is type(batch) and all(tensor.device.type == "meta" for tensor in moved)
    assert move(batch, torch.device("cpu")).tokens is batch.tokens
    assert move({"w": [batch.tokens], "n": 3}, torch.device("meta"))["n"] == 3
    assert device_of({"h": [{"bias": torch.zeros(1)}]}) == torch.device("cpu")
