"""Rollout throughput of GPT-2 124M: minirlhf beside what one would use instead. One table, one picture, JSON.

    python benchmarks/rollout.py                        all systems that are installed, on the CPU
    python benchmarks/rollout.py --device cuda --dtype bfloat16 --batches 64 256
    python benchmarks/rollout.py --systems minirlhf transformers --workloads equal --batches 8 32

Every system runs in a process of its own, one after the other, so that each has its own peak of memory. In
every process the machine's limits are measured as well. Runs: one that is not counted, then `--times`; the
median counts, the spread is that of the fastest to the slowest. Weights are random, of GPT-2's sizes.
"""

import dataclasses
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import measure
from rich.console import Console
from rollout_systems import SYSTEMS, Subject
from torch.utils._pytree import tree_map
from workloads import WORKLOADS, flops_per_token, gpt2_124m

from minirlhf.models import gpt2
from minirlhf.runs import keep_freed_memory, write_text_atomic
from minirlhf.training.device import move

HERE = Path(__file__).resolve().parent
NEEDS = {"transformers": "transformers", "CTranslate2": "ctranslate2"}


@dataclass(frozen=True)
class Options:
    """Compares systems that sample from GPT-2 124M."""

    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which ones; those that are not installed are left out, which is said."""
    workloads: tuple[Literal["equal", "skewed"], ...] = ("equal", "skewed")
    """equal: 64 + 64 tokens. skewed: 256 prompts of 8-128, responses geometric of mean 48, at most 256."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Rows at a time. The skewed workload runs with those of at least 8."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and cache."""
    times: int = 3
    """Counted runs of each."""
    out: Path = HERE / "results"
    """Where the table, the picture and the JSON go."""
    name: str = "rollout-" + platform.node()
    """Their name."""


def main(options: Options) -> None:
    """Measures, prints the table, writes all three."""
    console, results = Console(), []
    for name in options.systems:
        package = next((NEEDS[start] for start in NEEDS if name.startswith(start)), None)
        if package is not None and not _version(package):
            console.print(f"{name}: {package} is not installed, left out")
            continue
        for kind in options.workloads:
            for batch in options.batches:
                if kind == "skewed" and batch < 8 or kind == "equal" and "no refill" in name:
                    continue
                started = time.perf_counter()
                got = _in_a_process(name, kind, batch, options)
                results.append(got)
                said = got.get("failed") or f"{got['tokens_per_second']:.0f} tokens/s"
                console.print(f"{kind} {batch:4d} {name}: {said} ({time.perf_counter() - started:.0f} s)")
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {each: _version(each) for each in ("torch", "transformers", "ctranslate2")},
        "python": platform.python_version(),
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.out / f"{options.name}.json", json.dumps(record, indent=1) + "\n")
    text = report(record)
    write_text_atomic(options.out / f"{options.name}.md", text)
    console.print(text, markup=False)
    from rollout_picture import draw

    draw(record, options.out / f"{options.name}.png")


def report(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    lines = [
        f"# Rollout throughput, {record['date']}",
        "",
        f"{record['results'][0]['machine']['name']}, {record['results'][0]['machine']['threads']} threads, "
        f"{record['options']['dtype']}; {record['versions']}.",
        "",
        "tokens/s: generated, median of counted runs [slowest, fastest]. of limit: of the rate of a "
        "large matrix product. KV: bytes of pages in use per byte of live tokens, when fullest.",
        "",
        "| workload | batch | system | tokens/s | prefill s | decode s | once s | of limit | peak MB | KV |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in sorted(record["results"], key=lambda each: (each["workload"], each["batch"])):
        head = f"| {each['workload']} | {each['batch']} | {each['system']} | "
        if "failed" in each:
            lines.append(head + f"{each['failed']} | | | | | | |")
            continue
        low, high = each["spread"]
        seconds = f"{each['prefill']:.2f} | {each['decode']:.2f} | {each['once']:.2f}"
        cache = "" if each["cache"] is None else f"{each['cache']:.2f}"
        lines.append(
            head + f"{each['tokens_per_second']:.0f} [{low:.0f}, {high:.0f}] | {seconds} | "
            f"{each['of_limit']:.0%} | {each['peak_mb']:.0f} | {cache} |"
        )
    return "\n".join(lines) + "\n"


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
    run(workload)
    costs = sorted((run(workload) for _ in range(times)), key=lambda cost: cost.seconds)
    middle = costs[len(costs) // 2]
    rate = workload.tokens / statistics.median(cost.seconds for cost in costs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "system": name,
        "workload": kind,
        "batch": batch,
        "tokens": workload.tokens,
        "tokens_per_second": rate,
        "spread": [workload.tokens / costs[-1].seconds, workload.tokens / costs[0].seconds],
        "prefill": middle.prefill,
        "decode": middle.decode,
        "once": middle.once,
        "cache": middle.cache,
        "of_limit": rate * flops_per_token(model, params) / machine.gflops / 1e9,
        "peak_mb": peak,
        "machine": dataclasses.asdict(machine),
    }


def _in_a_process(name: str, kind: str, batch: int, options: Options) -> dict[str, Any]:
    given = [name, kind, batch, options.device, options.dtype, options.times]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(given)], capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"system": name, "workload": kind, "batch": batch, "failed": f"failed: {last[0][:100]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options, description=__doc__))
