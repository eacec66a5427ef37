"""A run made short: the same recipe, on a few samples of the same data, in a few steps.

What decides how a run goes on after a stop stays as it is: model, stages and what they train, optimizer,
batches, accumulation, clipping, averaging, augmentation. Pure: no torch, no files, no clock. It must not know
what the short run is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil
from typing import Any

from lehr.curves import Part, Schedule
from lehr.data.listing import Item, Listing
from lehr.duration import Duration
from lehr.errors import RecipeError, ScheduleError
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan, batches_in
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant
from lehr.selection import ModelFacts
from lehr.shapes import Shape

_STEPS_PER_EPOCH = Fraction(46, 10)  # of the stage with the smallest steps, so that its last one is not full
_LEAST_PER_EPOCH = Fraction(26, 10)  # of the one with the largest
_EPOCHS = 2
_VIEWS = 2  # of each sample, where there are more, and one epoch more, so that views come again
_FEW, _MOST = 6, 12  # steps of a stage, where the recipe has as many
_VALIDATED = 32  # samples in a batch of validation, at least


@dataclass(frozen=True)
class Short:
    """A short run: its recipe and data, the plan that they make, and in words what was shortened."""

    recipe: Recipe
    listing: Listing
    plan: Plan
    said: tuple[str, ...]


def shortened(recipe: Recipe, plan: Plan, facts: ModelFacts, listing: Listing) -> Short:
    """The run of `recipe` on `listing`, made short.

    Every stage keeps at most two epochs and twelve steps; one with several fixed views two of them, and three
    epochs. The training samples are the first of each class, as
    many as give a stage about five steps an epoch (three, where the stages' batches differ much); the samples
    to validate on make about two batches. A schedule that says more steps or epochs than a stage has left is
    scaled down with its stage.

    Args:
        recipe: the whole run's.
        plan: what it means for the model and all samples.
        facts: of the model.
        listing: all samples.
    """
    if any(stage.objectives for stage in recipe.stages):
        raise RecipeError(
            "stages: objectives have loss functions, which only Python can give; such a run is trained with lehr.fit, "
            "and stopped and resumed there"
        )
    sizes = [stage.batch_size * stage.accumulate for stage in plan.stages]
    train = _few(listing.train, ceil(max(_STEPS_PER_EPOCH * min(sizes), _LEAST_PER_EPOCH * max(sizes))))
    batch = max(_VALIDATED, *(stage.batch_size for stage in plan.stages))
    valid = _few(listing.valid, batch + batch // 2)
    stages, said = [], []
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        short = _short_stage(stage, stage.schedule or recipe.schedule, planned, len(train))
        stages.append(short)
        said += _differences(stage, short, planned)
    few = replace(listing, train=train, valid=valid, findings=())
    made = replace(recipe, stages=tuple(stages))
    return Short(made, few, resolve(made, facts, samples=len(train)), tuple(said))


def _few(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """`count` of the items, the first of every class before the second of any; in their order."""
    seen: Counter[int] = Counter()
    rank = []
    for place, item in enumerate(items):
        rank.append((seen[item.label], item.label, place))
        seen[item.label] += 1
    return tuple(items[place] for place in sorted(place for *_, place in sorted(rank)[:count]))


def _short_stage(stage: Stage, schedule: Schedule, planned: PlannedStage, samples: int) -> Stage:
    per_epoch = -(-batches_in(samples, planned.batch_size) // planned.accumulate)
    said = (
        Duration(Fraction(planned.steps), "steps") if stage.clock == "run" else Duration.parse(stage.length)
    )
    views = planned.views if planned.views == "fresh" else min(planned.views, _VIEWS)
    length = _short_length(said, per_epoch, _EPOCHS + (views == _VIEWS))
    steps = length.steps(steps_per_epoch=per_epoch)
    again = steps > per_epoch * (1 if views == "fresh" else views)
    fitting = _fitting(schedule, planned, steps, per_epoch)
    every = None if stage.every is None else str(_whole(min(planned.every, steps), "steps"))
    kept = stage.schedule if fitting == schedule else fitting
    return replace(
        stage, length=str(length), schedule=kept, every=every, clock="stage",
        views=stage.views if views == planned.views else views,
        cache="auto" if planned.cache == "require" and not again else stage.cache,
    )  # fmt: skip


def _short_length(length: Duration, per_epoch: int, epochs: int) -> Duration:
    """At most so many epochs, or as many as make six steps; never more than twelve steps."""
    epochs = max(epochs, -(-_FEW // per_epoch))
    short = Duration(min(length.amount, Fraction(epochs if length.unit == "epochs" else _MOST)), length.unit)
    most = min(_MOST, epochs * per_epoch)
    return short if short.steps(steps_per_epoch=per_epoch) <= most else Duration.parse(f"{most} steps")


def _fitting(schedule: Schedule, planned: PlannedStage, steps: int, per_epoch: int) -> Schedule:
    """The schedule as it is where a stage of `steps` has room for it; else scaled down; else the peak rate."""
    for way in (schedule, _scaled(planned.turns[0].schedule, Fraction(steps, planned.steps))):
        try:
            way.over(steps=steps, steps_per_epoch=per_epoch)
        except ScheduleError:
            continue
        return way
    return constant()


def _scaled(schedule: Schedule, by: Fraction) -> Schedule:
    """A schedule of whole steps, all of it `by` times as long; the seams stay in their places."""
    parts: list[Part] = []
    seam = Fraction(0)
    for part in schedule.parts:
        assert part.length is not None
        length = round((seam + part.length.amount) * by) - round(seam * by)
        seam += part.length.amount
        inner = Fraction(length) / part.length.amount if part.per == "step" else by
        parts.append(replace(part, shape=_scaled_shape(part.shape, inner), length=_whole(length, "steps")))
    return Schedule(tuple(parts))


def _scaled_shape(shape: Shape, by: Fraction) -> Shape:
    """A shape whose own lengths, all absolute, are `by` times as long, and at least one."""

    def scaled(value: Any) -> Any:
        if isinstance(value, Duration) and value.unit != "%":
            return _whole(max(1, round(value.amount * by)), value.unit)
        return tuple(map(scaled, value)) if isinstance(value, tuple) else value

    changed = {f.name: scaled(getattr(shape, f.name)) for f in fields(shape)}  # type: ignore[arg-type]  # a dataclass
    return replace(shape, **{k: v for k, v in changed.items() if v != getattr(shape, k)})  # type: ignore[type-var]


def _whole(count: int, unit: Any) -> Duration:
    return Duration(Fraction(count), unit)


def _differences(stage: Stage, short: Stage, planned: PlannedStage) -> list[str]:
    said, where = [], f"stage {planned.index + 1}"
    if stage.length != short.length:
        said.append(f"{where}: {short.length} instead of {stage.length}")
    if stage.views != short.views:
        said.append(f"{where}: {short.views} views of each sample instead of {planned.views}")
    if stage.schedule != short.schedule:
        said.append(f"{where}: its schedule, scaled down to fit: {short.schedule}")
    return said
