"""The process that `recipe.py` starts for fastai: `vision_learner` and `fine_tune`, all by their defaults.

    python benchmarks/recipe_fastai.py DATA WEIGHTS RESULT.json [--model timm] [--epochs N] [--size N] [--seed N]

DATA holds train/ and val/. The weights are a local file, given to timm in the place of its download. Batches of 64, the
augmentation of `aug_transforms()`, the learning rates of `fine_tune`. It notes every epoch's accuracy with wall and
processor time since the process began, imports included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        found = train(asked)
    except ImportError as error:
        found = {"missing": str(error.name or error)}
    asked.result.write_text(json.dumps(found), encoding="utf-8")
    return 0


def train(asked: argparse.Namespace) -> dict[str, Any]:
    """What a person writes after the quick start of fastai's documents, and the notes."""
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )  # fmt: skip

    class Notes(Callback):
        def after_epoch(self) -> None:
            epochs.append({
                "accuracy": float(self.recorder.metrics[0].value),
                "wall": time.perf_counter() - BEGAN,
                "cpu": time.process_time(),
            })  # fmt: skip

    epochs: list[dict[str, float]] = []
    set_seed(asked.seed)
    imported = time.perf_counter() - BEGAN
    loaders = ImageDataLoaders.from_folder(
        asked.data, train="train", valid="val", item_tfms=Resize(asked.size), batch_tfms=aug_transforms(),
        num_workers=0,
    )  # fmt: skip
    local = {"file": str(asked.weights)}
    learner = vision_learner(loaders, asked.model, metrics=accuracy, pretrained_cfg_overlay=local)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(asked.epochs, cbs=Notes())
    return {"epochs": epochs, "imports": imported, "batch": loaders.bs, "steps": len(loaders.train)}


if __name__ == "__main__":
    sys.exit(main())
