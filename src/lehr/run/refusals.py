"""What `fit` refuses before anything is changed: what could only fail later, or be ignored. It changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lehr.data.datasets import ImageSamples
from lehr.errors import RecipeError, RequestError, nearest
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.run.losses import Losses, LossSaid
from lehr.run.sampler import Feed
from lehr.run.update import is_builtin
from lehr.run.validation import HIGHER_IS_BETTER, LOWER_IS_BETTER, Metrics, direction_is_known


def check(
    plan: Plan, training: Feed, validation: Feed | None, metrics: Metrics | None, losses: Sequence[Losses]
) -> None:
    """Refuse what could only fail, or be ignored, later."""
    if metrics is not None and not isinstance(metrics, (Mapping, nn.ModuleDict)):
        raise RequestError(
            f'metrics: a {type(metrics).__name__}; expected torchmetrics by name, such as {{"f1": ...}}'
        )
    if metrics and validation is None:
        raise RequestError(
            "metrics: there is no validation set to measure them on; pass valid=, or leave them out"
        )
    restores = any(stage.restore_best for stage in plan.stages)
    needs = "restore_best" if restores else "patience" if plan.patience < math.inf else ""
    if needs and validation is None and not plan.monitor.startswith("train_"):
        raise RecipeError(
            f"{needs}: there is no validation set, so {plan.monitor!r} is never measured; "
            'pass valid=, or monitor="train_loss"'
        )
    named = ("accuracy",) if metrics is None else tuple(metrics)
    own = [f"{name}_loss" for name in plan.objectives if name]
    measured = [
        "train_loss",
        "valid_loss",
        *(f"valid_{name}" for name in (*named, *own)),
        *(f"train_{n}" for n in own),
    ]
    if plan.monitor not in measured:
        raise RecipeError(
            f"monitor: no metric is called {plan.monitor!r}{nearest(plan.monitor, measured)} "
            f"There are: {', '.join(measured)}"
        )
    _check_monitor(plan)
    for stage in plan.stages:
        _check_until(
            stage, validation, measured, losses[stage.index], [name for name in plan.objectives if name]
        )
        _check_direction(stage, metrics)
    if training.loader is None:
        return
    _check_views(plan)
    size = training.loader.batch_size
    for stage in plan.stages:
        if size is not None and stage.batch_size != size:
            raise RecipeError(
                f"batch_size: stage {stage.index + 1} says {stage.batch_size}, "
                f"the DataLoader makes batches of {size}; "
                f"say batch_size={size} in the recipe, or pass the data set and let lehr make the batches"
            )


def _check_views(plan: Plan) -> None:
    """Refuse fixed views of samples that are made where lehr cannot say which view is wanted."""
    for stage in plan.stages:
        if stage.views != "fresh":
            raise RecipeError(
                f"views: stage {stage.index + 1} says {stage.views}, and a DataLoader makes its samples as it likes; pass the "
                'data set and let lehr make the batches, or say views="fresh"'
            )


def _check_monitor(plan: Plan) -> None:
    """Refuse to call best by the loss of an objective that some stage does not have."""
    whose = next(
        (n for n in plan.objectives if n and plan.monitor in (f"train_{n}_loss", f"valid_{n}_loss")), None
    )
    without = [s.index + 1 for s in plan.stages if whose not in {turn.objective for turn in s.turns}]
    if whose and without:
        raise RecipeError(
            f"monitor: {plan.monitor!r} is not measured in stage {without[0]}, where {whose!r} has no turn; "
            'say monitor = "train_loss", or "valid_loss", which every stage has'
        )


def _check_until(
    stage: PlannedStage,
    validation: Feed | None,
    measured: Sequence[str],
    losses: Losses,
    objectives: Sequence[str],
) -> None:
    """Refuse a condition of which it is known that nothing measures it. What a person's own loss function returns is
    seen when it is called.
    """
    condition = stage.condition
    if condition is None:
        return
    if not condition.of_training and validation is None:
        raise RecipeError(
            f"stages.{stage.index}.until: there is no validation set, so {condition.metric!r} is never measured; "
            "pass valid=, or wait for a metric of the training"
        )
    own = [f"{turn.objective}_loss" for turn in stage.turns]
    others = {
        f"{half}_{name}_loss"
        for half in ("train", "valid")
        for name in objectives
        if f"{name}_loss" not in own
    }
    if condition.metric in others:
        raise RecipeError(
            f"stages.{stage.index}.until: {condition.metric!r} is of an objective that has no turn in this stage"
        )
    known = [name for name in measured if name not in others]
    known += ["train_error", "train_accuracy", *(["valid_error"] if "valid_accuracy" in measured else [])]
    if condition.metric not in known and all(is_builtin(loss) for loss in losses.values()):
        raise RecipeError(
            f"stages.{stage.index}.until: no metric is called {condition.metric!r}{nearest(condition.metric, known)} "
            f"There are: {', '.join(known)}"
        )


def _check_direction(stage: PlannedStage, metrics: Metrics | None) -> None:
    """Refuse a plateau of a metric of which it is not known whether more or less of it is better."""
    condition = stage.condition
    if condition and condition.kind == "plateaus" and not direction_is_known(condition.metric, metrics):
        raise RecipeError(
            f"stages.{stage.index}.until: is more or less of {condition.metric!r} better? Let its name hold "
            f"{' or '.join(LOWER_IS_BETTER)} (less), or {' or '.join(HIGHER_IS_BETTER)} (more), or give a torchmetric, "
            "which says so itself"
        )


def check_unused(recipe: Recipe, training: Feed, loss: LossSaid) -> None:
    """Refuse what a recipe says and nothing would follow."""
    if recipe.augment is not None and not isinstance(training.source, ImageSamples):
        raise RecipeError(
            f"augment: {list(recipe.augment)} is for the images that lehr reads; "
            "your own data set changes its samples itself, so leave augment out"
        )
    if training.loader is not None and training.workers:
        raise RequestError(
            f"workers: {training.workers} is for data sets; a DataLoader has its own, so say num_workers there"
        )
    if recipe.label_smoothing and (loss is not None or any(stage.objectives for stage in recipe.stages)):
        raise RecipeError(
            f"label_smoothing: {recipe.label_smoothing} is for the built-in cross-entropy; "
            "leave it out, and smooth in your own loss"
        )
