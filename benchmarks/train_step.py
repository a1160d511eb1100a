"""A training step of GPT-2 124M: minirlhf beside TRL's trainers. One table, one picture, JSON.

    python benchmarks/train_step.py                                  all that is installed, on the CPU
    python benchmarks/train_step.py --device cuda
    python benchmarks/train_step.py --stages DPO --systems minirlhf "TRL, best" --times 5
    python benchmarks/train_step.py --ppo-trl FOLDER                 a TRL that has PPOTrainer, for PPO

Steps of SFT, DPO and reward model, and whole iterations of PPO with the update in them, on equal batches.
Every measurement has a process of its own, in which the machine's limit is measured as well. Steps: a few
that are not counted (memory that is new to a process is slow, and what is compiled is compiled then), then
`--times`; the median counts. TRL has PPO until 1.12: `pip install --no-deps --target FOLDER trl==1.12.0`.
"""

import dataclasses
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import train_ours
import train_trl
import tyro
from harness import (
    check_counts,
    check_names,
    check_place,
    for_worker,
    in_a_process,
    installed,
    refuse,
    version,
    worker_arguments,
)
from machine import measure
from record import Benchmark, Output, Record, Row, head, run
from train_work import Work, flops, save_models, tokens

SYSTEMS = (*train_ours.SETTINGS, *train_trl.SETTINGS)
Stage = Literal["SFT", "DPO", "reward", "PPO"]


@dataclass(frozen=True)
class Options(Output):
    """Compares training steps of minirlhf and TRL."""

    name: str = "train-step-" + platform.node()
    """Their name."""
    stages: tuple[Stage, ...] = ("SFT", "DPO", "reward", "PPO")
    """Of what the steps are."""
    systems: tuple[str, ...] = SYSTEMS
    """Which ones; TRL is left out where it is not installed, which is said."""
    size: Literal["124m", "tiny"] = "124m"
    """tiny: to see whether everything runs."""
    device: str = "cpu"
    """cpu or cuda."""
    pairs: int = 4
    """Preferences a step; SFT takes both sides of each."""
    prompt: int = 32
    """Tokens of their prompts."""
    response: int = 64
    """Tokens of each response."""
    rollouts: int = 16
    """PPO's episodes an iteration."""
    asked: int = 32
    """Tokens of their prompts."""
    answered: int = 32
    """Tokens of their responses."""
    warm: int = 2
    """Steps that are not counted; of PPO's iterations, one."""
    times: int = 3
    """Steps that are."""
    ppo_trl: Path | None = None
    """A folder with a TRL that has PPOTrainer; None where the installed one does."""


def main(options: Options) -> None:
    """Measures, prints the table, writes all three."""
    check_place(options.device)
    check_names("--systems", options.systems, SYSTEMS)
    sizes = ("pairs", "prompt", "response", "rollouts", "asked", "answered")
    check_counts(options, *sizes, "warm", "times")
    if options.ppo_trl is not None and not (options.ppo_trl / "trl").is_dir():
        refuse(f"--ppo-trl {options.ppo_trl}: there is no trl in this folder")
    benchmark = Benchmark(
        packages=("torch", "transformers", "trl"),
        report=report,
        said=_said,
        picture="train_picture",
        choices=("stages", "systems", "ppo_trl"),
    )
    run(options, _rows(options), benchmark)


def _rows(options: Options) -> Iterator[Row]:
    folder = None if options.ppo_trl is None else str(options.ppo_trl.resolve())
    with tempfile.TemporaryDirectory() as models:
        save_models(Path(models), options.size)
        for stage in options.stages:
            for name in options.systems:  # innermost, so that what is compared runs within minutes
                if _can_run(name, stage, options):
                    given = [for_worker(options) | {"ppo_trl": folder}, stage, name, models]
                    labels = {"stage": stage, "system": name}
                    yield Row(labels, partial(in_a_process, __file__, given))


def _said(row: dict[str, Any]) -> str:
    return f"{row['parts'][0]['seconds']:.2f} s, {row['peak_mb']:.0f} MB"


