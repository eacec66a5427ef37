"""A pretrained network, few labels, two stages: the whole work in one call.

    python examples/fit.py [FOLDER]

FOLDER is a new directory for the run, runs/fit by default. examples/own_loop.py does the same work by hand.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lehr
from lehr.data import open_data
from lehr.progress import progress
from lehr.run.models import make_model

RECIPE = lehr.Recipe(
    stages=[
        lehr.Stage("5 epochs", train="head", lr=1e-2),
        lehr.Stage("5 epochs", train="all", lr={"head": 1e-3, "backbone": 3e-4}),
    ],
    optimizer="adamw",
    weight_decay=0.05,
    batch_size=4,
    schedule=lehr.warmup("10%") >> lehr.cosine(floor=0.01),
    monitor="valid_loss",
    seed=0,
)


def work() -> tuple[nn.Module, Any, Any]:
    """A model that knows the digits 0 to 4, with a new head; training and validation data of 5 to 9."""
    data = open_data("digits", seed=RECIPE.seed)
    torch.manual_seed(RECIPE.seed)  # the new head starts from here
    made = make_model("digits_net", classes=len(data.classes))
    train = data.train(replace(made.transform, augment=("shift",)), seed=RECIPE.seed)
    return made.module, train, data.valid(made.transform)


def main(folder: Path) -> lehr.Result:
    """Train, write everything into `folder`, and return what came of it."""
    model, train, valid = work()
    return lehr.fit(model, train, valid, recipe=RECIPE, out=folder, device="cpu", observers=[progress()])


if __name__ == "__main__":
    result = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fit"))
    model = result.model
    print(f"best epoch: valid_accuracy {result.best['valid_accuracy']:.4f}; everything is in {result.run}")
