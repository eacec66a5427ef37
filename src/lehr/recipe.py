"""What a person writes: `Recipe` and `Stage`, frozen and validated, and the strict TOML reader.

A recipe is words: durations keep their units, patterns stay patterns, a percentage stays one. Nothing here
knows a model or how much data there is; `resolving.py` brings them together. Every mistake is a
`RecipeError` that names the place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomlkit
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lehr.curves import Schedule
from lehr.errors import RecipeError, nearest
from lehr.recipe_values import (
    Count,
    Epochs,
    LayerDecay,
    Length,
    LrRule,
    NonNegative,
    OptimizerSaid,
    Patterns,
    Positive,
    Rate,
    ScheduleSaid,
    Share,
    Trained,
)
from lehr.schedules import cosine, warmup
from lehr.toml import toml_lines
from lehr.untrusted import MIB, brief, printable, read_bytes

_T = TypeVar("_T")
_LARGEST = MIB  # of the text of a recipe; a long one has some thousand bytes
_MOST_FINDINGS = 20  # lines in one message
_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CLOSED)
class Stage:
    """A stretch of the run with one set of trained parameters; what it leaves out it takes from the recipe.

    Args:
        length: `"5 epochs"` or `"400 steps"`.
        train: a pattern or a list of patterns (`lehr.selection`): what trains; everything else is frozen.
        lr: the peak rate, or one for each pattern: `{"head": 1e-3, "backbone": 1e-4}`.
        schedule: the curve over this stage that multiplies the peak rates.
        batch_size: samples in a batch, 1 or more.
        accumulate: batches whose gradients make one step, 1 or more.
        weight_decay: 0 or more; not applied to what the recipe's `no_decay` names.
        layer_decay: from 0 (excluded) to 1: rate * layer_decay ** (distance of the layer from the head).
        restore_best: end the stage with its best weights by `monitor`, and go on from them.

    Raises:
        RecipeError: for an unknown key or a value that cannot be, naming the key.

    Example:
        >>> Stage("5 epochs", train="head", lr=1e-3).train
        ('head',)
    """

    length: Length
    _: KW_ONLY
    train: Trained
    lr: Rate
    schedule: ScheduleSaid | None = None
    batch_size: Count | None = None
    accumulate: Count | None = None
    weight_decay: NonNegative | None = None
    layer_decay: LayerDecay | None = None
    restore_best: Annotated[bool, Field(strict=True)] | None = None


@dataclass(frozen=True, config=_CLOSED)
class Recipe:
    """A whole fine-tuning, as a person says it. Stages override what is theirs to override.

    Args:
        stages: one or more `Stage`s, in order.
        optimizer: the name of a `torch.optim` class in any case, or a table with `name` and the class's own
            keywords.
        schedule: the curve of every stage that has none of its own; each stage runs through it from the
            start.
        batch_size, accumulate, weight_decay, layer_decay, restore_best: as in `Stage`.
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

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError(
                "stages: []; a recipe needs at least one stage, for example Stage('5 epochs', train='head', lr=1e-3)"
            )
        object.__setattr__(self, "stages", tuple(self.stages))

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name as it was written."""
        return self.optimizer if isinstance(self.optimizer, str) else str(self.optimizer["name"])

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """The optimizer's own keywords."""
        return (
            {}
            if isinstance(self.optimizer, str)
            else {k: v for k, v in self.optimizer.items() if k != "name"}
        )

    def to_dict(self) -> dict[str, Any]:
        """All that is said or is a default, as plain values in the form that TOML has; what is None is left out."""
        plain = _said(self, Recipe)
        stages = plain.pop("stages")
        return {**plain, "stages": [_said(stage, Stage) for stage in stages]}

    def to_toml(self) -> str:
        """The recipe as TOML, defaults included, so that it keeps its meaning if a default changes one day.

        `load_recipe` reads it back as an equal recipe.
        """
        plain = self.to_dict()
        stages = [["", "[[stages]]", *toml_lines(stage)] for stage in plain.pop("stages")]
        return "\n".join([*toml_lines(plain), *(line for lines in stages for line in lines)]) + "\n"


