"""The other libraries' ways to train, for `pictures_contestants.py`: each as its documents show it.

Without a bar, a logger, checkpoints or validation. Where a library trains the norms of a frozen backbone unless
told otherwise, it is told; so all do the same work. Libraries are imported inside the functions.
"""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pictures_task import DECAY, LR, Task


def _lightning_module(model: nn.Module, task: Task) -> Any:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            task.freeze(model)  # parameters outside leaves, too; the callback freezes leaves
            self.backbone = nn.ModuleList(m for m in task.frozen_modules(model) if not any(m.children()))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            inputs, targets = batch
            return functional.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)

    return Module()


def _lightning_fit(module: Any, task: Task, callbacks: list[Any], **said: Any) -> None:
    import lightning as pl

    for name in ("lightning.pytorch", "lightning.fabric", "finetuning_scheduler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=task.epochs, accelerator="cpu", devices=1, enable_model_summary=False, callbacks=callbacks,
        **(settings | said),
    )  # fmt: skip
    trainer.fit(module, task.loader())


def lightning(model: nn.Module, task: Task) -> None:
    """Lightning's BackboneFinetuning, that never unfreezes, with the norms frozen as well."""
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Frozen(BackboneFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

    callbacks = [] if task.everything else [Frozen(unfreeze_backbone_at_epoch=10 * task.epochs)]
    _lightning_fit(_lightning_module(model, task), task, callbacks)


def lightning_as_is(model: nn.Module, task: Task) -> None:
    """Lightning's BackboneFinetuning as it comes, which trains the norms of the frozen backbone."""
    from lightning.pytorch.callbacks import BackboneFinetuning

    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=10 * task.epochs)]
    _lightning_fit(_lightning_module(model, task), task, callbacks)


def scheduler(model: nn.Module, task: Task) -> None:
    """finetuning-scheduler with a schedule of one phase."""
    from finetuning_scheduler import FinetuningScheduler

    names = [f"model.{name}" for name, _ in model.named_parameters() if name in task.trained]
    module = _lightning_module(model, task)
    del module.backbone
    phase = {"params": names, "max_transition_epoch": 10 * task.epochs}
    with tempfile.TemporaryDirectory() as folder:
        callback = FinetuningScheduler(
            ft_schedule={0: phase}, epoch_transitions_only=True, restore_best=False, max_depth=0
        )
        said = {"default_root_dir": folder, "limit_val_batches": 0}
        _lightning_fit(module, task, [callback], **said)


def _fastai(model: nn.Module, task: Task, *, train_norms: bool) -> None:
    from fastai.basics import Callback, CancelValidException, DataLoaders, Learner
    from fastai.callback.training import BnFreeze
    from fastai.optimizer import OptimWrapper

    class NoValidation(Callback):
        def before_validate(self) -> None:
            raise CancelValidException

    def optimizer(parameters: Any, **settings: Any) -> Any:
        return OptimWrapper(parameters, opt=torch.optim.AdamW, **settings)

    def groups(module: nn.Module) -> list[list[nn.Parameter]]:
        named = list(module.named_parameters())
        return [[p for n, p in named if (n in task.trained) == mine] for mine in (False, True)]

    spare = DataLoader(Subset(task.data, range(task.batch)), batch_size=task.batch)  # it insists on one
    said: dict[str, Any] = {} if task.everything else {"splitter": groups, "train_bn": train_norms}
    learner = Learner(
        DataLoaders(task.loader(), spare), model, functional.cross_entropy, opt_func=optimizer, lr=LR, **said
    )
    callbacks: list[Any] = [NoValidation()]
    if not task.everything:
        learner.freeze()
        callbacks += [] if train_norms else [BnFreeze()]
    with learner.no_bar(), learner.no_logging():
        learner.fit(task.epochs, cbs=callbacks, wd=DECAY)


def fastai(model: nn.Module, task: Task) -> None:
    """fastai's Learner, frozen to its last group, the norms as well (`train_bn=False`, `BnFreeze`)."""
    _fastai(model, task, train_norms=False)


def fastai_as_is(model: nn.Module, task: Task) -> None:
    """fastai's Learner as it comes, which trains the norms of frozen groups."""
    _fastai(model, task, train_norms=True)


class _Rows(Dataset[Any]):
    """Samples as the Hugging Face Trainer wants them."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs, labels = self.data[index]
        return {"pixel_values": inputs, "labels": labels}


class _WithLoss(nn.Module):
    """A network that returns its loss, as the Hugging Face Trainer wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(pixel_values)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(model: nn.Module, task: Task) -> None:
    """The Hugging Face Trainer, parameters frozen by `requires_grad`."""
    from transformers import Trainer, TrainingArguments

    task.freeze(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=task.epochs, per_device_train_batch_size=task.batch, learning_rate=LR,
            weight_decay=DECAY, lr_scheduler_type="constant", use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(_WithLoss(model), settings, train_dataset=_Rows(task.data)).train()


def keras(model: nn.Module, task: Task) -> None:
    """Keras on its torch backend: the same network in a TorchModuleWrapper, frozen by `requires_grad`."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as library
    from keras.layers import TorchModuleWrapper

    class Marks(library.callbacks.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            task.step_done()

    task.freeze(model)
    wrapped = library.Sequential([TorchModuleWrapper(model)])
    wrapped.compile(
        optimizer=library.optimizers.AdamW(LR, weight_decay=DECAY),
        loss=library.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, labels = (tensor.numpy() for tensor in task.data.tensors)
    wrapped.fit(images, labels, batch_size=task.batch, epochs=task.epochs, verbose=0, callbacks=[Marks()])
