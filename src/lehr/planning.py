"""The plan of a run as a value: `plan[t]` depends on `t` alone. `resolving.py` makes it.

What has an effect in it is names and numbers: no pattern, no None, and every length in whole steps (only the
lengths inside a shape that restarts stay as written, for they are of each cycle). The person's own words are
kept for the page. Pure: no torch, no clock; its files are written by `plan_json.py`. How a plan is printed
is in `plan_text.py`; how it is applied to a model, in `run/`. This file must not know what a recipe is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from lehr import plan_json
from lehr.errors import RecipeError, SelectionError, nearest
from lehr.notation import read_schedule
from lehr.plan_text import decision_text, plan_text
from lehr.plan_values import check_plan
from lehr.planned_stage import Decision, PlannedStage, Turn
from lehr.shapes import Array
from lehr.untrusted import printable, printable_lines


@dataclass(frozen=True)
class Step:
    """One optimizer update: what trains and how fast.

    `index` is 0-based over the run, `epoch` counts passes over the data from 0 (a stage begins a new one),
    `trainable` are parameter names, `lr` and `weight_decay` have one number for each group of the step's objective:
    0.0 where the group is frozen. `objective` is whose turn it is, "" in an ordinary stage. Both tables are
    read-only; a step pickles, copies and hashes as a value.
    """

    index: int
    stage: int
    epoch: int
    trainable: frozenset[str]
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]
    objective: str = ""

    def __hash__(self) -> int:
        return hash((self.index, self.stage, self.epoch, self.trainable, self.objective))

    def __reduce__(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        tables = dict(self.lr), dict(self.weight_decay)  # a read-only view does not pickle
        return _step, (self.index, self.stage, self.epoch, self.trainable, *tables, self.objective)


def _step(
    index: int,
    stage: int,
    epoch: int,
    trainable: frozenset[str],
    lr: dict[str, float],
    decay: dict[str, float],
    objective: str,
) -> Step:
    return Step(index, stage, epoch, trainable, MappingProxyType(lr), MappingProxyType(decay), objective)


@dataclass(frozen=True)
class PlannedObjective:
    """The optimizer of an objective: a class of `torch.optim` by name, its own keywords, and the largest norm of its
    gradients (infinite where they are not clipped).
    """

    optimizer: str
    optimizer_settings: Mapping[str, Any]
    clip_norm: float


@dataclass(frozen=True)
class Caching:
    """What caches may take: bytes in all; the narrowest type that is stored; whether each bit must be the model's own."""

    budget: int
    dtype: Literal["fp32", "fp16", "bf16"]
    exact: bool


