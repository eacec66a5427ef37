"""The plan of a run as a value: `plan[t]` depends on `t` alone. `resolving.py` makes it.

What has an effect in it is names and numbers: no pattern, no None, and every length in whole steps (only the
lengths inside a shape that restarts stay as written, for they are of each cycle). The person's own words are
kept for the page. Pure: no torch, no clock; its files are written by `plan_json.py`. How a plan is printed
is in `plan_text.py`; how it is applied to a model, in `run/`. This file must not know what a recipe is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lehr import plan_json
from lehr.curves import Curve, Schedule
from lehr.errors import RecipeError, SelectionError, nearest
from lehr.notation import read_schedule
from lehr.plan_text import plan_text
from lehr.plan_values import check_plan
from lehr.shapes import Array
from lehr.untrusted import printable, printable_lines


@dataclass(frozen=True)
class Step:
    """One optimizer update: what trains and how fast.

    `index` is 0-based over the run, `epoch` counts passes over the data from 0 (a stage begins a new one),
    `trainable` are parameter names, `lr` and `weight_decay` have one number for each group of the plan: 0.0
    where the group is frozen. Both tables are read-only; a step pickles, copies and hashes as a value.
    """

    index: int
    stage: int
    epoch: int
    trainable: frozenset[str]
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]

    def __hash__(self) -> int:
        return hash((self.index, self.stage, self.epoch, self.trainable))

    def __reduce__(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        tables = dict(self.lr), dict(self.weight_decay)  # a read-only view does not pickle
        return _step, (self.index, self.stage, self.epoch, self.trainable, *tables)


def _step(
    index: int,
    stage: int,
    epoch: int,
    trainable: frozenset[str],
    lr: dict[str, float],
    decay: dict[str, float],
) -> Step:
    return Step(index, stage, epoch, trainable, MappingProxyType(lr), MappingProxyType(decay))


@dataclass(frozen=True)
class PlannedStage:
    """A stage in numbers: the half-open steps [start, stop), its batches, its schedule in whole steps, and
    what trains at which peak.
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

    def __hash__(self) -> int:
        return hash((self.index, self.label, self.start, self.stop, self.schedule))

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
    `clip_norm` and `patience` are infinite and `ema` is 0.0 where there is none. `said` has each stage's
    schedule as the recipe wrote it; like `notes` and `model` it is for the page only, and not in the hash.

    Example:
        >>> from lehr.recipe import Recipe, Stage
        >>> from lehr.resolving import resolve
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
    said: tuple[str, ...]
    augment: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return int(self.hash[:16], 16)

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
        """SHA-256 over everything that has an effect: all but the notes, the model's name and the
        words that the schedules were written in.
        """
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
                "said": tuple(plain["said"]),
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
            check_plan(plain)
            plan = cls.from_dict(plain)
            for stage in plan.stages:
                stage.curve  # noqa: B018 - a schedule that does not fit its stage is refused here
        except ValueError as error:
            raise RecipeError(
                f"{printable(str(path))}: not a plan: {error}; make it again with `lehr plan --json`"
            ) from None
        return plan

    def __str__(self) -> str:
        return printable_lines(plan_text(self))  # names of parameters and patterns are whatever someone chose

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


def batches_in(samples: int, batch_size: int) -> int:
    """Batches in one pass over `samples`: all are used, the last may be short; a lone last sample joins the
    batch before it, since a batch of one has no batch statistics.

    >>> batches_in(100, 32), batches_in(97, 32), batches_in(1, 32)
    (4, 3, 1)
    """
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 0) - (rest == 1 and full > 0 and batch_size > 1))
