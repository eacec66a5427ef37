"""`fit`: the loop. It reads from top to bottom, and every part of it is usable alone.

examples/own_loop.py is the same loop by hand.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lehr.cadence import Cadence, checkpoint_settings
from lehr.data.purity import seed_all, seed_of
from lehr.errors import FeedError, LehrError, NonFiniteError, RunError
from lehr.events import (
    Event,
    FreezeAudited,
    Note,
    Observer,
    Resumed,
    StageEnded,
)
from lehr.journal import Journal
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.resolving import resolve
from lehr.run.allocator import keep_blocks
from lehr.run.best import Best
from lehr.run.cache.stage_cache import Caching
from lehr.run.compiling import Compile, check_compile, compiled, name_of
from lehr.run.ema import Ema
from lehr.run.facts import inspect, unwrap
from lehr.run.files import write_tensors
from lehr.run.folder import RunFolder, opened
from lehr.run.happenings import decision_told, epoch_ended, run_ended, run_started, stage_started
from lehr.run.layout import by_rule
from lehr.run.losses import LossSaid, judged_by, losses_of
from lehr.run.optimizer import apply, optimizer
from lehr.run.precision import arithmetic, slow_arithmetic
from lehr.run.refusals import check, check_unused
from lehr.run.resuming import Resume, Resumption, check_resume, resumption
from lehr.run.sampler import Feed, died, feed, samples_in
from lehr.run.saver import Saver
from lehr.run.stopping import Stop, Stopped, stopping
from lehr.run.training import Terms, Training, made_by
from lehr.run.update import Update, cross_entropy
from lehr.run.validation import Metrics, higher_is_better, validate
from lehr.run.watch import EpochWatch, Tell, non_finite, telling

_VALIDATED = 32
"""Samples in a batch of validation, or the stage's batch size where that is larger: a tiny one only costs time."""


