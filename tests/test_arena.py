"""The arena hands out memory that is nobody else's, and takes hardly more than is in use at once."""

import os
import subprocess
import sys

import pytest

_START = """
import random, sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from minirlhf.runs.arena import use_arena
used = use_arena() if sys.argv[1] == "arena" else None
"""
_OWN = (
    _START
    + """
def work(seed):
    draw, held = random.Random(seed), []
    for number in range(300):
        size = draw.choice([1, 2**10, 2**18, 2**18 + 1, 2**19, 3 * 2**19])
        held.append((number + 1000 * seed, torch.full((size,), number + 1000 * seed, dtype=torch.int32)))
        while len(held) > draw.randrange(1, 20):
            told, tensor = held.pop(draw.randrange(len(held)))
            low, high = tensor.aminmax()
            assert low == high == told, (told, low, high)
early = torch.ones(2**20)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
early.untyped_storage().resize_(2**23)
assert float(early.sum()) == 2**20
print(used)
"""
)
# Steps: each layer leaves activations, which go as its gradients come; these go in the end. Megabytes.
_PEAK = (
    _START
    + """
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
def made(*sizes):
    return [torch.ones(int(size * 2**18)) for size in sizes]
before, most = peak(), 0
for _ in range(3):
    layers, gradients = [made(1.9, 7, 2.2, 1.9, 7.5) for _ in range(12)], made(60)
    while layers:
        passing = made(7.5, 7.5)
        gradients += made(9, 2.3)
        del passing[0]
        gradients += made(9, 7)
        layers.pop()
        live = sum(each.nbytes for part in (*layers, gradients, passing) for each in part)
        most = max(most, live)
    del gradients, passing
print((peak() - before) / most)
"""
)


def _run(code: str, mode: str = "arena", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, mode],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


needs_arena = pytest.mark.skipif(
    sys.platform != "linux" or _run(_START + "print(used)") != "True", reason="no Linux, or no C++ compiler"
)


@needs_arena
def test_no_tensor_is_written_to_by_another_in_any_thread() -> None:
    assert _run(_OWN) == "True"


@needs_arena
def test_the_process_takes_hardly_more_than_its_tensors_take_at_most() -> None:
    assert float(_run(_PEAK)) < 1.18


@pytest.mark.parametrize("environment", [{"MINIRLHF_KERNELS": "0"}, {"CXX": "/no/such/compiler"}])
def test_without_a_compiler_torch_allocates_as_ever(environment: dict[str, str]) -> None:
    assert _run(_OWN, **environment) == "False"
