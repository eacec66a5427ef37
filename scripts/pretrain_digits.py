"""Pretrains the backbone of `digits_net` on the handwritten digits 0 to 4; writes src/lehr/data/digits_0to4.safetensors.

    python scripts/pretrain_digits.py

The digits 5 to 9, on which `lehr fit digits` fine-tunes, are never shown. Five classes alone teach little that
is of use elsewhere, so every image is shown in four rotations, and which one it is belongs to the answer
(Gidaris et al. 2018, arXiv:1803.07728). The head is left out of the file: it belongs to other classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

import lehr
from lehr.data import Transform, digits_pretraining
from lehr.data.datasets import ImageSamples
from lehr.progress import progress
from lehr.run.digits_net import digits_net
from lehr.run.weights import write_weights

OUT = Path(__file__).parent.parent / "src" / "lehr" / "data" / "digits_0to4.safetensors"


class Rotated(Dataset[tuple[torch.Tensor, int]]):
    """Each image in four rotations, `classes * rotation + class` the answer; shifted by up to a pixel each way, if asked."""

    def __init__(self, samples: ImageSamples, classes: int, *, shift: bool) -> None:
        self._kept = [samples[i] for i in range(len(samples))]
        self._classes, self._shift = classes, shift

    def __len__(self) -> int:
        return 4 * len(self._kept)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self._kept[index // 4]
        if self._shift:
            image = image.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2))
        return image.rot90(index % 4, (1, 2)), label + self._classes * (index % 4)


def main() -> None:
    data = digits_pretraining()
    transform = Transform((8, 8), 8, (0.3,), (0.37,), channels=1)
    train = Rotated(data.train(transform), len(data.classes), shift=True)
    valid = Rotated(data.valid(transform), len(data.classes), shift=False)
    torch.manual_seed(0)
    model = digits_net(4 * len(data.classes))
    stage = lehr.Stage("15 epochs", train="all", lr=3e-3)
    recipe = lehr.Recipe([stage], batch_size=64, weight_decay=0.05, monitor="valid_accuracy")
    result = lehr.fit(model, train, valid, recipe=recipe, device="cpu", observers=[progress()])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    write_weights(state, OUT)
    accuracy = result.history[-1]["valid_accuracy"]
    print(f"wrote {OUT.name}: {OUT.stat().st_size / 1000:.0f} kB; digit and rotation right: {accuracy:.4f}")


if __name__ == "__main__":
    main()
