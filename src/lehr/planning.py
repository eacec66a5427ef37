"""Recipe + facts -> Plan: everything resolved before the first batch. Pure: no torch, no files, no clock.

`resolve` turns words into numbers; a `Plan` is a value whose step `plan[t]` depends on `t` alone. In it
there is no pattern, no percentage and no None. How it is printed is in `plan_text.py`; how it is applied to
a model, in `run/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lehr import plan_json
from lehr.curves import Curve, Schedule
from lehr.duration import Duration
from lehr.errors import RecipeError, SelectionError, nearest
from lehr.notation import read_schedule
from lehr.plan_text import plan_text
from lehr.recipe import Recipe, Stage
from lehr.selection import ModelFacts, partition, select
from lehr.shapes import Array


@dataclass(frozen=True)
class Step:
    """One optimizer update: what trains and how fast.

    `index` is 0-based over the run, `epoch` counts passes over the data from 0 (a stage begins a new one),
    `trainable` are parameter names, `lr` and `weight_decay` have one number for each group of the plan: 0.0
    where the group is frozen.
    """

    index: int
    stage: int
    epoch: int
    trainable: frozenset[str]
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]


@dataclass(frozen=True)
class PlannedStage:
    """A stage in numbers: the half-open steps [start, stop), its batches, its curve, and what trains at
    which peak.
    """

    index: int
    label: str
    start: int
    stop: int
    first_epoch: int
    steps_per_epoch: int
    batch_size: int
    accumulate: int
    schedule: Schedule
    peak_lr: Mapping[str, float]
    weight_decay: Mapping[str, float]
    restore_best: bool

    @property
    def steps(self) -> int:
        """The number of updates."""
        return self.stop - self.start

    @property
    def epochs(self) -> int:
        """The number of passes over the data that it begins; the last may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    @cached_property
    def curve(self) -> Curve:
        """The schedule over this stage's steps."""
        return self.schedule.over(steps=self.steps, steps_per_epoch=self.steps_per_epoch)

    def epoch_ranges(self) -> Iterator[tuple[int, int, int]]:
        """Each epoch with its half-open range of steps: (epoch, start, stop)."""
        for k in range(self.epochs):
            start = self.start + k * self.steps_per_epoch
            yield self.first_epoch + k, start, min(start + self.steps_per_epoch, self.stop)


