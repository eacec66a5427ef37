"""What a plan asks of a trainer that is not lehr's, and whether that trainer gives it; else it is refused in words.

A trainer has its own batches, windows, clipping and end. A plan that was made for others would train something else
than it says. This file must not know any trainer: the callbacks describe theirs as a `Host`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lehr.errors import CheckpointError, ModelError, RequestError
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.run.facts import named


@dataclass(frozen=True)
class Host:
    """A trainer in numbers: `batches` in an epoch (infinite where that is not known), `accumulate` of them to an update,
    `updates` at the most (infinite without an end), `clip_norm` infinite where it does not clip. The words say how each
    is set there, and `unclipped` what to set for no clipping.
    """

    name: str
    batches: float
    accumulate: int
    updates: float
    clip_norm: float
    accumulate_word: str
    updates_word: str
    clip_word: str
    unclipped: str

    @property
    def updates_per_epoch(self) -> float:
        """Updates in an epoch; the last may be of fewer batches."""
        return self.batches if math.isinf(self.batches) else math.ceil(self.batches / self.accumulate)


def check(plan: Plan, host: Host) -> None:
    """Refuse a plan that this trainer cannot run as it says.

    Raises:
        RequestError: with what the plan says, what the trainer does, and how to make them agree.
    """
    _check_plan(plan, host)
    _check_clipping(plan, host)
    for stage in plan.stages:
        _check_epochs(stage, host)
    if host.updates > plan.total_steps:
        endless = math.isinf(host.updates)
        raise RequestError(
            f"{host.name} would make {'updates without end' if endless else f'{host.updates} updates'}, and the plan has "
            f"{plan.total_steps}; set {host.updates_word}={plan.total_steps}, or make the recipe longer"
        )


def _check_plan(plan: Plan, host: Host) -> None:
    """Refuse what only lehr's own loop does."""
    names = [name for name in plan.objectives if name]
    if names:
        raise RequestError(
            f"the plan has the objectives {', '.join(names)}, which take turns with an optimizer each; {host.name} has one "
            "loss and one optimizer here. Train with lehr.fit, or call lehr.apply in a loop of your own"
        )
    for stage in plan.stages:
        where = f"stage {stage.index + 1} ({stage.label!r})"
        if stage.until:
            raise RequestError(
                f"{where} may end on {stage.until!r}, and lehr measures nothing inside {host.name}; give the stage "
                "its length alone, or train with lehr.fit"
            )
        if stage.restore_best:
            raise RequestError(
                f"{where} would restore its best weights, which is not done inside {host.name}; leave restore_best "
                "out, and let the trainer keep its best checkpoint"
            )
    if plan.ema:
        raise RequestError(
            f"the plan averages the weights (ema={plan.ema:g}), which is not done inside {host.name}; leave ema out, "
            "or train with lehr.fit"
        )
    if not math.isinf(plan.patience):
        raise RequestError(
            f"the plan may stop early (patience), which is not done inside {host.name}; leave patience out, and let "
            "the trainer stop early by its own means"
        )


def _check_clipping(plan: Plan, host: Host) -> None:
    """Refuse a trainer that clips gradients otherwise than the plan says."""
    asked = plan.objectives[""].clip_norm
    if asked == host.clip_norm:
        return
    said = "does not clip gradients" if math.isinf(asked) else f"clips gradients to a norm of {asked:g}"
    does = "does not" if math.isinf(host.clip_norm) else f"clips them to {host.clip_norm:g}"
    there = host.unclipped if math.isinf(asked) else f"{asked:g}"
    here = (
        "leave clip_norm out"
        if math.isinf(host.clip_norm)
        else f"write clip_norm = {host.clip_norm:g} in the recipe"
    )
    raise RequestError(f"the plan {said}, {host.name} {does}; set {host.clip_word}={there}, or {here}")


def _check_epochs(stage: PlannedStage, host: Host) -> None:
    """Refuse a stage whose epochs or windows are not the trainer's."""
    where = f"stage {stage.index + 1} ({stage.label!r})"
    if stage.accumulate != host.accumulate:
        raise RequestError(
            f"{where} makes an update of {stage.accumulate} batches, {host.name} of {host.accumulate}; set "
            f"{host.accumulate_word}={stage.accumulate}, or accumulate = {host.accumulate} in the recipe"
        )
    makes = host.updates_per_epoch
    if not math.isinf(makes) and stage.steps_per_epoch != makes:
        raise RequestError(
            f"{where} has {stage.steps_per_epoch} updates in an epoch, with batches of {stage.batch_size}; {host.name} "
            f"makes {makes}. Give its loader batches of that size, or make the plan for its batches: "
            f"lehr.plan(recipe, model, samples, batches={host.batches:g}); a trainer has one size of batch for all stages"
        )


def planned_module(plan: Plan, module: nn.Module, path: str = "") -> nn.Module:
    """The part of `module` that the plan is for: the one at `path`, itself by default.

    Raises:
        ModelError: where its parameters are not the plan's; with the place where they are.
    """
    try:
        own = module.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"module: {type(module).__name__} has no part {path!r}{_where(plan, module)}"
        ) from None
    names = named(own).keys()
    if names == plan.parameters.keys():
        return own
    other = next(iter(sorted(names ^ plan.parameters.keys())))
    has = "the plan has" if other in plan.parameters else f"{type(own).__name__} has"
    raise ModelError(
        f"the plan is not for {type(own).__name__}: only {has} {other!r}{_where(plan, module)}. A plan belongs to the "
        "model that it was made from: lehr.plan(recipe, model, ...)"
    )


def _where(plan: Plan, module: nn.Module) -> str:
    """Where in `module` the plan's parameters are."""
    found = [
        path for path, part in module.named_modules() if path and named(part).keys() == plan.parameters.keys()
    ]
    return f"; it is for the part {found[0]!r}: PlanCallback(plan, module={found[0]!r})" if found else ""


def same_plan(plan: Plan, saved: str) -> None:
    """Refuse to go on with another plan than the one that a checkpoint was made with.

    Raises:
        CheckpointError: with the first digits of both hashes.
    """
    if saved != plan.hash:
        raise CheckpointError(
            f"this checkpoint is of the plan {saved[:12]}, and the callback has the plan {plan.hash[:12]}; go on with the "
            "same recipe, model and number of samples, or begin anew"
        )
