"""The same recipe in a loop of one's own, bare and with what Accelerate prepared, and what freezing means there.

Both loops come to the weights of `lehr.fit`, to the bit: the same updates on the same batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lehr
from one_recipe import (
    BATCH,
    SAMPLES,
    STEPS,
    Order,
    Seen,
    assert_same,
    data,
    fitted,
    loader,
    net,
    plan_of,
    weights,
)

accelerate = pytest.importorskip("accelerate", reason="the extra lehr[transformers] is not installed")


def accelerator(**said: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **said)


def test_a_loop_of_ones_own_and_fit_come_to_the_same() -> None:
    """A loop by hand over the plan's steps comes to the weights and buffers of `lehr.fit`, to the bit."""
    model = net()
    plan = plan_of(model)
    optimizer = lehr.optimizer(plan, model)
    seen, batches = Seen(model, optimizer), loader()
    for stage in plan.stages:
        for epoch, start, stop in stage.epoch_ranges():
            batches.sampler.set_epoch(epoch)
            model.train()
            for step, (inputs, targets) in zip(plan.steps(start, stop, stage), batches, strict=True):
                lehr.apply(step, model, optimizer)
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    seen.assert_is(plan)
    assert_same(weights(model), fitted())


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("saved_at", [None, 8, 12])
def test_accelerate_and_fit_come_to_the_same(tmp_path: Path, compiled: bool, saved_at: int | None) -> None:
    """With model, optimizer and loader as Accelerate prepared them (compiled as well), and stopped and gone on with from
    its own checkpoint, a loop over the plan's steps comes to the weights and buffers of `lehr.fit`, to the bit."""

    def train(start: int, stop: int) -> tuple[Any, Seen, Any]:
        here = accelerator()
        own = net()
        plan = plan_of(own)
        optimizer = lehr.optimizer(plan, own)
        seen = Seen(own, optimizer)
        model = torch.compile(own, backend="eager") if compiled else own
        model, optimizer, batches = here.prepare(model, optimizer, loader())
        if start:
            here.load_state(str(tmp_path))
        per_epoch = plan.stages[0].steps_per_epoch
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            batches.set_epoch(epoch)
            model.train()
            done = max(start - epoch * per_epoch, 0)
            rest = here.skip_first_batches(batches, done) if done else batches
            for t, (inputs, targets) in zip(range(epoch * per_epoch + done, stop), rest):  # noqa: B905
                lehr.apply(plan[t], model, optimizer)
                optimizer.zero_grad()
                here.backward(functional.cross_entropy(model(inputs), targets))
                optimizer.step()
        if stop < STEPS:
            here.save_state(str(tmp_path))
        seen.assert_is(plan, start, stop)
        return here, seen, own

    if saved_at:
        train(0, saved_at)
    _, _, model = train(saved_at or 0, STEPS)
    assert_same(weights(model), fitted())


def test_accumulation_counts_updates() -> None:
    """Under `accelerator.accumulate` the step of the plan is the update, which `sync_gradients` tells."""
    here = accelerator(gradient_accumulation_steps=2)
    own = net()
    plan = plan_of(own, accumulate=2)
    optimizer = lehr.optimizer(plan, own)
    seen = Seen(own, optimizer)
    model, optimizer, batches = here.prepare(own, optimizer, loader())
    t = 0
    for epoch in range(4):
        batches.set_epoch(epoch)
        for inputs, targets in batches:
            with here.accumulate(model):
                model.train()
                lehr.apply(plan[t], model, optimizer)
                here.backward(functional.cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
            t += here.sync_gradients
    assert t == plan.total_steps == 12
    seen.assert_is(plan)


def test_torch_scheduler_prepared_by_accelerate(tmp_path: Path) -> None:
    """A `torch_scheduler` that Accelerate prepared is followed at every update, without a warning, and goes on from
    Accelerate's checkpoint."""
    curve = (lehr.warmup("3 steps") >> lehr.cosine(0.1)).over(steps=STEPS)
    used: list[float] = []
    for start, stop in ((0, 7), (7, STEPS)):
        here = accelerator()
        own = net()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
        scheduler = lehr.torch_scheduler(optimizer, curve)
        model, optimizer, scheduler = here.prepare(own, optimizer, scheduler)
        if start:
            here.load_state(str(tmp_path))
        for _ in range(start, stop):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            here.backward(model(torch.ones(4, 6)).sum())
            optimizer.step()
            scheduler.step()
        here.save_state(str(tmp_path))
    assert used == [0.5 * curve(t) for t in range(STEPS)]


def test_frozen_stays_frozen() -> None:
    """What `lehr.freeze` froze does not change by a bit in a prepared model, whatever `train()` is called; after
    `lehr.thaw` it trains."""
    here = accelerator()
    own = net()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model, optimizer = here.prepare(own, optimizer)
    lehr.freeze(model, "backbone")
    before = weights(own.body)
    for what in ("frozen", "thawed"):
        model.train()
        for inputs, targets in torch.utils.data.DataLoader(data(), batch_size=BATCH, sampler=Order()):
            optimizer.zero_grad()
            here.backward(functional.cross_entropy(model(inputs), targets))
            optimizer.step()
        if what == "frozen":
            assert_same(weights(own.body), before)
            lehr.thaw(model)
    after = weights(own.body)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert SAMPLES % BATCH  # the last batch was a short one


def test_the_groups_of_a_prepared_optimizer() -> None:
    """`lehr.param_groups` looks through Accelerate's wrapper."""
    here = accelerator()
    own = net()
    plan = plan_of(own)
    bare = lehr.optimizer(plan, own)
    wanted = lehr.param_groups(bare).groups
    assert lehr.param_groups(here.prepare(bare)).groups == wanted
