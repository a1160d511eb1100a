"""learning_curves.png: one panel per stage, drawn from a run's metrics."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PANEL = 4.2, 3.2  # inches
_ACROSS = 3
_BLUE, _ORANGE = "#1f77b4", "#d95f02"


class Panel(NamedTuple):
    """What a stage's panel shows: curves on the left axis, and perhaps one of another unit on the right."""

    left: tuple[str, ...]
    right: tuple[str, ...]


# The first whose metrics a stage has: stages are told apart by their metrics, so a new one needs no entry.
PANELS = (
    Panel(("objective/scores", "validation/score"), ("objective/kl",)),
    Panel(("rewards/accuracies", "eval_rewards/accuracies"), ()),
    Panel(("accuracy", "eval_accuracy"), ()),
    Panel(("loss", "eval_loss"), ()),
)


def write_learning_curves(
    metrics: Sequence[Mapping[str, Any]], path: Path, *, say: Callable[[str], None]
) -> bool:
    """Draws the curves; where that cannot be done, says why and returns False.

    Args:
        metrics: rows of metrics.jsonl, each with "step" and "stage".
        path: the PNG to write.
        say: told what is missing, and the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        say(f"{path.name} was not drawn: it needs matplotlib; pip install 'minirlhf[plot]'")
        return False
    stages = stage_curves(metrics)
    if not stages:
        say(f"{path.name} was not drawn: the metrics hold no loss, accuracy or score")
        return False
    _draw(stages, path)
    return True


def stage_curves(
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[Panel, dict[str, list[tuple[int, float]]]]]:
    """By stage, in the order of the run: its panel, and (step, value) of each curve."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics:
        of_stage = curves.setdefault(row["stage"], {})
        for name, value in row.items():
            if name not in ("step", "stage"):
                of_stage.setdefault(name, []).append((row["step"], value))
    return {
        stage: (panel, {name: of_stage[name] for name in (*panel.left, *panel.right) if name in of_stage})
        for stage, of_stage in curves.items()
        for panel in [next((p for p in PANELS if of_stage.keys() & {*p.left}), None)]
        if panel is not None
    }


def _draw(stages: Mapping[str, tuple[Panel, Mapping[str, Sequence[tuple[int, float]]]]], path: Path) -> None:
    # Not pyplot: it keeps figures and a backend in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(stages))
    down = -(-len(stages) // across)
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (stage, (panel, curves)) in enumerate(stages.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        axes.set_title(stage)
        axes.set_xlabel("iteration" if panel.right else "step")
        axes.grid(alpha=0.25)
        _plot(axes, curves, panel.left, _BLUE)
        axes.legend(fontsize="small", framealpha=0.6)
        if any(name in curves for name in panel.right):
            other = axes.twinx()
            _plot(other, curves, panel.right, _ORANGE)
            other.set_ylabel(", ".join(panel.right), color=_ORANGE)
            other.tick_params(axis="y", labelcolor=_ORANGE)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _plot(
    axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], names: Sequence[str], color: str
) -> None:
    """The first name as a thin line (training), the second as a line with points (validation)."""
    for name, style in zip(
        names, ({"lw": 1.2}, {"lw": 1.2, "marker": "o", "ms": 4, "ls": "--"}), strict=False
    ):
        if name in curves:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, color=color, label=name, **style)
