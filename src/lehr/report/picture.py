"""A plan as a picture: the learning rate of every group over the steps, with the stages as bands and what each trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lehr.planning import Plan

_POINTS = 2000  # more than the picture has pixels across


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Write the picture of `plan` to `path`, as PNG or SVG by its ending."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.unique(np.linspace(0, plan.total_steps - 1, _POINTS).astype(int))
    for names, rates in _curves(plan):
        shown = rates[steps]
        axes.plot(steps, np.where(shown > 0, shown, np.nan), label=names, linewidth=1.8)
    for stage in plan.stages:
        if stage.index % 2:
            axes.axvspan(stage.start, stage.stop, color="0.5", alpha=0.12, linewidth=0)
        share = sum(plan.parameters[name] for name in plan.trainable(stage)) / sum(plan.parameters.values())
        axes.text(
            (stage.start + stage.stop) / 2, 1.02, f"{stage.label}\n{share:.1%} of parameters", transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=9,
        )  # fmt: skip
    axes.set(xlabel="step (0-based)", ylabel="learning rate", xlim=(0, plan.total_steps), yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower center")
    figure.savefig(path, dpi=130)


def _curves(plan: Plan) -> list[tuple[str, np.ndarray]]:
    """One curve for all groups that share it, under their common names."""
    curves: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for group in plan.groups:
        rates = plan.lr(group)
        curves.setdefault(rates.tobytes(), ([], rates))[0].append(group)
    return [
        (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""), rates)
        for names, rates in curves.values()
    ]
