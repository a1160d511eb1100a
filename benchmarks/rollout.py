"""Rollout throughput of GPT-2 124M: minirlhf beside what one would use instead. One table, one picture, JSON.

    python benchmarks/rollout.py                        all systems that are installed, on the CPU
    python benchmarks/rollout.py --device cuda --dtype bfloat16 --batches 64 256
    python benchmarks/rollout.py --systems minirlhf transformers --workloads equal --batches 8 32

Every system runs in a process of its own, one after the other, so that each has its own peak of memory. In
every process the machine's limits are measured as well. Runs: one that is not counted (of the skewed workload
a part), then `--times`; the median counts, the spread is that of the fastest to the slowest. Weights are
random, of GPT-2's sizes.
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
    in_a_process,
    installed,
    peak,
    worker_arguments,
)
from machine import Machine, measure
from record import Benchmark, Output, Record, Row, head, run
from rollout_account import account
from rollout_systems import ACCOUNTED, SYSTEMS, Cost, Subject
from torch.utils._pytree import tree_map
from workloads import WORKLOADS, Workload, beginning, flops, gpt2_124m, weight_bytes

from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.runs import keep_freed_memory
from minirlhf.training.device import move

NEEDS = {"transformers": "transformers", "CTranslate2": "ctranslate2", "vLLM": "vllm"}
# Refilling is of no use to one batch; a static cache would be compiled for every length of a prompt.
NOT_FOR = {"equal": ("minirlhf, no refill",), "skewed": ("transformers, static",)}


@dataclass(frozen=True)
class Options(Output):
    """Compares systems that sample from GPT-2 124M."""

    name: str = "rollout-" + platform.node()
    """Their name."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which ones; those that are not installed are left out, which is said."""
    workloads: tuple[Literal["equal", "skewed"], ...] = ("equal", "skewed")
    """equal: 64 + 64 tokens. skewed: 256 prompts of 8-128, responses geometric of mean 48, at most 256."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Rows at a time, in the equal workload."""
    skewed_batches: tuple[int, ...] = (32,)
    """Rows at a time, in the skewed one: transformers takes minutes for each run of it."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and cache."""
    times: int = 3
    """Counted runs of each."""


def main(options: Options) -> None:
    """Measures, prints the table, writes all three."""
    check_place(options.device)
    check_names("--systems", options.systems, SYSTEMS)
    check_counts(options, "batches", "skewed_batches", "times")
    benchmark = Benchmark(
        packages=("torch", *NEEDS.values()),
        report=report,
        said=_said,
        picture="rollout_picture",
        choices=("systems", "workloads", "batches", "skewed_batches"),
    )
    run(options, _rows(options), benchmark)


def _rows(options: Options) -> Iterator[Row]:
    names = [name for name in options.systems if installed(name, _package(name))]
    for kind in options.workloads:
        for batch in options.batches if kind == "equal" else options.skewed_batches:
            for name in names:  # innermost, so that what is compared runs within minutes
                if name in NOT_FOR[kind]:
                    continue
                given = [name, kind, batch, options.device, options.dtype, options.times]
                labels = {"system": name, "workload": kind, "batch": batch}
                yield Row(labels, partial(in_a_process, __file__, given))


def _package(name: str) -> str | None:
    return next((NEEDS[start] for start in NEEDS if name.startswith(start)), None)


def _said(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:.0f} tokens/s"


