"""The networks that `frozen.py` and `full.py` train, and what *head*, *last block* and *last stage* mean in each.

All have random weights, 224 px and 10 classes. Their norms' statistics are set from a few pictures first, so that
a network with frozen norms behaves as a trained one does. Nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import TensorDataset

CLASSES = 10
SIDE = 224


@dataclass(frozen=True)
class Network:
    """A network: how it is made, the modules of each thaw by path, the pictures of an epoch of `frozen.py`."""

    label: str
    make: Callable[[], nn.Module]
    thaws: Mapping[str, tuple[str, ...]]
    pictures: int = 64
    remark: str = ""


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES)

    return make


def _tiny() -> nn.Module:
    """What every contestant trains first, so that nothing is built for the first time while it is timed."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def _resnet(last: int) -> dict[str, tuple[str, ...]]:
    return {"head": ("fc",), "block": (f"layer4.{last}", "fc"), "stage": ("layer4", "fc"), "all": ("all",)}


NETWORKS = {
    "resnet18": Network("resnet18 (torchvision)", _torchvision("resnet18"), _resnet(1)),
    "resnet50": Network("resnet50 (torchvision)", _torchvision("resnet50"), _resnet(2)),
    "mobilenet_v3_large": Network(
        "mobilenet_v3_large (torchvision)",
        _torchvision("mobilenet_v3_large"),
        {
            "head": ("classifier",),
            "block": ("features.15", "features.16", "classifier"),
            "stage": ("features.13", "features.14", "features.15", "features.16", "classifier"),
            "all": ("all",),
        },
        pictures=128,
        remark="block: the last inverted residual and the convolution after it; stage: all at 7x7",
    ),
    "convnext_tiny": Network(
        "convnext_tiny (torchvision)",
        _torchvision("convnext_tiny"),
        {
            "head": ("classifier",),
            "block": ("features.7.2", "classifier"),
            "stage": ("features.6", "features.7", "classifier"),
            "all": ("all",),
        },
        remark="head: the norm and the linear layer; stage: the last downsampling and what follows",
    ),
    "vit_small": Network(
        "vit_small_patch16_224 (timm)",
        _timm("vit_small_patch16_224"),
        {
            "head": ("head",),
            "block": ("blocks.11", "norm", "head"),
            "stage": ("blocks.10", "blocks.11", "norm", "head"),
            "quarter": ("blocks.9", "blocks.10", "blocks.11", "norm", "head"),
            "all": ("all",),
        },
        remark="it has no stages: the last 2 of 12 blocks stand for one; quarter: the last 3",
    ),
    "tiny": Network("a warm-up", _tiny, {"head": ("5",), "all": ("all",)}, pictures=16),
}
THAWS = ("head", "block", "stage")


def pictures(count: int, side: int = SIDE) -> TensorDataset:
    """Random pictures with random classes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 3, side, side, generator=generator),
        torch.randint(CLASSES, (count,), generator=generator),
    )


def network(name: str, data: TensorDataset) -> nn.Module:
    """The network with the same initial weights in every process, its norms' statistics from 16 pictures."""
    torch.manual_seed(0)
    model = NETWORKS[name].make()
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if norms:
        kept = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            for part in data.tensors[0][:16].split(8):
                model.train()(part)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
    return model.train()  # as a new module is; Lightning keeps the mode it finds


def trained_names(model: nn.Module, paths: tuple[str, ...]) -> frozenset[str]:
    """The parameters below the paths, by name; `("all",)` is all of them."""
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if paths == ("all",) or any(name.startswith(f"{path}.") for path in paths)
    )
