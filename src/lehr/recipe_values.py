"""What may stand in a recipe: the type of each value, with its check and the words that refuse it.

A check returns the value as the recipe keeps it, which is what was written: durations stay texts, one pattern becomes a
list of one. This file must not know which key takes which value; `recipe.py` says that.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from lehr.byte_size import byte_size
from lehr.conditions import Condition
from lehr.curves import Schedule
from lehr.duration import Duration
from lehr.notation import read_schedule
from lehr.untrusted import brief, printable

LrRule = Literal["fixed", "linear"]
Clock = Literal["stage", "run"]
Cache = Literal["auto", "off", "require"]
CacheDtype = Literal["fp32", "fp16", "bf16"]
_MOST = {"steps": 10**8, "epochs": 10**6}  # a rate is computed for each step
_OWN_PLACE = {
    "lr": "the stage's `lr`",
    "weight_decay": "the recipe's `weight_decay`",
    "params": "the stage's `train`",
}


def _duration(said: object, *units: str) -> Duration:
    """The duration; a bare number is refused here, for only some `units` would do."""
    number = said.strip() if isinstance(said, str) else brief(said)
    if not isinstance(said, bool) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", number):
        ways = " or ".join(f'"{number} {unit}"' for unit in units if number.isdecimal() or unit == "epochs")
        raise ValueError(f"{brief(said)} has no unit; write {ways}")
    return Duration.parse(said, where="duration")  # type: ignore[arg-type]  # refuses everything but text


def _stage_length(said: object) -> str:
    """Check the length of a stage; it stays the text that was written."""
    length = _duration(said, "epochs", "steps")
    if length.unit == "%":
        raise ValueError(f'"{said}" is a share, but of what? A stage\'s length is in "epochs" or "steps"')
    if not length.amount:
        raise ValueError(f'"{said}" is no stage at all; leave the stage out, or give it at least one step')
    most = _MOST[length.unit]
    if length.amount > most:
        raise ValueError(f'"{said}" is longer than any run; a stage has at most {most:,} {length.unit}')
    return str(said)


def _epochs(said: object) -> str:
    length = _duration(said, "epochs")
    if length.unit != "epochs" or length.amount.denominator != 1 or not length.amount:
        raise ValueError(
            f'"{said}"; the data are validated once an epoch, so write whole epochs, for example "3 epochs"'
        )
    return str(said)


def _patterns(said: object) -> tuple[str, ...]:
    listed = (said,) if isinstance(said, str) else said
    if not isinstance(listed, Sequence) or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f'{brief(said)}; expected a pattern such as "head", or a list of patterns')
    return tuple(listed)


def _trained(said: object) -> tuple[str, ...]:
    patterns = _patterns(said)
    if not patterns:
        raise ValueError('[] trains nothing; name what to train, for example "head" or "all"')
    return patterns


def _rate(said: object) -> float | dict[str, float]:
    if isinstance(said, Mapping):
        if not said:
            raise ValueError(
                "{} gives no rate; write a number, or a rate for each pattern: { head = 1e-3, backbone = 1e-4 }"
            )
        return {str(pattern): _positive(rate, f"rate of {pattern!r}") for pattern, rate in said.items()}
    return _positive(said, "rate")


def _positive(said: object, what: str) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 < said <= sys.float_info.max:
        raise ValueError(f"{brief(said)}; expected a {what} above 0, a number such as 1e-3")
    return float(said)


def _optimizer(said: object) -> str | dict[str, Any]:
    table = {"name": said} if isinstance(said, str) else said
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str) or not table["name"]:
        raise ValueError(
            f'{brief(said)}; expected a name such as "adamw", or a table {{ name = "sgd", momentum = 0.9 }}'
        )
    for key, place in _OWN_PLACE.items():
        if key in table:
            raise ValueError(f"{key!r} does not stand in the optimizer; it is said in {place}")
    return said if isinstance(said, str) else {key: _setting(key, value) for key, value in table.items()}


def optimizer_named(said: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An optimizer's name as it was written, and its own keywords.

    >>> optimizer_named({"name": "sgd", "momentum": 0.9})
    ('sgd', {'momentum': 0.9})
    """
    if isinstance(said, str):
        return said, {}
    return str(said["name"]), {key: value for key, value in said.items() if key != "name"}


