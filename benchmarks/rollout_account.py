"""Where a decode step's time goes: each part beside what its flops and bytes would take at the limits."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from machine import Machine
from torch.utils._pytree import tree_leaves
from workloads import Workload

from minirlhf.kernels import cpu
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout import engine, weights
from minirlhf.rollout.sampler import generate


def account(
    model: LanguageModel, params: Params, workload: Workload, kind: weights.Weights, machine: Machine
) -> list[dict[str, Any]]:
    """Milliseconds of each part of a step on a CPU, with the least that arithmetic and memory allow.

    The kernels are timed from outside, so a part contains what calling it costs. Steps are counted from the
    17th on, when nothing is new to the memory any more.
    """
    spent, parts = defaultdict[str, float](float), _wrapped(kind)
    marks: list[tuple[float, dict[str, float]]] = []

    def mark(_: int) -> None:
        marks.append((time.perf_counter(), dict(spent)))

    for (owner, name), label in parts.items():
        _time(owner, name, label, spent)
    index = torch.arange(len(workload.prompts))
    generate(
        model, params, workload.prompts, law=sampling_law, max_new_tokens=workload.new, stop_ids=[], seed=0,
        prompt_index=index, sample_index=index, slots=workload.batch, weights=kind, progress=mark,
    )  # fmt: skip
    first, last = marks[16], marks[-1]
    steps = len(marks) - 17
    rows = [
        {"part": label, "ms": (last[1][label] - first[1][label]) / steps * 1e3, **bound}
        for label, bound in _bounds(model, params, workload, kind, machine).items()
    ]
    whole = (last[0] - first[0]) / steps * 1e3
    rest = {
        "part": "everything else",
        "ms": whole - sum(row["ms"] for row in rows),
        "flops_ms": 0.0,
        "bytes_ms": 0.0,
    }
    return [*rows, rest, {"part": "a step", "ms": whole} | {
        key: sum(row[key] for row in rows) for key in ("flops_ms", "bytes_ms")
    }]  # fmt: skip


def _wrapped(kind: weights.Weights) -> dict[tuple[Any, str], str]:
    products = (weights.Int8 if kind is weights.int8 else weights.Packed, "multiply")
    return {
        products: "products",
        (cpu.Reads, "attend"): "attention",
        (engine, "drawn"): "law, draw, log-probs",
        (gpt2, "gelu_tanh"): "gelu",
        (torch.nn.functional, "layer_norm"): "norms",
    }


def _time(owner: Any, name: str, label: str, spent: dict[str, float]) -> None:
    work: Callable[..., Any] = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        got = work(*given, **named)
        spent[label] += time.perf_counter() - start
        return got

    setattr(owner, name, timed)


def _bounds(
    model: LanguageModel, params: Params, workload: Workload, kind: weights.Weights, machine: Machine
) -> dict[str, dict[str, float]]:
    """Milliseconds at the machine's rate of products and of reading."""
    shape, vocabulary = model.cache, len(model.unembedding(params))
    entries = (
        sum(leaf.numel() for block in params["h"] for leaf in _matrices(block))
        + model.unembedding(params).numel()
    )
    steps = workload.new[0] - 17
    live = len(workload.prompts[0]) + 17 + steps / 2  # tokens a row sees in the mean step that counts
    cached = 2 * workload.batch * live * shape.layers * shape.heads * shape.width
    logits = workload.batch * vocabulary * 4

    def at_least(flops: float, size: float) -> dict[str, float]:
        return {"flops_ms": flops / machine.gflops / 1e6, "bytes_ms": size / machine.gbytes / 1e6}

    entry = 1 if kind is weights.int8 else 4
    return {
        "products": at_least(2 * workload.batch * entries, entry * entries),
        "attention": at_least(2 * cached, 4 * cached),
        "law, draw, log-probs": at_least(0, logits),
        "gelu": at_least(0, 0),
        "norms": at_least(0, 0),
    }


def _matrices(block: Params) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(block) if leaf.ndim == 2]
