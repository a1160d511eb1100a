"""The benchmark's picture: time and extra memory by the number of tokens."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from record import machine_of, measured


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a row of panels per share of masked tokens."""
    results = measured(record)
    shares = sorted({each["masked"] for each in results})
    systems = list(dict.fromkeys(each["system"] for each in results))
    figure, panels = plt.subplots(len(shares), 2, figsize=(11, 3.8 * len(shares)), squeeze=False)
    for line, share in zip(panels, shares, strict=True):
        for panel, key, label in zip(line, ("seconds", "extra_mb"), ("seconds", "extra MB"), strict=True):
            for number, system in enumerate(systems):
                here = [each for each in results if (each["masked"], each["system"]) == (share, system)]
                here.sort(key=lambda each: each["rows"])
                own = system.startswith("minirlhf")
                panel.plot(
                    [each["rows"] for each in here], [each[key] for each in here],
                    label=system, marker="o", color=f"C{number}", linestyle="-" if own else "--",
                )  # fmt: skip
            panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=f"{share:.0%} masked")
            rows = sorted({each["rows"] for each in results})
            panel.set_xticks(rows, [str(each) for each in rows])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][1].legend(fontsize=8)
    machine = machine_of(record)
    figure.suptitle(f"log π(token) and both gradients, {machine['dtype']}, {machine['name']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
