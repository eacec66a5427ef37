"""Recipe + facts -> Plan: words become numbers before the first batch. Pure: no torch, no files, no clock.

Here each key of a recipe comes to what it means for a model: what trains, the groups, rates and decays, the
steps of each stage, and the notes on what a person should know. It must not know how a plan is read, stored
or printed (`planning.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lehr.curves import Schedule
from lehr.duration import Duration
from lehr.errors import RecipeError
from lehr.plan_text import listed
from lehr.plan_values import MOST_STEPS
from lehr.planning import Plan, PlannedStage, batches_in
from lehr.recipe import Recipe, Stage
from lehr.selection import ModelFacts, partition, select

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
    settings = [_stage_settings(recipe, stage, index, facts) for index, stage in enumerate(recipe.stages)]
    groups = _groups(settings, recipe, facts)
    _check_min_lr(recipe, settings)
    stages: list[PlannedStage] = []
    for index, (stage, setting) in enumerate(zip(recipe.stages, settings, strict=True)):
        batch_size, accumulate = _batch(recipe, stage)
        in_epoch = batches_in(samples, batch_size) if batches is None else batches
        steps_per_epoch = -(-in_epoch // accumulate)
        length = Duration.parse(stage.length).steps(
            steps_per_epoch=steps_per_epoch, where=f"stages.{index}.length"
        )
        start = stages[-1].stop if stages else 0
        first_epoch = stages[-1].first_epoch + stages[-1].epochs if stages else 0
        first_of = {group: setting.get(names[0], (0.0, 0.0)) for group, names in groups.items()}
        planned = PlannedStage(
            index=index, label=_label(stage.train), start=start, stop=start + length, first_epoch=first_epoch,
            steps_per_epoch=steps_per_epoch, batch_size=batch_size, accumulate=accumulate,
            schedule=_in_steps(recipe, index, length, steps_per_epoch),
            peak_lr={group: rate for group, (rate, _) in first_of.items()},
            weight_decay={group: decay for group, (_, decay) in first_of.items()},
            restore_best=recipe.restore_best if stage.restore_best is None else stage.restore_best,
        )  # fmt: skip
        stages.append(planned)
    if stages[-1].stop > MOST_STEPS:
        raise RecipeError(
            f"stages: {stages[-1].stop:,} steps in all; a plan has {MOST_STEPS:,} at most, so make them shorter"
        )
    return Plan(
        model=facts.name, samples=samples, stages=tuple(stages), groups=groups,
        parameters={p.name: p.count for p in facts.parameters},
        optimizer=recipe.optimizer_name, optimizer_settings=recipe.optimizer_settings, min_lr=recipe.min_lr,
        clip_norm=math.inf if recipe.clip_norm is None else recipe.clip_norm, ema=recipe.ema or 0.0,
        label_smoothing=recipe.label_smoothing, seed=recipe.seed, monitor=recipe.monitor,
        patience=math.inf if recipe.patience is None else float(Duration.parse(recipe.patience).amount),
        said=tuple(str(stage.schedule or recipe.schedule) for stage in recipe.stages),
        augment=tuple(recipe.augment or ()),
        notes=_notes(recipe, facts, stages, groups, samples if batches is None else 0),
    )  # fmt: skip


def _whole(name: str, value: object, needs: str) -> int:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1:
        return int(value)
    raise RecipeError(f"{name}={value!r}; {needs}: expected a whole number, 1 or more")


def _in_steps(recipe: Recipe, index: int, steps: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a stage in whole steps; one that does not fit is refused here."""
    stage = recipe.stages[index]
    schedule = stage.schedule or recipe.schedule
    try:
        return schedule.over(steps=steps, steps_per_epoch=steps_per_epoch).in_steps
    except RecipeError as error:
        raise type(error)(f"stages.{index} ({_label(stage.train)}, {steps} steps): {error}") from None


def _stage_settings(
    recipe: Recipe, stage: Stage, index: int, facts: ModelFacts
) -> dict[str, tuple[float, float]]:
    """What a stage means for single parameters: name -> (peak rate, weight decay), for those that it trains."""
    where = f"stages.{index}"
    names = select(stage.train, facts, where=f"{where}.train").names
    no_decay = _no_decay(recipe, facts)
    layer_decay = recipe.layer_decay if stage.layer_decay is None else stage.layer_decay
    decay = recipe.weight_decay if stage.weight_decay is None else stage.weight_decay
    scale = _rate_scale(recipe, stage)
    if isinstance(stage.lr, Mapping):
        owner = partition(tuple(stage.lr), names, facts, where=f"{where}.lr")
        rate = {name: float(stage.lr[owner[name]]) for name in names}
    else:
        rate = dict.fromkeys(names, float(stage.lr))
    return {
        name: (
            rate[name] * scale * layer_decay ** (facts.layers - 1 - facts.by_name[name].layer),
            0.0 if name in no_decay else decay,
        )
        for name in names
    }


