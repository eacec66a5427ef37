"""Watches what a stage's `until` waits for: collects the numbers, and says when the stage ends or cools.

The judgement itself is `lehr.conditions`'s. This file must not know how an update is made, or what a decision changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lehr.conditions import Best, Condition, judged
from lehr.errors import RunError, nearest
from lehr.planned_stage import Decision, PlannedStage
from lehr.run.state import Gauge, Tally
from lehr.run.update import Measure, Returned

_MOST_WAITING = 1000  # numbers on the device
_SHARES = ("error", "accuracy")


class Gate:
    """What is known of a stage's condition, from the stage's start or from `gauge`, where a run had got to.

    Args:
        stage: the stage; one without `until` has nothing to watch.
        sign: 1.0 where more of the metric is better, -1.0 where less is.
        gauge: what another process had counted; of another condition it counts for nothing.
    """

    def __init__(self, stage: PlannedStage, sign: float, gauge: Gauge) -> None:
        self._sign, self._condition = sign, stage.condition
        gauge = gauge if gauge.condition == stage.until else Gauge(stage.until)
        self._best = Best(gauge.best, gauge.at)
        self._sums = {"window": gauge.window, "epoch": gauge.epoch}
        self._waiting: list[tuple[torch.Tensor, int]] = []  # sums over samples, and their number

    def measure(self, objective: str) -> Measure | None:
        """Finds the number to collect in what an objective's loss function returns; None where there is none."""
        condition = self._condition
        if condition is None or not condition.of_training:
            return None
        if condition.name == "loss" or not objective:
            return _measure(condition, condition.name)
        whose, _, name = condition.name.partition("_")  # `resolving` has refused what is of no objective
        return _measure(condition, name) if whose == objective else None

    @property
    def gauge(self) -> Gauge:
        """What has been counted."""
        self._read()
        return Gauge(
            str(self._condition or ""),
            self._best.value,
            self._best.at,
            self._sums["window"],
            self._sums["epoch"],
        )

    def add(self, measured: Sequence[torch.Tensor], samples: int) -> None:
        """Take what was measured on the batches of an update: sums over so many samples together."""
        if measured:
            self._waiting.append(
                (measured[0] if len(measured) == 1 else torch.stack([*measured]).sum(), samples)
            )
        if len(self._waiting) >= _MOST_WAITING:
            self._read()

    def after_step(self, stage: PlannedStage, step: int) -> Decision | None:
        """What is decided after `step` updates of the run; nothing where no check is due."""
        if not stage.every or (step - stage.start) % stage.every:
            return None
        self._read()
        if not self._sums["window"].samples:  # the objective had no turn: the window stays open
            return None
        value = self._mean("window")
        self._sums["window"] = Tally()
        return self._judged(stage, step, value, at=step - stage.start)

    def over_epoch(self) -> dict[str, float]:
        """The metric over the epoch that has ended, where it is one of the training."""
        self._read()
        some = self._condition and self._sums["epoch"].samples
        return {self._condition.metric: self._mean("epoch")} if self._condition and some else {}

    def after_epoch(
        self, stage: PlannedStage, step: int, row: Mapping[str, float], epoch: int
    ) -> Decision | None:
        """What is decided at the end of `epoch`, of which this is the row; another epoch begins to be counted.

        Raises:
            RunError: where nothing measures the metric.
        """
        self._read()
        samples = self._sums["epoch"].samples
        self._sums["epoch"] = Tally()
        condition = self._condition
        if condition is None or stage.every or (condition.of_training and not samples):
            return None  # where nothing was collected, the objective had no turn in an epoch that was cut
        known = {**row, **({"valid_error": 1 - row["valid_accuracy"]} if "valid_accuracy" in row else {})}
        if condition.metric not in known:
            measured = [name for name in known if name.startswith(("train_", "valid_"))]
            raise RunError(
                f"until: no metric is called {condition.metric!r}{nearest(condition.metric, measured)} "
                f"There are: {', '.join(measured)}. Let the loss function return a dict with it, or, for accuracy and error, "
                "with the outputs and targets"
            )
        return self._judged(stage, step, known[condition.metric], at=epoch - stage.first_epoch + 1)

    def _judged(self, stage: PlannedStage, step: int, value: float, *, at: int) -> Decision | None:
        condition = self._condition
        assert condition is not None
        met, self._best = judged(
            condition, value, self._best, at=at, patience=int(condition.patience.amount), sign=self._sign,
            counts=stage.is_warm(step),
        )  # fmt: skip
        cools = stage.reduce < 1 and len(stage.cooled) < stage.reductions
        if not met or (cools and step == stage.stop):  # where nothing is left to cool
            return None
        return Decision(stage.index, step, "reduce" if cools else "end", value)

    def _mean(self, which: str) -> float:
        tally = self._sums[which]
        return tally.total / tally.samples if tally.samples else math.nan

    def _read(self) -> None:
        """Bring what waits on the device here, all in one go, and count it."""
        if not self._waiting:
            return
        totals = torch.stack([total for total, _ in self._waiting]).tolist()
        for total, (_, samples) in zip(totals, self._waiting, strict=True):
            for which, tally in self._sums.items():
                self._sums[which] = Tally(tally.total + total, tally.samples + samples)
        self._waiting.clear()


def _measure(condition: Condition, name: str) -> Measure:
    """Finds `name` in what a loss function returned for a batch, as a sum over its samples."""

    def measure(returned: Returned, loss: torch.Tensor, samples: int) -> torch.Tensor:
        table = returned if isinstance(returned, Mapping) else {"loss": loss}
        if name in _SHARES and name not in table:
            right = _right(table, condition)
            counted = right if name == "accuracy" else ~right
            return _wide(counted.flatten(1)).mean(1).sum()  # of whole samples a count, exactly
        value = loss if name == "loss" else table.get(name)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            known = [key for key, one in table.items() if isinstance(one, torch.Tensor) and one.numel() == 1]
            raise RunError(
                f"until: nothing measures {condition.metric!r}{nearest(name, known)} The loss function returns "
                f"{', '.join(known)}; let it return a dict with a scalar {name!r}, the mean over the batch"
            )
        return _wide(value.detach().reshape(())) * samples

    return measure


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In the widest floating point that the device has: MPS has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _right(table: Mapping[str, torch.Tensor], condition: Condition) -> torch.Tensor:
    """Whether the class that got the largest output is the target, of each sample: shape [N, places in it]."""
    outputs, targets = table.get("outputs"), table.get("targets")
    if outputs is None or targets is None or outputs.ndim < 2 or targets.is_floating_point():
        raise RunError(
            f"until: {condition.metric!r} needs what the model said and the classes: let the loss function return "
            "{'loss': ..., 'outputs': [N, classes], 'targets': [N]}"
        )
    return (outputs.detach().argmax(1) == targets).unsqueeze(-1)