@dataclass(frozen=True)
class Plan:
    """A whole run in numbers. `plan[t]` is a pure function of `t`; iteration gives the steps in order.

    `groups` maps each group to its parameter names, the same for the whole run. There is an optimizer for each of
    `objectives`, "" being that of ordinary stages; `owners` says whose each group is, and those of one are disjoint.
    `parameters` maps every parameter of the model to its number of scalars. `patience` is infinite and `ema` is 0.0
    where there is none. `said` has each stage's schedules as the recipe wrote them; like `notes` and `model` it is for
    the page only, and not in the hash; nor is how what stays the same is cached (`caching`, and each stage's `cache`),
    which a run may change as it goes on. `decisions` are what was decided on evidence while the run went on: a plan
    with them is the same function with one more input.

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
    owners: Mapping[str, str]
    parameters: Mapping[str, int]
    objectives: Mapping[str, PlannedObjective]
    min_lr: float
    ema: float
    label_smoothing: float
    seed: int
    monitor: str
    patience: float
    caching: Caching
    said: tuple[tuple[str, ...], ...]
    augment: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

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
        """SHA-256 over everything that has an effect: all but the notes, the model's name, the words that the schedules
        were written in, and what is said of caches.
        """
        return plan_json.content_hash(self.to_dict())

    def lr(self, group: str) -> Array:
        """The learning rate of `group` at every step: float64, shape [total_steps]; 0.0 where it is frozen, which it is
        in the turns of other objectives.

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

    def groups_of(self, objective: str) -> tuple[str, ...]:
        """The groups of an objective, in order."""
        return self._groups_of[objective]

    def trainable(self, stage: PlannedStage) -> frozenset[str]:
        """The names of the parameters that `stage` trains, in whose turn ever."""
        return frozenset().union(*self._trainable[stage.index])

    def decided(self, decision: Decision) -> Plan:
        """The plan with one more decision: a stage that ends there, and the later ones that follow at once; or one that
        cools from there on. What came before the decision stays the same, to the bit.

        Raises:
            RecipeError: for a step that the stage does not have.
        """
        stage = self.stages[decision.stage] if 0 <= decision.stage < len(self.stages) else None
        if stage is None or not stage.start < decision.step <= stage.stop:
            raise RecipeError(
                f"{decision_text(decision)}, and the plan has no such place: make that stage as long as it was"
            )
        if decision.kind == "reduce":
            changed = [replace(stage, cooled=(*stage.cooled, decision.step))]
        else:
            changed = [replace(stage, stop=decision.step)]
        for later in self.stages[stage.index + 1 :]:
            before = changed[-1]
            stop = later.stop if later.clock == "run" else before.stop + later.steps
            first_epoch = before.first_epoch + before.epochs
            changed.append(replace(later, start=before.stop, stop=stop, first_epoch=first_epoch))
        stages = (*self.stages[: stage.index], *changed)
        return replace(self, stages=stages, decisions=(*self.decisions, decision))

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
        rates, here = self._rates(stage), slice(start - stage.start, stop - stage.start)
        rows: list[Iterator[tuple[float, ...]]] = []
        tables: list[tuple[tuple[str, ...], frozenset[str], Mapping[str, float], str]] = []
        for turn, trainable in zip(stage.turns, self._trainable[stage.index], strict=True):
            names = self.groups_of(turn.objective)
            columns = [rates[group][here].tolist() for group in names]
            rows.append(zip(*columns, strict=True))
            decays = MappingProxyType({group: stage.weight_decay[group] for group in names})
            tables.append((names, trainable, decays, turn.objective))
        turns = stage.turns_of(start, stop)
        for t, turn_index, values in zip(range(start, stop), turns, zip(*rows, strict=True), strict=True):
            names, trainable, decay, objective = tables[turn_index]
            epoch = stage.first_epoch + (t - stage.start) // stage.steps_per_epoch
            lr = MappingProxyType(dict(zip(names, values[turn_index], strict=True)))
            yield Step(t, stage.index, epoch, trainable, lr, decay, objective)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: numbers, texts, lists and tables only."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        stages = [
            {**_plain(stage), "turns": [{**_plain(t), "schedule": str(t.schedule)} for t in stage.turns]}
            for stage in self.stages
        ]
        objectives = {name: _plain(objective) for name, objective in self.objectives.items()}
        decisions = [
            {**_plain(d), "value": d.value if isfinite(d.value) else str(d.value)} for d in self.decisions
        ]
        caching = _plain(self.caching)
        return {
            **plain,
            "stages": stages,
            "objectives": objectives,
            "caching": caching,
            "decisions": decisions,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave."""
        read: dict[str, Any] = {
            "stages": tuple(_stage_from(stage) for stage in plain["stages"]),
            "groups": {group: tuple(names) for group, names in plain["groups"].items()},
            "objectives": {name: PlannedObjective(**said) for name, said in plain["objectives"].items()},
            "caching": Caching(**plain["caching"]),
            "said": tuple(map(tuple, plain["said"])),
            "decisions": tuple(Decision(**{**d, "value": float(d["value"])}) for d in plain["decisions"]),
        }
        return cls(**{**plain, **read, "augment": tuple(plain["augment"]), "notes": tuple(plain["notes"])})

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
                stage.curves  # noqa: B018 - a schedule that does not fit its stage is refused here
                stage.condition  # noqa: B018 - nor is a condition that is none
        except ValueError as error:
            raise RecipeError(
                f"{printable(str(path))}: not a plan: {error}; make it again with `lehr plan --json`"
            ) from None
        return plan

    def __str__(self) -> str:
        return printable_lines(plan_text(self))  # names of parameters and patterns are whatever someone chose

    @cached_property
    def _groups_of(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(g for g in self.groups if self.owners[g] == name) for name in self.objectives}

    @cached_property
    def _trainable(self) -> tuple[tuple[frozenset[str], ...], ...]:
        """What each turn of each stage trains."""
        return tuple(
            tuple(
                frozenset(
                    name
                    for group in self.groups_of(turn.objective)
                    if stage.peak_lr[group]
                    for name in self.groups[group]
                )
                for turn in stage.turns
            )
            for stage in self.stages
        )

    @cached_property
    def _rate_arrays(self) -> dict[int, Mapping[str, Array]]:
        return {}

    def _rates(self, stage: PlannedStage) -> Mapping[str, Array]:
        """rate = min_lr + (peak - min_lr) * factor, for every group and step of a stage; computed once."""
        if stage.index not in self._rate_arrays:
            rates = {group: np.zeros(stage.steps) for group in self.groups}
            for index, turn in enumerate(stage.turns):
                steps, factors = stage.factors(index)
                for group in self.groups_of(turn.objective):
                    if peak := stage.peak_lr[group]:
                        rates[group][steps] = self.min_lr + (peak - self.min_lr) * factors
            self._rate_arrays[stage.index] = rates
        return self._rate_arrays[stage.index]


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, one level deep."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _stage_from(plain: Mapping[str, Any]) -> PlannedStage:
    turns = (Turn(**{**turn, "schedule": read_schedule(turn["schedule"])}) for turn in plain["turns"])
    return PlannedStage(**{**plain, "turns": tuple(turns), "cooled": tuple(plain["cooled"])})


def batches_in(samples: int, batch_size: int) -> int:
    """Batches in one pass over `samples`: all are used, the last may be short; a lone last sample joins the
    batch before it, since a batch of one has no batch statistics.

    >>> batches_in(100, 32), batches_in(97, 32), batches_in(1, 32)
    (4, 3, 1)
    """
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 0) - (rest == 1 and full > 0 and batch_size > 1))