def _no_decay(recipe: Recipe, facts: ModelFacts) -> frozenset[str]:
    """What weight decay leaves alone. A model without norms or biases is no mistake here; a pattern that
    matches nothing is.
    """
    names = {
        p.name
        for p in facts.parameters
        if ("norm" in recipe.no_decay and p.norm) or ("bias" in recipe.no_decay and p.bias)
    }
    patterns = [p for p in recipe.no_decay if p not in ("norm", "bias")]
    return frozenset(names | set(select(patterns, facts, where="no_decay").names if patterns else ()))


def _batch(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    return stage.batch_size or recipe.batch_size, stage.accumulate or recipe.accumulate


def _rate_scale(recipe: Recipe, stage: Stage) -> float:
    """The linear learning-rate rule: k times the samples a step, k times the rate (Goyal et al. 2017,
    section 2.1).
    """
    if recipe.lr_rule == "fixed":
        return 1.0
    batch_size, accumulate = _batch(recipe, stage)
    return (batch_size * accumulate) / (recipe.batch_size * recipe.accumulate)


def _check_min_lr(recipe: Recipe, settings: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    for index, setting in enumerate(settings):
        for name, (rate, _) in setting.items():
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


def _groups(
    settings: Sequence[Mapping[str, tuple[float, float]]], recipe: Recipe, facts: ModelFacts
) -> dict[str, tuple[str, ...]]:
    """Parameters with equal settings in every stage are one group; names from the recipe's own words."""
    members: dict[tuple[tuple[float, float] | None, ...], list[str]] = {}
    for p in facts.parameters:
        vector = tuple(stage.get(p.name) for stage in settings)
        if any(vector):
            members.setdefault(vector, []).append(p.name)
    words = _words(recipe, facts)
    bases = {vector: _word_for(names, words) for vector, names in members.items()}
    layered = recipe.layer_decay < 1 or any((s.layer_decay or 1) < 1 for s in recipe.stages)
    groups: dict[str, tuple[str, ...]] = {}
    for vector, names in members.items():
        base = bases[vector]
        siblings = [v for v, b in bases.items() if b == base]
        if layered and len(siblings) > 1:
            base = f"{base}/{facts.by_name[names[0]].layer}"
        decays = [any(pair and pair[1] for pair in v) for v in siblings]
        if any(decays) and not any(pair and pair[1] for pair in vector):
            base = f"{base}/no_decay"
        unique, twin = base, 1
        while unique in groups:
            twin += 1
            unique = f"{base}#{twin}"
        groups[unique] = tuple(names)
    return groups


def _label(patterns: Sequence[str]) -> str:
    """What a stage trains, in a few words.

    >>> _label(["head", "layer4", "!norm"])
    'head + layer4 but norm'
    """
    left_out = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    named = " + ".join(pattern for pattern in patterns if not pattern.startswith("!"))
    return f"{named} but {' + '.join(left_out)}" if left_out else named


def _words(recipe: Recipe, facts: ModelFacts) -> dict[str, frozenset[str]]:
    """The patterns that the recipe uses and the roles that the model has, each with what it means."""
    said = [p for s in recipe.stages if isinstance(s.lr, Mapping) for p in s.lr] + [
        p for s in recipe.stages for p in s.train if not p.startswith("!")
    ]
    every = frozenset(p.name for p in facts.parameters)
    words = {word: frozenset(select(word, facts).names) for word in dict.fromkeys(said)}
    if facts.head:
        head = frozenset(select("head", facts).names)
        words |= {
            "head": head,
            "backbone": every - head,
        }  # the whole model may be its head: then no one's word is "backbone"
    return {**words, "all": every}


def _word_for(names: Sequence[str], words: Mapping[str, frozenset[str]]) -> str:
    """The narrowest word that means all of `names`."""
    fitting = [word for word, meant in words.items() if meant.issuperset(names)]
    return min(fitting, key=lambda word: len(words[word]))


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
    trained = {name for names in groups.values() for name in names}
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
    if recipe.optimizer_name.lower() in _FOLLOWS_LATE:
        notes.append(
            f"{recipe.optimizer_name} looks at the rate {_FOLLOWS_LATE[recipe.optimizer_name.lower()]}"
        )
    if facts.layers == 1 and (recipe.layer_decay < 1 or any((s.layer_decay or 1) < 1 for s in recipe.stages)):
        notes.append("layer_decay has no effect: the order of this model's layers was not recognised")
    return tuple(notes)
