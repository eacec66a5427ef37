"""The events of the loop, made of its values. It tells nobody, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lehr._version import __version__
from lehr.events import ConditionMet, EpochEnded, RateReduced, RunEnded, RunStarted, StageStarted
from lehr.planned_stage import Decision, PlannedStage
from lehr.planning import Plan
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Feed
from lehr.run.watch import EpochWatch, last_rates, trained


def run_started(
    made: Plan, plan: Plan, training: Feed, validation: Feed | None, on: Arithmetic
) -> RunStarted:
    """The run begins, or goes on in another process; `made` is the plan as it was made, before any decision."""
    return RunStarted(
        lehr=__version__, plan_hash=made.hash, total_steps=plan.total_steps, total_epochs=plan.total_epochs,
        samples_train=training.samples, samples_valid=validation.samples if validation else 0,
        device=str(on.device), precision=on.precision, stages=len(plan.stages),
    )  # fmt: skip


def stage_started(plan: Plan, stage: PlannedStage) -> StageStarted:
    """A stage begins, or is gone on with."""
    return StageStarted(
        stage=stage.index, label=stage.label, start=stage.start, stop=stage.stop,
        first_epoch=stage.first_epoch, epochs=stage.epochs,
        trained_parameters=sum(plan.parameters[name] for name in plan.trainable(stage)),
        total_parameters=sum(plan.parameters.values()), peak_lr=trained(stage.peak_lr, stage),
    )  # fmt: skip


def epoch_ended(row: Mapping[str, Any], plan: Plan, watch: EpochWatch) -> EpochEnded:
    """The epoch of this `row` of the history has ended."""
    own = ("epoch", "stage", "step", "train_loss", "best")
    return EpochEnded(
        epoch=row["epoch"], stage=row["stage"], step=row["step"], train_loss=row["train_loss"],
        metrics={name: value for name, value in row.items() if name not in own},
        lr=last_rates(plan, plan.stages[row["stage"]], row["step"]),
        seconds=watch.seconds, samples_per_second=watch.samples_per_second, best=row["best"],
    )  # fmt: skip


def decision_told(plan: Plan, decision: Decision) -> ConditionMet | RateReduced:
    """A stage's condition was met; `plan` is the one that follows."""
    stage = plan.stages[decision.stage]
    what: dict[str, Any] = {
        "stage": stage.index,
        "step": decision.step,
        "condition": stage.until,
        "value": decision.value,
    }
    if decision.kind == "reduce":
        return RateReduced(**what, factor=stage.reduce ** len(stage.cooled))
    return ConditionMet(**what, total_steps=plan.total_steps, total_epochs=plan.total_epochs)


def run_ended(
    history: Sequence[Mapping[str, Any]], row: Mapping[str, Any], reason: str, seconds: float
) -> RunEnded:
    """The run has ended; `row` is that of its best epoch."""
    return RunEnded(
        step=int(history[-1]["step"]), reason=reason, seconds=seconds,
        best_epoch=int(row["epoch"]) if row["best"] else None,
        metrics={name: value for name, value in row.items() if name.startswith(("train_", "valid_"))},
    )  # fmt: skip
