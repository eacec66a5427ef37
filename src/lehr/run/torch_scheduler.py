"""A torch `LRScheduler` whose rates are a function of the step alone: of a curve, or of a plan.

It is for other people's loops and trainers, which expect one; lehr's own loop has none. torch's `LambdaLR` would
do at first sight, but its state does not say which function it followed, a saved state is of no use before the
next `step()`, and a function of ours inside it does not pickle. This file must not know of models or trainers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from lehr.curves import Curve
from lehr.errors import CheckpointError, ScheduleError
from lehr.planning import Plan

Rate = Any  # a float, or a tensor of one element where the group's own rate is one


class Rates(Protocol):
    """What a scheduler follows: a frozen value."""

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """Plain values that are equal only where the rates are."""
        ...

    def at(self, step: int, groups: list[tuple[str, Rate]]) -> list[Rate]:
        """The rate of each group at `step`, given its name and the rate that it began with."""
        ...


@dataclass(frozen=True)
class CurveRates:
    """Each group's initial rate times the curve."""

    curve: Curve

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """The schedule as text, and what it is laid over."""
        curve = self.curve
        return {
            "schedule": str(curve.schedule),
            "steps": int(curve.steps),
            "steps_per_epoch": None if curve.steps_per_epoch is None else int(curve.steps_per_epoch),
        }

    def at(self, step: int, groups: list[tuple[str, Rate]]) -> list[Rate]:
        """The factor is worked out once for all groups."""
        factor = self.curve(step)
        return [initial * factor for _, initial in groups]


@dataclass(frozen=True)
class PlanRates:
    """The rates of a plan, by the groups' names; after its end, those of its last step."""

    plan: Plan

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """The plan's hash."""
        return {"plan": self.plan.hash}

    def at(self, step: int, groups: list[tuple[str, Rate]]) -> list[Rate]:
        """What the plan says; the rates that the groups began with do not matter."""
        lr = self.plan[min(step, self.plan.total_steps - 1)].lr
        return [lr[name] for name, _ in groups]


class ClosedFormLR(LRScheduler):  # what others ask is `isinstance(scheduler, LRScheduler)`
    """What `lehr.torch_scheduler` makes.

    `last_epoch` counts updates, as in every scheduler of torch's that is stepped once an update. The state is
    plain: `torch.load(..., weights_only=True)` reads it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Rates, last_epoch: int = -1) -> None:
        self.rates = rates
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Rate]:
        """The rate of each group at `last_epoch`."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_lrs):
            raise ScheduleError(
                f"torch_scheduler: the optimizer has {len(groups)} groups, and had {len(self.base_lrs)} when the "
                "scheduler was made; no schedule follows a group that is added later. Make the optimizer with all "
                "groups (lehr.freeze keeps some of them from training until lehr.thaw), or make the scheduler afterwards"
            )
        named = [
            (group.get("name", ""), initial) for group, initial in zip(groups, self.base_lrs, strict=True)
        ]
        return self.rates.at(self.last_epoch, named)

    _get_closed_form_lr = get_lr  # where torch looks for it in `step(epoch)`

    def state_dict(self) -> dict[str, Any]:
        """Where the scheduler is, with which initial rates, and what it follows, in plain values."""
        plain = {key: value for key, value in self.__dict__.items() if key not in ("optimizer", "rates")}
        return {**plain, "follows": dict(self.rates.described)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the groups have the rates of that step at once.

        Raises:
            CheckpointError: for the state of a scheduler that followed something else, or had other groups.
        """
        follows, own = state_dict.get("follows"), dict(self.rates.described)
        if follows != own:
            raise CheckpointError(
                f"torch_scheduler: this is the state of a scheduler that followed {_words(follows)}; this one follows "
                f"{_words(own)}. Make it from the same; to change it on the way, do not load the state, but give "
                "torch_scheduler last_epoch=..."
            )
        groups = self.optimizer.param_groups
        peaks = state_dict.get("base_lrs", [])
        if len(peaks) != len(groups):
            raise CheckpointError(
                f"torch_scheduler: this is the state of a scheduler for {len(peaks)} groups; the optimizer has "
                f"{len(groups)}. Make it with the same groups"
            )
        self.__dict__.update({key: value for key, value in state_dict.items() if key != "follows"})
        self._set_rates(self.get_lr())

    def _set_rates(self, rates: list[Rate]) -> None:
        """Give the groups their rates, in their own tensors where they have some."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = float(rate)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opt_called": getattr(self.optimizer, "_opt_called", False)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        called = state.pop("_opt_called")
        self.__dict__.update(state)
        # A copied optimizer has lost what tells torch that `optimizer.step()` was called; any scheduler puts it back.
        _Watcher(self.optimizer)
        self.optimizer._opt_called = called  # type: ignore[attr-defined]


class _Watcher(LRScheduler):
    """Changes no rate; while it is made, torch begins to notice calls of `optimizer.step()`."""

    def get_lr(self) -> list[Rate]:
        return [group["lr"] for group in self.optimizer.param_groups]


def torch_scheduler(optimizer: torch.optim.Optimizer, curve: Curve, *, last_epoch: int = -1) -> ClosedFormLR:
    """A torch `LRScheduler` that follows `curve`: each group's rate is its initial rate times `curve(t)`.

    For use inside other trainers; a lehr plan needs none. Call its `step()` once for each update, after
    `optimizer.step()`; a curve with `per="epoch"` as well, for its value holds through each epoch by itself. Past
    its end the curve stays where it ended.

    Args:
        optimizer: any; the rates of its groups are the initial ones, at which the curve is 1.
        curve: a schedule over its steps: `schedule.over(steps=...)`.
        last_epoch: as in torch's schedulers: the last update done, where one goes on without a saved state (the
            groups then have `initial_lr`); -1 begins.

    Returns:
        The scheduler. Its `state_dict` says what it followed, and is refused by a scheduler that follows something
        else; `load_state_dict` gives the groups their rates at once. It pickles and copies with its optimizer.

    Raises:
        ScheduleError: for a schedule that was not yet laid over its steps; later, from `step()`, where a group was
            added to the optimizer.

    Example:
        >>> from torch import nn
        >>> from lehr.schedules import linear
        >>> sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
        >>> scheduler = torch_scheduler(sgd, linear(0.5).over(steps=2))
        >>> sgd.step(); scheduler.step(); scheduler.get_last_lr()
        [1.5]
    """
    if not isinstance(curve, Curve):
        raise ScheduleError(
            f"torch_scheduler: {curve!r} is no curve; lay a schedule over its steps first: "
            "schedule.over(steps=...), with steps_per_epoch=... where a length is in epochs"
        )
    return ClosedFormLR(optimizer, CurveRates(curve), last_epoch)


def plan_scheduler(optimizer: torch.optim.Optimizer, plan: Plan) -> ClosedFormLR:
    """A torch `LRScheduler` that has the rates of `plan`, for trainers that want one: it says what `lehr.apply` does."""
    return ClosedFormLR(optimizer, PlanRates(plan))


def _words(follows: Mapping[str, Any] | None) -> str:
    """What a scheduler follows, as a person reads it."""
    if not follows:
        return "something that is not lehr's"
    if "plan" in follows:
        return f"the plan {str(follows['plan'])[:12]}"
    per_epoch = follows.get("steps_per_epoch")
    return f"{follows.get('schedule')} over {follows.get('steps')} steps" + (
        f" ({per_epoch} an epoch)" if per_epoch else ""
    )
