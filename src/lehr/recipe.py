"""What a person writes: `Recipe`, `Stage` and `Objective`, frozen and validated.

A recipe is words: durations keep their units, patterns stay patterns, a percentage stays one. Nothing here
knows a model or how much data there is; `resolving.py` brings them together. Every mistake is a
`RecipeError` that names the place. How a recipe is read from a file is in `recipe_file.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, fields
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from lehr.conditions import Condition
from lehr.curves import Schedule
from lehr.errors import RecipeError
from lehr.recipe_findings import MisplacedError, missing, speaking
from lehr.recipe_values import (
    Budget,
    Cache,
    CacheDtype,
    Clock,
    ConditionSaid,
    Count,
    Epochs,
    Every,
    LayerDecay,
    Length,
    LossSaid,
    LrRule,
    Name,
    NonNegative,
    OptimizerSaid,
    Patterns,
    Positive,
    Rate,
    Reduction,
    ScheduleSaid,
    Share,
    Trained,
    Views,
)
from lehr.schedules import cosine, warmup
from lehr.toml import toml_lines

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CLOSED)
class Objective:
    """One of several things that a stage trains for, in turns: its own loss, parameters, optimizer, rates and counter.

    On each batch (each window of batches, where gradients are accumulated) the stage's objectives take their turns
    in order. While one trains, everything else is frozen.

    Args:
        name: a short word such as `"d"`; its losses are told as `d_loss`. The same name in several stages is the same
            optimizer.
        loss: `loss(model, batch)` returns the mean over the batch, a scalar tensor, or a dict with it as `loss`. It may
            be given to `lehr.fit` instead, as `loss={"d": ...}`, so that a recipe can be a file.
        train: a pattern or a list of patterns: what it trains.
        lr: the peak rate, or one for each pattern.
        optimizer: as in `Recipe`, which is the default.
        schedule: over this objective's own updates in the stage; by default the stage's or the recipe's.
        weight_decay: by default the stage's or the recipe's.
        clip_norm: by default the recipe's; of this objective's gradients alone.
        every: takes its turn on batches 0, every, 2 * every, ... of each epoch.
        repeat: updates on each of these batches.

    Raises:
        RecipeError: for an unknown key or a value that cannot be, naming the key.

    Example:
        >>> Objective("d", train="discriminator", lr=2e-4).every
        1
    """

    name: Name
    loss: LossSaid | None = None
    _: KW_ONLY
    train: Trained
    lr: Rate
    optimizer: OptimizerSaid | None = None
    schedule: ScheduleSaid | None = None
    weight_decay: NonNegative | None = None
    clip_norm: Positive | None = None
    every: Count = 1
    repeat: Count = 1


@dataclass(frozen=True, config=_CLOSED)
class Stage:
    """A stretch of the run with one set of trained parameters; what it leaves out it takes from the recipe.

    Args:
        length: `"5 epochs"` or `"400 steps"`; with `until`, at the latest.
        train: a pattern or a list of patterns (`lehr.selection`): what trains; everything else is frozen.
        lr: the peak rate, or one for each pattern: `{"head": 1e-3, "backbone": 1e-4}`.
        objectives: several `Objective`s that take turns, instead of `train` and `lr`.
        until: ends the stage on a measured condition: `"train_error < 0.80"`, `"valid_accuracy > 0.95"`,
            `"valid_loss plateaus 3 epochs"` (no new best for so long).
        every: `"50 steps"`: `until` is checked so often, on the mean over the samples of those steps; a metric of the
            training only. By default it is checked at the end of each epoch.
        reduce: 0.1 multiplies the rates by it at each plateau that `until` finds, instead of ending the stage;
            `{"by": 0.1, "times": 2}` ends it at the plateau after two reductions. A warm-up counts as no plateau.
        clock: `"run"` counts `length` and `schedule` from the run's first step, so that "64000 steps" is where the run
            is then, however long the stages before it took; `"stage"` from the stage's own.
        schedule: the curve over this stage that multiplies the peak rates; over its latest length, where `until` may
            end it sooner.
        batch_size: samples in a batch, 1 or more.
        accumulate: batches whose gradients make one step, 1 or more.
        weight_decay: 0 or more; not applied to what the recipe's `no_decay` names.
        layer_decay: from 0 (excluded) to 1: rate * layer_decay ** (distance of the layer from the head).
        restore_best: end the stage with its best weights by `monitor`, and go on from them.
        views: how many fixed random versions each sample has, one an epoch in turn; 1 is the sample without random
            changes, as in validation; `"fresh"` is a new one each epoch. Fixed views can be cached.
        cache: `"auto"` computes what the stage does not train once for each view of a sample, where that is the same and
            pays; `"require"` refuses to train without; `"off"` does without.

    Raises:
        RecipeError: for an unknown key, a value that cannot be, or keys that do not go together, naming the key.

    Example:
        >>> Stage("5 epochs", train="head", lr=1e-3).train
        ('head',)
        >>> Stage("2 epochs", train="all", lr=0.01, until="train_error < 0.80", every="50 steps").until
        Condition.parse("train_error < 0.8")
    """

    length: Length
    _: KW_ONLY
    objectives: Sequence[Objective] = Field(default=(), validate_default=True, kw_only=True)
    train: Trained | None = Field(default=None, validate_default=True, kw_only=True)
    lr: Rate | None = Field(default=None, validate_default=True, kw_only=True)
    until: ConditionSaid | None = None
    every: Every | None = None
    reduce: Reduction | None = None
    clock: Clock = "stage"
    schedule: ScheduleSaid | None = None
    batch_size: Count | None = None
    accumulate: Count | None = None
    weight_decay: NonNegative | None = None
    layer_decay: LayerDecay | None = None
    restore_best: Annotated[bool, Field(strict=True)] | None = None
    views: Views | None = None
    cache: Cache | None = None

    @field_validator("train", "lr", mode="before")
    @classmethod
    def _is_said(cls, said: object, info: ValidationInfo) -> object:
        """What trains, and how fast, must be said, unless objectives say it (or are said, and wrong)."""
        if said is None and not info.data.get("objectives", "wrong"):
            raise ValueError(missing(str(info.field_name)))
        return said

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        _check_objectives(self)
        _check_until(self)


@dataclass(frozen=True, config=_CLOSED)
class Recipe:
    """A whole fine-tuning, as a person says it. Stages override what is theirs to override.

    Args:
        stages: one or more `Stage`s, in order.
        optimizer: the name of a `torch.optim` class in any case, or a table with `name` and the class's own
            keywords.
        schedule: the curve of every stage that has none of its own; each stage runs through it from the
            start.
        batch_size, accumulate, weight_decay, layer_decay, restore_best, views, cache: as in `Stage`.
        no_decay: patterns of parameters that weight decay leaves alone; norms and biases by default.
        min_lr: an absolute lowest rate: rate = min_lr + (peak - min_lr) * factor; at most the smallest peak.
        lr_rule: `"fixed"`: rates are as written. `"linear"`: they are meant for the recipe's `batch_size *
            accumulate`, and a stage with k times as many samples a step gets k times the rate (Goyal et al.
            2017).
        clip_norm: the largest global norm of the gradients; None does not clip.
        ema: the decay of an exponential moving average of the weights, from 0 (excluded) to 1; it is what
            is validated and kept.
        label_smoothing: for the built-in cross-entropy, 0 to 1.
        seed: of the order of the data, the augmentation, dropout and a new head.
        monitor: what "best" means: a metric by name such as `"valid_loss"` or `"valid_accuracy"`.
        patience: stop after so many epochs of the last stage without a new best, `"3 epochs"`; None does
            not stop early.
        augment: names of random changes for images that lehr reads (see `lehr.data`); refused with a data
            set of your own.
        cache_budget: the most memory that caches may take, `"4 GiB"`, on the disk where it does not fit in memory.
        cache_dtype: the narrowest type that a cache may store, `"fp32"`, `"fp16"` or `"bf16"`; fp32 is kept while it
            fits the budget.
        cache_exact: whether what is cached is computed to the same bits as the model's own: slower, nothing is folded.

    Example:
        >>> Recipe(stages=[Stage("1 epoch", train="all", lr=1e-3)]).optimizer
        'adamw'
    """

    stages: Sequence[Stage]
    _: KW_ONLY
    optimizer: OptimizerSaid = "adamw"
    schedule: ScheduleSaid = warmup("5%") >> cosine()
    batch_size: Count = 32
    accumulate: Count = 1
    weight_decay: NonNegative = 0.0
    no_decay: Patterns = ("norm", "bias")
    layer_decay: LayerDecay = 1.0
    min_lr: NonNegative = 0.0
    lr_rule: LrRule = "fixed"
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    label_smoothing: Share = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    monitor: Annotated[str, Field(min_length=1, strict=True)] = "valid_loss"
    patience: Epochs | None = None
    restore_best: Annotated[bool, Field(strict=True)] = False
    augment: Patterns | None = None
    views: Views = "fresh"
    cache: Cache = "auto"
    cache_budget: Budget = "4 GiB"
    cache_dtype: CacheDtype = "fp32"
    cache_exact: Annotated[bool, Field(strict=True)] = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError(
                "stages: []; a recipe needs at least one stage, for example Stage('5 epochs', train='head', lr=1e-3)"
            )
        object.__setattr__(self, "stages", tuple(self.stages))

    def to_dict(self) -> dict[str, Any]:
        """All that is said or is a default, as plain values in the form that TOML has; what is None is left out."""
        return _said(self)

    def to_toml(self) -> str:
        """The recipe as TOML, defaults included, so that it keeps its meaning if a default changes one day.

        `load_recipe` reads it back as an equal recipe.
        """
        plain = self.to_dict()
        stages = [line for stage in plain.pop("stages") for line in ("", *stage_lines(stage))]
        return "\n".join([*toml_lines(plain), *stages]) + "\n"


def _check_objectives(stage: Stage) -> None:
    """Objectives say themselves what trains, and each has a name of its own."""
    if not stage.objectives:
        return
    for key in ("train", "lr"):
        if getattr(stage, key) is not None:
            raise MisplacedError(
                key, f"does not stand beside objectives, each of which has its own {key}; leave it out"
            )
    twice = [name for name, count in Counter(o.name for o in stage.objectives).items() if count > 1]
    if twice:
        raise MisplacedError("objectives", f"{twice[0]!r} stands there twice; each has a name of its own")
    if stage.clock == "run":
        raise MisplacedError(
            "clock", '"run" is not for objectives, each of which counts its own updates; leave it out'
        )


def _check_until(stage: Stage) -> None:
    """What belongs to `until` makes sense only with it, and only with some conditions."""
    until = stage.until
    plateau = isinstance(until, Condition) and until.kind == "plateaus"
    if until is None and stage.every is not None:
        raise MisplacedError(
            "every", "says how often `until` is checked, and the stage has none; leave it out"
        )
    if stage.reduce is not None and not plateau:
        raise MisplacedError("reduce", 'needs a plateau to reduce at: until = "valid_loss plateaus 3 epochs"')
    if until is None:
        return
    if stage.every is not None and not until.of_training:
        raise MisplacedError(
            "every",
            f"{until.metric!r} is measured at the end of each epoch; leave `every` out, or wait for a metric of the "
            "training, such as train_error",
        )
    if plateau and until.patience.unit == "steps" and stage.every is None:
        raise MisplacedError(
            "until",
            f'"{until}" counts steps, and is checked once an epoch; write epochs, or every = "50 steps"',
        )


def stage_lines(stage: Mapping[str, Any]) -> Iterator[str]:
    """A stage of `to_dict` as lines of TOML."""
    yield "[[stages]]"
    yield from toml_lines({key: value for key, value in stage.items() if key != "objectives"})
    for objective in stage.get("objectives", ()):
        yield from ("", "[[stages.objectives]]", *toml_lines(objective))


def _said(value: Any) -> dict[str, Any]:
    """The fields of a recipe, stage or objective that say something, as TOML's values; a function is none."""
    out: dict[str, Any] = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if item is None or isinstance(item, Callable) or (f.name in _SILENT and item == _SILENT[f.name]):  # type: ignore[arg-type]
            continue
        if isinstance(item, (Schedule, Condition)):
            item = str(item)
        elif f.name in ("stages", "objectives"):
            item = [_said(one) for one in item]
        elif isinstance(item, tuple):
            item = item[0] if len(item) == 1 and f.name == "train" else list(item)
        out[f.name] = item
    return out


_SILENT: Final[Mapping[str, object]] = {"objectives": (), "clock": "stage", "every": 1, "repeat": 1}
"""Defaults that are what a person who does not know of the key expects."""
ROOMS: Final[Mapping[str, type]] = {"": Recipe, "stages": Stage, "objectives": Objective}
"""The classes of a recipe, by the key that holds a list of them."""
READER: Final = TypeAdapter(Recipe)
for _cls in ROOMS.values():
    speaking(_cls, ROOMS)
