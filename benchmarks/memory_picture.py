"""The benchmark's picture: what each stage was planned to take, beside what it took."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from record import machine_of, measured


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a panel per size of model, two bars per stage."""
    results = measured(record)
    sizes = list(dict.fromkeys(each["size"] for each in results))
    tallest = max(sum(each["size"] == size for each in results) for size in sizes)
    shape = (6 * len(sizes), 1.2 + 0.5 * tallest)
    figure, panels = plt.subplots(1, len(sizes), figsize=shape, squeeze=False)
    for panel, size in zip(panels[0], sizes, strict=True):
        here = [each for each in results if each["size"] == size]
        for place, key in enumerate(("planned", "taken")):
            bars = panel.barh(
                [row + 0.4 * place for row in range(len(here))], [each[key] / 1e9 for each in here], 0.38,
                label=key,
            )  # fmt: skip
            panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        panel.set_yticks([row + 0.2 for row in range(len(here))], [each["stage"] for each in here])
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set(title=size, xlabel="peak memory of the process, GB")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"Planned and taken, {machine_of(record)['name']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
