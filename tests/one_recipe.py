"""One recipe for every loop: the head, then all, through a thaw, over batches in lehr's order; and what it must come to.

A backbone with batch-norm: where a trainer's `train()` woke it while it is frozen, its statistics would drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lehr
from lehr.planning import Plan
from lehr.run.sampler import order

SAMPLES, BATCH, SEED = 44, 8, 5
PER_EPOCH = 6
STEPS = 4 * PER_EPOCH


class Net(nn.Module):
    """A backbone with batch-norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(inputs))


class Judged(Net):
    """The same network, that judges itself where it is given labels, as models of transformers do."""

    def forward(  # type: ignore[override]
        self, inputs: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        outputs = super().forward(inputs)
        found = {} if labels is None else {"loss": functional.cross_entropy(outputs, labels)}
        return {**found, "logits": outputs}


class Order(torch.utils.data.Sampler[int]):
    """lehr's order of the samples; trainers tell it the epoch by `set_epoch`."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order(SAMPLES, SEED, self.epoch).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Named(Dataset[dict[str, torch.Tensor]]):
    """The samples as dicts, which is what the Hugging Face Trainer feeds on."""

    def __init__(self) -> None:
        self.data = data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs, labels = self.data[index]
        return {"inputs": inputs, "labels": labels}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH, sampler=Order())


def net(make: type[Net] = Net) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make()


def recipe(**said: Any) -> lehr.Recipe:
    """Two epochs of the head, two of all, with a schedule in each and decay."""
    stages = said.pop("stages", None) or [
        lehr.Stage("2 epochs", train="head", lr=0.05),
        lehr.Stage("2 epochs", train="all", lr={"head": 0.02, "backbone": 0.01}),
    ]
    usual = {"batch_size": BATCH, "seed": SEED, "weight_decay": 0.02, "optimizer": "adamw"}
    return lehr.Recipe(stages, schedule=lehr.warmup("10%") >> lehr.cosine(0.1), **{**usual, **said})


def plan_of(model: nn.Module, **said: Any) -> Plan:
    return lehr.plan(recipe(**said), model, samples=SAMPLES)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def fitted(**said: Any) -> dict[str, torch.Tensor]:
    """What `lehr.fit` comes to."""
    model = net()
    lehr.fit(model, data(), recipe=recipe(**said), device="cpu", precision="fp32")
    return weights(model)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


class Seen:
    """What each update of a network saw: the rates, what trained, and whether its batch-norm was awake."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.rates: list[list[float]] = []
        self.trained: list[set[str]] = []
        self.awake: list[bool] = []
        self._model, self._body = model, model.get_submodule("body.1")
        if optimizer is not None:
            self.watch(optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Look on just before each update of `optimizer`."""

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.rates.append([group["lr"] for group in optimizer.param_groups])
            self.trained.append({n for n, p in self._model.named_parameters() if p.requires_grad})
            self.awake.append(self._body.training)

        optimizer.register_step_pre_hook(look)

    def assert_is(self, plan: Plan, start: int = 0, stop: int | None = None) -> None:
        """All of it is as the plan says for the updates of the half-open range."""
        steps = [plan[t] for t in range(start, plan.total_steps if stop is None else stop)]
        assert self.rates == [list(step.lr.values()) for step in steps]
        assert self.trained == [step.trainable for step in steps]
        assert self.awake == [step.stage == 1 for step in steps]
