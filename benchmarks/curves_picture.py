"""The benchmark's picture: loss curves, one over the other; below, how far each is from ours as it is."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from record import measured
from train_work import AS_IT_IS

_SAME = 1e-9
"""Where a difference of 0 is drawn: the axis is logarithmic."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a column of two panels per stage."""
    results = measured(record)
    stages = list(dict.fromkeys(each["stage"] for each in results))
    systems = list(dict.fromkeys(each["system"] for each in results))
    palette = plt.get_cmap("tab20")
    colours = {system: palette(number) for number, system in enumerate(systems)}
    size = (max(5 * len(stages), 10), 7)  # as wide as the legend at least
    figure, panels = plt.subplots(2, len(stages), figsize=size, squeeze=False, sharex=True)
    for (above, below), stage in zip(panels.T, stages, strict=True):
        here = {each["system"]: each["losses"] for each in results if each["stage"] == stage}
        _curves(above, here, colours)
        _differences(below, here, colours)
        above.set_title(stage)
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss")
    panels[1][0].set_ylabel(f"difference from {AS_IT_IS}'s")
    solid = [Line2D([], [], color=colours[system], label=system) for system in systems]
    figure.legend(handles=solid, loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(panel: Axes, here: dict[str, list[float]], colours: dict[str, Any]) -> None:
    for number, (system, losses) in enumerate(here.items()):
        # Ours is wide and below; of the others each has its turn in the dashes, so that all are seen.
        style = {"linewidth": 6, "alpha": 0.4}
        if system != AS_IT_IS:
            style = {"linewidth": 1.5, "linestyle": (6 * number, (6, 6 * (len(here) - 2)))}
        panel.plot(losses, color=colours[system], **style)


def _differences(panel: Axes, here: dict[str, list[float]], colours: dict[str, Any]) -> None:
    base = here.get(AS_IT_IS, [])
    for system, losses in here.items():
        if system != AS_IT_IS and len(losses) == len(base):
            gaps = [max(abs(ours - other), _SAME) for ours, other in zip(base, losses, strict=True)]
            panel.plot(gaps, color=colours[system], linewidth=1)
    panel.set_yscale("log")
