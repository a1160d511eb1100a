"""Loss curves that must be one curve: ours beside TRL's, and ours with and without what makes it fast.

    python benchmarks/train_curves.py                       a small model, CPU, 4 minutes with TRL
    python benchmarks/train_curves.py --size 124m --stages DPO --steps 8 --learning-rate 1e-4
    python benchmarks/train_curves.py --device cuda --steps 200

Every run trains the same weights on the same ragged batches in the same order, in a process of its own. What
is stated is the largest difference of any step's loss from that of minirlhf as it is.
"""

import dataclasses
import json
import os
import platform
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
    worker_arguments,
)
from machine import named
from record import Benchmark, Output, Record, Row, head, measured, run
from train_ours import Setting
from train_work import AS_IT_IS, Work, save_models

from minirlhf.kernels import logprob, passes


def _unfused() -> None:
    """Log-probs through all logits."""
    logprob.log_prob = lambda *given, entropy: passes.log_prob_plain(*given)


def _in_pieces() -> None:
    """No logits are kept, and the vocabulary is gone through in pieces of the narrowest kind."""
    passes.KEPT, passes.PIECE = 0, 1


def _without_kernels() -> None:
    """What is compiled from C++ is left to torch's operations."""
    os.environ["MINIRLHF_KERNELS"] = "0"


OURS = {
    AS_IT_IS: Setting(),
    "minirlhf, plain log-probs": Setting(prepare=_unfused),
    "minirlhf, padded rows": Setting(pack=lambda tokens, lengths: None),
    "minirlhf, recomputed": Setting(config={"activation_recomputation": True}),
    "minirlhf, compiled": Setting(config={"compile": "on"}),
    "minirlhf, log-probs in pieces": Setting(prepare=_in_pieces),
    "minirlhf, torch's operations": Setting(prepare=_without_kernels),
    "minirlhf, 3 micro-batches": Setting(parts=3),
    "minirlhf, 8 micro-batches": Setting(parts=8),
}
"""What must not change a curve."""
SYSTEMS = (*OURS, *train_trl.SETTINGS)


@dataclass(frozen=True)
class Options(Output):
    """Compares loss curves."""

    name: str = "train-curves-" + platform.node()
    """Their name."""
    stages: tuple[Literal["SFT", "DPO", "reward"], ...] = ("SFT", "DPO", "reward")
    """What is trained."""
    systems: tuple[str, ...] = SYSTEMS
    """Which runs, the one that they are compared with among them; TRL only where it is installed."""
    size: Literal["tiny", "124m"] = "tiny"
    """Of GPT-2, with fresh weights: two blocks of width 64, or the whole."""
    steps: int = 40
    """Of each run."""
    pairs: int = 8
    """Preferences a step; SFT takes both sides of each."""
    prompt: int = 16
    """Most tokens of a prompt."""
    response: int = 32
    """Most tokens of a response."""
    learning_rate: float = 1e-3
    """Constant."""
    device: str = "cpu"
    """cpu or cuda."""


def main(options: Options) -> None:
    """Trains, prints the table, writes all three."""
    check_place(options.device)
    check_names("--systems", options.systems, SYSTEMS)
    check_counts(options, "steps", "pairs", "prompt", "response")
    if AS_IT_IS not in options.systems and not options.add:
        refuse(f"--systems: expected {AS_IT_IS!r} among them, which the others are compared with")
    if min(options.prompt, options.response) < 2:
        refuse(f"--prompt and --response: expected at least 2, got {options.prompt} and {options.response}")
    benchmark = Benchmark(
        packages=("torch", "transformers", "trl"),
        report=report,
        said=_said,
        picture="curves_picture",
        choices=("stages", "systems"),
    )
    run(options, _rows(options), benchmark)


def _rows(options: Options) -> Iterator[Row]:
    names = [name for name in options.systems if installed(name, None if name in OURS else "trl")]
    with tempfile.TemporaryDirectory() as models:
        save_models(Path(models), options.size)
        for stage in options.stages:
            for name in names:
                if "log-probs" in name and stage == "reward":
                    continue  # it has none
                given = [for_worker(options), stage, name, models]
                yield Row({"stage": stage, "system": name}, partial(in_a_process, __file__, given))


def _said(row: dict[str, Any]) -> str:
    return f"loss {row['losses'][0]:.6f} to {row['losses'][-1]:.6f}"


def worker(given: dict[str, Any], stage: str, name: str, models: str) -> dict[str, Any]:
    """One run, in this process."""
    options = Options(**given)
    work = Work(
        policy=Path(models) / "policy", reward=Path(models) / "reward", size=options.size,
        steps=options.steps, device=options.device, pairs=options.pairs, prompt=options.prompt,
        response=options.response, rollouts=0, asked=0, answered=0, rate=options.learning_rate, ragged=True,
    )  # fmt: skip
    if name in OURS:
        took = train_ours.measure(work, stage, OURS[name])
    else:
        took = train_trl.measure(work, stage, train_trl.SETTINGS[name], None)
    machine = named(torch.device(options.device), torch.float32)
    return {"losses": took.losses, "machine": dataclasses.asdict(machine)}


def report(record: Record) -> str:
    """The table, as Markdown."""
    options = record["options"]
    lines = [
        *head(
            "Loss curves",
            record,
            f"GPT-2 {options['size']}, {options['steps']} steps of {options['pairs']} ragged pairs (prompts "
            f"of 2 to {options['prompt']} tokens, responses of 2 to {options['response']}), learning rate "
            f"{options['learning_rate']:g}. difference: the largest of any step's loss from that of "
            f"{AS_IT_IS} as it is; first: of the two losses before and after the first step.",
        ),
        "| stage | run | first loss | last loss | difference, first | difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for each in record["results"]:
        row = f"| {each['stage']} | {each['system']} | "
        if "failed" in each:
            lines.append(row + f"{each['failed']} | | | |")
            continue
        losses, gaps = each["losses"], _gaps(record, each)
        ends = f"{losses[0]:.6f} | {losses[-1]:.6f}"
        apart = f"{max(gaps[:2]):.1e} | {max(gaps):.1e}" if gaps else " | "
        lines.append(f"{row}{ends} | {apart} |")
    return "\n".join([*lines, "", *_largest(record)]) + "\n"


def _largest(record: Record) -> list[str]:
    """Of ours, and of TRL's, in words."""
    said = []
    for whose, kind in (("of minirlhf's own runs", OURS), ("of TRL's", train_trl.SETTINGS)):
        others = [each for each in measured(record) if each["system"] in kind and each["system"] != AS_IT_IS]
        found = [(max(gaps), each) for each in others if (gaps := _gaps(record, each))]
        if found:
            gap, each = max(found, key=lambda pair: pair[0])
            said.append(f"Largest difference {whose}: {gap:.1e} ({each['stage']}, {each['system']}).")
    return said


def _gaps(record: Record, row: dict[str, Any]) -> list[float]:
    """Of each step's loss; none where the run that it is compared with has failed, or took other steps."""
    base = {"stage": row["stage"], "system": AS_IT_IS}
    found = [each["losses"] for each in measured(record) if base.items() <= each.items()]
    if not found or len(found[0]) != len(row["losses"]):
        return []
    return [abs(ours - other) for ours, other in zip(found[0], row["losses"], strict=True)]


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
