"""The ways to save a run that `checkpoint.py` compares. Nothing here is timed; `checkpoint_worker.py` does that.

Every contestant is a function that trains the same network with Adam and saves model and optimizer every so
many steps, as its library's documents show it, keeping the last one or two. With it goes a function that reads
the weights back from what it left. A library that is missing is named; nothing else breaks.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

RATE = 1e-4

Tensors = dict[str, torch.Tensor]
Save = Callable[[nn.Module, torch.optim.Optimizer, Path], None]


@dataclass(frozen=True)
class Task:
    """What every contestant is given: one shuffled epoch over `data`, and a checkpoint after `every` steps."""

    data: TensorDataset
    batch: int
    every: int
    folder: Path

    def loader(self) -> DataLoader[Any]:
        """What a person would write; no workers."""
        return DataLoader(self.data, batch_size=self.batch, shuffle=True)


def plain_loop(save: Save | None) -> Callable[[nn.Module, Task], None]:
    """The loop by hand, which calls `save(model, optimizer, path)`; the two newest files are kept."""

    def train(model: nn.Module, task: Task) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        model.train()
        for step, (inputs, targets) in enumerate(task.loader(), start=1):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if save and step % task.every == 0:
                save(model, optimizer, task.folder / f"step-{step}")
                _remove(task.folder / f"step-{step - 2 * task.every}")

    return train


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def torch_save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """What everyone writes first: a power cut may leave a file without its content."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def torch_save_durable(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The same, so that it is there whole or not at all: written aside, flushed, renamed, the name flushed."""
    aside = path.with_name("part")
    torch_save(model, optimizer, aside)
    _flush(aside)
    aside.replace(path)
    _flush(path.parent)


def safetensors_save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """`save_file` of the model's tensors and the optimizer's, by name."""
    state = optimizer.state_dict()["state"]
    moments = {f"optimizer/{i}/{key}": value for i, kept in state.items() for key, value in kept.items()}
    save_file({**{f"model/{name}": t for name, t in model.state_dict().items()}, **moments}, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def torch_async(model: nn.Module, task: Task) -> None:
    """torch.distributed.checkpoint: `async_save` of one process. One stager is kept, so that its memory is used
    again, without what needs CUDA; it waits for the last checkpoint before it begins the next.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import async_save
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict

    dist.init_process_group("gloo", init_method=f"file://{task.folder}/meeting", rank=0, world_size=1)
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    under_way: list[Any] = []

    def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
        for before in under_way:
            before.result()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        under_way[:] = [async_save(state, checkpoint_id=path, async_stager=stager)]

    plain_loop(save)(model, task)
    for before in under_way:
        before.result()
    stager.close()
    dist.destroy_process_group()


def lightning(*, aside: bool) -> Callable[[nn.Module, Task], None]:
    """Lightning's Trainer with ModelCheckpoint, which keeps the newest; `aside`: with AsyncCheckpointIO."""

    def train(model: nn.Module, task: Task) -> None:
        import lightning as pl
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.plugins.io import AsyncCheckpointIO

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, _: int) -> torch.Tensor:
                inputs, targets = batch
                return functional.cross_entropy(self.model(inputs), targets)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.Adam(self.parameters(), lr=RATE)

        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_model_summary=False,
            enable_progress_bar=False, plugins=[AsyncCheckpointIO()] if aside else [],
            callbacks=[ModelCheckpoint(task.folder, every_n_train_steps=task.every)],
        )  # fmt: skip
        trainer.fit(Module(), task.loader())

    return train


def lehr_fit(model: nn.Module, task: Task) -> None:
    """`lehr.fit` with checkpoints; it saves at the start and the end besides, and keeps two."""
    import lehr

    recipe = lehr.Recipe(
        [lehr.Stage("1 epoch", train="all", lr=RATE)],
        optimizer="adam",
        weight_decay=0.0,
        batch_size=task.batch,
        schedule=lehr.constant(),
    )
    every = f"{task.every} steps"
    lehr.fit(model, task.data, recipe=recipe, device="cpu", out=task.folder / "run", checkpoint=every)


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def _read_torch(folder: Path) -> Tensors:
    return dict(torch.load(_newest(folder, "step-*"))["model"])


def _read_safetensors(folder: Path) -> Tensors:
    return _of_model(load_file(_newest(folder, "step-*")), "model/")


def _read_lightning(folder: Path) -> Tensors:
    return _of_model(torch.load(_newest(folder, "*.ckpt"), weights_only=False)["state_dict"], "model.")


def _read_lehr(folder: Path) -> Tensors:
    return _of_model(load_file(_newest(folder, "run/checkpoints/*-step-*.safetensors")), "model/")


def _read_async(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(_newest(folder, "step-*"), folder / "whole")
    return dict(torch.load(folder / "whole")["model"])


def _of_model(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Contestant:
    """One way to save: what the table calls it, the training, how its newest weights are read, what it flushes
    to the device before it goes on (as its source says), and the packages whose versions matter.
    """

    label: str
    train: Callable[[nn.Module, Task], None]
    read: Callable[[Path], Tensors] | None
    flushes: str = "nothing"
    packages: tuple[str, ...] = ()


CONTESTANTS = {
    "none": Contestant("plain loop, no checkpoints", plain_loop(None), None, flushes="-"),
    "torch": Contestant("plain loop + `torch.save`", plain_loop(torch_save), _read_torch),
    "torch-durable": Contestant(
        "plain loop + `torch.save`, fsync, rename", plain_loop(torch_save_durable), _read_torch,
        flushes="file and name",
    ),
    "safetensors": Contestant(
        "plain loop + `safetensors.save_file`", plain_loop(safetensors_save), _read_safetensors,
        packages=("safetensors",),
    ),
    "torch-async": Contestant(
        "plain loop + `torch.distributed.checkpoint.async_save`", torch_async, _read_async, flushes="files"
    ),
    "lightning": Contestant(
        "Lightning ModelCheckpoint", lightning(aside=False), _read_lightning, packages=("lightning",)
    ),
    "lightning-async": Contestant(
        "Lightning ModelCheckpoint + AsyncCheckpointIO", lightning(aside=True), _read_lightning,
        packages=("lightning",),
    ),
    "lehr": Contestant("lehr.fit", lehr_fit, _read_lehr, flushes="file and name", packages=("safetensors",)),
}  # fmt: skip
