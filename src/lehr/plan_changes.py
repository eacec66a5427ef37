"""Two plans side by side: what differs between them in words, and the rates of the one and the other.

Pure: no torch. It says what differs, and must not know what of it is allowed (`replanning.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from lehr.plan_text import listed
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan, PlannedObjective
from lehr.shapes import Array
from lehr.untrusted import printable

_LINES = 12  # of differences that are shown
_OF_A_STAGE = 3  # of differences in the rates and decays of a stage
_CURVES = 3  # whose rates are shown beside each other
_JUMP = 1.5  # so many times the rate is told in a line of its own
_NO_DECAY = "/no_decay"
_FROZEN = (0.0, 0.0)


def plan_differences(was: Plan, now: Plan) -> tuple[str, ...]:
    """What differs between two plans and has an effect, a line each; empty where they are the same run.

    The names of the model, of groups and of stages, and the order of the model's parameters have no effect: a
    model that was merely re-ordered is no difference, though the plan's hash is another (its groups are
    lists). Neither is another way to write the same schedule, nor how what stays the same is cached. Past a
    dozen lines only their number is told.

    Example:
        >>> from lehr.recipe import Recipe, Stage
        >>> from lehr.resolving import resolve
        >>> from lehr.selection import ModelFacts, ParameterFacts
        >>> facts = ModelFacts("net", (ParameterFacts("fc.weight", (2, 4)),))
        >>> one, two = (resolve(Recipe([Stage("2 epochs", train="all", lr=0.1)], seed=s), facts, samples=64) for s in (0, 1))
        >>> plan_differences(one, two)
        ('seed 1, was 0',)
    """
    lines = [*parameter_changes(was, now), *_settings(was, now), *_stages(was, now)]
    if not lines and partition_of(was) != partition_of(now):  # else it follows from what was said
        lines.append(f"the groups of parameters are {grouped(now)}; they were {grouped(was)}")
    lines, more = [printable(line) for line in lines], len(lines) - _LINES
    return tuple(lines) if more <= 0 else (*lines[:_LINES], f"and {more} more")


def parameter_changes(was: Plan, now: Plan) -> tuple[str, ...]:
    """Parameters that are missing, new, or of another size, each kind in a line; the order does not count."""
    gone = [name for name in was.parameters if name not in now.parameters]
    new = [name for name in now.parameters if name not in was.parameters]
    sizes = [
        f"{name!r} has {now.parameters[name]:,} numbers, had {count:,}"
        for name, count in was.parameters.items()
        if now.parameters.get(name, count) != count
    ]
    in_groups = {name for names in was.groups.values() for name in names}
    verb = "the run trained" if in_groups.issuperset(gone) else "the run's model has"
    return tuple(
        line
        for names, line in (
            (gone, f"the model has no {_quoted(gone)}, which {verb}"),
            (new, f"the model has {_quoted(new)}, which the run's model has not"),
            (sizes, listed(sizes)),
        )
        if names
    )


def grouped(plan: Plan) -> str:
    """The groups of a plan, with the number of tensors in each."""
    return listed([f"{group} ({len(names)})" for group, names in plan.groups.items()], most=6)


def partition_of(plan: Plan) -> dict[str, set[frozenset[str]]]:
    """How the parameters of each objective are grouped, whatever the groups are called."""
    return {name: {frozenset(plan.groups[g]) for g in plan.groups_of(name)} for name in plan.objectives}


def rates_of(plan: Plan, parameter: str, objective: str = "") -> Array:
    """The rate of one parameter at every step, in an objective's turns: float64, shape [total_steps]; 0.0 where it is
    frozen.
    """
    own = plan.groups_of(objective) if objective in plan.objectives else ()
    group = next((group for group in own if parameter in plan.groups[group]), None)
    return np.zeros(plan.total_steps) if group is None else plan.lr(group)


def rates_compared(was: Plan, now: Plan, *, step: int) -> str:
    """A table of rates from `step` on, old -> new, for the groups with the highest new rates; and a line for
    each that the new plan makes rise there by more than half.

    `-` stands where a plan has no such step. A group is known by its parameters, not by its name.

    Args:
        was: the plan that was followed so far.
        now: the plan to follow.
        step: updates that are done, 0 or more.
    """
    if step >= now.total_steps:
        return f"Nothing is left to train: {step:,} steps are done, and the plan has {now.total_steps:,}."
    curves = _curves(was, now, step)
    last = now.total_steps - 1
    ends = {was.total_steps - 1: "the old plan's last", last: "the last"}
    steps = {step, *(step + (last - step) * k // 4 for k in (1, 2, 3)), *(t for t in ends if t >= step)}
    rows = [("step", *(curve.name for curve in curves[:_CURVES]), "")]
    for t in sorted(steps):
        rates = (f"{_rate(curve.old, t):>8} -> {_rate(curve.new, t):<8}" for curve in curves[:_CURVES])
        rows.append((f"{t:,}", *rates, ends.get(t, "")))
    rises = [rise for curve in curves if (rise := _rise(was, now, step, curve))]
    return "\n".join(
        [
            *_table(rows),
            *_more(len(curves) - _CURVES, "lower rates are not shown"),
            *rises[:_CURVES],
            *_more(len(rises) - _CURVES, "rates rise there"),
        ]
    )


@dataclass(frozen=True)
class _Curve:
    """The old and the new rates that all groups in `name` have; `parameter` is one of theirs."""

    name: str
    parameter: str
    old: Array
    new: Array


def _curves(was: Plan, now: Plan, step: int) -> list[_Curve]:
    """A curve for all groups that share it and train from `step` on; the highest new rates come first."""
    sharing: dict[tuple[bytes, bytes], list[str]] = {}
    for group, names in now.groups.items():
        old, new = rates_of(was, names[0], now.owners[group]), now.lr(group)
        if new[step:].any() or old[step:].any():
            sharing.setdefault((old.tobytes(), new.tobytes()), []).append(group)
    curves = []
    for groups in sharing.values():
        first, objective = now.groups[groups[0]][0], now.owners[groups[0]]
        old = rates_of(was, first, objective)
        curves.append(_Curve(printable(listed(_told(groups), 2)), first, old, now.lr(groups[0])))
    return sorted(curves, key=lambda curve: -curve.new[step:].max())


def _rise(was: Plan, now: Plan, step: int, curve: _Curve) -> str:
    """A line where the new plan makes the rate rise at `step`; empty where it does not, or not by much."""
    over = step >= was.total_steps
    at = was.total_steps - 1 if over else step
    if not curve.old[at] or curve.new[step] <= _JUMP * curve.old[at]:
        return ""
    stage, before = now.stage_at(step), was.stage_at(at)
    if over and stage.start == step:
        why = f"stage {stage.index + 1} begins"
    elif stage.index == before.index and _is_stretched(was, now, stage.index):
        why = "the schedule is laid over the longer stage"
    else:
        why = "the new plan says so"
    return (
        f"The rate of {curve.name} rises at step {step:,} "
        f"from {curve.old[at]:.1e} to {curve.new[step]:.1e}: {why}."
    )


def _is_stretched(was: Plan, now: Plan, index: int) -> bool:
    before, after = was.stages[index], now.stages[index]
    return after.steps > before.steps and _said(was, before) == _said(now, after)


def _rate(rates: Array, t: int) -> str:
    """A rate with three digits, 0 where nothing moves, "-" past the end."""
    if t >= len(rates):
        return "-"
    return f"{rates[t]:.2e}" if rates[t] else "0"


def _more(count: int, what: str) -> list[str]:
    return [f"  and {count} more, whose {what}"] if count > 0 else []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns to the right, two spaces apart; the last one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]


def _settings(was: Plan, now: Plan) -> Iterator[str]:
    """What is said once for the whole run."""
    if was.samples != now.samples:
        yield f"{now.samples:,} training samples, were {was.samples:,}"
    for name in dict.fromkeys((*was.objectives, *now.objectives)):
        where = f"objective {name}: " if name else ""
        before, after = was.objectives.get(name), now.objectives.get(name)
        if before and after:
            yield from (where + line for line in _optimizer(before, after))
        elif name:
            yield f"{where}is new" if after else f"{where}is gone"
    for key in ("seed", "ema", "min_lr", "label_smoothing", "monitor", "patience", "augment"):
        old, new = getattr(was, key), getattr(now, key)
        if old != new:
            yield f"min_lr {new:g}, was {old:g}" if key == "min_lr" else f"{key} {_pair(new, old)}"


def _optimizer(before: PlannedObjective, after: PlannedObjective) -> Iterator[str]:
    if before.optimizer.lower() != after.optimizer.lower():  # a name counts in any case
        yield f"optimizer {after.optimizer}, was {before.optimizer}"
    for key in dict.fromkeys((*before.optimizer_settings, *after.optimizer_settings)):
        old, new = (
            repr(one.optimizer_settings[key]) if key in one.optimizer_settings else "not set"
            for one in (before, after)
        )
        if old != new:
            yield f"optimizer: {key} {new}, was {old}"
    if before.clip_norm != after.clip_norm:
        yield f"clip_norm {_pair(after.clip_norm, before.clip_norm)}"


def _word(value: object) -> str:
    """A setting in a word: what is infinite, 0.0 or empty is not there."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if isinstance(value, float):
        return "none" if value in (0.0, inf) else f"{value:g}"
    return str(value)


