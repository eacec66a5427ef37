"""What a resume needs besides tensors, as one small value that a person can read: where the run is, and what
it has counted.

Nothing of a schedule is in it, since `plan[t]` depends on `t` alone; the plan's hash is. It goes to JSON and
comes back strictly: no unknown field, no other type, no changed byte. This file must not know tensors, models
or where the JSON is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lehr.data.fingerprint import Fingerprint
from lehr.untrusted import brief

FORMAT = 4
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_COLUMNS = {"epoch": int, "stage": int, "step": int, "train_loss": float, "best": bool}
_STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[  # JSON has no infinities: they are texts, as in the journal
    float,
    BeforeValidator(lambda v: _NON_FINITE.get(v, v) if isinstance(v, str) else v),
    PlainSerializer(lambda v: v if math.isfinite(v) else str(float(v)), return_type=object),
]


@dataclass(frozen=True, config=_STRICT)
class Position:
    """Where to go on: in `stage`, in `epoch`, after `step` updates of the run.

    Within an epoch, `step` lies between the epoch's first step and the step after its last (all are done, the
    validation is not). After a stage's last epoch, `epoch` is the number of the next one: what ends a stage
    is still to be done.
    """

    stage: Count = 0
    epoch: Count = 0
    step: Count = 0


@dataclass(frozen=True, config=_STRICT)
class Tally:
    """A sum over samples, and their number."""

    total: Number = 0.0
    samples: Count = 0


@dataclass(frozen=True, config=_STRICT)
class SoFar:
    """What the epoch under way has counted: the sum of losses weighted by samples, the samples, seconds; and the
    losses of each objective, where there are several.
    """

    loss_sum: Number = 0.0
    samples: Count = 0
    seconds: Seconds = 0.0
    objectives: dict[str, Tally] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Gauge:
    """What is known of the stage's `until`, the words of which are `condition`: the best value so far, the larger the
    better, and where it was seen; what was counted since the last check, and in this epoch.
    """

    condition: str = ""
    best: Number = -math.inf
    at: Count = 0
    window: Tally = field(default_factory=Tally)
    epoch: Tally = field(default_factory=Tally)


@dataclass(frozen=True, config=_STRICT)
class Decided:
    """What was decided on evidence, as `lehr.planned_stage.Decision` has it."""

    stage: Count
    step: Count
    kind: Literal["end", "reduce"]
    value: Number


@dataclass(frozen=True, config=_STRICT)
class Kept:
    """An epoch whose weights are kept, and the value of its monitored metric, the larger the better."""

    epoch: Count
    value: Number


@dataclass(frozen=True, config=_STRICT)
class BestSoFar:
    """The best epochs: of the run, of the stage, the few best in order; and since when nothing was better."""

    run: Kept | None = None
    stage: Kept | None = None
    ranked: tuple[Kept, ...] = ()
    waiting_since: Annotated[int, Field(ge=-1, lt=2**63)] = -1


@dataclass(frozen=True, config=_STRICT)
class FileSum:
    """A file's size and SHA-256."""

    bytes: Count
    sha256: Hash


@dataclass(frozen=True, config=_STRICT)
class Slots:
    """What the optimizer keeps for one parameter, besides the tensors: their names, plain values, and which
    of the tensors lay in the host's memory though the parameter did not (None where it did, too).
    """

    tensors: tuple[str, ...]
    plain: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    host: tuple[str, ...] | None = None


@dataclass(frozen=True, config=_STRICT)
class Made:
    """By what the state was made; on anything else a run goes on closely, not to the bit. `compile` is the backend that
    compiled the model, or empty.
    """

    lehr: str
    torch: str
    device: str
    precision: str
    threads: Count
    compile: str = ""


