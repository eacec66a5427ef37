"""`lehr.torch_scheduler` is a scheduler of torch's in every respect: its state, its copies, its warnings, its groups.

That its curve is right is for test_schedules_torch.py, which compares the curves themselves.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torch_lr

import lehr
from lehr.curves import Curve, Schedule
from lehr.errors import CheckpointError, ScheduleError
from lehr.run.torch_scheduler import plan_scheduler
from small_run import Net
from strategies import joins

CURVE = (lehr.warmup("3 steps") >> lehr.cosine(0.1)).over(steps=10)
BY_EPOCH = lehr.cosine(per="epoch").over(steps=12, steps_per_epoch=3)


def sgd(*rates: Any) -> torch.optim.SGD:
    """An optimizer with a group for each rate."""
    rates = rates or (0.5, 2.0)
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates])


def now(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(scheduler: torch_lr.LRScheduler, steps: int) -> list[list[float]]:
    """The rates that each of the next updates uses."""
    used = []
    for _ in range(steps):
        used.append(now(scheduler.optimizer))
        scheduler.optimizer.step()
        scheduler.step()
    return used


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(joins(), st.lists(st.floats(1e-6, 10), min_size=1, max_size=3), st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_every_group_has_its_initial_rate_times_the_curve(
    schedule: Schedule, rates: list[float], steps: int
) -> None:
    """At every update and past the end each group's rate is its initial rate times the curve, for any schedule."""
    curve = schedule.over(steps=20, steps_per_epoch=5)
    optimizer = sgd(*rates)
    scheduler = lehr.torch_scheduler(optimizer, curve)
    assert isinstance(scheduler, torch_lr.LRScheduler)
    assert [group["initial_lr"] for group in optimizer.param_groups] == rates
    assert advance(scheduler, steps) == [[lr * curve(t) for lr in rates] for t in range(steps)]
    assert scheduler.last_epoch == steps
    assert scheduler.get_last_lr() == now(optimizer)


def test_what_torch_says_of_itself_is_the_same() -> None:
    """Beside `LambdaLR` over the same function: `last_epoch`, `get_last_lr`, `base_lrs` and `initial_lr` agree at
    every step."""
    ours = lehr.torch_scheduler(sgd(), CURVE)
    theirs = torch_lr.LambdaLR(sgd(), CURVE)
    for _ in range(14):
        for name in ("last_epoch", "base_lrs"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert [g["initial_lr"] for g in ours.optimizer.param_groups] == [0.5, 2.0]
        advance(ours, 1)
        advance(theirs, 1)


def test_cosine_is_torchs() -> None:
    """A cosine gives the rates of `CosineAnnealingLR`, to 1e-12 of each group's initial rate, over the steps it has."""
    ours = advance(lehr.torch_scheduler(sgd(), lehr.cosine().over(steps=50)), 51)
    theirs = advance(torch_lr.CosineAnnealingLR(sgd(), T_max=50), 51)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=2e-12)


