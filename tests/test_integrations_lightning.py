"""A plan, a scheduler and a freeze of lehr's inside the real Lightning Trainer.

The own loop, Lightning and `lehr.fit` come to the same weights, to the bit: the same updates on the same batches.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import lehr
from lehr.errors import CheckpointError, ModelError, RecipeError, RequestError
from lehr.planning import Plan
from one_recipe import (
    PER_EPOCH,
    STEPS,
    Seen,
    assert_same,
    fitted,
    loader,
    net,
    plan_of,
    recipe,
    weights,
)

pytest.importorskip("lightning", reason="the extra lehr[lightning] is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning warns of when it is imported is not ours
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

    from lehr.integrations.lightning import PlanCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*defined a `validation_step` but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings(
        r"ignore:Found \d+ module\(s\) in eval mode.*"
    ),  # they are meant to be: frozen
    pytest.mark.filterwarnings("ignore:.*`srun` command is available.*"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning tells on standard error which devices there are."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


class Lit(LightningModule):
    """The network as a part of a module, trained along a plan, or with the optimizer that `make` makes."""

    def __init__(self, plan: Plan | None = None, make: Any = None, **said: Any) -> None:
        super().__init__()
        self.net = net()
        self.plan = plan or plan_of(self.net, **said)
        self.seen = Seen(self.net)
        self._make = make or (lambda model: lehr.optimizer(self.plan, model))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:  # noqa: ARG002
        inputs, targets = batch
        return functional.cross_entropy(self.net(inputs), targets)

    def validation_step(self, batch: Any, index: int) -> None:  # noqa: ARG002
        assert not self.net.training

    def configure_optimizers(self) -> Any:
        made = self._make(self.net)
        self.seen.watch(made["optimizer"] if isinstance(made, dict) else made)
        return made


def trainer(*callbacks: Any, **said: Any) -> Trainer:
    usual = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 4,
    }  # fmt: skip
    return Trainer(**{**usual, **said}, callbacks=list(callbacks))


def callback(module: Lit) -> PlanCallback:
    return PlanCallback(module.plan, module="net")


def test_lightning_and_fit_come_to_the_same() -> None:
    """A plan inside Lightning, validation in between, ends with the weights and buffers of `lehr.fit`, to the bit; at
    every update rates, decays, what trains and what sleeps are the plan's."""
    module = Lit()
    trainer(callback(module)).fit(module, loader(), loader())
    module.seen.assert_is(module.plan)
    assert_same(weights(module.net), fitted())


def test_a_plan_of_the_whole_module() -> None:
    """Where the plan is made from the module itself, no path is needed."""
    module = Lit()
    plan = lehr.plan(recipe(), module, samples=44, head="net.fc")
    module._make = lambda _: lehr.optimizer(plan, module)
    trainer(PlanCallback(plan)).fit(module, loader())
    assert_same(weights(module.net), fitted())


@pytest.mark.parametrize("mid", [True, False], ids=["mid-epoch", "epoch's end"])
@pytest.mark.parametrize("stopped", [1, 3], ids=["before the thaw", "after it"])
def test_a_resume_goes_on_where_it_was(tmp_path: Path, stopped: int, mid: bool) -> None:
    """From Lightning's own checkpoint, before or after the thaw, a fresh process's objects go on at the right step of the
    plan; from an epoch's end they come to the weights of a run that was not stopped, to the bit."""
    first = Lit()
    done = stopped * PER_EPOCH + 2 * mid
    keeper = ModelCheckpoint(
        tmp_path, save_last=True, every_n_train_steps=done, save_on_train_epoch_end=False
    )
    trainer(callback(first), keeper, max_epochs=-1, max_steps=done, enable_checkpointing=True).fit(
        first, loader()
    )
    second = Lit()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*resuming from a checkpoint that ended before"
        )  # of the data, not of lehr
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
        path = next(tmp_path.glob("last*.ckpt"))
        trainer(callback(second), max_epochs=-1, max_steps=STEPS).fit(second, loader(), ckpt_path=path)
    first.seen.assert_is(first.plan, 0, done)
    second.seen.assert_is(second.plan, done)
    if not mid:
        assert_same(weights(second.net), fitted())


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    """A checkpoint that was made with another plan is refused by the hashes of both."""
    first = Lit()
    made = trainer(callback(first), max_steps=3)
    made.fit(first, loader())
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = Lit(optimizer="sgd")
    message = f"is of the plan {first.plan.hash[:12]}, and the callback has the plan {other.plan.hash[:12]}"
    with pytest.raises(CheckpointError, match=message):
        trainer(callback(other)).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt")


