"""What ends a stage on evidence: `"train_error < 0.80"`, `"valid_loss plateaus 3 epochs"`. Pure: it reads the words and
judges a number; it must not know how anything is measured, or what then happens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lehr.duration import Duration
from lehr.errors import ConditionError, DurationError, nearest
from lehr.untrusted import brief

Kind = Literal["<", "<=", ">", ">=", "plateaus"]

_LONGEST = 200
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_COMPARED = re.compile(rf"\s*([A-Za-z_]\w*)\s*(<=|>=|<|>)\s*({_NUMBER})\s*", re.ASCII)
_LEVEL = re.compile(r"\s*([A-Za-z_]\w*)\s+plateaus\s+(\S.*)", re.ASCII)
_PREFIXES = ("train_", "valid_")
_NO_TIME = Duration(Fraction(0), "epochs")
_EXAMPLES = '"train_error < 0.80", "valid_accuracy > 0.95" or "valid_loss plateaus 3 epochs"'


@dataclass(frozen=True)
class Condition:
    """A measured condition: `metric` compared with `limit`, or `metric` without a new best for `patience`.

    `"plateaus 3 epochs"` is met at the third epoch in a row that brings no new best (torch's
    `ReduceLROnPlateau(patience=2, threshold=0)`); NaN is never a best and meets no comparison.

    Raises:
        ConditionError: (a kind of RecipeError) for words that are none, a metric of neither the training nor the
            validation, or a limit that no number reaches.

    Example:
        >>> Condition.parse("train_error < 0.80")
        Condition.parse("train_error < 0.8")
        >>> Condition.parse("valid_loss plateaus 3 epochs").patience
        Duration.parse("3 epochs")
    """

    metric: str
    kind: Kind
    limit: float = 0.0
    patience: Duration = _NO_TIME

    def __post_init__(self) -> None:
        if not self.metric.startswith(_PREFIXES) or self.metric in _PREFIXES:
            known = [
                "train_loss",
                "train_error",
                "train_accuracy",
                "valid_loss",
                "valid_error",
                "valid_accuracy",
            ]
            raise ConditionError(
                f"{self.metric!r} is no metric{nearest(f'train_{self.metric}', known)} A metric is of "
                f"the training or of the validation: {', '.join(known)}, or another by its name"
            )
        if not math.isfinite(self.limit):
            raise ConditionError(f"{self.limit!r} is no limit; expected a finite number")
        if self.kind == "plateaus" and (not self.patience.amount or self.patience.unit == "%"):
            raise ConditionError(
                f'"plateaus {self.patience}": for how long? Write epochs or steps, for example "plateaus 3 epochs"'
            )
        if self.kind == "plateaus" and self.patience.amount.denominator != 1:
            raise ConditionError(
                f'"plateaus {self.patience}": a metric is compared after whole epochs; write a whole number'
            )

    @classmethod
    def parse(cls, text: str | Condition) -> Condition:
        """Read a condition as a person writes it."""
        if isinstance(text, Condition):
            return text
        if isinstance(text, str) and len(text) <= _LONGEST:
            if found := _COMPARED.fullmatch(text):
                metric, kind, limit = found.groups()
                return cls(metric, kind, float(limit))  # type: ignore[arg-type]  # one of the four in the pattern
            if found := _LEVEL.fullmatch(text):
                return cls(found[1], "plateaus", patience=_patience(found[2].strip()))
        raise ConditionError(f"{brief(text)} is no condition; expected for example {_EXAMPLES}")

    @property
    def of_training(self) -> bool:
        """Whether the metric is measured on what is trained on."""
        return self.metric.startswith("train_")

    @property
    def name(self) -> str:
        """The metric without the word for where it is measured: `error` of `train_error`."""
        return self.metric.partition("_")[2]

    def __str__(self) -> str:
        if self.kind == "plateaus":
            return f"{self.metric} plateaus {self.patience}"
        return f"{self.metric} {self.kind} {self.limit!r}"

    def __repr__(self) -> str:
        return f'Condition.parse("{self}")'


def _patience(text: str) -> Duration:
    try:
        return Duration.parse(text, where="plateaus")
    except DurationError as error:
        if re.fullmatch(_NUMBER, text):
            raise ConditionError(f'"plateaus {text}" has no unit; write "plateaus {text} epochs"') from None
        raise ConditionError(str(error)) from None


@dataclass(frozen=True)
class Best:
    """The best value so far, the larger the better, and the place at which it was seen or counting began anew."""

    value: float = -math.inf
    at: int = 0


def judged(
    condition: Condition,
    value: float,
    best: Best,
    *,
    at: int,
    patience: int,
    sign: float,
    counts: bool = True,
) -> tuple[bool, Best]:
    """Whether `value` meets the condition, and the best so far with it.

    Args:
        condition: what is waited for.
        value: what was measured.
        best: so far; only a plateau looks at it.
        at: where it was measured, in the unit of `patience`, rising from measurement to measurement.
        patience: how far without a new best a plateau is.
        sign: 1.0 where more is better, -1.0 where less is.
        counts: False while a warm-up lasts: its measurements are no plateau.

    Example:
        >>> flat = Condition.parse("valid_loss plateaus 2 epochs")
        >>> met, best = judged(flat, 0.5, Best(), at=1, patience=2, sign=-1.0)
        >>> met, best = judged(flat, 0.6, best, at=2, patience=2, sign=-1.0)
        >>> judged(flat, 0.5, best, at=3, patience=2, sign=-1.0)
        (True, Best(value=-0.5, at=3))
    """
    match condition.kind:
        case "<":
            return value < condition.limit, best
        case "<=":
            return value <= condition.limit, best
        case ">":
            return value > condition.limit, best
        case ">=":
            return value >= condition.limit, best
    better = sign * value > best.value  # False for NaN
    if better or not counts:
        return False, Best(sign * value if better else best.value, at)
    met = at - best.at >= patience
    return met, Best(best.value, at if met else best.at)
