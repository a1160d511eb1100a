"""The benchmark's picture: seconds of a step and peak memory, one group of bars for each stage."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from record import machine_of, measured


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG. Seconds are shown per 1,000 tokens read, so that the stages fit one axis."""
    results = measured(record)
    systems = list(dict.fromkeys(each["system"] for each in results))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    speed = {
        (_label(each["stage"], part["part"]), each["system"]): 1000 / part["tokens_per_second"]
        for each in results
        for part in each["parts"]
    }
    _bars(left, speed, systems, "{:.1f}")
    left.set_ylabel("seconds for 1,000 tokens")
    memory = {(each["stage"], each["system"]): each["peak_mb"] / 1000 for each in results}
    _bars(right, memory, systems, "{:.1f}")
    right.set_ylabel("peak memory of the process, GB")
    left.legend(fontsize=8)
    machine = machine_of(record)
    figure.suptitle(
        f"Training steps of GPT-2, {machine['dtype']}, {machine['name']}, {machine['threads']} threads",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(panel: Axes, values: dict[tuple[str, str], float], systems: list[str], form: str) -> None:
    groups = list(dict.fromkeys(group for group, _ in values))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        here = [
            (place, values[group, system]) for place, group in enumerate(groups) if (group, system) in values
        ]
        left = [place + (number - (len(systems) - 1) / 2) * width for place, _ in here]
        bars = panel.bar(
            left, [value for _, value in here], width, label=system, color=f"C{number}",
            alpha=1.0 if system.startswith("minirlhf") else 0.55,
        )  # fmt: skip
        panel.bar_label(bars, [form.format(value) for _, value in here], fontsize=7)
    panel.set_xticks(range(len(groups)), groups)
    panel.grid(axis="y", alpha=0.3)


def _label(stage: str, part: str) -> str:
    return stage if part == "step" else f"{stage} {part}"
