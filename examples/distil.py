"""A frozen teacher and a small student that learns from its answers (Hinton et al. 2015, arXiv:1503.02531).

    python examples/distil.py [FOLDER] [--seed N] [--epochs N]

The teacher knows 1,437 handwritten digits. The student has five labels of each digit, and trains twice from the
same start, on the same batches: by the labels alone, and by the labels and the teacher's softened answers on the
same images. FOLDER, runs/distil by default, gets the three runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lehr
from digit_judge import digits
from lehr.events import Event, FreezeAudited
from lehr.run.update import Loss

EPOCHS = 100  # of the student
LABELS = 5  # of each digit, for the student
TEMPERATURE = (
    4.0  # divides the scores: at 1 the teacher is so sure that its answers say no more than the labels
)
SHARE = 0.9  # of the teacher's answers in the student's loss; the rest is the labels'


@dataclass(frozen=True)
class Outcome:
    """Accuracy on held-out digits, and what the audit counted as frozen while the student learnt."""

    teacher: float
    alone: float
    taught: float
    frozen: FreezeAudited


def teacher_net() -> nn.Sequential:
    """Wide, with dropout: 85,000 weights."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10)
    )  # fmt: skip


def student_net() -> nn.Sequential:
    """Narrow: 2,400 weights."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def classroom(teacher: nn.Module, student: nn.Module) -> nn.ModuleDict:
    """Both as one model, of which a stage trains the student."""
    return nn.ModuleDict({"teacher": teacher, "student": student})


def distillation(temperature: float = TEMPERATURE, share: float = SHARE) -> Loss:
    """(1 - a) * hard + a * T^2 * soft: cross-entropy with the labels, and with the teacher's answers at temperature T.

    T^2 because the gradients of the soft part shrink by 1 / T^2 (Hinton et al., section 2). With `share` 0 the
    teacher is not asked.
    """

    def loss(model: nn.ModuleDict, batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        images, labels = batch
        scores = model["student"](images)
        both = cross_entropy(scores, labels)
        if share:  # lehr has frozen the teacher: its dropout is off, and no gradients are made for it
            answers = (model["teacher"](images) / temperature).softmax(1)
            soft = cross_entropy(scores / temperature, answers)
            both = (1 - share) * both + share * temperature**2 * soft
        return {"loss": both, "outputs": scores, "targets": labels}

    return loss


def few_labels(images: torch.Tensor, labels: torch.Tensor, seed: int) -> TensorDataset:
    """`LABELS` images of each class, drawn by the seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == digit][:LABELS] for digit in range(10)])
    return TensorDataset(images[chosen], labels[chosen])


def main(folder: Path, *, seed: int = 0, epochs: int = EPOCHS) -> Outcome:
    """Train the teacher, then the student without and with it; the three runs are in `folder`."""
    data = digits()
    train = TensorDataset(torch.tensor(data.train, dtype=torch.float32), torch.tensor(data.train_labels))
    held_out = TensorDataset(
        torch.tensor(data.held_out, dtype=torch.float32), torch.tensor(data.held_out_labels)
    )
    few = few_labels(*train.tensors, seed=seed)
    torch.manual_seed(seed)
    teacher, student = teacher_net(), student_net()
    begin = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    everything = lehr.Recipe([lehr.Stage("15 epochs", train="all", lr=1e-3)], optimizer="adam", seed=seed)
    knowing = lehr.fit(teacher, train, held_out, recipe=everything, out=folder / "teacher", device="cpu")
    found = {"teacher": knowing.history[-1]["valid_accuracy"]}

    lesson = lehr.Recipe(
        [lehr.Stage(f"{epochs} epochs", train="student", lr=1e-2)], optimizer="adam", seed=seed
    )
    audits: list[FreezeAudited] = []

    def watch(event: Event) -> None:
        if isinstance(event, FreezeAudited):
            audits.append(event)

    for name, loss in (("alone", distillation(share=0.0)), ("taught", distillation())):
        student.load_state_dict(begin)
        result = lehr.fit(
            classroom(teacher, student), few, held_out, recipe=lesson, loss=loss,
            out=folder / name, device="cpu", observers=[watch],
        )  # fmt: skip
        found[name] = result.history[-1]["valid_accuracy"]
    return Outcome(**found, frozen=audits[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/distil"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the student (default {EPOCHS})")
    asked = parser.parse_args()
    outcome = main(asked.folder, seed=asked.seed, epochs=asked.epochs)
    print(
        f"held-out accuracy: teacher {outcome.teacher:.3f}; student with {10 * LABELS} labels alone "
        f"{outcome.alone:.3f}, and with the teacher as well {outcome.taught:.3f}"
    )
    print(
        f"the teacher's {outcome.frozen.parameters} tensors are to the bit what they were (digest {outcome.frozen.digest})"
    )
    print(f"compare {asked.folder / 'alone' / 'journal.jsonl'} with that of {asked.folder / 'taught'}")
