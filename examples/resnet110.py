"""ResNet-110 on CIFAR-10 as in He et al. 2015 (arXiv:1512.03385, section 4.2), on one GPU: a long run in short pieces.

    python examples/resnet110.py DATA [FOLDER] [--minutes 5] [--steps N] [--compile] [--peak-tflops T]

DATA is a folder with CIFAR-10's own files, or a .npz; FOLDER is the run's, runs/resnet110 by default. The same command
goes on with a run that was stopped. The recipe is resnet110.toml; the images lie on the device as bytes, and are
changed at random there. docs/resnet110.md says more.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import lehr
from lehr.data import Transform, open_data
from lehr.events import Event, Progressed, Resumed
from lehr.progress import progress
from lehr.run.cifar_resnet import MEAN, STD, cifar_resnet

RECIPE = Path(__file__).with_name("resnet110.toml")
SIDE, PAD = 32, 4
# Pixels from 0 to 255, as they are in the file.
_BYTES = Transform((SIDE, SIDE), SIDE, (0.0,) * 3, (1 / 255,) * 3)


def in_memory(data: str, device: torch.device) -> tuple[TensorDataset, TensorDataset | None]:
    """Training and validation images [N, 3, 32, 32] as bytes with their classes, on `device`."""
    found = open_data(data)
    train, valid = found.train(_BYTES), found.valid(_BYTES)
    return _stacked(train, device), _stacked(valid, device) if len(valid) else None


def _stacked(samples: Any, device: torch.device) -> TensorDataset:
    pixels = torch.stack([image.round().to(torch.uint8) for image, _ in samples])
    return TensorDataset(pixels.to(device), torch.tensor(samples.targets, device=device))


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Each image with 4 black pixels around it, mirrored half the time, and a random part of 32 x 32 taken.

    The numbers come from torch's generator of the device, whose state a checkpoint has. The result is laid out
    channels-last.
    """
    count, _, height, width = pixels.shape
    on: dict[str, Any] = {"device": pixels.device}
    down = torch.randint(2 * PAD + 1, (count, 1), **on) + torch.arange(height, **on)
    across = torch.randint(2 * PAD + 1, (count, 1), **on) + torch.arange(width, **on)
    across = torch.where(torch.rand(count, 1, **on) < 0.5, across.flip(1), across)
    padded = functional.pad(pixels, (PAD,) * 4)
    which = torch.arange(count, **on)[:, None, None]
    return padded[which, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


@cache  # a copy to the device at every step would make the device wait for this process
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (255 * torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return mean, std


def classified(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Cross-entropy of a batch of bytes, changed at random while the model trains; lehr reads the error off it."""
    pixels, targets = batch
    if model.training:
        pixels = augmented(pixels)
    mean, std = _constants(pixels.device)
    inputs = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    outputs = model(inputs)
    return {"loss": functional.cross_entropy(outputs, targets), "outputs": outputs, "targets": targets}


class Pace:
    """An observer that stops the run in good order after so many minutes or updates, and times what was done.

    lehr ends the update under way and saves the run, as it does on any SIGTERM. It tells how far it is about ten times a
    second, so that a few updates more than asked for may be done.
    """

    def __init__(self, minutes: float, steps: float) -> None:
        self._stop_at, self._steps = time.monotonic() + 60 * minutes, steps
        self._first = 0
        self._speeds: dict[int, float] = {}
        self.stopped = False

    def __call__(self, event: Event) -> None:
        """Look at what the run tells."""
        if isinstance(event, Resumed):
            self._first = event.step
        if not isinstance(event, Progressed):
            return
        if event.samples_per_second:  # 0 before the first update
            self._speeds[event.epoch] = event.samples_per_second
        enough = event.step - self._first >= self._steps or time.monotonic() >= self._stop_at
        if enough and not self.stopped:
            self.stopped = True
            signal.raise_signal(
                signal.SIGTERM
            )  # a Ctrl-C is not heard by what a shell runs in the background

    def seconds_per_step(self, batch_size: int) -> float:
        """The median over the epochs of this process but the first, in which kernels are chosen and compiled."""
        speeds = list(self._speeds.values())
        return batch_size / statistics.median(speeds[1:] or speeds) if speeds else float("nan")


def flops(model: nn.Module) -> int:
    """Floating-point operations of one image, forwards and backwards: a multiplication and an addition are two.

    Counted are convolutions and matrix products; the rest of a residual network is small beside them.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, SIDE, SIDE, device=device)).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2


def main(arguments: list[str]) -> lehr.Result | None:
    """Train or go on training; the result where the run has ended, None where it was stopped before."""
    asked = _arguments(arguments)
    device = torch.device(asked.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    recipe = lehr.load_recipe(RECIPE, settings=asked.settings)
    recipe = replace(recipe, augment=None)  # which is done here, on the device
    train, valid = in_memory(asked.data, device)
    torch.manual_seed(recipe.seed)
    net = cifar_resnet(asked.depth, classes=10).to(device, memory_format=torch.channels_last)
    work = flops(net)
    pace = Pace(asked.minutes, asked.steps)
    result = None
    try:
        result = lehr.fit(
            net, train, valid, recipe=recipe, loss=classified, out=asked.out, compile=asked.compile,
            device=device, precision=asked.precision, observers=[progress(), pace], resume="auto", checkpoint="1 minute",
        )  # fmt: skip
    except SystemExit:
        if not pace.stopped:
            raise
        print(f"stopped as asked; the same command goes on with {asked.out}")
    seconds = pace.seconds_per_step(recipe.batch_size)
    print(f"{1000 * seconds:.1f} ms an update of {recipe.batch_size} images, {work / 1e9:.2f} GFLOP an image")
    if asked.peak_tflops:
        floor = recipe.batch_size * work / (asked.peak_tflops * 1e12)
        print(
            f"{seconds / floor:.1f} times the arithmetic floor of {1000 * floor:.2f} ms at {asked.peak_tflops:g} TFLOP/s"
        )
    return result


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("data", help="a folder with CIFAR-10's own files, or a .npz")
    add("out", nargs="?", type=Path, default=Path("runs/resnet110"), help="the run's folder (runs/resnet110)")
    add("--depth", type=int, default=110, help="6n + 2 (110)")
    add("--minutes", type=float, default=float("inf"), help="stop in good order after so long")
    add("--steps", type=float, default=float("inf"), help="stop in good order after about so many updates")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", default="auto", help="auto (bf16 on CUDA), fp32, bf16 or fp16")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--peak-tflops", type=float, help="of the device at this precision, dense, as its maker states it")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