def _stages(was: Plan, now: Plan) -> Iterator[str]:
    if len(was.stages) != len(now.stages):
        yield f"{len(now.stages)} stage{'s' if len(now.stages) > 1 else ''}, were {len(was.stages)}"
    for before, after in zip(was.stages, now.stages, strict=False):
        changes = (
            *_length(before, after),
            *_schedule(was, now, before, after),
            *_evidence(before, after),
            *_rates(was, now, after.index),
        )
        yield from (f"stage {after.index + 1}: {change}" for change in changes)
    for stage in now.stages[len(was.stages) :]:
        yield f"stage {stage.index + 1}: is new, {stage.label}, steps {_steps(stage)}"


def _length(before: PlannedStage, after: PlannedStage) -> Iterator[str]:
    if _steps(before) != _steps(after):
        yield f"steps {_steps(after)}, were {_steps(before)}"
    if before.steps_per_epoch != after.steps_per_epoch:
        yield f"{after.steps_per_epoch:,} steps in an epoch, were {before.steps_per_epoch:,}"
    for key in ("batch_size", "accumulate", "restore_best", "views"):
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            yield f"{key} {str(new).lower()}, was {str(old).lower()}"


def _schedule(was: Plan, now: Plan, before: PlannedStage, after: PlannedStage) -> Iterator[str]:
    """Whose turns there are, and what the schedules say; the same words over other steps follow from the length."""
    turns = [[(t.objective, t.every, t.repeat) for t in stage.turns] for stage in (before, after)]
    if turns[0] != turns[1]:
        yield f"the turns are {_turns(after)}; they were {_turns(before)}"
        return
    same_length = (before.span, before.steps_per_epoch) == (after.span, after.steps_per_epoch)
    for old, new, old_said, new_said in zip(
        before.turns, after.turns, _said(was, before), _said(now, after), strict=True
    ):
        name = f"{new.objective}: " if new.objective else ""
        if old.schedule == new.schedule:
            continue
        if old_said != new_said:
            yield f"{name}schedule {new_said}, was {old_said}"
        elif same_length:
            yield f"{name}schedule {new.schedule}, was {old.schedule}"


