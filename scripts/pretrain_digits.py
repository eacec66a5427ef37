"""Pretrains the backbone of `digits_net` on the digits 0 to 4; writes src/lehr/data/digits_0to4.safetensors.

    python scripts/pretrain_digits.py

The digits 5 to 9, on which `lehr fit digits` fine-tunes, are never shown. Five classes alone teach little
that is of use elsewhere, so every image is shown in eight positions (turned by quarters, mirrored or not),
and which one it is belongs to the answer (after Gidaris et al. 2018, arXiv:1803.07728); small random turns,
shifts and stretches make more of 901 images. The head is left out of the file: it belongs to other classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

import lehr
from lehr.data import Transform, digits_pretraining
from lehr.data.datasets import ImageSamples
from lehr.progress import progress
from lehr.run.digits_net import MEAN, STD, digits_net
from lehr.run.weights import write_weights

OUT = Path(__file__).parent.parent / "src" / "lehr" / "data" / "digits_0to4.safetensors"


POSITIONS = 8


class Positions(Dataset[tuple[torch.Tensor, int]]):
    """Each image in eight positions; the answer is `classes * position + class`."""

    def __init__(self, samples: ImageSamples, classes: int, *, distorted: bool) -> None:
        self._kept = [samples[i] for i in range(len(samples))]
        self._classes = classes
        black = (0 - MEAN) / STD
        distortion = v2.RandomAffine(
            15, (0.12, 0.12), (0.85, 1.15), 10, interpolation=v2.InterpolationMode.BILINEAR, fill=black
        )
        self._distort = distortion if distorted else v2.Identity()

    def __len__(self) -> int:
        return POSITIONS * len(self._kept)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (image, label), position = self._kept[index // POSITIONS], index % POSITIONS
        image = self._distort(image)
        turned = (image.flip(1) if position >= 4 else image).rot90(position % 4, (1, 2))
        return turned, label + self._classes * position


def main() -> None:
    data = digits_pretraining()
    transform = Transform((8, 8), 8, (MEAN,), (STD,), channels=1)
    train = Positions(data.train(transform), len(data.classes), distorted=True)
    valid = Positions(data.valid(transform), len(data.classes), distorted=False)
    torch.manual_seed(0)
    model = digits_net(POSITIONS * len(data.classes))
    stage = lehr.Stage("12 epochs", train="all", lr=3e-3)
    recipe = lehr.Recipe([stage], batch_size=64, weight_decay=0.05, monitor="valid_accuracy")
    result = lehr.fit(model, train, valid, recipe=recipe, device="cpu", observers=[progress()])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    write_weights(state, OUT)
    accuracy = result.history[-1]["valid_accuracy"]
    print(f"wrote {OUT.name}: {OUT.stat().st_size / 1000:.0f} kB; digit and position right: {accuracy:.4f}")


if __name__ == "__main__":
    main()
