"""A plan as a picture: the rate of every group over the steps, the stages as bands, what each trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lehr.errors import RequestError
from lehr.planning import Plan, PlannedStage
from lehr.shapes import Array

_POINTS = 2000  # more than the picture has pixels across
_LOWEST = 1e-5  # of the highest rate: so far down the axis goes; a cosine without a floor ends at about 0
_LABELLED = 8  # stages that there is room to label in full
_NO_DECAY = "/no_decay"
_FORMATS = (".pdf", ".png", ".svg")


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Write the picture of `plan` to `path`: PNG, SVG or PDF by its ending.

    Raises:
        RequestError: for another ending, or a directory that is not there.
    """
    file = Path(path)
    if file.suffix.lower() not in _FORMATS:
        raise RequestError(
            f"{file}: a picture is written as one of {', '.join(_FORMATS)}; give it such an ending"
        )
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_rates(axes, plan)
    for stage in plan.stages:
        _draw_stage(axes, plan, stage)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, plan.total_steps), yscale="log")
    peak = max(rate for stage in plan.stages for rate in stage.peak_lr.values())
    axes.set_ylim(bottom=max(axes.get_ylim()[0], peak * _LOWEST))
    axes.grid(alpha=0.25)
    figure.suptitle(plan.model, fontsize=10, parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False
    )
    if not file.parent.is_dir():
        raise RequestError(f"{file}: there is no directory {file.parent}; make it, or write elsewhere")
    aside = file.with_name(f".{file.name}.part")
    figure.savefig(aside, dpi=130, format=file.suffix[1:].lower())
    aside.replace(file)


def _draw_rates(axes: Axes, plan: Plan) -> None:
    """A line for each curve, broken between stages, where rates jump; the first are wider, so all show."""
    curves = _curves(plan)
    for colour, (names, rates) in enumerate(curves):
        for stage in plan.stages:
            steps = np.unique(np.linspace(stage.start, stage.stop - 1, _POINTS).astype(int))
            shown = np.where(rates[steps] > 0, rates[steps], np.nan)
            axes.plot(
                steps,
                shown,
                color=f"C{colour % 10}",
                label=names if stage.index == 0 else None,
                linewidth=1.5 + 2.5 * (1 - (colour + 1) / len(curves)),
                marker="." if stage.steps <= 20 else None,  # a line through a single step is nothing
            )


def _draw_stage(axes: Axes, plan: Plan, stage: PlannedStage) -> None:
    if stage.index % 2:
        axes.axvspan(stage.start, stage.stop, color="0.5", alpha=0.12, linewidth=0)
    share = _share(
        sum(plan.parameters[name] for name in plan.trainable(stage)), sum(plan.parameters.values())
    )
    room = max(6, int(90 * stage.steps / plan.total_steps))
    full = f"{_cut(stage.label, room)}\n{share} of parameters"
    wide = room >= 18 and len(plan.stages) <= _LABELLED
    axes.text(
        (stage.start + stage.stop) / 2,
        1.02,
        full if wide else str(stage.index + 1),
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=9,
        parse_math=False,
    )


def _curves(plan: Plan) -> list[tuple[str, Array]]:
    """One curve for all groups that share it, under their common names.

    A group and the one beside it without weight decay mostly have the same rates, and then are one name.
    """
    curves: dict[bytes, tuple[list[str], Array]] = {}
    for group in plan.groups:
        rates = plan.lr(group)
        curves.setdefault(rates.tobytes(), ([], rates))[0].append(group)
    return [(_named([n for n in names if n not in _twins(names)]), rates) for names, rates in curves.values()]


def _twins(names: list[str]) -> list[str]:
    return [f"{name}{_NO_DECAY}" for name in names]


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _share(part: int, whole: int) -> str:
    """As the plan's page writes it."""
    return f"{100 * part / whole:.1f} %" if part * 1000 >= whole or not part else "< 0.1 %"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"