def _turns(stage: PlannedStage) -> str:
    """Whose turns there are, how often."""
    return ", ".join(
        f"{t.objective or 'all in one'} (every {t.every}, {t.repeat} a turn)" for t in stage.turns
    )


def _evidence(before: PlannedStage, after: PlannedStage) -> Iterator[str]:
    """What ends or cools the stage on evidence."""
    for key in ("until", "every", "reduce", "reductions", "clock"):
        old, new = getattr(before, key), getattr(after, key)
        endless = not (before.may_end_sooner or after.may_end_sooner)
        if old != new and (key != "reductions" or not (endless or before.reduce != after.reduce)):
            yield f"{key} {new or 'none'}, was {old or 'none'}"


def _rates(was: Plan, now: Plan, index: int) -> list[str]:
    """What a stage trains, at which peak and decay, of each objective."""
    objectives = [name for name in now.objectives if name in was.objectives]
    lines = [line for objective in objectives for line in _rates_of(was, now, index, objective)]
    more = len(lines) - _OF_A_STAGE
    return lines if more <= 0 else [*lines[:_OF_A_STAGE], f"and {more} more of its rates and decays"]


def _rates_of(was: Plan, now: Plan, index: int, objective: str) -> Iterator[str]:
    """Parameter by parameter, for the groups may differ too."""
    before, after = _of_parameters(was, index, objective), _of_parameters(now, index, objective)
    where = f"{objective}: " if objective else ""
    changed: dict[str, list[str]] = {}
    for name in now.parameters:
        if name not in was.parameters:
            continue
        (rate, decay), (new_rate, new_decay) = before.get(name, _FROZEN), after.get(name, _FROZEN)
        if bool(rate) != bool(new_rate):
            change = "{} trained, was frozen" if new_rate else "{} frozen, was trained"
            changed.setdefault(change, []).append(name)
            continue
        if rate != new_rate:
            changed.setdefault(f"peak rate of {{}} {_pair(new_rate, rate)}", []).append(name)
        if rate and decay != new_decay:
            changed.setdefault(f"weight decay of {{}} {_pair(new_decay, decay)}", []).append(name)
    for change, names in changed.items():
        yield where + change.format(_named(names, was, now, objective))


def _of_parameters(plan: Plan, index: int, objective: str) -> dict[str, tuple[float, float]]:
    """Peak rate and weight decay of every parameter that an objective trains in any stage, in one stage."""
    stage = plan.stages[index]
    return {
        name: (stage.peak_lr[group], stage.weight_decay[group])
        for group in plan.groups_of(objective)
        for name in plan.groups[group]
    }


def _named(names: Sequence[str], was: Plan, now: Plan, objective: str) -> str:
    """Parameters by their groups, new or old, where these are whole; else by their own names."""
    left, words = dict.fromkeys(names), list[str]()
    for plan in (now, was):
        for group in plan.groups_of(objective):
            if left.keys() >= set(plan.groups[group]):
                words.append(group)
                left = {name: None for name in left if name not in plan.groups[group]}
    return listed([*_told(words), *map(repr, left)])


def _told(groups: Sequence[str]) -> list[str]:
    """Groups without those that differ from one beside them in nothing but that they do not decay."""
    return [group for group in groups if group.removesuffix(_NO_DECAY) not in set(groups) - {group}]


def _said(plan: Plan, stage: PlannedStage) -> tuple[str, ...]:
    """The schedules of a stage as they were written."""
    return plan.said[stage.index]


def _steps(stage: PlannedStage) -> str:
    return f"{stage.start:,} to {stage.stop:,}"


def _pair(new: object, old: object) -> str:
    """Both values, as short as they still differ."""
    words = [_word(value) for value in (new, old)]
    return "{}, was {}".format(*(words if words[0] != words[1] else map(repr, (new, old))))


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])
