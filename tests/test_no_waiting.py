"""Steps that never wait for the device: a number that is read back would stop a GPU at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import lehr
from lehr.recipe import Recipe, Stage
from lehr.run.ema import Ema
from lehr.run.optimizer import apply
from lehr.run.precision import Arithmetic, arithmetic
from lehr.run.sampler import feed
from lehr.run.update import Update
from waiting import no_waiting

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
STAGES = [Stage("1 epoch", train="head", lr=0.01), Stage("1 epoch", train="all", lr=0.01)]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 4)
    )


def data() -> TensorDataset:
    return TensorDataset(torch.randn(44, 3, 8, 8), torch.arange(44) % 4)


class NoReads(TorchDispatchMode):
    """Nothing is read back from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in READS, func
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class AsIfBeside(Arithmetic):
    """The CPU, taken to be a device that computes beside this program."""

    @property
    def synchronous(self) -> bool:
        return False


def epochs(on: Arithmetic, guarded: Any, optimizer: Any) -> list[torch.Tensor]:
    """The losses of a run of two stages; each step is made within `guarded`."""
    torch.manual_seed(0)
    recipe = Recipe(STAGES, optimizer=optimizer, batch_size=8, accumulate=2, clip_norm=1.0)
    model = net().to(on.device)
    train = feed(data(), seed=0, pin=on.device.type == "cuda")
    plan = lehr.plan(recipe, model, samples=train.samples)
    own = lehr.optimizer(plan, model)
    update, average = Update(model, own, plan=plan, on=on), Ema(model, 0.9)
    losses = []
    for stage in plan.stages:
        model.train()
        windows = train.windows(stage, stage.first_epoch)
        for step, window in zip(plan.steps(stage.start, stage.stop, stage), windows, strict=True):
            with guarded():
                apply(step, model, own)
                losses.append(update(window, step.index))
                average.update(step.index)
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", {"name": "sgd", "momentum": 0.9}, "sgd"], ids=str)
def test_no_step_reads_a_number_back(optimizer: Any) -> None:
    """Forward, backward, clipping, update and average of a step ask for no value of any tensor; a test that can fail."""
    losses = epochs(AsIfBeside(torch.device("cpu"), "fp32"), NoReads, optimizer)
    assert len(losses) == 6
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        epochs(arithmetic("cpu"), NoReads, optimizer)  # a CPU may be asked: it computes here and now


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", {"name": "sgd", "momentum": 0.9}], ids=str)
def test_no_step_waits_for_cuda(precision: str, optimizer: Any) -> None:
    """CUDA itself finds no synchronisation in a step, copies of its batches included."""

    epochs(arithmetic("cuda", precision), no_waiting, optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_cuda_are_pinned() -> None:
    """Batches of tensors in memory lie where a GPU can fetch them by itself."""
    source = feed(data(), seed=0, pin=True)
    for batch in source.batches_of([torch.arange(8), torch.arange(3)], 0):
        assert all(tensor.is_pinned() for tensor in batch)
