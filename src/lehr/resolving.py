"""Recipe + facts -> Plan: words become numbers before the first batch. Pure: no torch, no files, no clock.

Here each key of a recipe comes to what it means for a model: what trains, the groups, rates and decays, the
steps of each stage, and the notes on what a person should know. It must not know how a plan is read, stored
or printed (`planning.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from lehr.byte_size import byte_size
from lehr.duration import Duration
from lehr.errors import RecipeError
from lehr.grouping import Task, batch_of, groups_of, settings_of, settled, tasks_of
from lehr.plan_text import listed
from lehr.plan_values import MOST_IN_TURNS, MOST_STEPS
from lehr.planned_stage import PlannedStage, Turn, steps_in_epoch
from lehr.planning import Caching, Plan, PlannedObjective, batches_in
from lehr.recipe import Recipe, Stage
from lehr.recipe_values import optimizer_named
from lehr.schedules import constant
from lehr.selection import ModelFacts, hides_module

_FOLLOWS_LATE = {"rprop": "at its first step only, so no schedule moves it", "asgd": "one step late"}


def resolve(recipe: Recipe, facts: ModelFacts, *, samples: int, batches: int | None = None) -> Plan:
    """The plan of `recipe` for a model of which `facts` are known and `samples` training samples.

    Args:
        recipe: what the person wrote.
        facts: from `lehr.inspect(model)`.
        samples: training samples in one epoch, 1 or more.
        batches: batches in one epoch, 1 or more, where a data loader has decided them; computed from
            `samples` where it is not given.

    Raises:
        RecipeError: (or one of its kinds) for anything that cannot be, naming the stage and the key.
    """
    samples = _whole("samples", samples, "a plan needs at least one training sample")
    if batches is not None:
        batches = _whole("batches", batches, "an epoch needs at least one batch")
    tasks = [tasks_of(stage) for stage in recipe.stages]
    settings = [
        {task.name: settings_of(recipe, index, task, facts) for task in of_stage}
        for index, of_stage in enumerate(tasks)
    ]
    groups = groups_of(settings, tasks, recipe, facts)
    _check_min_lr(recipe, settings)
    stages: list[PlannedStage] = []
    for index, stage in enumerate(recipe.stages):
        batch_size, accumulate = batch_of(recipe, stage)
        in_epoch = batches_in(samples, batch_size) if batches is None else batches
        rates = settled(groups, settings[index])
        length = _length(stage, -(-in_epoch // accumulate), stages[-1] if stages else None)
        planned = PlannedStage(
            index=index, label=_label(stage), start=length.start, stop=length.stop, first_epoch=length.first_epoch,
            steps_per_epoch=length.steps_per_epoch, rounds_per_epoch=length.rounds_per_epoch,
            batch_size=batch_size, accumulate=accumulate, turns=length.turns,
            peak_lr={group: rate for group, (rate, _) in rates.items()},
            weight_decay={group: decay for group, (_, decay) in rates.items()},
            restore_best=recipe.restore_best if stage.restore_best is None else stage.restore_best,
            span=length.span, clock=stage.clock, **_evidence(stage, length),
            views=recipe.views if stage.views is None else stage.views,
            cache=recipe.cache if stage.cache is None else stage.cache,
        )  # fmt: skip
        _check_cache(planned, whole=len(settings[index].get("", {})) == len(facts.parameters))
        stages.append(_in_steps(recipe, planned))
    if stages[-1].stop > MOST_STEPS:
        raise RecipeError(
            f"stages: {stages[-1].stop:,} steps in all; a plan has {MOST_STEPS:,} at most, so make them shorter"
        )
    owners = {group: objective for objective, of_objective in groups.items() for group in of_objective}
    flat = {group: names for of_objective in groups.values() for group, names in of_objective.items()}
    return Plan(
        model=facts.name, samples=samples, stages=tuple(stages), groups=flat, owners=owners,
        parameters={p.name: p.count for p in facts.parameters},
        objectives=_objectives(recipe, tasks), min_lr=recipe.min_lr, ema=recipe.ema or 0.0,
        label_smoothing=recipe.label_smoothing, seed=recipe.seed, monitor=recipe.monitor,
        patience=math.inf if recipe.patience is None else float(Duration.parse(recipe.patience).amount),
        caching=Caching(byte_size(recipe.cache_budget), recipe.cache_dtype, recipe.cache_exact),
        said=tuple(
            tuple(str(task.schedule or stage.schedule or recipe.schedule) for task in of_stage)
            for stage, of_stage in zip(recipe.stages, tasks, strict=True)
        ),
        augment=tuple(recipe.augment or ()),
        notes=_notes(recipe, facts, stages, flat, samples if batches is None else 0),
    )  # fmt: skip


@dataclass(frozen=True)
class _Length:
    """Where a stage lies, how its epochs are cut, and how many steps its schedules are laid over."""

    index: int
    start: int
    stop: int
    first_epoch: int
    steps_per_epoch: int
    rounds_per_epoch: int
    turns: tuple[Turn, ...]
    span: int


def _length(stage: Stage, rounds: int, before: PlannedStage | None) -> _Length:
    index, start = (before.index + 1, before.stop) if before else (0, 0)
    turns = tuple(Turn(task.name, task.every, task.repeat, constant()) for task in tasks_of(stage))
    steps_per_epoch = steps_in_epoch(turns, rounds)
    if stage.objectives and steps_per_epoch > MOST_IN_TURNS:
        raise RecipeError(
            f"stages.{index}.objectives: {steps_per_epoch:,} updates in an epoch; objectives share "
            f"{MOST_IN_TURNS:,} at most, so make batches larger"
        )
    said = Duration.parse(stage.length)
    span = said.steps(steps_per_epoch=steps_per_epoch, where=f"stages.{index}.length")
    stop = span if stage.clock == "run" else start + span
    if stop <= start:
        raise RecipeError(
            f'stages.{index}.length: "{said}" counted from the run\'s start (clock = "run") ends at step {stop:,}, and '
            f"the stages before it may last until step {start:,}; make it longer, or leave `clock` out"
        )
    first_epoch = before.first_epoch + before.epochs if before else 0
    return _Length(index, start, stop, first_epoch, steps_per_epoch, rounds, turns, span)


def _evidence(stage: Stage, length: _Length) -> dict[str, Any]:
    """What ends or cools a stage before its length, in steps."""
    until = stage.until
    if until is None:
        return {}
    where = f"stages.{length.index}"
    named = [f"{turn.objective}_" for turn in length.turns if turn.objective]
    if named and until.of_training and until.name != "loss" and not until.name.startswith(tuple(named)):
        raise RecipeError(
            f"{where}.until: {until.metric!r} is of no objective; write whose it is, for example train_{named[0]}loss"
        )
    every = 0 if stage.every is None else Duration.parse(stage.every).steps()
    if every > length.span:
        raise RecipeError(
            f"{where}.every: {every:,} steps, and the stage has {length.span:,} at the most, so `until` "
            "would never be checked; write fewer"
        )
    if every and until.kind == "plateaus":
        steps = until.patience.steps(steps_per_epoch=length.steps_per_epoch)
        until = replace(until, patience=Duration(Fraction(steps), "steps"))
    said = stage.reduce
    if said is None:
        return {"until": str(until), "every": every}
    by, times = (
        (said["by"], said.get("times", length.stop)) if isinstance(said, Mapping) else (said, length.stop)
    )
    return {"until": str(until), "every": every, "reduce": by, "reductions": min(int(times), length.stop)}


def _objectives(recipe: Recipe, tasks: Sequence[Sequence[Task]]) -> dict[str, PlannedObjective]:
    """An optimizer for each objective; the same name in several stages is the same one."""
    said: dict[str, tuple[str, tuple[str, Mapping[str, Any], float]]] = {}
    for index, of_stage in enumerate(tasks):
        for task in of_stage:
            own = task.said.optimizer if task.said else None
            clip = task.said.clip_norm if task.said else None
            name, settings = optimizer_named(recipe.optimizer if own is None else own)
            largest = recipe.clip_norm if clip is None else clip
            made = (name, settings, math.inf if largest is None else largest)
            where, before = said.setdefault(task.name, (f"stages.{index}.{task.key}", made))
            if before != made:
                raise RecipeError(
                    f"stages.{index}.{task.key}optimizer: {task.name!r} has another optimizer or clip_norm than in "
                    f"{where.rstrip('.')}; one name is one optimizer, so say the same, or give it another name"
                )
    return {name: PlannedObjective(*made) for name, (_, made) in said.items()}


def _whole(name: str, value: object, needs: str) -> int:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1:
        return int(value)
    raise RecipeError(f"{name}={value!r}; {needs}: expected a whole number, 1 or more")


def _in_steps(recipe: Recipe, planned: PlannedStage) -> PlannedStage:
    """The stage with its schedules in whole steps; one that does not fit is refused here."""
    stage, turns = recipe.stages[planned.index], []
    for index, (task, turn) in enumerate(zip(tasks_of(stage), planned.turns, strict=True)):
        schedule = task.schedule or stage.schedule or recipe.schedule
        if planned.clock == "run" and any(part.per == "epoch" for part in schedule.parts):
            raise RecipeError(
                f"stages.{planned.index}.schedule: {schedule} holds through epochs, and where those of the stage begin is not "
                'known on the run\'s clock; leave per="epoch" out, or clock = "run"'
            )
        steps = planned.own_updates(index, planned.span)
        if not steps:
            raise RecipeError(
                f"stages.{planned.index}.{task.key}every: {task.name!r} never has its turn in {planned.steps:,} steps; "
                "make the stage longer"
            )
        try:
            curve = schedule.over(steps=steps, steps_per_epoch=turn.updates(planned.rounds_per_epoch))
        except RecipeError as error:
            said = f"{planned.label}, {steps} steps" if not task.name else f"{task.name}, {steps} updates"
            raise type(error)(f"stages.{planned.index} ({said}): {error}") from None
        turns.append(replace(turn, schedule=curve.in_steps))
    return replace(planned, turns=tuple(turns))


def _check_cache(planned: PlannedStage, *, whole: bool) -> None:
    """Refuse to require a cache where nothing could be kept, or used again."""
    if planned.cache != "require":
        return
    views = 1 if planned.views == "fresh" else planned.views
    if not planned.is_plain or planned.turns[0].objective:
        why = "objectives take turns, and each freezes other parts"
    elif whole:
        why = "it trains the whole model, so nothing stays the same"
    elif planned.epochs <= views:
        why = f"in {planned.epochs:,} epoch{'s' * (planned.epochs > 1)} no view of a sample comes again"
    else:
        return
    raise RecipeError(f'stages.{planned.index}.cache: "require", but {why}; say cache = "auto" in this stage')


def _check_min_lr(
    recipe: Recipe, settings: Sequence[Mapping[str, Mapping[str, tuple[float, float]]]]
) -> None:
    rates = (
        (index, name, rate)
        for index, of_stage in enumerate(settings)
        for of_task in of_stage.values()
        for name, (rate, _) in of_task.items()
    )
    for index, name, rate in rates:
        if rate == 0:  # a rate of 0 means frozen in a plan
            raise RecipeError(
                f"layer_decay: the rate of {name!r} in stages.{index} is too small for a float and would be 0; "
                "raise layer_decay, or leave that parameter out of `train`"
            )
        if recipe.min_lr > rate:
            raise RecipeError(
                f"min_lr: {recipe.min_lr:g} lies above the peak rate {rate:g} of {name!r} in stages.{index}; "
                "lower min_lr, raise that rate, or use the schedule's floor, which is a share of each group's own peak"
            )


def _label(stage: Stage) -> str:
    """What a stage trains, in a few words; of each objective, where it has some."""
    if stage.objectives:
        return ", ".join(
            f"{objective.name}: {_trained_words(objective.train)}" for objective in stage.objectives
        )
    return _trained_words(stage.train or ())


def _trained_words(patterns: Sequence[str]) -> str:
    """Patterns in a few words.

    >>> _trained_words(["head", "layer4", "!norm"])
    'head + layer4 but norm'
    """
    left_out = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    named = " + ".join(pattern for pattern in patterns if not pattern.startswith("!"))
    return f"{named} but {' + '.join(left_out)}" if left_out else named


def _notes(
    recipe: Recipe,
    facts: ModelFacts,
    stages: Sequence[PlannedStage],
    groups: Mapping[str, tuple[str, ...]],
    samples: int,
) -> tuple[str, ...]:
    """What a person should know before paying for the run. `samples` is 0 where a data loader makes the
    batches.
    """
    notes = list(facts.understood)
    trains = [train for s in recipe.stages for train in (s.train, *(o.train for o in s.objectives))]
    for word in dict.fromkeys(word.removeprefix("!") for train in trains for word in train or ()):
        if hides_module(word, facts):
            notes.append(
                f'"{word}" is every parameter in that role, not only the module of this name, which is "{word}.*"'
            )
    trained = {name for names in groups.values() for name in names}
    thawed = [p.name for p in facts.parameters if p.name in trained and p.frozen_by_hand]
    if thawed:
        notes.append(
            f"frozen by hand, and trained all the same, since a stage names it: {listed(thawed)}; to keep it frozen, take it "
            f'out with a "!" in front: "!{thawed[0]}"'
        )
    never = [p.name for p in facts.parameters if p.name not in trained and not p.frozen_by_hand]
    if never:
        notes.append(f"no stage trains {listed(never)} ({facts.count(never):,} scalars)")
    joined = [
        str(s.index + 1) for s in stages if samples and samples > s.batch_size > 1 == samples % s.batch_size
    ]
    if joined:
        where = f"stage{'s' if len(joined) > 1 else ''} {' and '.join(joined)}"
        notes.append(
            f"{where}: the last of {samples} samples joins the batch before it (a batch of one has no statistics)"
        )
    for stage, said in zip(stages, recipe.stages, strict=True):
        if said.batch_size or said.accumulate:
            k = (stage.batch_size * stage.accumulate) / (recipe.batch_size * recipe.accumulate)
            rule = (
                "multiplied by it"
                if recipe.lr_rule == "linear"
                else 'as written; lr_rule = "linear" would multiply them by it'
            )
            if k != 1:
                notes.append(
                    f"stage {stage.index + 1} has {k:g} times the samples a step; its rates are {rule}"
                )
        if stage.steps < stage.steps_per_epoch:
            notes.append(
                f"stage {stage.index + 1} ends after {stage.steps} of the {stage.steps_per_epoch} steps of an epoch"
            )
    own = [o.optimizer for stage in recipe.stages for o in stage.objectives if o.optimizer is not None]
    for name in dict.fromkeys(optimizer_named(said)[0] for said in (recipe.optimizer, *own)):
        if name.lower() in _FOLLOWS_LATE:
            notes.append(f"{name} looks at the rate {_FOLLOWS_LATE[name.lower()]}")
    if facts.layers == 1 and (recipe.layer_decay < 1 or any((s.layer_decay or 1) < 1 for s in recipe.stages)):
        notes.append("layer_decay has no effect: the order of this model's layers was not recognised")
    return tuple(notes)