def recipe_from(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A recipe from plain values, as a TOML file holds them.

    Raises:
        RecipeError: listing everything that is wrong, each with its place below `where`.
    """
    try:
        return _READER.validate_python(dict(table))
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None
    except RecipeError as error:
        raise type(error)(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(
            f"{where}: tables or lists within each other without end; a recipe has two levels"
        ) from None


def load_recipe(path: str | Path, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, with `settings` such as `"stages.0.lr=1e-3"` laid over it.

    Raises:
        RecipeError: where the file cannot be read, is no TOML, or says something that cannot be, naming
            file and key.
    """
    name = printable(str(path))
    try:
        text = read_bytes(path, most=_LARGEST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(
            f"{name}: cannot be read: {reason}; `lehr init DATA` writes a recipe to start from"
        ) from None
    return recipe_from(overridden(_parsed(text, name), settings), where=name)


def _parsed(text: str, where: str) -> dict[str, Any]:
    """What a TOML text says, as plain values."""
    try:
        return tomlkit.parse(text).unwrap()
    except RecursionError:
        raise RecipeError(f"{where}: not TOML that a recipe needs: lists within lists within lists") from None
    except Exception as error:  # tomlkit lets ValueError, AttributeError and more of Python's through
        said = printable(str(error)[:200]) or type(error).__name__
        raise RecipeError(f"{where}: not TOML: {said}") from None


def overridden(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with each `key=value` of `settings` laid over it; keys are dotted, values are TOML.

    Example:
        >>> overridden({"stages": [{"lr": 1e-4}]}, ["stages.0.lr=1e-3", "optimizer=sgd"])
        {'stages': [{'lr': 0.001}], 'optimizer': 'sgd'}
    """
    out: dict[str, Any] = _copied(dict(table))
    for setting in settings:
        key, equals, written = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"--set {printable(setting[:200])}: expected KEY=VALUE, for example --set stages.0.lr=1e-3"
            )
        target: Any = out
        *path, last = key.strip().split(".")
        for part in path:
            target = _step_into(target, part, setting)
        if isinstance(target, list):
            _step_into(target, last, setting)
            target[int(last)] = _toml_value(written)
        elif isinstance(target, dict):
            target[last] = _toml_value(written)
        else:
            raise RecipeError(
                f"--set {printable(setting[:200])}: {printable('.'.join(path))} is a single value, so {last!r} cannot be set inside it"
            )
    return out


def _step_into(target: Any, part: str, setting: str) -> Any:
    if isinstance(target, list):
        if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
            raise RecipeError(
                f"--set {printable(setting[:200])}: there are {len(target)} entries, 0 to {len(target) - 1}; {part!r} is none of them"
            )
        return target[int(part)]
    if not isinstance(target, dict):
        raise RecipeError(
            f"--set {printable(setting[:200])}: {part!r} lies inside a single value; set that value as a whole"
        )
    return target.setdefault(part, {})


def _toml_value(written: str) -> Any:
    """A TOML value; a bare word is a text, so that `optimizer=sgd` needs no quotes within quotes."""
    try:
        return _parsed(f"x = {written}", "--set")["x"]
    except RecipeError:
        return written.strip()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _said(value: Any, cls: type) -> dict[str, Any]:
    """The fields of a recipe or stage that are not None, as TOML's values."""
    out: dict[str, Any] = {}
    for f in fields(cls):
        item = getattr(value, f.name)
        if item is None:
            continue
        if isinstance(item, Schedule):
            item = str(item)
        elif isinstance(item, tuple) and f.name != "stages":
            item = item[0] if len(item) == 1 and f.name == "train" else list(item)
        out[f.name] = item
    return out


def _explain(error: ValidationError, where: str, cls: type = Recipe) -> str:
    """pydantic's findings as one line each: where it is, what was found, what was expected, how to mend it."""
    lines = list(dict.fromkeys(f"{where}: {_finding(dict(found), cls)}" for found in error.errors()))
    more = [f"{where}: and {len(lines) - _MOST_FINDINGS} more"] * (len(lines) > _MOST_FINDINGS)
    return "\n".join(lines[:_MOST_FINDINGS] + more)


def _finding(found: dict[str, Any], cls: type) -> str:
    loc = tuple(found["loc"])
    if loc and loc[0] == 0:  # the one positional argument of a direct call
        loc = (fields(cls)[0].name, *loc[1:])
    place = ".".join(printable(str(part)[:100]) for part in loc)
    kind = found["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        key = str(loc[-1])
        cls = Stage if "stages" in loc[:-1] else cls
        known = [f.name for f in fields(cls)]
        hint = nearest(key, known)
        other = Recipe if cls is Stage else Stage
        if hint == "." and key in {f.name for f in fields(other)}:
            hint = f"; it belongs to the {other.__name__.lower()}."
        return f"{place}: no such key in a {cls.__name__.lower()}{hint} Known: {', '.join(known)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place}: missing; " + _EXAMPLE.get(
            place.rsplit(".", 1)[-1], "it has no default, so write it"
        )
    if kind == "value_error":
        said = (
            str(found["ctx"]["error"]).removeprefix("duration: ").removeprefix("schedule: ")
        )  # the place says it
        return ": ".join(filter(None, (place, said)))
    if kind == "unexpected_positional_argument":
        names = [f.name for f in fields(cls)]
        meant = names[loc[0]] if isinstance(loc[0], int) and loc[0] < len(names) else names[1]
        return f"{brief(found['input'])}; only {names[0]!r} may stand without its name: write {meant}={brief(found['input'])} or the like"
    if place == "stages":
        return f"stages: {brief(found['input'])}; expected a list of stages: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python"
    return f"{place}: {brief(found['input'])}; {_expected(kind, found)}"


def _expected(kind: str, found: dict[str, Any]) -> str:
    """What stands instead of pydantic's words; those where it has a kind that is not known here."""
    words = _EXPECTED.get(kind)
    if words is None:
        return f"{found['msg'][0].lower()}{found['msg'][1:]}"
    return "expected " + words.format(**{k: _plain(v) for k, v in found.get("ctx", {}).items()})


def _plain(limit: object) -> object:
    return f"{limit:g}" if isinstance(limit, float) else limit


_EXPECTED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "literal_error": "{expected}",
    "dataclass_type": "a stage: a table with length, train and lr",
}


_EXAMPLE = {
    "stages": "a recipe needs at least one stage: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python",
    "length": 'how long is the stage? For example length = "5 epochs"',
    "train": 'what does it train? For example train = "head"',
    "lr": "at which peak rate? For example lr = 1e-3",
}


def _speaking(cls: type[_T]) -> type[_T]:
    """Let a direct call such as `Stage(...)` raise `RecipeError` too, in the words of `_explain`."""
    plain: Callable[..., None] = cls.__init__

    def __init__(self: _T, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is the __init__
        try:
            plain(self, *args, **kwargs)
        except ValidationError as error:
            raise RecipeError(_explain(error, cls.__name__, cls)) from None

    __init__.__wrapped__ = plain  # type: ignore[attr-defined]  # keeps the signature for help() and inspect
    cls.__init__ = __init__  # type: ignore[method-assign,assignment]
    return cls


_READER = TypeAdapter(Recipe)
_speaking(Stage)
_speaking(Recipe)
