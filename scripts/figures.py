"""Draws the figures of the notes, docs/figures/*.png, from lehr's own schedules and, beside them, torch's.

    python scripts/figures.py [FOLDER]

FOLDER is docs/figures by default. The labels are English and mathematics, so that pages in every language can
show the same figure. Nothing here trains anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.optim import lr_scheduler

import lehr

OUT = Path(__file__).parent.parent / "docs" / "figures"
DPI = 130


def main(folder: Path = OUT) -> list[Path]:
    """Write every figure into `folder` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_saved(draw, folder / f"{name}.png") for name, draw in FIGURES.items()]


def cosine(left: Axes, right: Axes) -> None:
    """One cosine, where torch's goes on after its end, and the two other ways of walking along it."""
    steps = np.arange(0, 151)
    one = lehr.cosine().over(steps=50)
    left.plot(steps, one(steps), label="lehr.cosine(): stays at its floor", **_OURS)
    left.plot(
        steps, _torch_cosine(50, len(steps)), label="CosineAnnealingLR(T_max=50): rises again", **_THEIRS
    )
    left.axvline(50, color="0.6", linewidth=0.8)
    left.annotate("T_max", (50, 1.0), xytext=(4, -2), textcoords="offset points", fontsize=8, color="0.35")
    left.set(title="one cosine over 50 steps, and past its end", xlabel="step")

    sgdr = lehr.restarts("20 steps", grow=2, decay=0.7).over(steps=140)
    stairs = lehr.cosine(per="epoch").over(steps=140, steps_per_epoch=14)
    whole = lehr.cosine().over(steps=140)
    steps = np.arange(141)
    right.plot(steps, whole(steps), color="0.6", linewidth=1.2, label="cosine()")
    right.plot(
        steps,
        stairs(steps),
        color="C2",
        linewidth=1.4,
        label='cosine(per="epoch"), 14 steps an epoch',
        drawstyle="steps-post",
    )
    right.plot(
        steps, sgdr(steps), label='restarts("20 steps", grow=2, decay=0.7)', drawstyle="steps-post", **_OURS
    )
    right.set(title="per step, per epoch, with restarts", xlabel="step")


def warmup(left: Axes, right: Axes) -> None:
    """Warm-up into a cosine; and the schedule of ResNet-110, whose warm-up ends on a measurement."""
    steps = np.arange(100)
    for curve, how in (
        ("linear", _OURS),
        ("quadratic", {"color": "C2", "linewidth": 1.6, "linestyle": "--"}),
    ):
        schedule = (lehr.warmup("20 steps", curve=curve) >> lehr.cosine(0.01)).over(steps=100)
        left.plot(steps, schedule(steps), label=f'warmup("20 steps", curve="{curve}") >> cosine(0.01)', **how)
    left.set(title="warm-up, then a cosine", xlabel="step")

    right.plot([0, 400, 400, 32_000, 32_000, 48_000, 48_000, 64_000], _RESNET_110, **_OURS)
    right.set(title="ResNet-110 on CIFAR-10", xlabel="step (logarithmic)", ylabel="learning rate")
    right.set(yscale="log", xlim=(0, 64_000))
    right.set_xscale("symlog", linthresh=100)
    right.set_xticks([0, 400, 4_000, 32_000], ["0", "400", "4,000", "32,000"])
    right.annotate(
        "until the training\nerror is below 80 %", (400, 0.01), xytext=(8, 2), textcoords="offset points", fontsize=8
    )  # fmt: skip


_OURS = {"color": "C0", "linewidth": 2.0}
_THEIRS = {"color": "C3", "linewidth": 1.6, "linestyle": "--"}
_RESNET_110 = [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
FIGURES: dict[str, Callable[[Axes, Axes], None]] = {"cosine": cosine, "warmup": warmup}


def _torch_cosine(length: int, steps: int) -> list[float]:
    """The rates of torch's CosineAnnealingLR with a peak of 1, stepped past its end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = lr_scheduler.CosineAnnealingLR(optimizer, T_max=length), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _saved(draw: Callable[[Axes, Axes], None], path: Path) -> Path:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, right)
    for axes in (left, right):
        axes.set_title(axes.get_title(), fontsize=10)
        axes.grid(alpha=0.25)
        if not axes.get_ylabel():
            axes.set(ylabel="share of the peak rate", ylim=(-0.03, 1.22))
            axes.legend(fontsize=7.5, frameon=False, loc="upper right")
    figure.savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return path


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT):
        print(path)