def test_accumulation_counts_updates() -> None:
    """With gradient accumulation the plan's step is the update: all batches of a window are trained by one step, the
    short window at an epoch's end included."""
    module = Lit(accumulate=4)
    assert module.plan.stages[0].steps_per_epoch == 2
    awake: list[bool] = []
    module.net.body[1].register_forward_hook(lambda part, *_: awake.append(part.training))
    trainer(callback(module), accumulate_grad_batches=4).fit(module, loader())
    module.seen.assert_is(module.plan)
    assert awake == [False] * 2 * PER_EPOCH + [True] * 2 * PER_EPOCH


def test_a_run_may_end_early() -> None:
    """A trainer that makes fewer updates than the plan has trains the first of them."""
    module = Lit()
    trainer(callback(module), max_steps=9).fit(module, loader())
    module.seen.assert_is(module.plan, 0, 9)


def test_a_scheduler_beside_it_has_no_effect() -> None:
    """Where `configure_optimizers` gives a scheduler too, it is warned of, and the rates stay the plan's."""

    def make(model: nn.Module) -> Any:
        optimizer = lehr.optimizer(module.plan, model)
        halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving, "interval": "step"}}

    module = Lit(make=make)
    with pytest.warns(UserWarning, match=r"a scheduler \(ExponentialLR\) as well; the rates are the plan's"):
        trainer(callback(module)).fit(module, loader())
    module.seen.assert_is(module.plan)
    assert_same(weights(module.net), fitted())


def test_a_compiled_part() -> None:
    """A network that is compiled inside the module is looked through."""
    module = Lit()
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    trainer(callback(module), max_steps=1).fit(module, loader())
    assert module.seen.awake == [False]


STAGES = [lehr.Stage("2 epochs", train="head", lr=0.05), lehr.Stage("2 epochs", train="all", lr=0.01)]