def _setting(key: str, value: object) -> object:
    """A keyword of the optimizer as TOML and JSON hold it: a tuple is a list, and there is no None and no
    infinity.
    """
    if isinstance(value, (list, tuple)):
        return [_setting(key, item) for item in value]
    whole = isinstance(value, int) and abs(value) < 2**63  # a larger one is no number of torch
    if whole or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(
        f"{printable(key)}={brief(value)}; expected a finite number, a text, true or false, or a list of them; leave out what is None"
    )


def _every(said: object) -> str:
    """How often `until` is checked; it stays the text that was written."""
    every = _duration(said, "steps")
    if every.unit != "steps" or not every.amount:
        raise ValueError(f'"{said}"; expected a number of steps, for example "50 steps"')
    return str(said)


def _budget(said: object) -> str:
    """Check an amount of memory; it stays the text that was written."""
    byte_size(said, where="size")  # type: ignore[arg-type]  # refuses everything but text
    return str(said)


def _views(said: object) -> int | Literal["fresh"]:
    if said == "fresh":
        return "fresh"
    if isinstance(said, bool) or not isinstance(said, int) or not 1 <= said < 2**31:
        raise ValueError(
            f'{brief(said)}; expected how many fixed views each sample has, 1 or more, or "fresh": a new one each epoch'
        )
    return said


def _condition(said: object) -> Condition:
    return Condition.parse(said)  # type: ignore[arg-type]  # refuses everything but text


def _reduction(said: object) -> float | dict[str, float]:
    """A factor, or a table with it and how often."""
    table = said if isinstance(said, Mapping) else {"by": said}
    by, times = table.get("by"), table.get("times", 1)
    if (
        not table.keys() <= {"by", "times"}
        or isinstance(by, bool)
        or not isinstance(by, (int, float))
        or not 0 < by < 1
    ):
        raise ValueError(f"{brief(said)}; expected a factor between 0 and 1, or {{ by = 0.1, times = 2 }}")
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times < 2**31:
        raise ValueError(f"{brief(said)}; times: expected a whole number, 1 or more")
    return {"by": float(by), "times": times} if "times" in table else float(by)


def _name(said: object) -> str:
    if not isinstance(said, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,30}", said):
        raise ValueError(f'{brief(said)}; expected a short word of letters and digits, such as "d"')
    return said


def _loss(said: object) -> Any:
    if not callable(said):
        raise ValueError(
            f"{brief(said)}; expected a function of (model, batch); in a file leave it out, and give it to lehr.fit: "
            'loss={"d": ...}'
        )
    return said


Length = Annotated[str, PlainValidator(_stage_length)]
Epochs = Annotated[str, PlainValidator(_epochs)]
Patterns = Annotated[str | Sequence[str], PlainValidator(_patterns)]
Trained = Annotated[str | Sequence[str], PlainValidator(_trained)]
Rate = Annotated[float | Mapping[str, float], PlainValidator(_rate)]
OptimizerSaid = Annotated[str | Mapping[str, Any], PlainValidator(_optimizer)]
ScheduleSaid = Annotated[Schedule, PlainValidator(read_schedule)]
ConditionSaid = Annotated[Condition, PlainValidator(_condition)]
Every = Annotated[str, PlainValidator(_every)]
Budget = Annotated[str, PlainValidator(_budget)]
Views = Annotated[int | Literal["fresh"], PlainValidator(_views)]
Reduction = Annotated[float | Mapping[str, float], PlainValidator(_reduction)]
Name = Annotated[str, PlainValidator(_name)]
LossSaid = Annotated[Callable[..., Any], PlainValidator(_loss)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
LayerDecay = Annotated[float, Field(gt=0, le=1, strict=True)]
