"""Log-probs of tokens with both gradients: fused beside what one would use instead. Table, picture, JSON.

    python benchmarks/logprobs.py                       GPT-2's vocabulary and width, on the CPU
    python benchmarks/logprobs.py --device cuda --dtype bfloat16

One run is: log π(token) of every token under the mask from states [N, D] and unembedding [V, D], and the
gradients of their weighted sum by both. Every measurement has a process of its own, so that each has its own
peak of memory: what is resident at most, less what the inputs took. Runs: one that is not counted, then
`--times`; the median counts.
"""

import dataclasses
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from harness import forget_peak, head, in_a_process, peak, record_of, save, version, worker_arguments
from machine import clock, measure
from rich.console import Console
from torch import Tensor

from minirlhf.kernels import fused, passes
from minirlhf.runs import keep_freed_memory

HERE = Path(__file__).resolve().parent
LogProbs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(states [N, D], unembedding [V, D], ids [N], mask [N]) -> log-probs [N], 0 where masked."""


@dataclass(frozen=True)
class Options:
    """Compares ways to get the log-probs of tokens."""

    rows: tuple[int, ...] = (512, 2048, 4096, 8192)
    """Tokens, N."""
    masked: tuple[float, ...] = (0.0, 0.5)
    """Share of them that does not count."""
    vocabulary: int = 50257
    width: int = 768
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    times: int = 3
    """Counted runs of each."""
    out: Path = HERE / "results"
    """Where the table, the picture and the JSON go."""
    name: str = "logprobs-" + platform.node()
    """Their name."""


def minirlhf(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return fused.log_prob(states, unembedding, ids, mask, 1.0, entropy=False)[0]


def minirlhf_kept(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """With as much memory as the logits need."""
    passes.KEPT = 2**40
    return minirlhf(states, unembedding, ids, mask)


def naive(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logp = torch.log_softmax((states @ unembedding.T).float(), dim=-1)
    return torch.where(mask, logp.gather(1, ids[:, None])[:, 0], 0.0)


def cross_entropy(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    ids = torch.where(mask, ids, -100)
    return -F.cross_entropy((states @ unembedding.T).float(), ids, reduction="none", ignore_index=-100)


def trl(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logp = import_module("trl.trainer.utils").selective_log_softmax(states @ unembedding.T, ids)
    return torch.where(mask, logp, 0.0)


def liger(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(unembedding, states, torch.where(mask, ids, -100))


def cut_cross_entropy(states: Tensor, unembedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return -loss(states, unembedding, torch.where(mask, ids, -100), reduction="none")


SYSTEMS: dict[str, LogProbs] = {
    "naive": naive,
    "F.cross_entropy": cross_entropy,
    "TRL": trl,
    "minirlhf": minirlhf,
    "minirlhf, logits kept": minirlhf_kept,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
NEEDS = {"TRL": "trl", "Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
CUDA_ONLY = ("Liger", "cut-cross-entropy")


def main(options: Options) -> None:
    """Measures, prints the table, writes all three."""
    console, results = Console(), []
    names = [name for name in SYSTEMS if _can_run(name, options, console)]
    for rows in options.rows:
        for masked in options.masked:
            for name in names:  # innermost, so that what is compared runs within seconds
                labels = {"system": name, "rows": rows, "masked": masked}
                got = in_a_process(
                    __file__, [name, rows, masked, dataclasses.asdict(options) | {"out": ""}], labels
                )
                results.append(got)
                said = got.get("failed") or f"{got['seconds']:.2f} s, {got['extra_mb']:.0f} MB"
                console.print(f"{rows:5d} tokens, {masked:.0%} masked, {name}: {said}")
    record = record_of(options, ("torch", *NEEDS.values()), results)
    save(record, report(record), options.out, options.name)
    console.print(report(record), markup=False)
    from logprobs_picture import draw

    draw(record, options.out / f"{options.name}.png")


def report(record: dict[str, Any]) -> str:
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
        base = next(
            other
            for other in record["results"]
            if (other["rows"], other["masked"], other["system"]) == (each["rows"], each["masked"], "naive")
        )
        low, high = each["spread"]
        lines.append(
            row
            + f"{each['seconds']:.2f} [{low:.2f}, {high:.2f}] | {each['seconds'] / base['seconds']:.2f} | "
            f"{each['extra_mb']:.0f} | {each['extra_mb'] / base['extra_mb']:.2f} | {each['of_limit']:.0%} |"
        )
    return "\n".join(lines) + "\n"


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

    def loss(states: Tensor, unembedding: Tensor) -> Tensor:
        return (SYSTEMS[name](states, unembedding, ids, mask) * weight).sum()

    def run() -> float:
        start = clock(device)
        leaves = [each.requires_grad_() for each in (states.detach(), unembedding.detach())]
        torch.autograd.grad(loss(*leaves), leaves)
        return clock(device) - start

    tiny = torch.ones(2, options.width, device=device, dtype=dtype)  # imports and builds are not its memory
    SYSTEMS[name](tiny, unembedding[:16], ids[:2] % 16, mask[:2])
    before = forget_peak() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    run()
    extra = (peak() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)) - before
    seconds = sorted(run() for _ in range(options.times))
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


def _can_run(name: str, options: Options, console: Console) -> bool:
    if name in CUDA_ONLY and options.device == "cpu":
        console.print(f"{name}: needs CUDA, left out")
        return False
    if name in NEEDS and version(NEEDS[name]) is None:
        console.print(f"{name}: {NEEDS[name]} is not installed, left out")
        return False
    return True


if __name__ == "__main__":
    import json

    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
