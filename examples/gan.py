"""A pair of networks with two objectives that take turns: a small DCGAN (Radford et al. 2016, arXiv:1511.06434).

    python examples/gan.py [FOLDER] [--seed N] [--epochs N] [--data IMAGES --size 64]
                           [--start gan.safetensors] [--freeze-d N]

FOLDER is the run, runs/gan by default: stop it and say the same again, and it goes on to the same bits. Without
IMAGES, a folder of class folders, it draws handwritten digits, which examples/digit_judge.py then judges.
docs/objectives.md tells what happens here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import Dataset, TensorDataset

import lehr
from digit_judge import BAR, Judge, Verdict, digits
from lehr.data import Transform, open_data
from lehr.events import EpochEnded, Event, Observer
from lehr.progress import progress

EPOCHS = 120  # about a minute on one core
NOISE = 32  # numbers that a picture is made of
PICTURES = 1000  # that the judge sees


def generator(size: int, channels: int, width: int = 64) -> nn.Sequential:
    """Noise [N, 32, 1, 1] to pictures [N, channels, size, size] in [-1, 1]: transposed convolutions, batch-norms."""
    levels = int(math.log2(size)) - int(math.log2(_base(size)))
    widths = [NOISE, *(width * 2**level for level in reversed(range(levels)))]
    blocks = [
        nn.Sequential(
            nn.ConvTranspose2d(before, after, 4, 2, 1)
            if level
            else nn.ConvTranspose2d(before, after, _base(size)),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )
        for level, (before, after) in enumerate(pairwise(widths))
    ]
    return nn.Sequential(*blocks, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


def discriminator(size: int, channels: int, width: int = 64) -> nn.Sequential:
    """Pictures to one score each, above 0 for real ones: strided convolutions, blocks "0", "1", ...

    It has no batch-norm: in the generator's turn it is frozen, and so in eval mode, and would judge drawn pictures by
    the running statistics of real and drawn ones together.
    """
    levels = int(math.log2(size)) - int(math.log2(_base(size)))
    widths = [channels, *(width * 2**level for level in range(levels))]
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2))
        for before, after in pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * _base(size) ** 2, 1))


def _base(size: int) -> int:
    """The side at which a picture begins to grow: 2 pixels for digits, 4 for anything larger."""
    return 2 if size < 16 else 4


def pair(size: int = 8, channels: int = 1, width: int = 64, *, seed: int = 0) -> nn.ModuleDict:
    """Both networks as one model, so that one run trains, averages and saves them."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"generator": generator(size, channels, width), "discriminator": discriminator(size, channels, width)}
    )


