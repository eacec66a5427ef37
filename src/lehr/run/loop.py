"""`fit`: the loop. It reads from top to bottom, and every part of it is usable alone.

examples/own_loop.py is the same loop by hand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lehr._version import __version__
from lehr.data.datasets import ImageSamples
from lehr.errors import NonFiniteError, RecipeError, RequestError, nearest
from lehr.journal import EpochEnded, Note, Observer, RunEnded, RunStarted, StageEnded, StageStarted
from lehr.planning import Plan, PlannedStage
from lehr.recipe import Recipe
from lehr.resolving import resolve
from lehr.run.best import Best
from lehr.run.ema import Ema
from lehr.run.facts import inspect, unwrap
from lehr.run.folder import RunFolder
from lehr.run.optimizer import apply, optimizer
from lehr.run.precision import Arithmetic, arithmetic, channels_last_pays
from lehr.run.sampler import Feed, feed, samples_in
from lehr.run.update import Loss, Update, cross_entropy
from lehr.run.validation import Metrics, validate
from lehr.run.watch import EpochWatch, non_finite, telling, trained

_CHANNELS_LAST = "convolution weights are laid out channels-last, which is faster for this model here"
_VALIDATED = 32
"""Samples in a batch of validation, or the stage's batch size where that is larger: a tiny one only costs time."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `model` is the person's own, trained in place; `history` has one row of plain numbers an epoch; `best` is
    the row of the best epoch by `monitor` (the last epoch's without validation); `run` is the directory, or
    None.
    """

    model: nn.Module
    history: tuple[Mapping[str, float], ...]
    best: Mapping[str, float]
    run: Path | None


def fit(
    model: nn.Module,
    train: Any,
    valid: Any = None,
    *,
    recipe: Recipe,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    observers: Sequence[Observer] = (),
    workers: int = 0,
    head: str | Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Train `model` in place as `recipe` says, stage by stage, and return what came of it.

    Afterwards the model has the weights of the last step, or the best ones where the last stage has
    `restore_best`; what the last stage froze stays frozen (`lehr.thaw` frees it). torch's global random state
    is seeded with the recipe's seed.

    Args:
        model: any `nn.Module`; a compiled one, too.
        train: a map-style data set of samples, or a `DataLoader` (which then decides batches and order).
        valid: the same, used whole, once an epoch; None validates nothing.
        recipe: what trains when, and how fast.
        loss: `loss(model, batch)` returns the mean over the batch, a scalar tensor, or a dict with it as
            `loss` (and `outputs` and `targets` for metrics). By default batches are `(inputs, targets)` and
            the loss is cross-entropy.
        metrics: torchmetrics by name, for validation; accuracy by default, where there are classes.
        out: a new directory for the run: recipe, plan, journal, best weights. None writes nothing.
        device: `"auto"` (CUDA, else MPS, else CPU), or a device.
        precision: `"auto"` (bf16 on CUDA that has it, else fp32), `"fp32"`, `"bf16"` or `"fp16"`.
        observers: called with each event of `lehr.journal`; `lehr.progress.progress()` draws a bar.
        workers: processes that load samples, for data sets; the results do not depend on it. Tensors in memory
            need none, and a `DataLoader` has its own.
        head: module paths of the classifier, where lehr does not find it.
        notes: what else should stand in the journal, and be shown, when the run begins.

    Raises:
        RequestError: (or one of its kinds) for what cannot be done; nothing was started.
        NonFiniteError: where the loss or the weights became NaN or infinite; the best weights so far are in
            `out`, where a metric said which were best.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lehr.recipe import Stage
        >>> data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
        >>> result = fit(nn.Linear(4, 2), data, recipe=Recipe([Stage("2 epochs", train="all", lr=0.1)]))
        >>> len(result.history)
        2
    """
    on = arithmetic(device, precision)
    pin = on.device.type == "cuda"
    training = feed(train, seed=recipe.seed, workers=workers, pin=pin)
    validation = (
        None if valid is None else feed(valid, seed=recipe.seed, workers=workers, pin=pin, what="valid")
    )
    plan = resolve(recipe, inspect(model, head=head), samples=training.samples, batches=training.batches)
    _check(plan, training, validation, metrics)
    _check_unused(recipe, training, loss)

    torch.manual_seed(plan.seed)
    model.to(on.device)
    channels_last = channels_last_pays(model, on)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    torch_optimizer = optimizer(plan, model)
    update = Update(model, torch_optimizer, loss or cross_entropy(plan.label_smoothing), plan=plan, on=on)
    average = Ema(model, plan.ema) if plan.ema else None
    judged = average.model if average else model
    folder = None if out is None else RunFolder.create(out)
    if folder:
        folder.describe(recipe, plan, on)
    best = Best(plan.monitor if validation or plan.monitor == "train_loss" else "", metrics, folder)
    history: list[Mapping[str, float]] = []
    last = plan.stages[-1]
    began = time.monotonic()

    with telling(folder, observers) as tell:
        tell(_run_started(plan, training, validation, on))
        for note in (*notes, *plan.notes, *([_CHANNELS_LAST] if channels_last else [])):
            tell(Note(note))
        for stage in plan.stages:
            tell(_stage_started(plan, stage))
            best.begin_stage(stage.first_epoch)
            for epoch, start, stop in stage.epoch_ranges():
                model.train()
                with EpochWatch(plan, stage, (epoch, start, stop), tell) as watch:
                    for step, window in zip(
                        plan.steps(start, stop, stage), training.windows(stage, epoch), strict=False
                    ):
                        apply(step, model, torch_optimizer)
                        watch.add(update(window, step.index), samples_in(window))
                        if average:
                            average.update(step.index)
                    row = watch.finish()
                if validation:
                    row |= validate(
                        judged,
                        validation,
                        loss,
                        metrics,
                        batch_size=max(stage.batch_size, _VALIDATED),
                        on=on,
                        tell=tell,
                    )
                    if not math.isfinite(row["valid_loss"]):
                        raise NonFiniteError(non_finite("the validation loss is not finite", stop - 1, plan))
                is_best = best.offer(epoch, row, judged)
                history.append({"epoch": epoch, "stage": stage.index, "step": stop, **row, "best": is_best})
                tell(_epoch_ended(history[-1], plan, watch))
                patient = stage is not last or best.epochs_since(epoch) < plan.patience
                if not patient:
                    break
            restored = (
                best.restore(model, average, epoch, of_run=stage is last) if stage.restore_best else None
            )
            reason = "length" if patient else "patience"
            tell(StageEnded(stage.index, stop, reason, restored))
        if average:
            unwrap(model).load_state_dict(average.model.state_dict())
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise NonFiniteError(non_finite("the weights are not finite", stop - 1, plan))
        best.finish(model)
        result = Result(model, tuple(history), best.row(history), folder.path if folder else None)
        tell(_run_ended(result, reason, time.monotonic() - began))
    return result


def _check(plan: Plan, training: Feed, validation: Feed | None, metrics: Metrics | None) -> None:
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
    if needs and validation is None and plan.monitor != "train_loss":
        raise RecipeError(
            f"{needs}: there is no validation set, so {plan.monitor!r} is never measured; "
            'pass valid=, or monitor="train_loss"'
        )
    named = ("accuracy",) if metrics is None else tuple(metrics)
    measured = ["train_loss", "valid_loss", *(f"valid_{name}" for name in named)]
    if plan.monitor not in measured:
        raise RecipeError(
            f"monitor: no metric is called {plan.monitor!r}{nearest(plan.monitor, measured)} "
            f"There are: {', '.join(measured)}"
        )
    if training.loader is None:
        return
    size = training.loader.batch_size
    for stage in plan.stages:
        if size is not None and stage.batch_size != size:
            raise RecipeError(
                f"batch_size: stage {stage.index + 1} says {stage.batch_size}, "
                f"the DataLoader makes batches of {size}; "
                f"say batch_size={size} in the recipe, or pass the data set and let lehr make the batches"
            )


def _check_unused(recipe: Recipe, training: Feed, loss: Loss | None) -> None:
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
    if loss is not None and recipe.label_smoothing:
        raise RecipeError(
            f"label_smoothing: {recipe.label_smoothing} is for the built-in cross-entropy; "
            "leave it out, and smooth in your own loss"
        )


def _run_started(plan: Plan, training: Feed, validation: Feed | None, on: Arithmetic) -> RunStarted:
    return RunStarted(
        lehr=__version__, plan_hash=plan.hash, total_steps=plan.total_steps, total_epochs=plan.total_epochs,
        samples_train=training.samples, samples_valid=validation.samples if validation else 0,
        device=str(on.device), precision=on.precision, stages=len(plan.stages),
    )  # fmt: skip


def _stage_started(plan: Plan, stage: PlannedStage) -> StageStarted:
    return StageStarted(
        stage=stage.index, label=stage.label, start=stage.start, stop=stage.stop,
        first_epoch=stage.first_epoch, epochs=stage.epochs,
        trained_parameters=sum(plan.parameters[name] for name in plan.trainable(stage)),
        total_parameters=sum(plan.parameters.values()), peak_lr=trained(stage.peak_lr, stage),
    )  # fmt: skip


def _epoch_ended(row: Mapping[str, Any], plan: Plan, watch: EpochWatch) -> EpochEnded:
    own = ("epoch", "stage", "step", "train_loss", "best")
    return EpochEnded(
        epoch=row["epoch"], stage=row["stage"], step=row["step"], train_loss=row["train_loss"],
        metrics={name: value for name, value in row.items() if name not in own},
        lr=trained(plan[row["step"] - 1].lr, plan.stages[row["stage"]]),
        seconds=watch.seconds, samples_per_second=watch.samples_per_second, best=row["best"],
    )  # fmt: skip


def _run_ended(result: Result, reason: str, seconds: float) -> RunEnded:
    row = result.best
    return RunEnded(
        step=int(result.history[-1]["step"]), reason=reason, seconds=seconds,
        best_epoch=int(row["epoch"]) if row["best"] else None,
        metrics={name: value for name, value in row.items() if name.startswith(("train_", "valid_"))},
    )  # fmt: skip