Judge = Callable[..., dict[str, float]]  # `validate` with its data, loss and metrics


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `model` is the person's own, trained in place; `history` has one row of plain numbers an epoch; `best` is
    the row of the best epoch by `monitor` (the last epoch's without validation); `run` is the directory, or
    None; `plan` is what was followed, with what was decided on evidence.
    """

    model: nn.Module
    history: tuple[Mapping[str, float], ...]
    best: Mapping[str, float]
    run: Path | None
    plan: Plan


def fit(
    model: nn.Module,
    train: Any,
    valid: Any = None,
    *,
    recipe: Recipe,
    loss: LossSaid = None,
    metrics: Metrics | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    observers: Sequence[Observer] = (),
    workers: int = 0,
    head: str | Sequence[str] | None = None,
    notes: Sequence[str] = (),
    resume: Resume = False,
    checkpoint: str | Mapping[str, object] = "10 minutes",
    cache_dir: str | Path | None = None,
    compile: Compile = False,
) -> Result:
    """Train `model` in place as `recipe` says, stage by stage, and return what came of it.

    Afterwards the model has the weights of the last step, or the best ones where the last stage has
    `restore_best`; what the last stage froze stays frozen (`lehr.thaw` frees it). The global random states of
    torch, `random` and numpy are seeded with the recipe's seed.

    Args:
        model: any `nn.Module`; a compiled one, too.
        train: a map-style data set of samples, or a `DataLoader` (which then decides batches and order).
        valid: the same, used whole, once an epoch; None validates nothing.
        recipe: what trains when, and how fast.
        loss: `loss(model, batch)` returns the mean over the batch, a scalar tensor, or a dict with it as
            `loss` (and `outputs` and `targets` for metrics; further scalars are measured by their names). By
            default batches are `(inputs, targets)` and the loss is cross-entropy. For a stage's objectives a table
            of such functions by name, where they do not say it themselves.
        metrics: torchmetrics by name, for validation; accuracy by default, where there are classes.
        out: a new directory for the run: recipe, plan, journal, checkpoints, best weights. None writes nothing.
        device: `"auto"` (CUDA, else MPS, else CPU), or a device.
        precision: `"auto"` (bf16 on CUDA that has it, else fp32), `"fp32"`, `"bf16"` or `"fp16"`.
        observers: called with each event of `lehr.events`; `lehr.progress.progress()` draws a bar.
        workers: processes that load samples, for data sets; the results do not depend on it. Tensors in memory
            need none, and a `DataLoader` has its own.
        head: module paths of the classifier, where lehr does not find it.
        notes: what else should stand in the journal, and be shown, when the run begins.
        resume: True goes on with the run in `out` from its last good checkpoint, and ends with the same bits
            as if it had not been stopped (docs/resume.md says when); `"auto"` begins it where there is none yet;
            `"changed"` goes on although the recipe has changed, where that can be. A run that has ended is not
            trained again: its model and result come back.
        checkpoint: how often the run is saved: `"10 minutes"`, `"500 steps"`, `"1 epoch"`; or a table with
            `every`, `keep` (checkpoints, 2) and `keep_best` (weights of the best epochs, 1). Besides, it is
            saved at its start, at each stage's end, and when it is stopped.
        cache_dir: a directory where the features that frozen parts compute are kept for later runs (docs/cache.md); None
            keeps them for this run alone.
        compile: True has `torch.compile` make code of the model, once a stage (docs/speed.md); a backend's name, or a
            function, is one of torch's instead of inductor. Afterwards the model is run as it is written again.

    Raises:
        RequestError: (or one of its kinds) for what cannot be done; nothing was started.
        CheckpointError: where there is nothing to go on from, or it is of another plan, model or data; it says
            what differs.
        NonFiniteError: where the loss or the weights became NaN or infinite; the best weights so far are in
            `out`, where a metric said which were best.
        FeedError: where a sample could not be had; the run is saved as of its last whole step.
        RunError: for other failures; also at the end, where the result could not be written to `out`.
        KeyboardInterrupt, SystemExit: after Ctrl-C, or SIGTERM or a terminal that closes, when the step under way
            is done and the run is saved; a second Ctrl-C leaves at once.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lehr.recipe import Stage
        >>> data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
        >>> result = fit(nn.Linear(4, 2), data, recipe=Recipe([Stage("2 epochs", train="all", lr=0.1)]))
        >>> len(result.history)
        2
    """
    on, cadence = arithmetic(device, precision), checkpoint_settings(checkpoint)
    check_resume(resume, out)
    pin = on.device.type == "cuda"
    training = feed(train, seed=recipe.seed, workers=workers, pin=pin)
    validation = (
        None if valid is None else feed(valid, seed=recipe.seed, workers=workers, pin=pin, what="valid")
    )
    plan = resolve(recipe, inspect(model, head=head), samples=training.samples, batches=training.batches)
    losses = losses_of(recipe, plan, loss)
    check(plan, training, validation, metrics, losses)
    check_unused(recipe, training, loss)
    check_compile(compile, model, on, takes_turns=any(plan.objectives))
    model.to(on.device)
    tuning = keep_blocks(on.device.type)
    optimizers = {name: optimizer(plan, model, name) for name in plan.objectives}
    monitor = plan.monitor if validation or plan.monitor.startswith("train_") else ""
    run = Training(
        made=plan, model=model, optimizers=optimizers, losses=losses, feed=training, on=on,
        updates={name: Update(model, one, plan=plan, on=on, objective=name) for name, one in optimizers.items()},
        average=Ema(model, plan.ema) if plan.ema else None, best=Best(monitor, metrics, most=cadence.keep_best),
        rule=by_rule(model, on), sign=lambda metric: 1.0 if higher_is_better(metric, metrics) else -1.0,
        caching=Caching(
            model, on, Path(out) if out else None, Path(cache_dir) if cache_dir else None,
            validation.samples if validation else 0,
        ),
        compiled_by=name_of(compile),
    )  # fmt: skip
    judge = None if validation is None else partial(_judged, run, loss, validation, metrics)
    with nullcontext() if out is None else opened(out, resume=bool(resume)) as folder:
        run.terms = Terms.of(training, validation, cadence) if folder else None
        resumed = (
            resumption(folder, plan, run.terms, made_by(on, run.compiled_by), how=resume)
            if folder and run.terms and resume
            else None
        )
        run.lay_out(run.rule)
        seed_all(seed_of(plan.seed))  # spread over the 64 bits of which numpy takes the upper half
        torch.manual_seed(plan.seed)
        if resumed:
            run.put(resumed.found.snapshot)
        if resumed and resumed.ended:  # the same result once more: nothing is trained or written
            for observer in observers:
                observer(Note("this run has ended already, and nothing is trained again; it can be extended"))
            _trained(run, judge, lambda _: None, None, Stop())
        else:
            first: list[Event] = [run_started(plan, run.plan, training, validation, on)]
            told = resumed.notes if resumed else (*notes, *plan.notes)
            try:
                with compiled(compile, run.models, on, stages=len(plan.stages)) as how:
                    here = [slow_arithmetic(on), run.rule.said if run.rule.name != "contiguous" else ""]
                    here += [tuning.said if tuning.is_tuned else "", how]
                    first += [Note(note) for note in (*told, *filter(None, here))]
                    _recorded(
                        run, judge, folder, observers, recipe=recipe, cadence=cadence, resumed=resumed, first=first
                    )  # fmt: skip
            finally:
                if run.cache:  # also after an error, whose traceback holds on to the run
                    run.cache.close()
    return Result(model, tuple(run.history), run.best.row(run.history), Path(out) if out else None, run.plan)


def _recorded(
    run: Training,
    judge: Judge | None,
    folder: RunFolder | None,
    observers: Sequence[Observer],
    *,
    recipe: Recipe,
    cadence: Cadence,
    resumed: Resumption | None,
    first: Sequence[Event],
) -> None:
    """The run, told and saved; and left in good order, however it ends."""
    journal = Journal(folder.journal, append=folder.journal.exists()) if folder else None
    with telling(journal, observers, run.step, run.stage) as tell, stopping(saved=bool(folder)) as stop:
        saver = Saver(folder, cadence, partial(run.take, journal), tell) if folder and journal else None
        if resumed or (journal and journal.records):  # what was told and not saved does not count
            tell(Resumed(run.step, run.stage, run.epoch, resumed.records if resumed else 0))
        for event in first:
            tell(event)
        if saver and folder:
            _begin(run, folder, recipe, saver, resumed)
        try:
            reason = _trained(run, judge, tell, saver, stop)
        except (Stopped, FeedError) as why:
            if saver:
                _save_as_it_is(run, saver, tell)
            if isinstance(why, Stopped) or stop.signal:
                raise stop.leave() from None
            raise
        except Exception as error:
            if saver:
                saver.wait()  # for the best weights so far
            if said := died(error):
                raise RunError(f"step {run.step}: {said}") from error
            raise
        if saver:
            saver.finish(run.step, run.best.weights(run.model), run.best.epoch)
        tell(run_ended(run.history, run.best.row(run.history), reason, run.seconds))
    problem = (saver.problem if saver else "") or (journal.problem if journal else "")
    if problem:
        where = folder.path if folder else ""
        raise RunError(
            f"{where}: the run is done, but this directory is not whole: {problem}; {_elsewhere(run)}"
        )


def _trained(run: Training, judge: Judge | None, tell: Tell, saver: Saver | None, stop: Stop) -> str:
    """The loop itself, from where `run` is to the plan's end; why its last stage ended."""
    model, best = run.model, run.best
    judged = run.average.model if run.average else model
    reason = "length"
    for index in range(run.stage, len(run.plan.stages)):
        stage, is_last = run.enter(index), index == len(run.plan.stages) - 1
        tell(stage_started(run.plan, stage))
        cache = run.hasten(tell)
        for epoch, start, end in stage.epoch_ranges():
            if epoch < run.epoch:
                continue
            if start >= stage.stop or (is_last and best.epochs_since(epoch - 1) >= run.plan.patience):
                break
            model.train()
            ends = (epoch, start, min(end, stage.stop))
            with EpochWatch(run.plan, stage, ends, tell, at=run.step, so_far=run.so_far) as watch:
                run.begin_epoch(watch)
                for step, window in run.steps(start, end):
                    apply(step, model, run.optimizers[step.objective])
                    samples = samples_in(window)
                    watch.add(run.update(step, window, tell), samples)
                    if decision := run.done(step, samples):
                        watch.tell_all()
                        stage = run.decide(decision)
                        watch.follow(run.plan, stage)
                        tell(decision_told(run.plan, decision))
                    if stage.ends_round(step.index):
                        stop.check()
                        if saver:
                            saver.offer(run.step, epoch)
                row = {**watch.finish(), **run.measured()}
            if judge:
                row |= judge(judged, stage=stage, tell=tell, check=stop.check)
                if not math.isfinite(row["valid_loss"]):
                    raise NonFiniteError(
                        non_finite("the validation loss is not finite", run.step - 1, run.plan)
                    )
            is_best = best.offer(epoch, row, judged)
            decision = run.epoch_done(row)
            run.end_epoch({"epoch": epoch, "stage": index, "step": run.step, **row, "best": is_best})
            tell(epoch_ended(run.history[-1], run.plan, watch))
            if decision:
                stage = run.decide(decision)
                tell(decision_told(run.plan, decision))
            if saver:
                saver.offer(run.step, run.epoch, epoch_ended=True)
        cache.end()
        frozen = run.audited(stage)
        if saver:
            saver.save(run.step, run.epoch)
        tell(FreezeAudited(index, run.step, *frozen))
        ended = run.epoch - 1
        restored = best.restore(model, run.average, ended, of_run=is_last) if stage.restore_best else None
        if run.has_decided("end"):
            reason = "until"
        else:
            reason = "patience" if is_last and best.epochs_since(ended) >= run.plan.patience else "length"
        tell(StageEnded(index, run.step, reason, restored))
    if run.average:
        unwrap(model).load_state_dict(run.average.model.state_dict())
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise NonFiniteError(non_finite("the weights are not finite", run.step - 1, run.plan))
    return reason


def _judged(
    run: Training, said: LossSaid, validation: Feed, metrics: Metrics | None, model: nn.Module, *, stage: PlannedStage,
    tell: Tell, check: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """The numbers of `model` over the validation set, by the losses of a stage."""
    loss = judged_by(run.losses[stage.index], said) or cross_entropy()
    short = run.cache.validation(model, validation, loss) if run.cache else None
    return validate(
        model, short or validation, short.loss if short else loss, metrics, on=run.on, tell=tell, check=check,
        batch_size=max(stage.batch_size, _VALIDATED),
    )  # fmt: skip


def _begin(
    run: Training, folder: RunFolder, recipe: Recipe, saver: Saver, resumed: Resumption | None
) -> None:
    """Leave in the directory what describes the run, and a checkpoint to go on from; or go on from one."""
    run.best.keep = saver.keep
    if resumed is None:
        folder.describe(recipe, run.made, run.on)
        run.enter(0)
        saver.begin()
        return
    saver.go_on(resumed.found.snapshot.state)
    if resumed.replaces:
        run.instead_of = resumed.replaces
        saver.begin(run.step, run.epoch)
        folder.write_plan(recipe, run.made)
        run.instead_of = None
    elif resumed.found.snapshot.state.plan_hash == run.made.hash and not folder.has_plan(run.made):
        with suppress(LehrError):  # it was lost or damaged; the run does not need it
            folder.write_plan(recipe, run.made)


def _save_as_it_is(run: Training, saver: Saver, tell: Tell) -> None:
    """Save the run between two steps, before it is left."""
    try:
        saver.save(run.step, run.epoch, wait=True)
    except RuntimeError as error:
        if not died(error):  # which comes once, in the middle of anything
            raise
        saver.save(run.step, run.epoch, wait=True)
    if saver.problem:
        tell(Note(f"the run is not saved as it is after step {run.step}; {_elsewhere(run)}"))


def _elsewhere(run: Training) -> str:
    """Put the run's weights where they can be, since its directory does not take them; say where they are."""
    folder: str | None = None
    try:
        folder = tempfile.mkdtemp(prefix="lehr-")
        where = Path(folder) / "best.safetensors"
        write_tensors(where, run.best.weights(run.model))
    except OSError as error:
        if folder:
            with suppress(OSError):
                Path(folder).rmdir()
        return f"nor could the weights be written elsewhere ({error.filename}: {error.strerror or error})"
    return f"the weights are in {where}"
