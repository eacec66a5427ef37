"""What a recipe's words mean for single parameters, and the groups of an optimizer that follow. Pure.

A task is what an ordinary stage trains, or one objective of a stage. This file must not know steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lehr.curves import Schedule
from lehr.recipe import Objective, Recipe, Stage
from lehr.selection import ModelFacts, partition, select

Settings = Mapping[str, tuple[float, float]]
"""Parameter name -> (peak rate, weight decay), for those that train."""


@dataclass(frozen=True)
class Task:
    """What an ordinary stage trains, or one objective of a stage; `key` is where it stands in the recipe."""

    name: str
    key: str
    train: Sequence[str]
    lr: float | Mapping[str, float]
    schedule: Schedule | None = None
    weight_decay: float | None = None
    every: int = 1
    repeat: int = 1
    said: Objective | None = None


def tasks_of(stage: Stage) -> tuple[Task, ...]:
    """The one task of an ordinary stage, or one for each of its objectives."""
    if not stage.objectives:
        assert stage.train is not None
        assert stage.lr is not None
        return (Task("", "", stage.train, stage.lr),)
    return tuple(
        Task(o.name, f"objectives.{i}.", o.train, o.lr, o.schedule, o.weight_decay, o.every, o.repeat, o)
        for i, o in enumerate(stage.objectives)
    )


def settings_of(recipe: Recipe, index: int, task: Task, facts: ModelFacts) -> dict[str, tuple[float, float]]:
    """What a task means for single parameters: name -> (peak rate, weight decay), for those that it trains."""
    stage, where = recipe.stages[index], f"stages.{index}.{task.key}"
    names = select(task.train, facts, where=f"{where}train").names
    no_decay = _no_decay(recipe, facts)
    layer_decay = recipe.layer_decay if stage.layer_decay is None else stage.layer_decay
    said = (task.weight_decay, stage.weight_decay, recipe.weight_decay)
    decay = next(value for value in said if value is not None)
    scale = _rate_scale(recipe, stage)
    if isinstance(task.lr, Mapping):
        owner = partition(tuple(task.lr), names, facts, where=f"{where}lr")
        rate = {name: float(task.lr[owner[name]]) for name in names}
    else:
        rate = dict.fromkeys(names, float(task.lr))
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


def batch_of(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Samples in a batch of a stage, and batches in a step."""
    return stage.batch_size or recipe.batch_size, stage.accumulate or recipe.accumulate


def _rate_scale(recipe: Recipe, stage: Stage) -> float:
    """The linear learning-rate rule: k times the samples a step, k times the rate (Goyal et al. 2017,
    section 2.1).
    """
    if recipe.lr_rule == "fixed":
        return 1.0
    batch_size, accumulate = batch_of(recipe, stage)
    return (batch_size * accumulate) / (recipe.batch_size * recipe.accumulate)


def groups_of(
    settings: Sequence[Mapping[str, Mapping[str, tuple[float, float]]]],
    tasks: Sequence[Sequence[Task]],
    recipe: Recipe,
    facts: ModelFacts,
) -> dict[str, dict[str, tuple[str, ...]]]:
    """The groups of each objective, over all stages; those of a named one begin with its name."""
    names = dict.fromkeys(task.name for of_stage in tasks for task in of_stage)
    layered = recipe.layer_decay < 1 or any((s.layer_decay or 1) < 1 for s in recipe.stages)
    out: dict[str, dict[str, tuple[str, ...]]] = {}
    for objective in names:
        own = [task for of_stage in tasks for task in of_stage if task.name == objective]
        made = _partition([of_stage.get(objective, {}) for of_stage in settings], own, facts, layered)
        prefix = f"{objective}/" if objective else ""
        out[objective] = {f"{prefix}{group}": members for group, members in made.items()}
    return out


def _partition(
    settings: Sequence[Mapping[str, tuple[float, float]]],
    tasks: Sequence[Task],
    facts: ModelFacts,
    layered: bool,
) -> dict[str, tuple[str, ...]]:
    """Parameters with equal settings in every stage are one group; names from the recipe's own words."""
    members: dict[tuple[tuple[float, float] | None, ...], list[str]] = {}
    for p in facts.parameters:
        vector = tuple(stage.get(p.name) for stage in settings)
        if any(vector):
            members.setdefault(vector, []).append(p.name)
    words = _words(tasks, facts)
    bases = {vector: _word_for(names, words) for vector, names in members.items()}
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


def settled(
    groups: Mapping[str, Mapping[str, tuple[str, ...]]],
    settings: Mapping[str, Mapping[str, tuple[float, float]]],
) -> dict[str, tuple[float, float]]:
    """Peak rate and weight decay of each group in a stage; nothing for what the stage freezes."""
    return {
        group: settings.get(objective, {}).get(names[0], (0.0, 0.0))
        for objective, of_objective in groups.items()
        for group, names in of_objective.items()
    }


def _words(tasks: Sequence[Task], facts: ModelFacts) -> dict[str, frozenset[str]]:
    """The patterns that the tasks use and the roles that the model has, each with what it means."""
    said = [p for task in tasks if isinstance(task.lr, Mapping) for p in task.lr] + [
        p for task in tasks for p in task.train if not p.startswith("!")
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