def worker(given: dict[str, Any], stage: str, name: str, models: str) -> dict[str, Any]:
    """One system on one stage, in this process."""
    options = Options(**given)
    skipped = 1 if stage == "PPO" else options.warm
    work = Work(
        policy=Path(models) / "policy", reward=Path(models) / "reward", size=options.size,
        steps=skipped + options.times, device=options.device, pairs=options.pairs, prompt=options.prompt,
        response=options.response, rollouts=options.rollouts, asked=options.asked, answered=options.answered,
        rate=1e-5,
    )  # fmt: skip
    if name in train_ours.SETTINGS:
        took = train_ours.measure(work, stage, train_ours.SETTINGS[name])
    else:
        took = train_trl.measure(work, stage, train_trl.SETTINGS[name], given["ppo_trl"])
    machine = measure(torch.device(options.device), torch.float32)
    needed, parts = flops(work, stage), []
    for part, seconds in took.seconds.items():
        counted = sorted(seconds[skipped:])
        median = statistics.median(counted)
        parts.append({
            "part": part,
            "seconds": median,
            "spread": [counted[0], counted[-1]],
            "uncounted": seconds[:skipped],
            "tokens_per_second": tokens(work, stage) / median,
            "of_limit": needed[part] / median / machine.gflops / 1e9,
        })  # fmt: skip
    return {
        "parts": parts,
        "peak_mb": took.step_peak / 2**20,
        "trained_mb": took.trained_bytes / 2**20,
        "losses": took.losses,
        "trl": None if name in train_ours.SETTINGS else version("trl"),
        "machine": dataclasses.asdict(machine),
    }


def report(record: Record) -> str:
    """The table, as Markdown."""
    lines = [
        *head(
            "Training steps",
            record,
            "s: a step's median [fastest, slowest]. of limit: the flops that the stage needs at least "
            "(formula: benchmarks/train_work.py), by time and the rate of a large product in the same "
            "process. peak MB: resident in the process at most, from its first step on. trained MB: "
            "gradients and both moments. speed: how many times faster than TRL's default / its best setting. "
            "memory: peak, as a multiple of theirs. loss: the largest difference from TRL's over the same "
            "steps.",
        ),
        "| stage | system | s | tokens/s | of limit | peak MB | trained MB | speed | memory | loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    results = record["results"]
    for each in results:
        if "failed" in each:
            lines.append(f"| {each['stage']} | {each['system']} | {each['failed']} | | | | | | | |")
            continue
        theirs = [_of(results, each["stage"], name) for name in train_trl.SETTINGS]
        for number, part in enumerate(each["parts"]):
            speed = [_seconds(other, number) / part["seconds"] if other else None for other in theirs]
            memory = [each["peak_mb"] / other["peak_mb"] if other else None for other in theirs]
            low, high = part["spread"]
            stage = each["stage"] if part["part"] == "step" else f"{each['stage']} {part['part']}"
            lines.append(
                f"| {stage} | {each['system']} | {part['seconds']:.2f} [{low:.2f}, {high:.2f}] | "
                f"{part['tokens_per_second']:.0f} | {part['of_limit']:.0%} | {each['peak_mb']:.0f} | "
                f"{each['trained_mb']:.0f} | {_both(speed)} | {_both(memory)} | {_gap(each, theirs)} |"
            )
    old = sorted({each["trl"] for each in results if each.get("trl")} - {record["versions"]["trl"]})
    if old:
        lines += ["", f"PPO's TRL is {', '.join(old)}."]
    return "\n".join(lines) + "\n"


def _of(results: list[dict[str, Any]], stage: str, system: str) -> dict[str, Any] | None:
    found = (each for each in results if (each["stage"], each["system"]) == (stage, system))
    return next((each for each in found if "failed" not in each), None)


def _seconds(result: dict[str, Any], number: int) -> float:
    return result["parts"][number]["seconds"]


def _both(ratios: list[float | None]) -> str:
    return " / ".join("" if each is None else f"{each:.2f}" for each in ratios)


def _gap(each: dict[str, Any], theirs: list[dict[str, Any] | None]) -> str:
    other = next((other for other in theirs if other and other is not each), None)
    if other is None or not each["losses"]:
        return ""
    pairs = zip(each["losses"], other["losses"], strict=False)  # one may have been run with more steps
    return f"{max(abs(ours - its) for ours, its in pairs):.0e}"


def _can_run(name: str, stage: str, options: Options) -> bool:
    if name in train_ours.SETTINGS:
        return True
    if not installed(f"{stage}, {name}", "trl"):
        return False
    if stage == "PPO" and options.ppo_trl is None and not _has_ppo():
        said = f"trl {version('trl')} has no PPOTrainer, and --ppo-trl is not given, left out"
        print(f"{stage}, {name}: {said}")
        return False
    return True


def _has_ppo() -> bool:
    from importlib.util import find_spec

    found = find_spec("trl")
    places = [] if found is None else found.submodule_search_locations or []
    return any((Path(each) / "experimental" / "ppo").is_dir() for each in places)


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
