"""Going on with another plan: what a run that was begun by one plan may go on with, and a longer recipe.

A plan has no history, so a run may change to any plan in which the place where it stands has the same
meaning. Pure: no torch, no files, no clock. It must not know what a checkpoint is; a place is three numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lehr.duration import Duration
from lehr.errors import DurationError, RecipeError
from lehr.plan_changes import grouped, parameter_changes, partition_of
from lehr.plan_text import listed
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.untrusted import printable

_ANEW = "or begin a new run from its weights: lehr fit DATA --weights RUN/best.safetensors"


def check_continuation(was: Plan, now: Plan, *, stage: int, epoch: int, step: int) -> None:
    """Refuse to go on with `now` what `was` has begun, where that cannot be.

    Rates, decays, schedules, lengths, later stages, and how the run is judged and ended may differ. What was
    done stays: the model, its groups, the optimizer and the kind of state that it keeps, the steps and epochs
    of the stages before; and of a stage that has begun what it trains and how its epochs are cut into steps,
    since the order of the data is a function of the epoch (a step may become smaller batches, accumulated). In
    the middle of an epoch the seed and the number of samples stay too. A begun stage keeps its views; caches may change.

    Args:
        was: the plan that was followed so far.
        now: the plan to follow.
        stage: the stage to go on in, 0-based.
        epoch: the epoch to go on in, 0-based over the run; after a stage's last epoch the one after it.
        step: updates that are done, from the stage's first to its last and one.

    Raises:
        RecipeError: with a line for every reason, each with the way out.
    """
    reasons = [*_state(was, now), *_place(was, now, stage, epoch, step)]
    if reasons:
        raise RecipeError(
            "\n".join(f"resume: stage {stage + 1}, step {step:,}: {printable(reason)}" for reason in reasons)
        )


def extended(recipe: Recipe, by: str) -> Recipe:
    """The recipe with a last stage that is longer `by` a duration of the same unit.

    What its schedule says in absolute lengths stays as it is (`warmup("500 steps")`, `step_decay(at=["30
    epochs"])`); percentages, and the part that takes what the others leave, stretch over the longer stage. So
    a rate that had come down may rise again: `rates_compared` shows it.

    Raises:
        DurationError: where `by` is no duration, is 0 or a share, or has another unit than the stage's length.

    Example:
        >>> from lehr.recipe import Stage
        >>> extended(Recipe([Stage("5 epochs", train="all", lr=0.1)]), "2.5 epochs").stages[-1].length
        '7.5 epochs'
    """
    more = Duration.parse(by, where="extend")
    last = recipe.stages[-1]
    length = Duration.parse(last.length)
    if more.unit == "%":
        raise DurationError(f'extend: "{by}" is a share, but of what? Write {length.unit}, as the last stage')
    if not more.amount:
        raise DurationError(f'extend: "{by}" adds nothing; write how much longer, for example "1 epoch"')
    if more.unit != length.unit:
        raise DurationError(
            f'extend: "{by}" cannot be added to the "{length}" of the last stage, for a recipe does not know how '
            f"many steps an epoch has; write {length.unit}"
        )
    longer = replace(last, length=str(Duration(length.amount + more.amount, length.unit)))
    return replace(recipe, stages=(*recipe.stages[:-1], longer))


def _state(was: Plan, now: Plan) -> Iterator[str]:
    """What does not fit the state that was saved."""
    other_model = parameter_changes(was, now)
    for change in other_model:
        yield f"{change}; go on with the model that the run began with, {_ANEW}"
    if not other_model and was.objectives.keys() != now.objectives.keys():
        yield (
            f"the objectives are {_names(now)}, were {_names(was)}, and each has an optimizer of its own; "
            f"leave them as they were, {_ANEW}"
        )
    elif not other_model and partition_of(was) != partition_of(now):
        yield (
            f"the groups of parameters are {grouped(now)}; they were {grouped(was)}. A group has one rate and "
            "one decay and stays together, so let `train`, `lr`, `no_decay` and `layer_decay` name the same "
            f"parts as before, with other numbers, {_ANEW}"
        )
    for name in was.objectives.keys() & now.objectives.keys():
        before, after = was.objectives[name], now.objectives[name]
        whose = f"the optimizer of {name}" if name else "the optimizer"
        if before.optimizer.lower() != after.optimizer.lower():
            yield (
                f"{whose} is {after.optimizer}, was {before.optimizer}, and its state is of no use to another; "
                f"leave it as it was, {_ANEW}"
            )
        else:
            yield from _settings(whose, before.optimizer_settings, after.optimizer_settings)
    if was.monitor != now.monitor:
        yield (
            f"monitor is {now.monitor!r}, was {was.monitor!r}, by which the best weights so far were chosen; "
            f"leave it as it was, {_ANEW}"
        )
    if bool(was.ema) != bool(now.ema):
        turned = "turned on, and there is no average so far" if now.ema else "turned off"
        yield f"ema is {turned}; leave it as it was (another decay would do), {_ANEW}"


def _names(plan: Plan) -> str:
    return listed([name or "that of ordinary stages" for name in plan.objectives])


def _settings(whose: str, was: Any, now: Any) -> Iterator[str]:
    """Numbers may change; what decides which state is kept may not: switches, and a momentum from nothing."""
    for key in dict.fromkeys((*was, *now)):
        a, b = was.get(key), now.get(key)
        if a != b and not (_are_numbers(a) and _are_numbers(b)):
            said = "was not set" if key not in was else f"was {a!r}"
            found = "not set" if key not in now else repr(b)
            yield (
                f"{whose}'s {key} is {found}, {said}, which changes what state it keeps; "
                f"leave it as it was, {_ANEW}"
            )


def _are_numbers(value: object) -> bool:
    """A number that is not 0, or a list of such."""
    if isinstance(value, (list, tuple)):
        return all(map(_are_numbers, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _place(was: Plan, now: Plan, stage: int, epoch: int, step: int) -> Iterator[str]:
    """Why the place has another meaning in `now`; nothing where it has the same."""
    if stage >= len(now.stages):
        yield f"the plan has only {len(now.stages)} of the stages; keep this one, at its length or shorter"
        return
    for before, after in zip(was.stages[:stage], now.stages[:stage], strict=True):
        if _extent(before) != _extent(after):
            yield (
                f"stage {before.index + 1} is done, {_in_words(before)}; the plan has it {_in_words(after)}. "
                "Leave its length, batch_size and accumulate, and the number of samples, as they were"
            )
            return
    yield from _decided(was, now, stage)
    before, after = was.stages[stage], now.stages[stage]
    if step > before.start:
        changed = list(_begun(was, now, stage))
        yield from changed
        if changed:
            return
    yield from _ends(before, after, epoch, step)
    inside = any(number == epoch and a < step < b for number, a, b in before.epoch_ranges())
    for name, old, new in (("seed", was.seed, now.seed), ("samples", was.samples, now.samples)):
        if inside and old != new:
            yield (
                f"in the middle of epoch {epoch + 1}, the rest of which would come from another order: "
                f"{name} {new:,}, was {old:,}; leave it as it was, or go on from the end of an epoch"
            )


def _decided(was: Plan, now: Plan, stage: int) -> Iterator[str]:
    """What may not change, since evidence has decided on it: it would have no effect, or change what is done."""
    for before, after in zip(was.stages[: stage + 1], now.stages[: stage + 1], strict=True):
        ends = [d.step for d in was.decisions if d.kind == "end" and d.stage == before.index]
        if ends and (before.span, before.until) != (after.span, after.until):
            yield (
                f"stage {before.index + 1} has ended on evidence, after step {ends[0]:,} ({before.until}), so another length or "
                f"condition has no effect; leave them as they were, and write a stage after it, {_ANEW}"
            )
        if before.cooled and before.reduce != after.reduce:
            yield (
                f"stage {before.index + 1} has cooled by {before.reduce:g} already, {len(before.cooled)} times; leave `reduce` as "
                "it was, or write a stage after it"
            )


def _begun(was: Plan, now: Plan, stage: int) -> Iterator[str]:
    """What may not change of a stage some of whose steps are done."""
    before, after = was.stages[stage], now.stages[stage]
    end_it = f"or end stage {stage + 1} here and write a stage after it"
    # Smaller batches, accumulated to the same step, are of the same samples.
    if before.batch_size * before.accumulate != after.batch_size * after.accumulate:
        yield (
            f"the stage has begun with {_batches(before)}, the plan has {_batches(after)}; "
            f"leave batch_size and accumulate as they were, {end_it}"
        )
    elif before.steps_per_epoch != after.steps_per_epoch:
        yield (
            f"the stage has begun with {before.steps_per_epoch:,} steps in an epoch, the plan has "
            f"{after.steps_per_epoch:,} ({now.samples:,} training samples, were {was.samples:,}); "
            "give the data that the run began with"
        )
    if before.views != after.views:
        yield (
            f"the stage has begun with {_seen(before)}, the plan has {_seen(after)}; leave `views` as it was, {end_it}"
        )
    turns = [[(turn.objective, turn.every, turn.repeat) for turn in s.turns] for s in (before, after)]
    if turns[0] != turns[1]:
        yield f"the stage has begun, and its objectives take other turns in the plan; leave them as they were, {end_it}"
        return
    shared = was.parameters.keys() & now.parameters.keys()
    trained, trains = was.trainable(before) & shared, now.trainable(after) & shared
    if trained != trains:
        odd = ", ".join(
            f"{word} {listed(sorted(names))}"
            for word, names in (("thaws", trains - trained), ("freezes", trained - trains))
            if names
        )
        yield (
            f"the stage has begun, and the plan {odd} in it; a stage trains the same from its first step to "
            f"its last, so leave its `train` as it was, {end_it}"
        )


def _ends(before: PlannedStage, after: PlannedStage, epoch: int, step: int) -> Iterator[str]:
    """Why the epochs of a stage of another length do not have the place."""
    if after.stop < step:
        yield (
            f"the plan ends the stage at step {after.stop:,}, which is past; "
            f'make it at least "{step - after.start} steps" long'
        )
    elif not _has(after, epoch, step):
        done, over = (step - before.start) % before.steps_per_epoch, before.first_epoch + before.epochs
        if epoch == over and step == before.stop and done:
            why = (
                f"the stage has ended within an epoch, after {done:,} of {before.steps_per_epoch:,} steps, and that "
                "epoch is validated and counted"
            )
        else:
            why = f"neither plan has epoch {epoch + 1} at this step"
        yield f"{why}, so it cannot be made longer; leave its length and write a stage after it, {_ANEW}"


def _has(stage: PlannedStage, epoch: int, step: int) -> bool:
    """Whether a run of `stage` comes by this place."""
    at_its_end = epoch == stage.first_epoch + stage.epochs and step == stage.stop
    return at_its_end or any(number == epoch and a <= step <= b for number, a, b in stage.epoch_ranges())


def _extent(stage: PlannedStage) -> tuple[int, ...]:
    return stage.start, stage.stop, stage.first_epoch, stage.epochs


def _in_words(stage: PlannedStage) -> str:
    epochs = f"{stage.epochs} epoch" + ("" if stage.epochs == 1 else "s")
    return f"from step {stage.start:,} to {stage.stop:,} in {epochs}"


def _seen(stage: PlannedStage) -> str:
    if stage.views == "fresh":
        return "fresh views"
    return f"{stage.views:,} fixed view{'s' if stage.views > 1 else ''} of each sample"


def _batches(stage: PlannedStage) -> str:
    several = f", {stage.accumulate} to a step" if stage.accumulate > 1 else ""
    return f"batches of {stage.batch_size:,}{several}"