def report(record: Record) -> str:
    """The table, as Markdown."""
    lines = [
        *head(
            "Rollout throughput",
            record,
            "tokens/s: generated, median of the runs [slowest, fastest]. products: the flops that prompts "
            "and new tokens need, by time and the rate of a large product in the same process. reading: "
            "bytes of weights that decode steps read, likewise. KV: pages in use per live token, in bytes, "
            "when fullest. prefill: passes that read prompts, beside which live rows may decode. first run: "
            "the one that is not counted; where something is compiled, in it.",
        ),
        "| workload | batch | system | tokens/s | runs | prefill s | decode s | packing s | first run s "
        "| products | reading | peak MB | KV |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in sorted(record["results"], key=lambda each: (each["workload"], each["batch"])):
        row = f"| {each['workload']} | {each['batch']} | {each['system']} | "
        if "failed" in each:
            lines.append(row + f"{each['failed']} | | | | | | | | | |")
            continue
        low, high = each["spread"]
        known = each["workload"] == "equal" or each["system"].startswith("minirlhf")
        seconds = f"{each['prefill']:.2f} | {each['decode']:.2f}" if known else "|"
        cache = "" if each["cache"] is None else f"{each['cache']:.2f}"
        eight = "int8" in each["system"]  # it reads other bytes
        reading = "" if eight or each["of_reading"] is None else f"{each['of_reading']:.0%}"
        lines.append(
            row + f"{each['tokens_per_second']:.0f} [{low:.0f}, {high:.0f}] | {each['runs']} | {seconds} | "
            f"{each['once']:.2f} | {each['first']:.1f} | {each['of_products']:.0%} | {reading} | "
            f"{each['peak_mb']:.0f} | {cache} |"
        )
    for each in record["results"]:
        if each.get("account"):
            lines += ["", *_account(each)]
    return "\n".join(lines) + "\n"


def _account(result: dict[str, Any]) -> list[str]:
    lines = [
        f"A decode step of {result['system']} at batch {result['batch']}, in ms, and what its flops and "
        "bytes would take at the machine's limits:",
        "",
        "| part | ms | flops | bytes |",
        "|---|--:|--:|--:|",
    ]
    for row in result["account"]:
        bounds = [f"{row[key]:.1f}" if row[key] else "" for key in ("flops_ms", "bytes_ms")]
        lines.append(f"| {row['part']} | {row['ms']:.1f} | {bounds[0]} | {bounds[1]} |")
    return lines


def worker(name: str, kind: str, batch: int, device_name: str, dtype: str, times: int) -> dict[str, Any]:
    """One system on one workload, in this process."""
    keep_freed_memory()
    device, precision = torch.device(device_name), getattr(torch, dtype)
    config = gpt2_124m()
    model = gpt2.bind(config)
    params = model.init(torch.Generator().manual_seed(0))
    params = move(tree_map(lambda leaf: leaf.to(precision), params), device)
    machine = measure(device, precision)
    workload = WORKLOADS[kind](config, batch)
    run = SYSTEMS[name](Subject(model, params, device))
    first = run(workload if kind == "equal" else beginning(workload))
    costs = sorted((run(workload) for _ in range(times)), key=lambda cost: cost.seconds)
    middle = costs[len(costs) // 2]
    rate = workload.tokens / statistics.median(cost.seconds for cost in costs)
    most = peak() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    return {
        "runs": times,
        "tokens": workload.tokens,
        "tokens_per_second": rate,
        "spread": [workload.tokens / costs[-1].seconds, workload.tokens / costs[0].seconds],
        "prefill": middle.prefill,
        "decode": middle.decode,
        "once": middle.once,
        "first": first.seconds,
        "cache": middle.cache,
        "of_products": flops(model, params, workload) / middle.seconds / machine.gflops / 1e9,
        "of_reading": None if kind == "skewed" else _of_reading(model, params, workload, middle, machine),
        "peak_mb": most / 2**20,
        "machine": dataclasses.asdict(machine),
        "account": account(model, params, workload, ACCOUNTED[name], machine)
        if name in ACCOUNTED and kind == "equal" and batch > 1 and device.type == "cpu"
        else None,
    }


def _of_reading(
    model: LanguageModel, params: Params, workload: Workload, cost: Cost, machine: Machine
) -> float:
    """Of the rate of reading: the weights, once for every decode step."""
    size = weight_bytes(model, params) * (workload.new[0] - 1)
    return size / cost.decode / machine.gbytes / 1e9


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
