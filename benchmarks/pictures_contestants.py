"""The training loops that `frozen.py` and `full.py` compare. Nothing here is timed; `pictures_worker.py` does that.

Every contestant trains the same parameters of the same network on the same tensors with AdamW. The libraries' are
in `pictures_rivals.py`. One that is not installed is named and left out, nothing else breaks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

import pictures_rivals as rivals
from pictures_task import DECAY, LR, Task

TOLD = ("PrefixCached", "CacheClosed", "Note")  # events of lehr's that are kept beside its times


def plain(model: nn.Module, task: Task) -> None:
    """The loop that everyone writes: `requires_grad_(False)`, and frozen norms in eval mode."""
    optimizer = torch.optim.AdamW(task.freeze(model), lr=LR, weight_decay=DECAY)
    norms = [m for m in task.frozen_modules(model) if isinstance(m, _NormBase)]
    loader = task.loader()
    for _ in range(task.epochs):
        model.train()
        for norm in norms:
            norm.eval()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()


def keep_blocks() -> None:
    """Tell glibc to keep large blocks: no mmap and no trimming below 1 GiB; where refused, no mmap at all."""
    mallopt = ctypes.CDLL(None).mallopt
    trim, threshold, count, large = -1, -3, -4, 1 << 30
    mallopt(trim, large)
    if not mallopt(threshold, large):
        mallopt(count, 0)


def give_back() -> None:
    """Have glibc give back what is free, so that memory which grows is seen to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _by_hand(model: nn.Module, task: Task, layout: torch.memory_format) -> None:
    keep_blocks()
    model.to(memory_format=layout)
    optimizer = torch.optim.AdamW(task.freeze(model), lr=LR, weight_decay=DECAY, fused=True)
    norms = [m for m in task.frozen_modules(model) if isinstance(m, _NormBase)]
    images, labels = task.data.tensors
    for _ in range(task.epochs):
        model.train()
        for norm in norms:
            norm.eval()
        for chosen in torch.randperm(len(labels)).split(task.batch):
            optimizer.zero_grad(set_to_none=True)
            inputs = images[chosen].contiguous(memory_format=layout)
            functional.cross_entropy(model(inputs), labels[chosen]).backward()
            optimizer.step()


def hand(model: nn.Module, task: Task) -> None:
    """The plain loop tuned by hand: channels_last, fused AdamW, large blocks kept, gathered batches."""
    _by_hand(model, task, torch.channels_last)


def hand_contiguous(model: nn.Module, task: Task) -> None:
    """The same without channels_last, which does not pay for every network."""
    _by_hand(model, task, torch.contiguous_format)


def _patterns(paths: tuple[str, ...]) -> list[str]:
    """Modules as lehr's patterns: "norm" alone would be every norm there is."""
    return [path if path == "all" else f"{path}.*" for path in paths]


def _lehr(model: nn.Module, task: Task, **said: Any) -> None:
    import lehr

    recipe = lehr.Recipe(
        [lehr.Stage(f"{task.epochs} epochs", train=_patterns(task.paths), lr=LR)],
        optimizer="adamw",
        weight_decay=DECAY,
        batch_size=task.batch,
        schedule=lehr.constant(),
        **said,
    )

    def keep(event: Any) -> None:
        if type(event).__name__ in TOLD and is_dataclass(event):
            task.told.append({"event": type(event).__name__, **asdict(event)})

    lehr.fit(model, task.data, recipe=recipe, device="cpu", observers=[keep])


def lehr_fit(model: nn.Module, task: Task) -> None:
    """`lehr.fit` as a person calls it."""
    _lehr(model, task)


def lehr_uncached(model: nn.Module, task: Task) -> None:
    """The same without the cache."""
    _lehr(model, task, cache="off")


@dataclass(frozen=True)
class Contestant:
    """One way to train: what the table calls it, the function, and the packages whose versions matter."""

    label: str
    train: Callable[[nn.Module, Task], None]
    packages: tuple[str, ...] = ()


CONTESTANTS = {
    "plain": Contestant("plain PyTorch loop", plain),
    "hand": Contestant("tuned by hand, channels_last", hand),
    "hand-contiguous": Contestant("tuned by hand, contiguous", hand_contiguous),
    "lehr": Contestant("lehr.fit", lehr_fit),
    "lehr-uncached": Contestant('lehr.fit, `cache="off"`', lehr_uncached),
    "lightning": Contestant("Lightning BackboneFinetuning, norms frozen", rivals.lightning, ("lightning",)),
    "lightning-as-is": Contestant(
        "Lightning BackboneFinetuning as it comes", rivals.lightning_as_is, ("lightning",)
    ),
    "fts": Contestant("finetuning-scheduler", rivals.scheduler, ("finetuning-scheduler", "lightning")),
    "fastai": Contestant("fastai, norms frozen", rivals.fastai, ("fastai",)),
    "fastai-as-is": Contestant("fastai as it comes", rivals.fastai_as_is, ("fastai",)),
    "hf": Contestant("Hugging Face Trainer", rivals.hugging_face, ("transformers", "accelerate")),
    "keras": Contestant("Keras, torch backend (TorchModuleWrapper)", rivals.keras, ("keras",)),
}