def test_a_curve_by_epochs_is_stepped_once_an_update() -> None:
    """A curve with `per="epoch"` holds its value through each epoch, and is that of torch's stepped once an epoch."""
    used = advance(lehr.torch_scheduler(sgd(1.0), BY_EPOCH), 12)
    by_epoch = advance(torch_lr.CosineAnnealingLR(sgd(1.0), T_max=4), 4)
    assert used == [[pytest.approx(by_epoch[t // 3][0], abs=1e-12)] for t in range(12)]


@pytest.mark.parametrize("curve", [CURVE, BY_EPOCH], ids=["per step", "per epoch"])
@pytest.mark.parametrize("done", [0, 1, 4, 10, 13])
def test_a_saved_state_goes_on(curve: Curve, done: int) -> None:
    """A state saved at any step, read by `torch.load(weights_only=True)`, goes on with the rates of a run that was not
    stopped; the first update after it included, whether or not the optimizer's state is loaded as well."""
    whole = advance(lehr.torch_scheduler(sgd(), curve), 16)
    before = lehr.torch_scheduler(sgd(), curve)
    advance(before, done)
    state = through_a_file(before.state_dict())
    after = lehr.torch_scheduler(sgd(), curve)
    after.load_state_dict(state)
    assert after.last_epoch == done
    assert after.get_last_lr() == now(after.optimizer) == whole[done]
    assert advance(after, 16 - done) == whole[done:]


def test_a_saved_state_keeps_the_initial_rates() -> None:
    """As in torch, the initial rates are those of the state, not of the optimizer that it is loaded beside."""
    before = lehr.torch_scheduler(sgd(0.5), CURVE)
    advance(before, 2)
    after = lehr.torch_scheduler(sgd(7.0), CURVE)
    after.load_state_dict(before.state_dict())
    assert now(after.optimizer) == [0.5 * CURVE(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["follows"].update(steps=11),
            r"over 11 steps; this one follows .* over 10 steps",
        ),
        (lambda state: state.pop("follows"), "followed something that is not lehr's"),
        (lambda state: state.update(base_lrs=[0.5]), "for 1 groups; the optimizer has 2"),
    ],
    ids=["another length", "another scheduler", "other groups"],
)
def test_a_state_of_something_else_is_refused(change: Any, message: str) -> None:
    """A state that followed another curve, or had other groups, is refused in words, and nothing has changed."""
    state = copy.deepcopy(lehr.torch_scheduler(sgd(), CURVE).state_dict())
    change(state)
    after = lehr.torch_scheduler(sgd(), CURVE)
    advance(after, 3)
    before, rates = copy.deepcopy(after.state_dict()), now(after.optimizer)
    with pytest.raises(CheckpointError, match=message):
        after.load_state_dict(state)
    assert after.state_dict() == before
    assert now(after.optimizer) == rates


def test_last_epoch_goes_on_without_a_state() -> None:
    """`last_epoch` means what it means in torch: the last update that was done; a fresh optimizer is refused by torch
    as always."""
    optimizer = sgd()
    whole = advance(lehr.torch_scheduler(optimizer, CURVE), 9)
    again = lehr.torch_scheduler(optimizer, CURVE, last_epoch=4)
    assert advance(again, 4) == whole[5:]
    with pytest.raises(KeyError, match="initial_lr"):
        lehr.torch_scheduler(sgd(), CURVE, last_epoch=4)


def test_the_order_is_warned_about_once_and_only_when_wrong() -> None:
    """`step()` before the first `optimizer.step()` brings torch's own warning, pointing at the caller; the right order
    brings none (here warnings are errors)."""
    scheduler = lehr.torch_scheduler(sgd(), CURVE)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`") as caught:
        scheduler.step()
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    advance(lehr.torch_scheduler(sgd(), CURVE), 3)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("done", [0, 1, 5])
def test_copies_are_whole(copied: Any, done: int) -> None:
    """A deep copy and a pickle go on with an optimizer of their own, at the same rates, and warn of a wrong order when
    it is wrong and only then; the original does not notice."""
    scheduler = lehr.torch_scheduler(sgd(), CURVE)
    whole = advance(lehr.torch_scheduler(sgd(), CURVE), 12)
    advance(scheduler, done)
    twin = copied(scheduler)
    assert twin.optimizer is not scheduler.optimizer
    if not done:
        wrong = copied(scheduler)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            wrong.step()
    assert advance(twin, 12 - done) == whole[done:]
    assert scheduler.last_epoch == done
    assert now(scheduler.optimizer) == whole[done]


def test_a_copy_between_the_two_steps_does_not_warn() -> None:
    """A copy that is made after `optimizer.step()` knows that the order is right."""
    scheduler = lehr.torch_scheduler(sgd(), CURVE)
    scheduler.optimizer.step()
    copy.deepcopy(scheduler).step()


def test_a_group_that_is_added_later_is_refused_in_words() -> None:
    """A group added after the scheduler was made is never left out of the schedule in silence."""
    optimizer = sgd()
    scheduler = lehr.torch_scheduler(optimizer, CURVE)
    advance(scheduler, 2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0})
    optimizer.step()
    with pytest.raises(ScheduleError, match=r"has 3 groups, and had 2 .* or make the scheduler afterwards"):
        scheduler.step()


def test_rates_in_tensors_stay_in_their_tensors() -> None:
    """Where a group's rate is a tensor, as for compiled optimizers, it is filled in place, after a resume too."""
    rate = torch.tensor(0.5)
    scheduler = lehr.torch_scheduler(sgd(rate), CURVE)
    advance(scheduler, 4)
    own = scheduler.optimizer.param_groups[0]["lr"]
    assert own.item() == pytest.approx(0.5 * CURVE(4), rel=1e-6)
    assert advance(scheduler, 1)[0][0] == pytest.approx(0.5 * CURVE(4), rel=1e-6)
    assert scheduler.optimizer.param_groups[0]["lr"] is own
    again = lehr.torch_scheduler(sgd(torch.tensor(0.5)), CURVE)
    filled = again.optimizer.param_groups[0]["lr"]
    again.load_state_dict(through_a_file(scheduler.state_dict()))
    assert again.optimizer.param_groups[0]["lr"] is filled
    assert filled.item() == pytest.approx(0.5 * CURVE(5), rel=1e-6)


def test_it_stands_in_torchs_own_joints() -> None:
    """`SequentialLR` and `step(epoch)` work with it as with torch's schedulers."""
    optimizer = sgd(1.0)
    first = torch_lr.ConstantLR(optimizer, factor=0.5, total_iters=4)
    second = lehr.torch_scheduler(optimizer, lehr.linear().over(steps=4))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The epoch parameter", UserWarning
        )  # torch's SequentialLR passes it
        joined = torch_lr.SequentialLR(optimizer, [first, second], milestones=[3])
        used = advance(joined, 7)
    assert used[3:] == [[1.0], [0.75], [0.5], [0.25]]


def test_a_plan_as_a_scheduler() -> None:
    """`plan_scheduler` has the rates of the plan at every step and its last ones after it; its state names the plan."""
    model = Net()
    stages = [lehr.Stage("3 steps", train="fc", lr=0.1), lehr.Stage("4 steps", train="all", lr=0.01)]
    plan = lehr.plan(lehr.Recipe(stages, batch_size=8), model, samples=24)
    optimizer = lehr.optimizer(plan, model)
    scheduler = plan_scheduler(optimizer, plan)
    for t in range(9):
        assert now(optimizer) == [*plan[min(t, 6)].lr.values()]
        optimizer.step()
        scheduler.step()
    state = through_a_file(scheduler.state_dict())
    other = lehr.plan(lehr.Recipe(stages[:1], batch_size=8), model, samples=24)
    with pytest.raises(
        CheckpointError, match=f"followed the plan {plan.hash[:12]}; this one follows the plan"
    ):
        plan_scheduler(lehr.optimizer(other, model), other).load_state_dict(state)
