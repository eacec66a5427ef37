"""Two tasks on one trunk: as two objectives that take turns, and as one loss that sums.

    python examples/two_heads.py [FOLDER] [--seed N] [--epochs N]

The tasks: which handwritten digit is it, and does it have a loop (0, 6, 8 and 9 do)? Both ways begin with the same
weights and see the same batches. In turns, each task makes its own updates of the trunk and of its head, with its own
optimizer and rate, so a batch is two updates; summed, it is one. FOLDER, runs/two_heads by default, gets both runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lehr
from digit_judge import digits
from lehr.run.update import Loss

LOOPS = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 1, 1])  # by digit
EPOCHS = 8


class TwoHeads(nn.Module):
    """Pictures [N, 1, 8, 8] to features, and from these to the scores of each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(),
        )  # fmt: skip
        self.digit = nn.Linear(32, 10)
        self.loop = nn.Linear(32, 2)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the digits [N, 10], and of no loop and loop [N, 2]."""
        features = self.trunk(pictures)
        return self.digit(features), self.loop(features)


def digit_loss(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the digit."""
    pictures, labels = batch
    return cross_entropy(model(pictures)[0], labels)


def loop_loss(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of whether there is a loop."""
    pictures, labels = batch
    return cross_entropy(model(pictures)[1], LOOPS.to(labels.device)[labels])


def summed(model: nn.Module, batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both losses of one forward pass, added; each is told under its own name as well."""
    pictures, labels = batch
    digit_scores, loop_scores = model(pictures)
    digit = cross_entropy(digit_scores, labels)
    loop = cross_entropy(loop_scores, LOOPS.to(labels.device)[labels])
    return {"loss": digit + loop, "digit_loss": digit.detach(), "loop_loss": loop.detach()}


def in_turns(epochs: int, seed: int) -> lehr.Recipe:
    """Each task trains the trunk and its own head; while it does, the other head is frozen."""
    stage = lehr.Stage(
        f"{epochs} epochs",
        objectives=[
            lehr.Objective("digit", digit_loss, train=["trunk", "digit"], lr=2e-3),
            lehr.Objective("loop", loop_loss, train=["trunk", "loop"], lr=1e-3),
        ],
    )
    return lehr.Recipe([stage], optimizer="adam", seed=seed)


def at_once(epochs: int, seed: int) -> lehr.Recipe:
    """One update a batch, by the sum."""
    return lehr.Recipe([lehr.Stage(f"{epochs} epochs", train="all", lr=2e-3)], optimizer="adam", seed=seed)


def accuracies(model: nn.Module, data: TensorDataset) -> dict[str, float]:
    """The share of pictures that each head names rightly."""
    pictures, labels = data.tensors
    model.eval()
    with torch.no_grad():
        scores = model(pictures)
    rightly = zip(("digit", "loop"), scores, (labels, LOOPS[labels]), strict=True)
    return {head: float((said.argmax(1) == true).float().mean()) for head, said, true in rightly}


def main(folder: Path, *, seed: int = 0, epochs: int = EPOCHS) -> dict[str, dict[str, float]]:
    """Train both ways, print what became of each task, and return the accuracies on held-out digits."""
    train, held_out = _data()
    ways: dict[str, tuple[lehr.Recipe, Loss | None]] = {
        "turns": (in_turns(epochs, seed), None),
        "sum": (at_once(epochs, seed), summed),
    }
    found = {}
    for way, (recipe, loss) in ways.items():
        torch.manual_seed(seed)
        model = TwoHeads()
        result = lehr.fit(model, train, held_out, recipe=recipe, loss=loss, out=folder / way, device="cpu")
        print(f"{way}: {result.history[-1]['step']} updates")
        for row in result.history:
            losses = {name: value for name, value in row.items() if name in _SHOWN}
            print(f"  epoch {row['epoch'] + 1}: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
        found[way] = accuracies(result.model, held_out)
        print("  held out: " + ", ".join(f"{head} {share:.3f}" for head, share in found[way].items()))
    return found


_SHOWN = ("train_loss", "train_digit_loss", "train_loop_loss", "valid_digit_loss", "valid_loop_loss")


def _data() -> tuple[TensorDataset, TensorDataset]:
    data = digits()
    halves = ((data.train, data.train_labels), (data.held_out, data.held_out_labels))
    pictures, labels = zip(*halves, strict=True)
    as_tensors = [torch.tensor(half, dtype=torch.float32).reshape(-1, 1, 8, 8) for half in pictures]
    train, held_out = zip(as_tensors, map(torch.tensor, labels), strict=True)
    return TensorDataset(*train), TensorDataset(*held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/two_heads"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}")
    asked = parser.parse_args()
    found = main(asked.folder, seed=asked.seed, epochs=asked.epochs)
    print(f"look at {asked.folder / 'turns' / 'journal.jsonl'}: `objectives` says whose turn each update was")
