"""How many fixed views of each image a frozen stage needs, and how long its head: accuracy on held-out images.

    python benchmarks/views.py [--models mobilenetv2_100 torchvision/squeezenet1_1] [--features DIR] [--save]

The frozen part is computed once for each image and view, as in a cache; then many heads are trained on it with the
optimizer, batches and rates of lehr's default recipe: for several numbers of views, lengths, amounts of training
images and seeds (each with a split of its own). `fresh` is more views than any other has, a new one each epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import nn

from lehr.data import open_data
from lehr.data.datasets import PLAIN, ImageSamples
from lehr.defaults import default_augment
from lehr.run.models import make_model
from machine import machine

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
WEIGHTS = {
    "mobilenetv2_100": SHARED / "weights" / "timm_mobilenetv2_100_onnxzoo_features.pth",
    "torchvision/squeezenet1_1": SHARED / "weights" / "squeezenet1_1_onnxzoo.pth",
}
VIEWS = (1, 2, 4, 8)
FEW = 100  # training images; and a middling number, and all
MIDDLING = 600


@dataclass(frozen=True)
class Trained:
    """One head: what it was trained on, and how many of the held-out images it has right, each as a share."""

    model: str
    images: int
    views: int
    steps: int
    seed: int
    last: float
    best: float


def main() -> int:
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    found: list[Trained] = []
    for name in asked.models:
        features, labels, head = _features(name, asked)
        for seed in asked.seeds:
            for images in asked.images:
                found += _heads(name, features, labels, head, images=images, seed=seed, lengths=asked.steps)
            _say(f"{name}, seed {seed}: {len(found)} heads")
    page = _page(found, asked)
    print(page)
    if asked.save:
        part = (
            ""
            if asked.models == list(WEIGHTS)
            else "-" + "-".join(re.sub(r"\W+", "_", m) for m in asked.models)
        )
        out = HERE / "results" / f"views{part}.json"
        record = {
            "command": _command(), "machine": machine(), "versions": _versions(), "found": [asdict(f) for f in found],
        }  # fmt: skip
        out.write_text(json.dumps(record) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--data", type=Path, default=SHARED / "data" / "flowers5", help="folder of class folders")
    add("--models", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    add("--size", type=int, default=128, help="pixels the model sees (default 128)")
    add("--fresh", type=int, default=16, help="views that stand for fresh ones (default 16)")
    add("--images", type=int, nargs="+", default=[FEW, MIDDLING, 0], help="to train on; 0 is all (80 %%)")
    add("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000], help="lengths of the head stage")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--features", type=Path, default=Path("views-features"), help="folder in which features are kept")
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    add("--save", action="store_true", help="write benchmarks/results/views.json and .md")
    asked = parser.parse_args()
    for path in (asked.data, *(WEIGHTS[name] for name in asked.models)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    return asked


def _features(name: str, asked: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """What enters the head: [view, image, ...] in fp16, the view without random changes first; the labels; the head."""
    data = open_data(str(asked.data), valid_share=0.0)
    made = make_model(name, len(data.classes), weights=str(WEIGHTS[name]), size=asked.size)
    body, head = _cut(name, made.module)
    transform = replace(made.transform, augment=default_augment(asked.size))
    samples = data.train(transform, seed=0)
    labels = torch.tensor(samples.targets)
    kept = asked.features / f"{name.replace('/', '-')}-{asked.size}.pt"
    if kept.exists():
        features = torch.load(kept)
        if features.shape[:2] == (asked.fresh + 1, len(samples)):
            return features, labels, head
    began = time.perf_counter()
    made_of = [_view(body, samples, view) for view in (PLAIN, *range(asked.fresh))]
    features = torch.stack(made_of)
    _say(f"{name}: {len(made_of)} views of {len(samples)} images in {time.perf_counter() - began:.0f} s")
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(features, kept)
    return features, labels, head


def _cut(name: str, module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The frozen part and the head, which is what `train = "head"` trains and what follows it."""
    net: Any = module.eval()
    if name.startswith("torchvision/"):
        return net.features, nn.Sequential(net.classifier, nn.Flatten())
    return nn.Sequential(
        net.conv_stem, net.bn1, net.blocks, net.conv_head, net.bn2, net.global_pool
    ), net.classifier


@torch.no_grad()
def _view(body: nn.Module, samples: ImageSamples, view: int, batch: int = 32) -> torch.Tensor:
    out = []
    for start in range(0, len(samples), batch):
        images = [samples.sample(i, view)[0] for i in range(start, min(start + batch, len(samples)))]
        out.append(body(torch.stack(images)).half())
    return torch.cat(out)


