"""What a machine can do at most, measured where the benchmark runs: matrix products, and reading memory."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Named:
    """name: processor or GPU. threads: of torch. dtype: what is computed in."""

    name: str
    threads: int
    dtype: str


@dataclass(frozen=True)
class Machine(Named):
    """With its limits. gflops: of a large matrix product in `dtype`. gbytes: per second, read."""

    gflops: float
    gbytes: float


def named(device: torch.device, dtype: torch.dtype) -> Named:
    """The machine that this process runs on."""
    return Named(_name(device), torch.get_num_threads(), str(dtype).removeprefix("torch."))


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Best of several: the limits are what the machine can do when nothing disturbs it."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    many = torch.randn(2**26 if device.type == "cpu" else 2**29, device=device)
    product = best_of(lambda: a @ a, device)
    reading = best_of(lambda: many.sum(), device)
    return Machine(
        **vars(named(device, dtype)),
        gflops=2 * size**3 / product / 1e9,
        gbytes=many.nbytes / reading / 1e9,
    )


def best_of(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """Seconds of the fastest of `times` runs, after two that are not counted."""
    fastest = float("inf")
    for number in range(times + 2):
        start = clock(device)
        work()
        if number >= 2:
            fastest = min(fastest, clock(device) - start)
    return fastest


def clock(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            line = next(line for line in file if line.startswith("model name"))
        return line.split(":")[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
