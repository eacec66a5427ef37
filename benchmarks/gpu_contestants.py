"""The ways to train that `gpu.py` compares; nothing here is timed, counted or saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

import lehr
from gpu_device import On
from pictures_contestants import TOLD
from pictures_task import DECAY, LR, Task

Train = Callable[[nn.Module, Task, On], None]


def compiled_step(model: nn.Module, task: Task, on: On) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of the plain loop, on a batch that lies on the device."""
    model.to(on.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(task.freeze(model), lr=LR, weight_decay=DECAY, fused=True)
    _still(model, task)
    compiled = torch.compile(model)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(on.device.type, torch.bfloat16):
            loss = functional.cross_entropy(compiled(inputs), targets)
        loss.backward()
        optimizer.step()

    return step


def _still(model: nn.Module, task: Task) -> None:
    for module in task.frozen_modules(model):
        if isinstance(module, _NormBase):
            module.eval()


def _loader(task: Task, on: On) -> DataLoader[Any]:
    return DataLoader(
        task.data, task.batch, shuffle=True, drop_last=True, num_workers=on.workers, pin_memory=on.is_cuda,
        persistent_workers=on.workers > 0,
    )  # fmt: skip


def plain(model: nn.Module, task: Task, on: On) -> None:
    """The compiled loop by hand."""
    step, loader = compiled_step(model, task, on), _loader(task, on)
    for _ in range(task.epochs):
        for inputs, targets in loader:
            here = inputs.to(on.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            step(here, targets.to(on.device, non_blocking=True))


def resident(model: nn.Module, task: Task, on: On) -> None:
    """The same steps, always on the first batch, which lies on the device."""
    step = compiled_step(model, task, on)
    inputs, targets = (tensor[: task.batch].to(on.device) for tensor in task.data.tensors)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    for _ in range(task.epochs * (len(task.data) // task.batch)):
        step(inputs, targets)


def lehr_fit(model: nn.Module, task: Task, on: On, *, compile: bool = False, **said: Any) -> None:
    """`lehr.fit` of one stage at a constant rate; `said` goes into the recipe."""
    train = ["all"] if task.everything else [f"{path}.*" for path in task.paths]
    recipe = lehr.Recipe(
        [lehr.Stage(f"{task.epochs} epochs", train=train, lr=LR)],
        optimizer="adamw", weight_decay=DECAY, batch_size=task.batch, schedule=lehr.constant(), **said,
    )  # fmt: skip

    def keep(event: Any) -> None:
        if type(event).__name__ in TOLD and is_dataclass(event) and not isinstance(event, type):
            task.told.append({"event": type(event).__name__, **asdict(event)})

    lehr.fit(
        model, task.data, recipe=recipe, device=on.device, precision="bf16", observers=[keep], compile=compile
    )


def lightning(model: nn.Module, task: Task, on: On) -> None:
    """Lightning's Trainer; it keeps the norms' modes as it finds them."""
    import lightning as pl

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trained = task.freeze(model)
    _still(model, task)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            inputs, targets = batch
            return functional.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)

    trainer = pl.Trainer(
        max_epochs=task.epochs, accelerator=on.device.type, devices=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), _loader(task, on))


@dataclass(frozen=True)
class Contestant:
    """One way to train: what the table calls it, the function, and the stages in which it has a part."""

    label: str
    train: Train
    stages: tuple[str, ...] = ("head", "all")


CONTESTANTS = {
    "plain": Contestant("plain loop, compiled", plain),
    "resident": Contestant("the same, one batch on the device", resident),
    "lehr": Contestant("lehr.fit", lehr_fit),
    "lehr-compiled": Contestant("lehr.fit, `compile=True`", partial(lehr_fit, compile=True), ("all",)),
    "lehr-uncached": Contestant(
        'lehr.fit, `compile=True`, `cache="off"`', partial(lehr_fit, compile=True, cache="off"), ("head",)
    ),
    "lightning": Contestant("Lightning", lightning),
}
