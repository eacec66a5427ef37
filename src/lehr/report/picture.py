"""A plan as a picture: the rate of every group over the steps, the stages as bands, what each trains; and,
where a run has changed to it, the plan before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lehr.errors import RequestError
from lehr.plan_changes import rates_of
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.shapes import Array

_POINTS = 2000  # more than the picture has pixels across
_LOWEST = 1e-5  # of the highest rate: so far down the axis goes; a cosine without a floor ends at about 0
_LABELLED = 8  # stages that there is room to label in full
_NO_DECAY = "/no_decay"
_DASHED = {"color": "0.45", "linewidth": 1.1, "linestyle": (0, (4, 2.5)), "zorder": 1.8}
_FORMATS = (".pdf", ".png", ".svg")


def draw_plan(plan: Plan, path: str | Path, *, before: Plan | None = None, at: int | None = None) -> None:
    """Write the picture of `plan` to `path`: PNG, SVG or PDF by its ending.

    A dotted upright line stands where a stage may end on evidence at the latest, and where it has ended or cooled.

    Args:
        plan: what to draw.
        path: the file to write.
        before: the plan that a run followed until it changed to this one, drawn behind it in thin dashes.
        at: the step at which the run went on with `plan`, 0 or more; an upright line stands there. Up to it
            the solid lines are what was done, the rates of `before`, and those of `plan` are dashed.

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
    _draw_rates(axes, plan, before, at or 0)
    for stage in plan.stages:
        _draw_stage(axes, plan, stage)
    steps = max(plan.total_steps, before.total_steps if before else 0)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), yscale="log")
    peak = max(rate for stage in plan.stages for rate in stage.peak_lr.values())
    axes.set_ylim(bottom=max(axes.get_ylim()[0], peak * _LOWEST))
    axes.grid(alpha=0.25)
    for number, (step, said) in enumerate(_marks(plan)):  # one above the other, for they may be near
        _draw_mark(axes, step / steps, step, said, height=0.1 + 0.06 * (number % 6), dotted=True)
    if at is not None:
        _draw_mark(axes, at / steps, at, f"resumed at {at:,}")
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


def _draw_rates(axes: Axes, plan: Plan, before: Plan | None, at: int) -> None:
    """A line for each curve, broken between stages, where rates jump; the first are wider, so all show.

    With a plan `before`, that one is followed up to step `at`, and `plan` from there on; the rest of both is
    dashed, for it was never done.
    """
    curves = _curves(plan, before)
    for colour, (names, rates, old) in enumerate(curves):
        how: dict[str, Any] = {
            "color": f"C{colour % 10}",
            "linewidth": 1.5 + 2.5 * (1 - (colour + 1) / len(curves)),
        }
        for stage in before.stages if before else ():
            _draw_line(axes, old, stage.start, min(stage.stop, at), label=None, **how)
        for stage in plan.stages:
            label = names if stage.index == 0 else None
            _draw_line(axes, rates, max(stage.start, at if before else 0), stage.stop, label=label, **how)
    label = "planned, not followed" if at else "the plan before"
    for _, rates, old in curves if before else ():
        for stage in plan.stages:
            _draw_line(axes, rates, stage.start, min(stage.stop, at), label=None, **_DASHED)
        for stage in before.stages if before else ():
            _draw_line(axes, old, max(stage.start, at), stage.stop, label=label, **_DASHED)
            label = None


def _draw_line(axes: Axes, rates: Array, start: int, stop: int, **how: Any) -> None:
    """The rates of the half-open steps [start, stop). Where there are none, the label is told all the same."""
    own = start + np.flatnonzero(rates[start:stop])  # in the turns of other objectives a group is frozen
    steps = own[np.unique(np.linspace(0, len(own) - 1, _POINTS).astype(int))] if len(own) else own
    shown = rates[steps]
    marker = "." if 0 < len(steps) <= 20 else None  # a line through a single step is nothing
    axes.plot(steps, shown, marker=marker, **how)


def _marks(plan: Plan) -> list[tuple[int, str]]:
    """Where evidence has a say: what was decided, and where a stage that waits ends at the latest."""
    marks = []
    ended = {decision.stage for decision in plan.decisions if decision.kind == "end"}
    for decision in plan.decisions:
        until = plan.stages[decision.stage].until
        what = "" if decision.kind == "end" else f"rates x {plan.stages[decision.stage].reduce:g}: "
        marks.append((decision.step, f"{what}{until}, at {decision.step:,}"))
    for stage in plan.stages:
        if stage.until and stage.index not in ended:
            ends = stage.may_end_sooner
            what = f"when {stage.until}" if ends else f"rates x {stage.reduce:g} when {stage.until}"
            marks.append((stage.stop, f"{what}{', at the latest here' if ends else ', until here'}"))
    return marks


def _draw_mark(
    axes: Axes, share: float, at: int, said: str, *, height: float = 0.04, dotted: bool = False
) -> None:
    """An upright line, with its words beside it, on the side that has more room."""
    axes.axvline(at, color="0.25", linewidth=1, zorder=1.5, linestyle=":" if dotted else "-")
    right = share < 0.5
    axes.annotate(
        said,
        (at, height),
        xycoords=axes.get_xaxis_transform(),
        xytext=(5 if right else -5, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=8,
        color="0.25",
        parse_math=False,
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


def _curves(plan: Plan, before: Plan | None) -> list[tuple[str, Array, Array]]:
    """One curve for all groups that share it, under their common names, and that of the plan before.

    A group and the one beside it without weight decay mostly have the same rates, and then are one name.
    """
    curves: dict[tuple[bytes, bytes], tuple[list[str], Array, Array]] = {}
    for group, members in plan.groups.items():
        rates, old = plan.lr(group), rates_of(before or plan, members[0], plan.owners[group])
        curves.setdefault((rates.tobytes(), old.tobytes()), ([], rates, old))[0].append(group)
    return [
        (_named([n for n in names if n not in _twins(names)]), rates, old)
        for names, rates, old in curves.values()
    ]


def _twins(names: list[str]) -> list[str]:
    return [f"{name}{_NO_DECAY}" for name in names]


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _share(part: int, whole: int) -> str:
    """As the plan's page writes it."""
    return f"{100 * part / whole:.1f} %" if part * 1000 >= whole or not part else "< 0.1 %"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"
