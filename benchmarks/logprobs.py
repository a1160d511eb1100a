"""Log-probs of tokens with both gradients: fused beside what one would use instead. Table, picture, JSON.

    python benchmarks/logprobs.py                       GPT-2's vocabulary and width, on the CPU
    python benchmarks/logprobs.py --rows 8192 --systems naive minirlhf --add
    python benchmarks/logprobs.py --device cuda --dtype bfloat16

One run is: log π(token) of every token under the mask from states [N, D] and unembedding [V, D], and the
gradients of their weighted sum by both. Every measurement has a process of its own, so that each has its own
peak of memory: what is resident at most, less what the inputs took. Runs: one that is not counted, then
`--times`; the median counts. A system whose logits would not fit the memory that is there is not run, which
the table says. TRL's helper is `trl.trainer.utils.selective_log_softmax` of the TRL that is installed.
"""

import dataclasses
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from harness import (
    check_counts,
    check_names,
    check_place,
    for_worker,
    forget_peak,
    in_a_process,
    installed,
    peak,
    refuse,
    worker_arguments,
)
from logprobs_systems import SYSTEMS
from machine import clock, measure
from record import Benchmark, Output, Record, Row, head, run
from torch import Tensor

from minirlhf.runs import keep_freed_memory
from minirlhf.training.memory_plan import available

PACKAGES = ("torch", "trl", "liger_kernel", "cut_cross_entropy")


@dataclass(frozen=True)
class Options(Output):
    """Compares ways to get the log-probs of tokens."""

    name: str = "logprobs-" + platform.node()
    """Their name."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which ones; those that are not installed are left out, which is said."""
    rows: tuple[int, ...] = (512, 2048, 4096, 8192)
    """Tokens, N."""
    masked: tuple[float, ...] = (0.0, 0.5)
    """Share of them that does not count."""
    vocabulary: int = 50257
    """V."""
    width: int = 768
    """Of a state, D."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of states and unembedding."""
    times: int = 3
    """Counted runs of each."""


def main(options: Options) -> None:
    """Measures, prints the table, writes all three."""
    check_place(options.device)
    check_names("--systems", options.systems, SYSTEMS)
    check_counts(options, "rows", "vocabulary", "width", "times")
    if not options.masked or not all(0 <= share < 1 for share in options.masked):
        refuse(f"--masked: expected shares of at least 0 and below 1, got {options.masked}")
    benchmark = Benchmark(
        packages=PACKAGES,
        report=report,
        said=_said,
        picture="logprobs_picture",
        choices=("systems", "rows", "masked"),
    )
    run(options, _rows(options), benchmark)


def _rows(options: Options) -> Iterator[Row]:
    names = [name for name in options.systems if _can_run(name, options)]
    for rows in options.rows:
        for masked in options.masked:
            for name in names:  # innermost, so that what is compared runs within seconds
                given = [name, rows, masked, for_worker(options)]
                labels = {"system": name, "rows": rows, "masked": masked}
                yield Row(labels, partial(in_a_process, __file__, given))


def _can_run(name: str, options: Options) -> bool:
    system = SYSTEMS[name]
    if system.cuda_only and options.device == "cpu":
        print(f"{name}: needs CUDA, left out")
        return False
    return installed(name, system.needs)


def _said(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.2f} s, {row['extra_mb']:.0f} MB"


def report(record: Record) -> str:
    """The table, as Markdown."""
    lines = [
        *head(
            "Log-probs of tokens, with both gradients",
            record,
            "extra MB: resident at most, less the inputs. of limit: 6 N D V flops of the tokens that count, "
            "by time and the rate of a large product. time, memory: as multiples of naive's.",
        ),
        "| tokens | masked | system | s [fastest, slowest] | time | extra MB | memory | of limit |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for each in record["results"]:
        row = f"| {each['rows']} | {each['masked']:.0%} | {each['system']} | "
        if "failed" in each:
            lines.append(row + f"{each['failed']} | | | | |")
            continue
        (low, high), base = each["spread"], _naive(record, each)
        time, memory = (f"{each[key] / base[key]:.2f}" if base else "" for key in ("seconds", "extra_mb"))
        lines.append(
            row + f"{each['seconds']:.2f} [{low:.2f}, {high:.2f}] | {time} | {each['extra_mb']:.0f} | "
            f"{memory} | {each['of_limit']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _naive(record: Record, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row that this one is compared with, if it could be measured."""
    wanted = {"system": "naive", "rows": row["rows"], "masked": row["masked"]}
    found = (each for each in record["results"] if wanted.items() <= each.items())
    return next((each for each in found if "failed" not in each), None)


def worker(name: str, rows: int, masked: float, given: dict[str, Any]) -> dict[str, Any]:
    """One system on one size, in this process."""
    keep_freed_memory()
    options = Options(**given)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(rows, options.width, generator=draw).to(device, dtype)
    unembedding = (torch.randn(options.vocabulary, options.width, generator=draw) * 0.05).to(device, dtype)
    ids = torch.randint(options.vocabulary, (rows,), generator=draw).to(device)
    mask = (torch.rand(rows, generator=draw) >= masked).to(device)
    weight = torch.randn(rows, generator=draw).to(device)
    system = SYSTEMS[name]
    needed = 4 * system.held * rows * options.vocabulary + 2 * unembedding.nbytes
    there = available(device)
    if there is not None and needed > there:
        return {"failed": f"not run: needs about {needed / 1e9:.1f} GB, {there / 1e9:.1f} are available"}

    def loss(states: Tensor, unembedding: Tensor) -> Tensor:
        return (system.work(states, unembedding, ids, mask) * weight).sum()

    def once() -> float:
        start = clock(device)
        leaves = [each.requires_grad_() for each in (states.detach(), unembedding.detach())]
        torch.autograd.grad(loss(*leaves), leaves)
        return clock(device) - start

    tiny = torch.ones(2, options.width, device=device, dtype=dtype)  # imports and builds are not its memory
    system.work(tiny, unembedding[:16], ids[:2] % 16, mask[:2])
    before = forget_peak() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    once()
    extra = (peak() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)) - before
    seconds = sorted(once() for _ in range(options.times))
    median = statistics.median(seconds)
    flops = 6.0 * int(mask.sum()) * unembedding.numel()
    machine = measure(device, dtype)  # last: the memory it leaves behind would hide what a run takes
    return {
        "seconds": median,
        "spread": [seconds[0], seconds[-1]],
        "extra_mb": extra / 2**20,
        "of_limit": flops / median / machine.gflops / 1e9,
        "machine": dataclasses.asdict(machine),
    }


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