def _heads(
    name: str,
    features: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    *,
    images: int,
    seed: int,
    lengths: Sequence[int],
) -> Iterator[Trained]:
    """Every number of views and steps, on one split."""
    numbers = list(range(len(labels)))
    train, held_out = train_test_split(numbers, test_size=0.2, stratify=labels.numpy(), random_state=seed)
    if images:
        train, _ = train_test_split(
            train, train_size=images, stratify=labels[train].numpy(), random_state=seed
        )
    train, held_out = torch.tensor(train), torch.tensor(held_out)
    valid = features[0][held_out].float(), labels[held_out]
    for views in (*VIEWS, len(features) - 1):
        for steps in lengths:
            last, best = _head(
                features, labels, head, train=train, valid=valid, views=views, steps=steps, seed=seed
            )
            yield Trained(name, len(train), 0 if views > max(VIEWS) else views, steps, seed, last, best)


def _head(
    features: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    *,
    train: torch.Tensor,
    valid: tuple[torch.Tensor, torch.Tensor],
    views: int,
    steps: int,
    seed: int,
) -> tuple[float, float]:
    """The share of held-out images that a head has right after its last epoch, and after its best."""
    torch.manual_seed(seed)
    own = copy.deepcopy(head).train()
    for layer in own.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.reset_parameters()
    weights = [p for p in own.parameters() if p.ndim > 1]
    biases = [p for p in own.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    batch = next((size for size in (32, 16, 8) if len(train) >= 10 * size), 4)
    step, epoch, best, warm = 0, 0, 0.0, max(1, round(0.05 * steps))
    while step < steps:
        view = 0 if views == 1 else 1 + epoch % views  # view 0 here is the one without random changes
        of_view = features[view]
        for indices in train[torch.randperm(len(train))].split(batch):
            if step == steps:
                break
            factor = (step + 1) / (warm + 1) if step < warm else _cosine((step - warm) / (steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * factor
            optimizer.zero_grad()
            loss(own(of_view[indices].float()), labels[indices]).backward()
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            step += 1
        epoch += 1
        last = _right(own, *valid)
        best = max(best, last)
    return last, best


def _cosine(done: float, floor: float = 0.01) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def _right(head: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    head.eval()
    right = (head(inputs).argmax(1) == labels).float().mean().item()
    head.train()
    return right


def _page(found: Sequence[Trained], asked: argparse.Namespace) -> str:
    """A table for each model and amount of images: views beside each other, lengths below each other."""
    lines = []
    for model in dict.fromkeys(f.model for f in found):
        for images in dict.fromkeys(f.images for f in found if f.model == model):
            some = [f for f in found if (f.model, f.images) == (model, images)]
            lines += [f"**{model}**, {images} training images", "", *_table(some), ""]
    seeds = len(asked.seeds)
    lines += [
        f"Share of held-out images that are right after the last epoch: mean of {seeds} seeds (each with its own split), and "
        "the mean difference to fresh views at the same length with its standard error, paired by seed.",
        f"{asked.fresh} views stand for fresh ones. {machine()}; {', '.join(f'{k} {v}' for k, v in _versions().items())}.",
        f"Command: `{_command()}`",
    ]
    return "\n".join(lines)


def _table(found: Sequence[Trained]) -> Iterator[str]:
    by: Mapping[tuple[int, int, int], float] = {(f.views, f.steps, f.seed): f.last for f in found}
    seeds = sorted({f.seed for f in found})
    yield "| steps | " + " | ".join(f"views = {v}" for v in VIEWS) + " | fresh |"
    yield "|---" * (len(VIEWS) + 2) + "|"
    for steps in sorted({f.steps for f in found}):
        cells = []
        for views in VIEWS:
            accuracy = [by[views, steps, seed] for seed in seeds]
            gaps = [by[views, steps, seed] - by[0, steps, seed] for seed in seeds]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
            cells.append(f"{statistics.fmean(accuracy):.4f} ({statistics.fmean(gaps):+.4f} ± {error:.4f})")
        fresh = statistics.fmean(by[0, steps, seed] for seed in seeds)
        yield f"| {steps:,} | " + " | ".join(cells) + f" | {fresh:.4f} |"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchvision", "timm", "scikit-learn")}


def _command() -> str:
    """The command line; the directory where features are kept is the reader's own."""
    said = sys.argv[1:]
    if "--features" in said:
        said[said.index("--features") + 1] = "features"
    return shlex.join(["python", "benchmarks/views.py", *said])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
