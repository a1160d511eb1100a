"""The benchmark's picture: loss curves, one over the other; below, how far each is from ours as it is."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from record import measured
from train_work import AS_IT_IS

_SAME = 1e-9
"""Where a difference of 0 is drawn: the axis is logarithmic."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a column of two panels per stage."""
    results = measured(record)
    stages = list(dict.fromkeys(each["stage"] for each in results))
    systems = list(dict.fromkeys(each["system"] for each in results))
    figure, panels = plt.subplots(2, len(stages), figsize=(5 * len(stages), 7), squeeze=False, sharex=True)
    for (above, below), stage in zip(panels.T, stages, strict=True):
        here = {each["system"]: each["losses"] for each in results if each["stage"] == stage}
        _curves(above, here, systems)
        _differences(below, here, systems)
        above.set_title(stage)
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss")
    panels[1][0].set_ylabel(f"difference from {AS_IT_IS}'s")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(panel: Axes, here: dict[str, list[float]], systems: list[str]) -> None:
    for number, (system, losses) in enumerate(here.items()):  # those below are wider, so that all are seen
        width, dash = 1 + 1.2 * (len(here) - 1 - number), (0, (6, number))
        colour = f"C{systems.index(system)}"
        panel.plot(losses, label=system, linewidth=width, linestyle=dash, color=colour)


def _differences(panel: Axes, here: dict[str, list[float]], systems: list[str]) -> None:
    base = here.get(AS_IT_IS, [])
    for system, losses in here.items():
        if system != AS_IT_IS and len(losses) == len(base):
            gaps = [max(abs(ours - other), _SAME) for ours, other in zip(base, losses, strict=True)]
            panel.plot(gaps, color=f"C{systems.index(system)}", linewidth=1)
    panel.set_yscale("log")
