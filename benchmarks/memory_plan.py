"""The memory plan beside what the run took: every stage, planned by --dry-run, then run. Table, JSON.

    PYTHONPATH=. python benchmarks/memory_plan.py             GPT-2 124M and a model of 27 M, random weights
    PYTHONPATH=. python benchmarks/memory_plan.py --sizes small --stages sft ppo

Plan and run have a process each and are the commands that a user types. What a run took is the most that was
resident of its process (VmHWM): Python and torch included, as in the plan.
"""

import contextlib
import io
import json
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from harness import in_a_process, peak, record_of, save, worker_arguments
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minirlhf.cli import main as minirlhf
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import with_scalar_head

HERE = Path(__file__).resolve().parent
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
_PLANNED = re.compile(r"planned peak of memory ([\d.]+) GB")


@dataclass(frozen=True)
class Options:
    """Compares planned and measured peaks."""

    sizes: tuple[Size, ...] = ("small", "gpt2")
    stages: tuple[str, ...] = tuple(FLAGS)
    out: Path = HERE / "results"
    """Where the table and the JSON go."""
    name: str = "memory_plan"


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
    """What a user would type, but for --dry-run."""
    data = {"sft": "demonstrations", "ppo": "prompts", "group": "prompts"}.get(stage, "preferences")
    judge = ["--reward-model", str(folder / "reward")] if data == "prompts" else []
    return [
        stage, "--policy", str(folder / "policy"), "--data", str(folder / f"{data}.jsonl"), *judge,
        "--out", str(folder / f"made-{stage}"), "--device", "cpu", *FLAGS[stage],
    ]  # fmt: skip


def work(given: list[Any]) -> dict[str, Any]:
    """One command in this process: bytes planned by a dry run, or bytes taken."""
    arguments, said = given, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = minirlhf(arguments)
    if code:
        raise SystemExit(f"minirlhf {arguments[0]}: {errors.getvalue().strip().splitlines()[-1]}")
    found = _PLANNED.search(said.getvalue())
    return {"planned": float(found[1]) * 1e9 if found else None, "taken": peak()}


def compare(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    labels, arguments = {"size": size, "stage": stage}, command(stage, folder)
    dry = in_a_process(__file__, [*arguments, "--dry-run"], labels)
    wet = in_a_process(__file__, arguments, labels)
    failed = {name: each["failed"] for name, each in (("dry", dry), ("run", wet)) if "failed" in each}
    if failed:
        return labels | {"failed": str(failed)}
    return labels | {
        "planned": dry["planned"],
        "taken": wet["taken"],
        "dry_run_took": dry["taken"],
        "ratio": dry["planned"] / wet["taken"],
    }


def table_of(record: dict[str, Any]) -> str:
    """Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    lines = [
        f"{record['date']}; cpu, {torch.get_num_threads()} threads, fp32; {versions}.\n",
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


def main() -> None:
    """All rows, one process after the other."""
    options, results = tyro.cli(Options, description=__doc__), []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), SHAPES[size])
            for stage in options.stages:
                results.append(compare(size, stage, Path(folder)))
                Console(stderr=True).print(results[-1])
    record = record_of(options, ("torch", "numpy"), results)
    save(record, table_of(record), options.out, options.name)
    print(table_of(record), end="")


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(work(given)))
    else:
        main()
