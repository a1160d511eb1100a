"""Loss curves that must be one curve: ours beside TRL's, and ours with and without what makes it fast.

    python benchmarks/train_curves.py                       a small model, CPU, under a minute with TRL
    python benchmarks/train_curves.py --device cuda --steps 200

Every run trains the same weights on the same ragged batches in the same order, in a process of its own. What
is stated is the largest difference of any step's loss from that of minirlhf as it is.
"""

import dataclasses
import json
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import train_ours
import train_trl
import tyro
from harness import in_a_process, record_of, save, version, worker_arguments
from rich.console import Console
from train_ours import Setting
from train_work import Work, save_models

from minirlhf.kernels import logprob, passes

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options:
    """Compares loss curves."""

    stages: tuple[Literal["SFT", "DPO", "reward"], ...] = ("SFT", "DPO", "reward")
    size: Literal["tiny", "124m"] = "tiny"
    steps: int = 40
    pairs: int = 8
    """Preferences a step; SFT takes both sides of each."""
    prompt: int = 16
    """Most tokens of a prompt."""
    response: int = 32
    """Most tokens of a response."""
    learning_rate: float = 1e-3
    """Constant."""
    device: str = "cpu"
    out: Path = HERE / "results"
    """Where the table, the picture and the JSON go."""
    name: str = "train-curves-" + platform.node()
    """Their name."""


def _unfused() -> None:
    """Log-probs through all logits."""
    logprob.log_prob = lambda *given, entropy: passes.log_prob_plain(*given)


def _in_pieces() -> None:
    """No logits are kept, and the vocabulary is gone through in pieces of the narrowest kind."""
    passes.KEPT, passes.PIECE = 0, 1


OURS = {
    "minirlhf": Setting(),
    "minirlhf, plain log-probs": Setting(prepare=_unfused),
    "minirlhf, padded rows": Setting(pack=lambda tokens, lengths: None),
    "minirlhf, recomputed": Setting(config={"activation_recomputation": True}),
    "minirlhf, compiled": Setting(config={"compile": "on"}),
    "minirlhf, log-probs in pieces": Setting(prepare=_in_pieces),
    "minirlhf, 3 micro-batches": Setting(parts=3),
    "minirlhf, 8 micro-batches": Setting(parts=8),
}
"""What must not change a curve."""


def main(options: Options) -> None:
    """Trains, prints the table, writes all three."""
    console, results, models = Console(), [], Path(tempfile.mkdtemp())
    names = [*OURS, *(train_trl.SETTINGS if version("trl") else ())]
    if not version("trl"):
        console.print("TRL is not installed, left out")
    try:
        save_models(models, options.size)
        for stage in options.stages:
            for name in names:
                if "log-probs" in name and stage == "reward":
                    continue  # it has none
                given = [dataclasses.asdict(options) | {"out": ""}, stage, name, str(models)]
                results.append(in_a_process(__file__, given, {"stage": stage, "system": name}))
                console.print(f"{stage}, {name}: {results[-1].get('failed', 'done')}")
    finally:
        shutil.rmtree(models)
    record = record_of(options, ("torch", "transformers", "trl"), results)
    save(record, report(record), options.out, options.name)
    console.print(report(record), markup=False)
    from train_picture import draw_curves

    draw_curves(record, options.out / f"{options.name}.png")


def worker(given: dict[str, Any], stage: str, name: str, models: str) -> dict[str, Any]:
    """One run, in this process."""
    options = Options(**given)
    work = Work(
        policy=Path(models) / "policy", reward=Path(models) / "reward", size=options.size,
        steps=options.steps, device=options.device, pairs=options.pairs, prompt=options.prompt,
        response=options.response, rollouts=0, asked=0, answered=0, rate=options.learning_rate, ragged=True,
    )  # fmt: skip
    if name in OURS:
        return {"losses": train_ours.measure(work, stage, OURS[name]).losses}
    return {"losses": train_trl.measure(work, stage, train_trl.SETTINGS[name], None).losses}


def report(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    options, versions = record["options"], record["versions"]
    lines = [
        "# Loss curves",
        "",
        f"{record['date']}; {options['size']} GPT-2, {options['steps']} steps of {options['pairs']} ragged "
        f"pairs at a learning rate of {options['learning_rate']:g}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        + ".",
        "",
        "difference: the largest of any step's loss from that of minirlhf as it is; first: after one step.",
        "",
        "| stage | run | first loss | last loss | difference, first | difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for each in record["results"]:
        head = f"| {each['stage']} | {each['system']} | "
        if "failed" in each:
            lines.append(head + f"{each['failed']} | | | |")
            continue
        losses = each["losses"]
        gaps = [abs(ours - other) for ours, other in zip(losses, _base(record, each["stage"]), strict=True)]
        lines.append(
            head + f"{losses[0]:.6f} | {losses[-1]:.6f} | {max(gaps[:2]):.1e} | {max(gaps):.1e} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _base(record: dict[str, Any], stage: str) -> list[float]:
    base = ("minirlhf", stage)
    return next(each["losses"] for each in record["results"] if (each["system"], each["stage"]) == base)


if __name__ == "__main__":
    given = worker_arguments()
    if given is not None:
        print(json.dumps(worker(*given)))
    else:
        main(tyro.cli(Options, description=__doc__))