@pytest.mark.parametrize(
    ("said", "set_to", "message"),
    [
        (
            {"batch_size": 4},
            {},
            r"stage 1 \('head'\) has 11 updates in an epoch, .* the Lightning Trainer makes 6",
        ),
        ({}, {"limit_train_batches": 3}, r"makes 3\. .*lehr\.plan\(recipe, model, samples, batches=3\)"),
        ({}, {"max_epochs": 5}, r"would make 30 updates, and the plan has 24; set max_steps=24"),
        ({}, {"max_epochs": -1}, r"updates without end, and the plan has 24; set max_steps=24"),
        ({"accumulate": 2}, {}, r"an update of 2 batches, .* of 1; set accumulate_grad_batches=2"),
        (
            {},
            {"gradient_clip_val": 1.0},
            r"the plan does not clip .* clips them to 1; set gradient_clip_val=None",
        ),
        (
            {"clip_norm": 0.5},
            {},
            r"to a norm of 0\.5, .* does not; set gradient_clip_val=0\.5, or leave clip_norm out",
        ),
        (
            {"clip_norm": 0.5},
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "clips gradients by value; a plan clips by norm",
        ),
        ({"ema": 0.9}, {}, r"averages the weights \(ema=0\.9\)"),
        ({"patience": "2 epochs", "monitor": "train_loss"}, {}, r"may stop early \(patience\)"),
        ({"restore_best": True}, {}, "would restore its best weights"),
        (
            {"stages": [lehr.Stage("4 epochs", train="all", lr=0.1, until="train_error < 0.1")]},
            {},
            "may end on 'train_error < 0.1', and lehr measures nothing inside the Lightning Trainer",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(said: dict[str, Any], set_to: dict[str, Any], message: str) -> None:
    """A plan that Lightning would not train as it says is refused in words before the first update."""
    module = Lit(**said)
    made = trainer(callback(module), **set_to)
    with pytest.raises(RequestError, match=message):
        made.fit(module, loader())
    assert module.seen.rates == []
    assert all(parameter.requires_grad for parameter in module.net.parameters())


def test_what_clips_alike_is_taken() -> None:
    """A plan that clips and a trainer that clips to the same norm come to what `lehr.fit` comes to."""
    module = Lit(clip_norm=0.05)
    trainer(callback(module), gradient_clip_val=0.05).fit(module, loader())
    assert_same(weights(module.net), fitted(clip_norm=0.05))


def test_several_objectives_are_refused() -> None:
    """A plan whose objectives take turns is refused by their names."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d, self.g = nn.Linear(2, 2), nn.Linear(2, 2)

    turns = [lehr.Objective(name, train=name, lr=0.1) for name in ("d", "g")]
    plan = lehr.plan(lehr.Recipe([lehr.Stage("1 epoch", objectives=turns)]), Pair(), samples=44, head="g")
    module = Lit()
    module.net = Pair()  # type: ignore[assignment]
    module._make = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RequestError, match=r"the objectives d, g, which take turns .* Train with lehr\.fit"):
        trainer(PlanCallback(plan, module="net")).fit(module, loader())


def test_a_plan_of_another_model_is_refused() -> None:
    """A plan is refused for a module that has other parameters, with the part that it fits; so is a path that leads
    nowhere, and an optimizer that is not the plan's."""
    module = Lit()
    with pytest.raises(
        ModelError, match=r"not for Lit: .*it is for the part 'net': PlanCallback\(plan, module='net'\)"
    ):
        trainer(PlanCallback(module.plan)).fit(module, loader())
    with pytest.raises(ModelError, match=r"Lit has no part 'nett'; it is for the part 'net'"):
        trainer(PlanCallback(module.plan, module="nett")).fit(module, loader())
    with pytest.raises(ModelError, match=r"not for Linear: only Linear has 'bias'"):
        trainer(PlanCallback(module.plan, module="net.fc")).fit(module, loader())
    module = Lit(make=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RecipeError, match=r"make it with lehr\.optimizer\(plan, model\)"):
        trainer(callback(module)).fit(module, loader())


def test_optimising_by_hand_is_refused() -> None:
    """A module that makes its updates itself, or several optimizers, is told to call `lehr.apply` itself."""
    module = Lit()
    module.automatic_optimization = False
    with pytest.raises(RequestError, match=r"has 1 optimizers and optimises by hand; .*call lehr\.apply"):
        trainer(callback(module)).fit(module, loader())


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified.*")
def test_data_parallel() -> None:
    """Under DDP a plan that freezes wants unused parameters to be looked for, and then comes to the same weights."""
    dist, environment = torch.distributed, dict(os.environ)  # Lightning leaves some variables
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # no port is opened
    try:
        module = Lit()
        with pytest.raises(RequestError, match="ddp_find_unused_parameters_true"):
            trainer(callback(module), strategy="ddp", devices=1).fit(module, loader())
        module = Lit()
        parallel = {"strategy": "ddp_find_unused_parameters_true", "use_distributed_sampler": False}
        trainer(callback(module), **parallel, devices=1).fit(module, loader())
        assert_same(weights(module.net), fitted())
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


# The parts alone


def test_torch_scheduler_inside_lightning(tmp_path: Path) -> None:
    """`torch_scheduler` returned from `configure_optimizers` with the interval "step" is followed at every update, also
    after a resume, without a warning; the monitor of rates sees it."""
    curve = (lehr.warmup("3 steps") >> lehr.cosine(0.1)).over(steps=STEPS)

    def make(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = {"scheduler": lehr.torch_scheduler(optimizer, curve), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    first, second = Lit(make=make), Lit(make=make)
    made = trainer(
        LearningRateMonitor(), max_steps=8, logger=True, default_root_dir=tmp_path, log_every_n_steps=1
    )
    made.fit(first, loader())
    assert made.callback_metrics["lr-SGD"] == pytest.approx(0.5 * curve(7), rel=1e-6)
    made.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*resuming from a checkpoint that ended before")
        trainer(max_epochs=-1, max_steps=STEPS).fit(second, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [*first.seen.rates, *second.seen.rates] == [[0.5 * curve(t)] for t in range(STEPS)]


def test_frozen_stays_frozen() -> None:
    """What `lehr.freeze` froze does not change by a bit under Lightning's training and validation, and trains again
    after `lehr.thaw`."""
    module = Lit(
        make=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    lehr.freeze(module.net, "backbone")
    before = weights(module.net.body)
    trainer(max_epochs=2).fit(module, loader(), loader())
    assert_same(weights(module.net.body), before)
    lehr.thaw(module.net)
    trainer(max_epochs=1).fit(module, loader(), loader())
    after = weights(module.net.body)
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_without_lightning_the_extra_is_named() -> None:
    """Where the package is missing, importing the callback says which extra to install."""
    code = "import sys; sys.modules['lightning'] = None; import lehr.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "lehr[lightning]"' in done.stderr.splitlines()[-1]
