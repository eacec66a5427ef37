"""The training loops that `loop.py` compares. Nothing here is timed; `loop_worker.py` does that.

Every contestant is a function that trains the same perceptron on the same data, as its library's documents
show it. It imports its library inside its function: one that is not installed is named, nothing else breaks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

BATCH = 8
PEAK = {"sgd": 0.1, "adamw": 3e-3}


@dataclass(frozen=True)
class Task:
    """What every contestant is given: one shuffled epoch over `data` in batches of 8, with a rate a step."""

    data: TensorDataset
    optimizer: str

    @property
    def steps(self) -> int:
        """Updates in the epoch."""
        return len(self.data) // BATCH

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return PEAK[self.optimizer]

    def loader(self) -> DataLoader[Any]:
        """What a person would write; no workers."""
        return DataLoader(self.data, batch_size=BATCH, shuffle=True)

    def torch_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer with torch's own defaults, without decay."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.peak)
        return torch.optim.AdamW(model.parameters(), lr=self.peak, weight_decay=0.0)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up over a twentieth of the steps, then a cosine to 0, in the form that costs torch least."""
        steps, rise = self.steps, round(0.05 * self.steps)

        def factor(t: int) -> float:
            if t < rise:
                return (t + 1) / (rise + 1)
            return 0.5 * (1 + math.cos(math.pi * (t - rise) / (steps - rise)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def bare(model: nn.Module, task: Task) -> None:
    """The loop that everyone writes first: no bar."""
    loader, optimizer = task.loader(), task.torch_optimizer(model)
    scheduler = task.scheduler(optimizer)
    model.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()


def bare_fast(model: nn.Module, task: Task) -> None:
    """The same without a data loader (one gather, then slices): the best a hand loop can do; no bar."""
    optimizer = task.torch_optimizer(model)
    scheduler = task.scheduler(optimizer)
    order = torch.randperm(len(task.data))
    inputs_all, targets_all = (t[order] for t in task.data.tensors)
    model.train()
    for inputs, targets in zip(inputs_all.split(BATCH), targets_all.split(BATCH), strict=True):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()


def tqdm_postfix(model: nn.Module, task: Task) -> None:
    """The bare loop with a bar that shows the loss of every step."""
    from tqdm import tqdm

    loader, optimizer = task.loader(), task.torch_optimizer(model)
    scheduler = task.scheduler(optimizer)
    model.train()
    with tqdm(loader) as bar:
        for inputs, targets in bar:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.set_postfix(loss=loss.item())


def lightning(model: nn.Module, task: Task) -> None:
    """Lightning's Trainer with its tqdm bar (the default without `rich`); no logger, checkpoints, summary."""
    import lightning as pl
    from lightning.pytorch.callbacks import TQDMProgressBar

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            inputs, targets = batch
            loss = functional.cross_entropy(self.model(inputs), targets)
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = task.torch_optimizer(self)
            return [optimizer], [{"scheduler": task.scheduler(optimizer), "interval": "step"}]

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[TQDMProgressBar()],
    )  # fmt: skip
    trainer.fit(Module(), task.loader())


def ignite(model: nn.Module, task: Task) -> None:
    """Ignite's supervised trainer with its ProgressBar, which shows the loss of every step."""
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers.tqdm_logger import ProgressBar

    optimizer = task.torch_optimizer(model)
    scheduler = task.scheduler(optimizer)
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, device="cpu")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    ProgressBar(persist=True).attach(trainer, output_transform=lambda loss: {"loss": loss})
    trainer.run(task.loader(), max_epochs=1)


def accelerate(model: nn.Module, task: Task) -> None:
    """The loop of Accelerate's documentation, with the bar that its examples use."""
    from accelerate import Accelerator
    from accelerate.utils import tqdm

    accelerator = Accelerator(cpu=True)
    optimizer = task.torch_optimizer(model)
    scheduler = task.scheduler(optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, task.loader(), scheduler)
    model.train()
    bar = tqdm(loader)
    for inputs, targets in bar:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=loss.item())


def fastai(model: nn.Module, task: Task) -> None:
    """fastai's Learner over the same loader and torch optimizer, with its own bar and scheduler.

    It insists on a validation set: it gets one batch of it, one step in 12,500.
    """
    from fastai.basics import DataLoaders, Learner
    from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
    from fastai.optimizer import OptimWrapper

    classes = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    rise = combine_scheds([0.05, 0.95], [SchedLin(0.0, task.peak), SchedCos(task.peak, 0.0)])
    loaders = DataLoaders(task.loader(), DataLoader(Subset(task.data, range(BATCH)), batch_size=BATCH))

    def optimizer(parameters: Any, **settings: Any) -> OptimWrapper:
        return OptimWrapper(parameters, opt=classes[task.optimizer], **settings)

    learner = Learner(loaders, model, functional.cross_entropy, opt_func=optimizer, lr=task.peak)
    learner.fit(1, cbs=ParamScheduler({"lr": rise}), wd=0.0)


def lehr_recipe(task: Task) -> Any:
    import lehr

    return lehr.Recipe(
        [lehr.Stage("1 epoch", train="all", lr=task.peak)],
        optimizer=task.optimizer,
        weight_decay=0.0,
        batch_size=BATCH,
        schedule=lehr.warmup("5%") >> lehr.cosine(),
    )


def lehr_fit(model: nn.Module, task: Task) -> None:
    """`lehr.fit` with its bar, given the data set."""
    import lehr
    from lehr.progress import progress

    lehr.fit(model, task.data, recipe=lehr_recipe(task), device="cpu", observers=[progress()])


def lehr_fit_loader(model: nn.Module, task: Task) -> None:
    """`lehr.fit` with its bar, given the same data loader as the bare loop."""
    import lehr
    from lehr.progress import progress

    lehr.fit(model, task.loader(), recipe=lehr_recipe(task), device="cpu", observers=[progress()])


def lehr_own_loop(model: nn.Module, task: Task) -> None:
    """The bare loop with `lehr.apply` in the scheduler's place; no bar."""
    import lehr

    plan = lehr.plan(lehr_recipe(task), model, samples=len(task.data))
    optimizer = lehr.optimizer(plan, model)
    model.train()
    for step, (inputs, targets) in zip(plan, task.loader(), strict=True):
        lehr.apply(step, model, optimizer)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class Contestant:
    """One way to train: what the table calls it, the function, and the packages whose versions matter."""

    label: str
    train: Callable[[nn.Module, Task], None]
    packages: tuple[str, ...] = ()


CONTESTANTS = {
    "bare": Contestant("bare loop (DataLoader, no bar)", bare),
    "bare-fast": Contestant("bare loop (sliced tensors, no bar)", bare_fast),
    "tqdm": Contestant("plain loop + tqdm `set_postfix`", tqdm_postfix, packages=("tqdm",)),
    "lightning": Contestant("Lightning Trainer", lightning, packages=("lightning",)),
    "ignite": Contestant("Ignite + ProgressBar", ignite, packages=("pytorch-ignite", "tqdm")),
    "accelerate": Contestant("Accelerate + tqdm `set_postfix`", accelerate, packages=("accelerate", "tqdm")),
    "fastai": Contestant("fastai Learner", fastai, packages=("fastai", "fastprogress")),
    "lehr": Contestant("lehr.fit (data set)", lehr_fit, packages=("tqdm",)),
    "lehr-loader": Contestant("lehr.fit (same DataLoader)", lehr_fit_loader, packages=("tqdm",)),
    "lehr-own": Contestant("own loop + lehr.apply (no bar)", lehr_own_loop),
}
