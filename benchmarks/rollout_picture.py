"""The benchmark's picture: tokens per second by batch, one panel per workload."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the PNG."""
    results = [each for each in record["results"] if "failed" not in each]
    kinds = sorted({each["workload"] for each in results})
    figure, panels = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.2), squeeze=False, sharey=True)
    systems = list(dict.fromkeys(each["system"] for each in results))
    for panel, kind in zip(panels[0], kinds, strict=True):
        for number, system in enumerate(systems):
            here = [each for each in results if each["workload"] == kind and each["system"] == system]
            if not here:
                continue
            here.sort(key=lambda each: each["batch"])
            own = system.startswith("minirlhf")
            panel.errorbar(
                [each["batch"] for each in here],
                [each["tokens_per_second"] for each in here],
                yerr=[
                    [each["tokens_per_second"] - each["spread"][0] for each in here],
                    [each["spread"][1] - each["tokens_per_second"] for each in here],
                ],
                label=system, marker="o", color=f"C{number}", linestyle="-" if own else "--", capsize=2,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="rows at a time", title=kind)
        batches = sorted({each["batch"] for each in results if each["workload"] == kind})
        panel.set_xticks(batches, [str(each) for each in batches])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("generated tokens per second")
    panels[0][-1].legend(fontsize=8)
    machine = results[0]["machine"]
    figure.suptitle(
        f"GPT-2 124M, {machine['dtype']}, {machine['name']}, {machine['threads']} threads", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
