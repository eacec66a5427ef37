"""What may stand in a plan's file: the type and range of each value, and that the parts agree with each other.

A plan's hash says that nothing was changed by accident; whoever writes a file can write its hash as well. This
file handles plain values and must not know what a plan does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lehr.byte_size import MOST_BYTES
from lehr.untrusted import brief, printable

MOST_STEPS = 10**8
"""Of a whole run, a thousand times as many as a long one has: a rate is kept for each."""

MOST_TURNS = 100
"""Of objectives in a stage."""
MOST_IN_TURNS = 10**7
"""Of steps in an epoch that several objectives share: whose turn each is, is kept."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_Positive = Annotated[int, Field(ge=1, lt=2**31)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Endless = Annotated[float, Field(gt=0)]  # infinite where there is none


@dataclass(frozen=True, config=_STRICT)
class _Turn:
    objective: str
    every: _Positive
    repeat: _Positive
    schedule: str


@dataclass(frozen=True, config=_STRICT)
class _Stage:
    index: _Count
    label: str
    start: _Step
    stop: _Step
    first_epoch: _Step
    steps_per_epoch: _Positive
    rounds_per_epoch: _Positive
    batch_size: _Positive
    accumulate: _Positive
    turns: Annotated[list[_Turn], Field(min_length=1, max_length=MOST_TURNS)]
    peak_lr: dict[str, _Rate]
    weight_decay: dict[str, _Rate]
    restore_best: bool
    span: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    clock: Literal["stage", "run"]
    until: str
    every: _Step
    reduce: Annotated[float, Field(gt=0, le=1)]
    reductions: _Step
    cooled: list[_Step]
    views: _Positive | Literal["fresh"]
    cache: Literal["auto", "off", "require"]


@dataclass(frozen=True, config=_STRICT)
class _Objective:
    optimizer: Annotated[str, Field(min_length=1)]
    optimizer_settings: dict[str, Any]
    clip_norm: _Endless


@dataclass(frozen=True, config=_STRICT)
class _Caching:
    budget: Annotated[int, Field(ge=1, le=MOST_BYTES)]
    dtype: Literal["fp32", "fp16", "bf16"]
    exact: bool


@dataclass(frozen=True, config=_STRICT)
class _Decision:
    stage: _Count
    step: _Step
    kind: Literal["end", "reduce"]
    value: float | Literal["nan", "inf", "-inf"]


@dataclass(frozen=True, config=_STRICT)
class _Plan:
    model: str
    samples: Annotated[int, Field(ge=1, lt=2**63)]
    stages: Annotated[list[_Stage], Field(min_length=1)]
    groups: dict[str, list[str]]
    owners: dict[str, str]
    parameters: dict[str, _Count]
    objectives: Annotated[dict[str, _Objective], Field(min_length=1)]
    min_lr: _Rate
    ema: Annotated[float, Field(ge=0, lt=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    seed: _Count
    monitor: str
    patience: _Endless
    caching: _Caching
    said: list[list[str]]
    augment: list[str]
    notes: list[str]
    decisions: list[_Decision]


_READER = TypeAdapter(_Plan)


def check_plan(plain: Mapping[str, Any]) -> None:
    """Say no to values that no plan has.

    Raises:
        ValueError: for the first that is wrong, with its place.
    """
    try:
        plan = _READER.validate_json(json.dumps(plain))  # strictly, which from Python would want the classes
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(printable(str(part)[:100]) for part in found["loc"])
        raise ValueError(f"{place}: {brief(found['input'], 80)}: {found['msg'].lower()}") from None
    _check_objectives(plan)
    _check_stages(plan)
    for number, decision in enumerate(plan.decisions):
        stage = plan.stages[decision.stage] if decision.stage < len(plan.stages) else None
        if stage is None or not stage.start < decision.step <= stage.stop:
            raise ValueError(f"decisions.{number}: at no step of its stage")
    if not plan.parameters.keys() >= set(chain.from_iterable(plan.groups.values())):
        raise ValueError("groups: a parameter that the model does not have")
    if [len(said) for said in plan.said] != [len(stage.turns) for stage in plan.stages]:
        raise ValueError("said: not one schedule for each stage, and each of its objectives")


def _check_objectives(plan: _Plan) -> None:
    """Each group is one objective's, and no parameter is in two groups of it."""
    if plan.owners.keys() != plan.groups.keys() or not set(plan.owners.values()) <= plan.objectives.keys():
        raise ValueError("owners: not each group is one objective's")
    for objective in plan.objectives:
        names = [
            name for group, own in plan.groups.items() if plan.owners[group] == objective for name in own
        ]
        if len(set(names)) != len(names):
            raise ValueError("groups: a parameter is in two of them")


def _check_stages(plan: _Plan) -> None:
    """Each begins where the one before ended, and has a rate and a decay for each group."""
    step, epoch = 0, 0
    for index, stage in enumerate(plan.stages):
        where = f"stages.{index}"
        if stage.index != index or stage.start != step or stage.first_epoch != epoch or stage.stop <= step:
            raise ValueError(f"{where}: does not begin where the stage before ends, or has no step")
        if stage.peak_lr.keys() != plan.groups.keys() or stage.weight_decay.keys() != plan.groups.keys():
            raise ValueError(f"{where}: not one rate and one decay for each group")
        _check_turns(stage, plan, where)
        cooled = [stage.start, *stage.cooled, stage.stop]
        if sorted(cooled) != cooled or len(stage.cooled) > stage.reductions:
            raise ValueError(f"{where}.cooled: not rising within the stage, or more often than it may")
        step = stage.stop
        epoch += -(-(stage.stop - stage.start) // stage.steps_per_epoch)


def _check_turns(stage: _Stage, plan: _Plan, where: str) -> None:
    """They are of objectives that there are, make the steps of an epoch, and are all that has a rate."""
    names = {turn.objective for turn in stage.turns}
    if not names <= plan.objectives.keys():
        raise ValueError(f"{where}.turns: an objective that the plan does not have")
    if "" in names and any((turn.every, turn.repeat, len(stage.turns)) != (1, 1, 1) for turn in stage.turns):
        raise ValueError(f"{where}.turns: one without a name is the only one, and has each round once")
    updates = sum(-(-stage.rounds_per_epoch // turn.every) * turn.repeat for turn in stage.turns)
    if updates != stage.steps_per_epoch:
        raise ValueError(f"{where}: {stage.steps_per_epoch} steps in an epoch, and its turns make {updates}")
    if updates > MOST_IN_TURNS and "" not in names:
        raise ValueError(f"{where}: {updates} steps in an epoch that objectives share")
    if any(peak and plan.owners[group] not in names for group, peak in stage.peak_lr.items()):
        raise ValueError(f"{where}: a rate for a group that is no turn's")
