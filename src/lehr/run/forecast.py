"""What each stage will cost, before it is paid for: where the model is cut, bytes, seconds and memory, from a few timed
steps on real samples. The model is changed by these steps and is of no further use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from lehr.costs import StageCost
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.run.batches import leaves
from lehr.run.cache.stage_cache import not_again, wanted_in, why_not
from lehr.run.cache.store import place_for, row_bytes
from lehr.run.cache.ways import Wanted, Way, check_worth, find_way, through_suffix
from lehr.run.optimizer import apply, optimizer
from lehr.run.precision import Arithmetic
from lehr.run.prefix.cuts import CannotSplit
from lehr.run.sampler import Feed, view_of
from lehr.run.update import Loss, Update, placed

_STEPS = 3
_ENOUGH = 2.0
"""Seconds after which one timed step must do."""


def forecast(
    plan: Plan, model: nn.Module, feed: Feed, loss: Loss, on: Arithmetic, *, samples_valid: int = 0
) -> Iterator[StageCost]:
    """The cost of each ordinary stage of `plan`, one after the other; of one with objectives nothing is known."""
    model.to(on.device)
    for stage in plan.stages:
        if stage.is_plain and not any(turn.objective for turn in stage.turns):
            wanted = wanted_in(plan, stage, feed, samples_valid, views=stage.views)
            yield _cost(plan, stage, model, feed, loss, on=on, wanted=wanted)


def _cost(
    plan: Plan,
    stage: PlannedStage,
    model: nn.Module,
    feed: Feed,
    loss: Loss,
    *,
    on: Arithmetic,
    wanted: Wanted,
) -> StageCost:
    step, made = plan[stage.start], optimizer(plan, model)
    apply(step, model, made)
    model.train()
    batch, load = _timed_batch(feed, stage)
    here, times = placed(batch, on.device), stage.accumulate
    update = Update(model, made, loss, plan=plan, on=on)
    size = len(leaves(batch)[0])
    memory = _memory(model, lambda: loss(model, here), on)
    plain = load * times + _seconds(lambda: update([(here, size)] * times, stage.start), on)
    way, why = _way(plan, stage, model, feed, loss, batch=here, on=on, wanted=wanted)
    if way is None:
        total = stage.steps * plain
        return StageCost(stage.index, "", why, 0.0, 0, 0, 0, "nowhere", load, plain, plain, total, memory)
    halfway = way.halfway(way.kept(here), torch.arange(size))
    update.loss = through_suffix(way, loss)
    later = _seconds(lambda: update([(halfway, size)] * times, stage.start), on)
    first = later + times * (load + _seconds(lambda: way.kept(here), on))
    read = max(stage.epochs - wanted.views, 0) / stage.epochs * way.rows / max(wanted.rows, 1)
    total = stage.steps * ((1 - read) * first + read * later)
    size_of_row = row_bytes(way.columns)
    return StageCost(
        stage.index, way.cut.after, "", way.cut.share, size_of_row, way.rows, wanted.rows,
        place_for(way.rows * size_of_row, on.device), load, first, later, total, memory,
    )  # fmt: skip


def _way(
    plan: Plan,
    stage: PlannedStage,
    model: nn.Module,
    feed: Feed,
    loss: Loss,
    *,
    batch: Any,
    on: Arithmetic,
    wanted: Wanted,
) -> tuple[Way | None, str]:
    why = why_not(plan, stage, feed)[0]
    try:
        if not why:
            check_worth(model, batch, wanted)
            why = not_again(plan, stage, feed, stage.views)[0]
        if why:
            return None, why
        return find_way(model, loss, batch, trained=plan.trainable(stage), wanted=wanted, on=on)[0], ""
    except CannotSplit as reason:
        return None, str(reason)
    except Exception as error:  # as in a run, which goes the long way then
        return None, f"looking for the frozen part failed ({type(error).__name__})"


def _timed_batch(feed: Feed, stage: PlannedStage) -> tuple[Any, float]:
    """The second batch of the stage and the seconds it took: the first brings up what loads."""
    if feed.loader is not None:
        batches: Iterator[Any] = iter(feed.loader)
    else:
        batches = iter(
            feed.batches_of(feed.indices(stage, stage.first_epoch)[:2], view_of(stage, stage.first_epoch))
        )
    first = next(batches)
    began = time.perf_counter()
    second = next(batches, None)
    return (first, 0.0) if second is None else (second, time.perf_counter() - began)


def _seconds(work: Callable[[], object], on: Arithmetic) -> float:
    """The median of a few runs after one that warms up; one that is long must do alone."""
    taken: list[float] = []
    for number in range(1 + _STEPS):
        began = time.perf_counter()
        work()
        if on.device.type == "cuda":
            torch.cuda.synchronize(on.device)
        taken.append(time.perf_counter() - began)
        if number == 0 and taken[0] > _ENOUGH:
            return taken[0]
    return median(taken[1:])


def _memory(model: nn.Module, forward: Callable[[], object], on: Arithmetic) -> int:
    """Bytes of the model, of gradients and the optimizer's state for what trains (two numbers a weight, which is Adam's),
    and of all that one forward pass leaves for the backward pass.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), on.autocast():
        kept = forward()
    del kept
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights + 3 * trained + sum(saved.values())
