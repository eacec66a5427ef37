"""Pretrains the backbone of `digits_net` on the handwritten digits 0 to 4, and writes src/lehr/data/digits_0to4.safetensors.

    python scripts/pretrain_digits.py

The digits 5 to 9, on which `lehr fit digits` fine-tunes, are never shown. The head is left out of the file: it belongs to other classes.
"""

from __future__ import annotations

from pathlib import Path

import torch

import lehr
from lehr.data import Transform, digits_pretraining
from lehr.progress import progress
from lehr.run.digits_net import digits_net
from lehr.run.weights import write_weights

OUT = Path(__file__).parent.parent / "src" / "lehr" / "data" / "digits_0to4.safetensors"


def main() -> None:
    data = digits_pretraining()
    transform = Transform((8, 8), 8, (0.3,), (0.37,), channels=1, augment=("shift",))
    torch.manual_seed(0)
    model = digits_net(len(data.classes))
    recipe = lehr.Recipe(
        [lehr.Stage("20 epochs", train="all", lr=3e-3)], batch_size=32, weight_decay=0.05, label_smoothing=0.1, monitor="valid_accuracy",
    )  # fmt: skip
    result = lehr.fit(
        model,
        data.train(transform),
        data.valid(transform),
        recipe=recipe,
        device="cpu",
        observers=[progress()],
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    write_weights(state, OUT)
    print(
        f"wrote {OUT.name}: {OUT.stat().st_size / 1000:.0f} kB, accuracy on held-out 0 to 4: {result.best['valid_accuracy']:.4f}"
    )


if __name__ == "__main__":
    main()
