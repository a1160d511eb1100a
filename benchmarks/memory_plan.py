"""The memory plan beside what the run took: each stage planned, then run. Table, picture, JSON.

    python benchmarks/memory_plan.py                          GPT-2 124M and a model of 27 M, random weights
    python benchmarks/memory_plan.py --sizes gpt2 --stages ppo group --add

Plan (--dry-run) and run have a process each and are the commands that a user types. What a run took is the
most that was resident of its process (VmHWM): Python and torch included, as in the plan. A stage whose plan
is larger than the memory that is there is not run, which the table says.
"""

import contextlib
import dataclasses
import io
import json
import platform
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from harness import check_names, check_place, in_a_process, peak, worker_arguments
from machine import named
from record import Benchmark, Output, Record, Row, head, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minirlhf.cli import main as minirlhf
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import with_scalar_head
from minirlhf.training.memory_plan import available

Size = Literal["small", "gpt2"]
SHAPES = {
    "small": gpt2.GPT2Config(
        vocab_size=4096, n_positions=256, n_embd=512, n_layer=8, n_head=8, eos_token_id=0
    ),
    "gpt2": gpt2.GPT2Config(eos_token_id=0),
}
PROMPT, RESPONSE = 32, (32, 64)  # tokens
FLAGS = {
    "sft": ["--batch-size", "8", "--micro-batch-size", "4", "--max-steps", "2"],
    "reward": ["--batch-size", "4", "--micro-batch-size", "2", "--max-steps", "2", "--rollouts", "16"],
    "dpo": ["--batch-size", "4", "--micro-batch-size", "2", "--max-steps", "2"],
    "ppo": ["--batch-size", "8", "--micro-batch-size", "4", "--iterations", "2", "--epochs", "1"],
    "group": ["--prompts-per-batch", "4", "--samples-per-prompt", "2", "--micro-batch-size", "4"],
}
FLAGS["ppo"] += ["--max-response", "32"]
FLAGS["group"] += ["--max-response", "32", "--iterations", "2", "--epochs", "1"]
FLAGS["sft+adapters"] = [*FLAGS["sft"], "--adapter-rank", "8"]
FLAGS["dpo+adapters"] = [*FLAGS["dpo"], "--adapter-rank", "8"]
FLAGS["sft+recomputation"] = [*FLAGS["sft"], "--activation-recomputation"]
FLAGS["ppo+adapters+bf16"] = [*FLAGS["ppo"], "--adapter-rank", "8", "--precision", "bf16"]
_PLANNED = re.compile(r"planned peak of memory ([\d.]+) GB")


@dataclass(frozen=True)
class Options(Output):
    """Compares planned and measured peaks."""

    name: str = "memory_plan-" + platform.node()
    """Their name."""
    sizes: tuple[Size, ...] = ("small", "gpt2")
    """Of the model: 27 M parameters, and GPT-2's 124 M."""
    stages: tuple[str, ...] = tuple(FLAGS)
    """Which commands, and with which of their options."""


def write_files(folder: Path, shape: gpt2.GPT2Config, *, rows: int = 60) -> None:
    """A model of random weights, a reward model, and data whose words are a token each."""
    words = [a + b for a in "abcdefgh" for b in "ijklmnop"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(words)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    pairs = [
        {"prompt": text(PROMPT), "chosen": " " + text(a), "rejected": " " + text(b)}
        for a, b in ((draw.randint(*RESPONSE), draw.randint(*RESPONSE)) for _ in range(rows))
    ]
    files = {"preferences": pairs, "prompts": [{"prompt": pair["prompt"]} for pair in pairs]}
    files["demonstrations"] = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, some in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model, generator = gpt2.bind(shape), torch.Generator().manual_seed(0)
    params = model.init(generator)
    save_language_model(folder / "policy", model, params, tokenizer=folder / "tokenizer.json")
    save_scalar_model(
        folder / "reward", model, with_scalar_head(model, params, generator=generator),
        tokenizer=folder / "tokenizer.json", normalisation=Normalisation(),
    )  # fmt: skip


def command(stage: str, folder: Path) -> list[str]:
    """What a user would type, but for --dry-run; stage is a key of FLAGS."""
    flags, out = FLAGS[stage], folder / f"made-{stage}"
    stage = stage.partition("+")[0]
    data = {"sft": "demonstrations", "ppo": "prompts", "group": "prompts"}.get(stage, "preferences")
    judge = ["--reward-model", str(folder / "reward")] if data == "prompts" else []
    return [
        stage, "--policy", str(folder / "policy"), "--data", str(folder / f"{data}.jsonl"), *judge,
        "--out", str(out), "--device", "cpu", *flags,
    ]  # fmt: skip


def main(options: Options) -> None:
    """Plans and runs, prints the table, writes all three."""
    check_place("cpu")
    check_names("--stages", options.stages, FLAGS)
    benchmark = Benchmark(
        packages=("torch", "numpy"),
        report=report,
        said=_said,
        picture="memory_picture",
        choices=("sizes", "stages"),
    )
    run(options, _rows(options), benchmark)


def _rows(options: Options) -> Iterator[Row]:
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), SHAPES[size])
            for stage in options.stages:
                yield Row({"size": size, "stage": stage}, partial(_compared, command(stage, Path(folder))))


def _compared(arguments: list[str]) -> dict[str, Any]:
    """Planned and taken, in bytes; what the dry run itself took, and their ratio."""
    dry = in_a_process(__file__, [*arguments, "--dry-run"])
    if "failed" in dry:
        return {"failed": f"dry run {dry['failed']}"}
    planned, there = dry["planned"], available(torch.device("cpu"))
    if there is not None and planned > there:
        return {"failed": f"not run: planned {planned / 1e9:.1f} GB, {there / 1e9:.1f} are available"}
    wet = in_a_process(__file__, arguments)
    if "failed" in wet:
        return wet
    return {
        "planned": planned,
        "taken": wet["taken"],
        "dry_run_took": dry["taken"],
        "ratio": planned / wet["taken"],
        "machine": wet["machine"],
    }


def _said(row: dict[str, Any]) -> str:
    return f"planned {row['planned'] / 1e9:.2f} GB, taken {row['taken'] / 1e9:.2f}"


def report(record: Record) -> str:
    """The table, as Markdown."""
    lines = [
        *head(
            "Memory, planned and taken",
            record,
            f"Prompts of {PROMPT} tokens, responses of {RESPONSE[0]} to {RESPONSE[1]}; batches: FLAGS in "
            "benchmarks/memory_plan.py.",
        ),
        "| model | stage | planned, GB | taken, GB | planned / taken | the dry run took, GB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in record["results"]:
        if "failed" in row:
            lines.append(f"| {row['size']} | {row['stage']} | {row['failed']} | | | |")
            continue
        numbers = (row["planned"] / 1e9, row["taken"] / 1e9, row["ratio"], row["dry_run_took"] / 1e9)
        cells = " | ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"| {row['size']} | {row['stage']} | {cells} |")
    return "\n".join(lines) + "\n"


def work(arguments: list[str]) -> dict[str, Any]:
    """One command in this process: bytes planned by a dry run, or bytes taken."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = minirlhf(arguments)
    if code:
        raise SystemExit(f"minirlhf {arguments[0]}: {errors.getvalue().strip().splitlines()[-1]}")
    found, machine = _PLANNED.search(said.getvalue()), named(torch.device("cpu"), torch.float32)
    return {
        "planned": float(found[1]) * 1e9 if found else None,
        "taken": peak(),
        "machine": dataclasses.asdict(machine),
    }


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(work(given)))
    else:
        main(tyro.cli(Options, description=__doc__))