def d_loss(model: nn.ModuleDict, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """How wrong the discriminator is: real pictures should score high, drawn ones low.

    lehr has frozen the generator in this turn, so no gradients are made for it.
    """
    real = batch[0]
    drawn = model["generator"](_noise(real))
    return softplus(-model["discriminator"](real)).mean() + softplus(model["discriminator"](drawn)).mean()


def g_loss(model: nn.ModuleDict, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """How little the generator deceives the discriminator: the loss that does not saturate (Goodfellow et al. 2014)."""
    return softplus(-model["discriminator"](model["generator"](_noise(batch[0])))).mean()


def _noise(like: torch.Tensor) -> torch.Tensor:
    """From torch's global generator, whose state lehr saves: so a resumed run draws the same."""
    return torch.randn(len(like), NOISE, 1, 1, device=like.device)


def recipe(*, epochs: int = EPOCHS, lr: float = 2e-3, seed: int = 0, frozen: int = 0) -> lehr.Recipe:
    """One stage, two objectives. With `frozen`, that many first blocks of the discriminator stay as they are.

    That is FreezeD (Mo et al. 2020, arXiv:2002.10964), for a discriminator that has learnt elsewhere.
    """
    kept = [f"!discriminator.{block}" for block in range(frozen)]
    stage = lehr.Stage(
        f"{epochs} epochs",
        objectives=[
            lehr.Objective("d", d_loss, train=["discriminator", *kept], lr=lr),
            lehr.Objective("g", g_loss, train="generator", lr=lr),
        ],
    )
    return lehr.Recipe(
        [stage],
        optimizer={"name": "adam", "betas": [0.5, 0.999]},
        schedule=lehr.cosine(),
        batch_size=64,
        ema=0.999,
        seed=seed,
    )


def digit_pictures() -> TensorDataset:
    """The training half of the digits, all ten classes, [1437, 1, 8, 8] in [-1, 1]."""
    data = digits()
    return TensorDataset(
        torch.tensor(data.train, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(data.train_labels)
    )


def folder_pictures(folder: Path, size: int, seed: int) -> Dataset[Any]:
    """Every image of a folder of class folders, `size` pixels square, RGB in [-1, 1], half of them mirrored."""
    data = open_data(folder, valid_share=0.0)
    half = (0.5,) * 3
    return data.train(Transform((size, size), size, half, half, augment=("flip",)), seed=seed)


def draw(model: nn.Module, count: int, *, seed: int = 1) -> torch.Tensor:
    """`count` pictures by a copy of the generator in eval mode, from noise of their own: nothing else is touched."""
    noise = torch.randn(count, NOISE, 1, 1, generator=torch.Generator().manual_seed(seed))
    artist = deepcopy(model.get_submodule("generator")).eval()
    with torch.no_grad():
        drawn: torch.Tensor = artist(noise.to(next(artist.parameters()).device))
    return drawn.cpu()


def grid(pictures: torch.Tensor, *, columns: int = 10, scale: int = 4, gap: int = 2) -> Image.Image:
    """Pictures [N, channels, height, width] in [-1, 1], N a multiple of `columns`, enlarged `scale` times."""
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    levels = levels.repeat(scale, axis=1).repeat(scale, axis=2)
    levels = np.pad(levels, [(0, 0), (0, gap), (0, gap), (0, 0)], constant_values=96)
    lines = [np.concatenate(levels[at : at + columns], axis=1) for at in range(0, len(levels), columns)]
    return Image.fromarray(np.concatenate(lines)[: -gap or None, : -gap or None].squeeze())


def sampler(model: nn.ModuleDict, folder: Path, every: int) -> Observer:
    """An observer that draws 100 pictures after every `every`-th epoch, from the same noise each time."""

    def observe(event: Event) -> None:
        if isinstance(event, EpochEnded) and (event.epoch + 1) % every == 0:
            grid(draw(model, 100)).save(folder / f"epoch-{event.epoch + 1:04d}.png")

    return observe


def judged(model: nn.Module) -> Verdict:
    """What the judge says of a thousand digits, printed beside what it says of real ones."""
    data = digits()
    judge = Judge(data)
    verdict = judge(rows(draw(model, PICTURES)))
    print(f"held-out digits: {judge(data.held_out)}")
    print(f"drawn digits:    {verdict}")
    print(
        "the bar is "
        + ("reached" if not verdict.misses(BAR) else f"missed: {'; '.join(verdict.misses(BAR))}")
    )
    return verdict


def rows(pictures: torch.Tensor) -> np.ndarray:
    """Pictures as the judge takes them: [N, pixels]."""
    return pictures.flatten(1).double().numpy()


def train(asked: Mapping[str, Any], folder: Path, *, observers: Sequence[Observer] = ()) -> lehr.Result:
    """The run, begun or gone on with; the model has the averaged weights afterwards."""
    data, seed = asked.get("data"), asked.get("seed", 0)
    size = asked.get("size", 64) if data else 8
    model = pair(size, 3 if data else 1, seed=seed)
    if start := asked.get("start"):
        model.load_state_dict(load_file(start))
    lr = 2e-4 if data else 2e-3  # the paper's; so small pictures from so few images bear more
    said = recipe(epochs=asked.get("epochs", EPOCHS), lr=lr, seed=seed, frozen=asked.get("freeze_d", 0))
    pictures = folder_pictures(data, size, seed) if data else digit_pictures()
    folder.mkdir(parents=True, exist_ok=True)
    watch = [*observers, sampler(model, folder, asked.get("every", 10))]
    return lehr.fit(model, pictures, recipe=said, out=folder, resume="auto", device="auto", observers=watch)


def main(arguments: Sequence[str] | None = None) -> lehr.Result:
    """Train, draw, judge, and say what to look at."""
    asked = _asked(arguments)
    result = train(vars(asked), asked.folder, observers=[progress()])
    grid(draw(result.model, 100)).save(asked.folder / "samples.png")
    weights = {name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}
    save_file(weights, asked.folder / "gan.safetensors")
    if not asked.data:
        judged(result.model)
    print(f"look at {asked.folder / 'samples.png'}, and at epoch-*.png beside it for how it came about")
    return result


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("runs/gan"), help="the run (default runs/gan)")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}")
    add("--every", type=int, default=10, help="epochs between two pictures (default 10)")
    add("--data", type=Path, help="a folder of class folders; the digits without it")
    add("--size", type=int, default=64, choices=[16, 32, 64, 128], help="pixels, with --data (default 64)")
    add("--start", type=Path, help="begin with the weights of another run: its gan.safetensors")
    add("--freeze-d", type=int, default=0, metavar="N", help="keep the discriminator's first N blocks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