@dataclass(frozen=True, config=_STRICT)
class Settings:
    """What the run was asked for that has no effect on its result: how often to save, and how many to keep."""

    every: str
    keep: Annotated[int, Field(ge=1)]
    keep_best: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class State:
    """Everything but the tensors.

    `plan_hash` is that of the plan as it was made; with the `decisions`, each an end or a cooling of a stage, it is the
    plan that is followed. `gauge` has what is known of the next one. `optimizer` and `scalers` are by objective.
    `records` counts the journal's lines that were written when the state was taken; `instead_of` is the hash
    of the plan that a person replaced by this one, or empty; `frozen` has a digest of each tensor that the
    stage keeps frozen, as it was when the stage began; `random` has what is no tensor of the random states;
    `rule` is how convolution weights lie in memory, and `layout` how those do that the stage trains;
    `files` are the checkpoint's tensors (`"tensors"`) and the weights of best epochs (`"best-3"`).
    """

    at: Position
    plan_hash: Hash
    instead_of: Hash | None
    records: Count
    seconds: Seconds
    so_far: SoFar
    decisions: tuple[Decided, ...]
    gauge: Gauge
    history: tuple[dict[str, bool | int | Number], ...]
    best: BestSoFar
    frozen: dict[str, str]
    optimizer: dict[str, dict[str, Slots]]
    scalers: dict[str, dict[str, int | float]]
    random: dict[str, int | float | str | None]
    train: Fingerprint
    valid: Fingerprint | None
    settings: Settings
    rule: Literal["contiguous", "channels_last"]
    layout: Literal["contiguous", "channels_last"]
    made: Made
    files: dict[str, FileSum]
    format: int = FORMAT


_ADAPTER: TypeAdapter[State] = TypeAdapter(State)


class DamageError(Exception):
    """A file that is not what was written, and why."""


def dumps(state: State) -> str:
    """The state as JSON, with a hash over all of it."""
    plain: dict[str, Any] = _ADAPTER.dump_python(state, mode="json")
    return json.dumps({**plain, "hash": _hash(plain)}, indent=1) + "\n"


def loads(text: str | bytes) -> State:
    """The state that `dumps` wrote.

    Raises:
        DamageError: for anything else.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"not JSON ({error})") from None
    if not isinstance(plain, dict):
        raise DamageError(f"holds a {type(plain).__name__}, not a table")
    if plain.get("format") != FORMAT:
        raise DamageError(
            f"of format {brief(plain.get('format'), most=40)}; this lehr reads {FORMAT}: use the lehr that wrote it"
        )
    said = plain.pop("hash", None)
    try:
        same = said == _hash(plain)
    except RecursionError:
        same = False
    if not same:
        raise DamageError("its content does not have the hash that it says")
    try:
        state = _ADAPTER.validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = brief(".".join(map(str, first["loc"])))
        raise DamageError(f"{place}: {first['msg']}") from None
    if wrong := next(_contradictions(state), ""):
        raise DamageError(f"it cannot be: {wrong}")
    return state


def _contradictions(state: State) -> Iterator[str]:
    """What no run can have written: the hash says that nothing has changed since, not who wrote it."""
    at, best = state.at, state.best
    if len(state.history) != at.epoch:
        yield f"a history of {len(state.history):,} epochs in epoch {at.epoch:,}"
    step = 0
    for number, row in enumerate(state.history):
        if any(type(row.get(key)) is not kind for key, kind in _COLUMNS.items()) or row["epoch"] != number:
            yield f"row {number} of the history is not that of an epoch"
            return
        if not step < row["step"] <= at.step:
            yield f"row {number} of the history ends at step {row['step']}"
        step = int(row["step"])
    if (at.step > step) != (state.so_far.samples > 0):
        yield f"{state.so_far.samples:,} samples so far in an epoch of which {at.step - step:,} steps are done"
    named = [kept.epoch for kept in (best.run, best.stage, *best.ranked) if kept]
    if max((*named, best.waiting_since), default=-1) >= at.epoch:
        yield "a best epoch that has not ended"


def _hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
