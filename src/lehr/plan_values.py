"""What may stand in a plan's file: the type and range of each value, and that the parts agree with each other.

A plan's hash says that nothing was changed by accident; whoever writes a file can write its hash as well. This
file handles plain values and must not know what a plan does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lehr.untrusted import brief, printable

MOST_STEPS = 10**8
"""Of a whole run, a thousand times as many as a long one has: a rate is kept for each."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_Positive = Annotated[int, Field(ge=1, lt=2**31)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Endless = Annotated[float, Field(gt=0)]  # infinite where there is none


@dataclass(frozen=True, config=_STRICT)
class _Stage:
    index: _Count
    label: str
    start: _Step
    stop: _Step
    first_epoch: _Step
    steps_per_epoch: _Positive
    batch_size: _Positive
    accumulate: _Positive
    schedule: str
    peak_lr: dict[str, _Rate]
    weight_decay: dict[str, _Rate]
    restore_best: bool


@dataclass(frozen=True, config=_STRICT)
class _Plan:
    model: str
    samples: Annotated[int, Field(ge=1, lt=2**63)]
    stages: Annotated[list[_Stage], Field(min_length=1)]
    groups: dict[str, list[str]]
    parameters: dict[str, _Count]
    optimizer: Annotated[str, Field(min_length=1)]
    optimizer_settings: dict[str, Any]
    min_lr: _Rate
    clip_norm: _Endless
    ema: Annotated[float, Field(ge=0, lt=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    seed: _Count
    monitor: str
    patience: _Endless
    said: list[str]
    augment: list[str]
    notes: list[str]


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
    _check_stages(plan)
    names = list(chain.from_iterable(plan.groups.values()))
    if len(set(names)) != len(names):
        raise ValueError("groups: a parameter is in two of them")
    if not plan.parameters.keys() >= set(names):
        raise ValueError("groups: a parameter that the model does not have")
    if len(plan.said) != len(plan.stages):
        raise ValueError("said: not one schedule for each stage")


def _check_stages(plan: _Plan) -> None:
    """Each begins where the one before ended, and has a rate and a decay for each group."""
    step, epoch = 0, 0
    for index, stage in enumerate(plan.stages):
        where = f"stages.{index}"
        if stage.index != index or stage.start != step or stage.first_epoch != epoch or stage.stop <= step:
            raise ValueError(f"{where}: does not begin where the stage before ends, or has no step")
        if stage.peak_lr.keys() != plan.groups.keys() or stage.weight_decay.keys() != plan.groups.keys():
            raise ValueError(f"{where}: not one rate and one decay for each group")
        step = stage.stop
        epoch += -(-(stage.stop - stage.start) // stage.steps_per_epoch)