@dataclass(frozen=True)
class Plan:
    """A whole run in numbers. `plan[t]` is a pure function of `t`; iteration gives the steps in order.

    `groups` maps each group to its parameter names: disjoint, over everything that any stage trains, the
    same for the whole run. `parameters` maps every parameter of the model to its number of scalars.
    `clip_norm` and `patience` are infinite and `ema` is 0.0 where there is none.

    Example:
        >>> from lehr.recipe import Recipe, Stage
        >>> from lehr.selection import ModelFacts, ParameterFacts
        >>> facts = ModelFacts("net", (ParameterFacts("body.weight", (4, 4)), ParameterFacts("fc.weight", (2, 4))), head=("fc",))
        >>> plan = resolve(Recipe([Stage("2 epochs", train="head", lr=0.1)], batch_size=10), facts, samples=100)
        >>> plan.total_steps, plan[0].trainable, plan[0].lr["head"]
        (20, frozenset({'fc.weight'}), 0.05)
    """

    model: str
    samples: int
    stages: tuple[PlannedStage, ...]
    groups: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, int]
    optimizer: str
    optimizer_settings: Mapping[str, Any]
    min_lr: float
    clip_norm: float
    ema: float
    label_smoothing: float
    seed: int
    monitor: str
    patience: float
    augment: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """The number of updates of the whole run."""
        return self.stages[-1].stop

    @property
    def total_epochs(self) -> int:
        """The number of passes over the data of the whole run."""
        return self.stages[-1].first_epoch + self.stages[-1].epochs

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything that has an effect: all but the notes and the model's name."""
        return plan_json.content_hash(self.to_dict())

    def lr(self, group: str) -> Array:
        """The learning rate of `group` at every step: float64, shape [total_steps]; 0.0 where it is frozen.

        Raises:
            SelectionError: for a group that the plan does not have.
        """
        if group not in self.groups:
            raise SelectionError(
                f"the plan has no group {group!r}{nearest(group, self.groups)} Groups: {', '.join(self.groups)}"
            )
        return np.concatenate([self._rates(stage)[group] for stage in self.stages])

    def stage_at(self, step: int) -> PlannedStage:
        """The stage that update `step` belongs to."""
        if (
            isinstance(step, bool)
            or not isinstance(step, (int, np.integer))
            or not 0 <= step < self.total_steps
        ):
            raise IndexError(f"plan[{step!r}]: the plan has the steps 0 to {self.total_steps - 1}")
        return next(stage for stage in self.stages if step < stage.stop)

    def trainable(self, stage: PlannedStage) -> frozenset[str]:
        """The names of the parameters that `stage` trains."""
        return self._trainable[stage.index]

    def __getitem__(self, step: int) -> Step:
        stage = self.stage_at(step)
        return next(self.steps(int(step), int(step) + 1, stage))

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[Step]:
        for stage in self.stages:
            for _, start, stop in stage.epoch_ranges():
                yield from self.steps(start, stop, stage)

    def steps(self, start: int, stop: int, stage: PlannedStage) -> Iterator[Step]:
        """The steps of the half-open range [start, stop), which lies within `stage`; as `plan[t]`, only
        faster.
        """
        here = slice(start - stage.start, stop - stage.start)
        rates = self._rates(stage)
        columns = [rates[group][here].tolist() for group in self.groups]
        names, trainable = tuple(self.groups), self._trainable[stage.index]
        decay = MappingProxyType(dict(stage.weight_decay))
        for t, row in zip(range(start, stop), zip(*columns, strict=True), strict=True):
            epoch = stage.first_epoch + (t - stage.start) // stage.steps_per_epoch
            yield Step(
                t, stage.index, epoch, trainable, MappingProxyType(dict(zip(names, row, strict=True))), decay
            )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: numbers, texts, lists and tables only."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        stages = [
            {**{f.name: getattr(s, f.name) for f in fields(s)}, "schedule": str(s.schedule)}
            for s in self.stages
        ]
        return {**plain, "stages": stages}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave."""
        stages = tuple(
            PlannedStage(**{**s, "schedule": read_schedule(s["schedule"])}) for s in plain["stages"]
        )
        groups = {group: tuple(names) for group, names in plain["groups"].items()}
        return cls(
            **{
                **plain,
                "stages": stages,
                "groups": groups,
                "augment": tuple(plain["augment"]),
                "notes": tuple(plain["notes"]),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, with its hash."""
        plan_json.write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            RecipeError: where the file cannot be read, is of another format, or was changed after it was
                written.
        """
        plain = plan_json.read(path)
        try:
            return cls.from_dict(plain)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path}: not a plan: {error}; make it again with `lehr plan --json`") from None

    def __str__(self) -> str:
        return plan_text(self)

    @cached_property
    def _trainable(self) -> tuple[frozenset[str], ...]:
        return tuple(
            frozenset(n for g, peak in s.peak_lr.items() if peak for n in self.groups[g]) for s in self.stages
        )

    @cached_property
    def _rate_arrays(self) -> dict[int, Mapping[str, Array]]:
        return {}

    def _rates(self, stage: PlannedStage) -> Mapping[str, Array]:
        """rate = min_lr + (peak - min_lr) * factor, for every group and step of a stage; computed once."""
        if stage.index not in self._rate_arrays:
            factor = stage.curve(np.arange(stage.steps))
            self._rate_arrays[stage.index] = {
                group: self.min_lr + (peak - self.min_lr) * factor if peak else np.zeros(stage.steps)
                for group, peak in stage.peak_lr.items()
            }
        return self._rate_arrays[stage.index]


_FOLLOWS_LATE = {"rprop": "at its first step only, so no schedule moves it", "asgd": "one step late"}


def batches_in(samples: int, batch_size: int) -> int:
    """Batches in one pass over `samples`: all are used, the last may be short; a lone last sample joins the
    batch before it, since a batch of one has no batch statistics.

    >>> batches_in(100, 32), batches_in(97, 32), batches_in(1, 32)
    (4, 3, 1)
    """
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 0) - (rest == 1 and full > 0 and batch_size > 1))


def resolve(recipe: Recipe, facts: ModelFacts, *, samples: int, batches: int | None = None) -> Plan:
    """The plan of `recipe` for a model of which `facts` are known and `samples` training samples.

    Args:
        recipe: what the person wrote.
        facts: from `lehr.inspect(model)`.
        samples: training samples in one epoch, 1 or more.
        batches: batches in one epoch where a data loader has decided them; computed from `samples` where it
            is not given.

    Raises:
        RecipeError: (or one of its kinds) for anything that cannot be, naming the stage and the key.
    """
    if samples < 1:
        raise RecipeError(f"samples={samples}; a plan needs at least one training sample")
    settings = [_stage_settings(recipe, stage, index, facts) for index, stage in enumerate(recipe.stages)]
    groups = _groups([s.by_parameter for s in settings], recipe, facts)
    _check_min_lr(recipe, settings)
    stages: list[PlannedStage] = []
    for index, (stage, setting) in enumerate(zip(recipe.stages, settings, strict=True)):
        batch_size, accumulate = _batch(recipe, stage)
        steps_per_epoch = -(-(batches or batches_in(samples, batch_size)) // accumulate)
        length = Duration.parse(stage.length).steps(
            steps_per_epoch=steps_per_epoch, where=f"stages.{index}.length"
        )
        start = stages[-1].stop if stages else 0
        first_epoch = stages[-1].first_epoch + stages[-1].epochs if stages else 0
        first_of = {group: setting.by_parameter.get(names[0], (0.0, 0.0)) for group, names in groups.items()}
        planned = PlannedStage(
            index=index, label=_label(stage.train), start=start, stop=start + length, first_epoch=first_epoch,
            steps_per_epoch=steps_per_epoch, batch_size=batch_size, accumulate=accumulate,
            schedule=stage.schedule or recipe.schedule,
            peak_lr={group: rate for group, (rate, _) in first_of.items()},
            weight_decay={group: decay for group, (_, decay) in first_of.items()},
            restore_best=recipe.restore_best if stage.restore_best is None else stage.restore_best,
        )  # fmt: skip
        try:
            planned.curve  # noqa: B018 - a schedule that does not fit is refused now
        except RecipeError as error:
            raise type(error)(f"stages.{index} ({planned.label}, {length} steps): {error}") from None
        stages.append(planned)
    return Plan(
        model=facts.name, samples=samples, stages=tuple(stages), groups=groups,
        parameters={p.name: p.count for p in facts.parameters},
        optimizer=recipe.optimizer_name, optimizer_settings=recipe.optimizer_settings, min_lr=recipe.min_lr,
        clip_norm=math.inf if recipe.clip_norm is None else recipe.clip_norm, ema=recipe.ema or 0.0,
        label_smoothing=recipe.label_smoothing, seed=recipe.seed, monitor=recipe.monitor,
        patience=math.inf if recipe.patience is None else float(Duration.parse(recipe.patience).amount),
        augment=tuple(recipe.augment or ()),
        notes=_notes(recipe, facts, stages, groups, samples if batches is None else 0),
    )  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    """What a stage means for single parameters: name -> (peak rate, weight decay), for those that it trains."""

    by_parameter: Mapping[str, tuple[float, float]]


def _stage_settings(recipe: Recipe, stage: Stage, index: int, facts: ModelFacts) -> _Settings:
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
    return _Settings(
        {
            name: (
                rate[name] * scale * layer_decay ** (facts.layers - 1 - facts.by_name[name].layer),
                0.0 if name in no_decay else decay,
            )
            for name in names
        }
    )


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


def _check_min_lr(recipe: Recipe, settings: Sequence[_Settings]) -> None:
    for index, setting in enumerate(settings):
        for name, (rate, _) in setting.by_parameter.items():
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
        notes.append(f"no stage trains {_listed(never)} ({facts.count(never):,} scalars)")
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
        if (
            samples > 1
            and stage.batch_size > 1
            and samples % stage.batch_size == 1
            and samples > stage.batch_size
        ):
            notes.append(
                f"stage {stage.index + 1}: the last of {samples} samples joins the batch before it (a batch of one has no statistics)"
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


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
