"""What lehr is compared with on real images: a careful hand-written fine-tuning loop, and a linear probe.

Neither uses anything of lehr. The loop is what an experienced person writes in one sitting: the head alone on
a frozen backbone (in eval mode, no gradient through it), then everything; AdamW without decay on norms and
biases, a warm-up and a cosine in each stage, label smoothing, random crops and flips, the best epoch kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC
FLOOR = 0.01  # the cosine's, as a share of the peak
PROBE_C = {"scaled": (0.0003, 0.001, 0.003, 0.01), "raw": (0.003, 0.01, 0.03, 0.1, 0.3)}
PROBE_ITERATIONS = 10_000

Item = tuple[Path, int]


@dataclass(frozen=True)
class Settings:
    """Everything the hand-written loop can be told."""

    model: str
    weights: Path
    classes: int
    size: int
    epochs: tuple[int, int]
    batch: int = 32
    head_lr: float = 3e-3
    thaw_head_lr: float = 1e-3
    thaw_backbone_lr: float = 3e-4
    decay: float = 0.05
    warm_up: float = 0.05
    smoothing: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """Validation accuracy after every epoch, and the seconds it all took."""

    head: tuple[float, ...]
    thawed: tuple[float, ...]
    seconds: float

    @property
    def best(self) -> float:
        """The best epoch, of either stage."""
        return max(self.head + self.thawed)


class Images(Dataset[Any]):
    """Images decoded once, kept as bytes; the transform runs at every look."""

    def __init__(self, items: Sequence[Item], transform: Callable[[Any], Any]) -> None:
        self.pixels = [torch.from_numpy(np.asarray(Image.open(p).convert("RGB")).copy()) for p, _ in items]
        self.labels = [label for _, label in items]
        self.transform = transform

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image as the model sees it, and its class."""
        return self.transform(self.pixels[index].permute(2, 0, 1)), self.labels[index]


def train_transform(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def valid_transform(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(round(size / 0.875), interpolation=BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def pretrained(settings: Settings) -> nn.Module:
    """The network with its pretrained backbone and a new head.

    The head gets torch's own initial weights: timm draws them for many classes, and with five they are so
    large that a few epochs only unlearn them.
    """
    model = timm.create_model(settings.model, num_classes=settings.classes)
    loaded = torch.load(settings.weights, weights_only=True)
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    head = {name for name, _ in model.named_parameters() if name.startswith(model.default_cfg["classifier"])}
    if unexpected or set(missing) - head:
        raise SystemExit(f"{settings.weights} does not fit {settings.model}: {[*unexpected, *missing][:3]}")
    model.get_classifier().reset_parameters()
    return model.to(memory_format=torch.channels_last)


def hand_loop(train: Sequence[Item], valid: Sequence[Item], settings: Settings, *, seed: int) -> Outcome:
    """Both stages; the thaw begins from the best epoch of the head stage."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    model = pretrained(settings)
    train_data = Images(train, train_transform(settings.size))
    train_loader = DataLoader(train_data, batch_size=settings.batch, shuffle=True)
    valid_loader = DataLoader(Images(valid, valid_transform(settings.size)), batch_size=64)
    head = model.get_classifier()

    model.requires_grad_(False)
    head.requires_grad_(True)
    groups = groups_of(head, settings.head_lr, settings.decay)
    first = _stage(
        model, groups, (train_loader, valid_loader), settings, epochs=settings.epochs[0], frozen=True
    )

    model.requires_grad_(True)
    groups = groups_of(head, settings.thaw_head_lr, settings.decay)
    mine = {id(p) for p in head.parameters()}
    groups += groups_of(model, settings.thaw_backbone_lr, settings.decay, leave_out=mine)
    second = _stage(
        model, groups, (train_loader, valid_loader), settings, epochs=settings.epochs[1], frozen=False
    )
    return Outcome(tuple(first), tuple(second), time.perf_counter() - began)


def groups_of(
    module: nn.Module, lr: float, decay: float, *, leave_out: set[int] = frozenset()
) -> list[dict[str, Any]]:
    """Two groups: matrices and filters decay, norms and biases do not."""
    parameters = [p for p in module.parameters() if id(p) not in leave_out]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "peak": lr, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "peak": lr, "weight_decay": 0.0},
    ]


def _stage(
    model: nn.Module,
    groups: list[dict[str, Any]],
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    settings: Settings,
    *,
    epochs: int,
    frozen: bool,
) -> list[float]:
    """Train `epochs` epochs and leave the model at its best one; the accuracy after each."""
    train_loader, valid_loader = loaders
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * len(train_loader)
    rise = max(1, round(settings.warm_up * steps))
    accuracies: list[float] = []
    best = copy.deepcopy(model.state_dict())
    step = 0
    for _ in range(epochs):
        model.train(not frozen)
        for images, labels in train_loader:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _factor(step, steps, rise)
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimizer.step()
            step += 1
        accuracies.append(accuracy(model, valid_loader))
        if accuracies[-1] == max(accuracies):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return accuracies


def _factor(step: int, steps: int, rise: int) -> float:
    if step < rise:
        return (step + 1) / (rise + 1)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """The share of all images of `loader` that the model names rightly."""
    model.eval()
    right = count = 0
    for images, labels in loader:
        named = model(images.contiguous(memory_format=torch.channels_last)).argmax(1)
        right += int((named == labels).sum())
        count += len(labels)
    return right / count


def linear_probe(train: Sequence[Item], valid: Sequence[Item], settings: Settings) -> dict[str, Any]:
    """Logistic regression on the frozen features, to convergence; C and scaling chosen on `train`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    began = time.perf_counter()
    model = pretrained(settings).eval()
    (x_train, y_train), (x_valid, y_valid) = (
        _features(model, items, settings.size) for items in (train, valid)
    )
    search = GridSearchCV(
        Pipeline([("scale", StandardScaler()), ("fit", LogisticRegression(max_iter=PROBE_ITERATIONS))]),
        [
            {"scale": [StandardScaler()], "fit__C": PROBE_C["scaled"]},
            {"scale": ["passthrough"], "fit__C": PROBE_C["raw"]},
        ],
        cv=5,
    )
    search.fit(x_train, y_train)
    chosen = search.best_estimator_
    iterations = int(max(chosen["fit"].n_iter_))
    return {
        "accuracy": float(chosen.score(x_valid, y_valid)),
        "train_accuracy": float(chosen.score(x_train, y_train)),
        "cross_validated": float(search.best_score_),
        "C": search.best_params_["fit__C"],
        "scaled": search.best_params_["scale"] != "passthrough",
        "iterations": iterations,
        "converged": iterations < PROBE_ITERATIONS,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def _features(model: nn.Module, items: Sequence[Item], size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = [], []
    for images, targets in DataLoader(Images(items, valid_transform(size)), batch_size=64):
        maps = model.forward_features(images.contiguous(memory_format=torch.channels_last))
        rows.append(model.forward_head(maps, pre_logits=True).numpy())
        labels.append(targets.numpy())
    return np.concatenate(rows), np.concatenate(labels)
