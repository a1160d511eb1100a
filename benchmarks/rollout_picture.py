"""The benchmark's picture: tokens per second by batch, one panel per workload."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from record import machine_of, measured


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG: lines over the batch, or bars where there is one batch only."""
    results = measured(record)
    kinds = sorted({each["workload"] for each in results})
    systems = sorted({each["system"] for each in results}, key=lambda name: (not _ours(name), name))
    colours = {system: f"C{number}" for number, system in enumerate(systems)}
    figure, panels = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.4), squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        here = [each for each in results if each["workload"] == kind]
        batches = sorted({each["batch"] for each in here})
        (_bars if len(batches) == 1 else _lines)(panel, here, batches, colours)
        panel.set_title(kind if len(batches) > 1 else f"{kind}, {batches[0]} rows at a time")
        panel.grid(alpha=0.3)
    machine = machine_of(record)
    figure.suptitle(
        f"GPT-2 124M, {machine['dtype']}, {machine['name']}, {machine['threads']} threads", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(panel: Axes, here: list[dict[str, Any]], batches: list[int], colours: dict[str, str]) -> None:
    for system, colour in colours.items():
        own = sorted((each for each in here if each["system"] == system), key=lambda each: each["batch"])
        if own:
            panel.errorbar(
                [each["batch"] for each in own], [each["tokens_per_second"] for each in own],
                yerr=list(zip(*map(_around, own), strict=True)), label=system, marker="o", color=colour,
                linestyle="-" if _ours(system) else "--", capsize=2,
            )  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="rows at a time", ylabel="generated tokens per second")
    panel.set_xticks(batches, [str(each) for each in batches])
    ticks = [30, 60, 120, 240, 480, 960]
    panel.set_yticks(ticks, [str(each) for each in ticks])
    panel.minorticks_off()
    panel.legend(fontsize=8)


def _bars(panel: Axes, here: list[dict[str, Any]], batches: list[int], colours: dict[str, str]) -> None:
    own = sorted(here, key=lambda each: each["tokens_per_second"])
    bars = panel.barh(
        [each["system"] for each in own], [each["tokens_per_second"] for each in own],
        xerr=list(zip(*map(_around, own), strict=True)), color=[colours[each["system"]] for each in own],
        capsize=2,
    )  # fmt: skip
    panel.bar_label(bars, fmt="%.0f", padding=6, fontsize=8)
    panel.set_xlabel("generated tokens per second")
    panel.margins(x=0.12)


def _around(each: dict[str, Any]) -> tuple[float, float]:
    low, high = each["spread"]
    return each["tokens_per_second"] - low, high - each["tokens_per_second"]


def _ours(system: str) -> bool:
    return system.startswith("minirlhf")
