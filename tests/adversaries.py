"""A generator and a discriminator that train in a blink, with everything that a turn must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lehr
from lehr.recipe import Objective, Recipe, Stage


class Pair(nn.Module):
    """Both networks have batch-norm and dropout; the person's own wish is that the first layer stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)
        )


def pair(seed: int = 1) -> Pair:
    torch.manual_seed(seed)
    return Pair()


def real(samples: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 4, generator=torch.Generator().manual_seed(2)) + 1)


def d_loss(model: Any, batch: Any) -> torch.Tensor:
    """The discriminator's: real ones up, made ones down."""
    (samples,) = batch
    made = model.generator(torch.randn(len(samples), 3))
    return (
        functional.softplus(-model.discriminator(samples)).mean()
        + functional.softplus(model.discriminator(made)).mean()
    )


def g_loss(model: Any, batch: Any) -> torch.Tensor:
    """The generator's: what it makes, up."""
    made = model.generator(torch.randn(len(batch[0]), 3))
    return functional.softplus(-model.discriminator(made)).mean()


def recipe(d: dict[str, Any] | None = None, g: dict[str, Any] | None = None, **said: Any) -> Recipe:
    """Three epochs of five batches of eight."""
    objectives = [
        Objective("d", **{"loss": d_loss, "train": "discriminator", "lr": 0.02, **(d or {})}),
        Objective("g", **{"loss": g_loss, "train": "generator", "lr": 0.01, **(g or {})}),
    ]
    usual = {"optimizer": {"name": "adam", "betas": [0.5, 0.999]}, "batch_size": 8, "seed": 3}
    return Recipe([Stage("3 epochs", objectives=objectives)], **{**usual, **said})


def fit(out: Path | None = None, model: nn.Module | None = None, watch: Callable[..., None] | None = None, **said: Any) -> Any:  # fmt: skip
    """The run; `watch(name, model)` is called in each loss function before it."""
    how = said.pop("recipe", None) or recipe()
    if watch:
        how = watched(how, watch)
    kept = {"device": "cpu", "precision": "fp32", "checkpoint": {"every": "1000 steps", "keep": 9}, **said}
    return lehr.fit(pair() if model is None else model, real(), recipe=how, out=out, **kept)


def watched(how: Recipe, watch: Callable[..., None]) -> Recipe:
    """The same recipe, with something to see each call of a loss function."""

    def seen(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
        def watching(model: nn.Module, batch: Any) -> Any:
            watch(name, model)
            return loss(model, batch)

        return watching

    stages = []
    for stage in how.stages:
        said = [{k: getattr(o, k) for k in o.__dataclass_fields__} for o in stage.objectives]
        objectives = [Objective(**{**o, "loss": seen(o["name"], o["loss"])}) for o in said]
        fields = {k: getattr(stage, k) for k in stage.__dataclass_fields__ if k not in ("train", "lr")}
        stages.append(Stage(**{**fields, "objectives": objectives}))
    kept = {k: getattr(how, k) for k in how.__dataclass_fields__}
    return Recipe(**{**kept, "stages": stages})
