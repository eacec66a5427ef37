"""The training loop by hand, in plain PyTorch, with lehr's parts: plan, optimizer, `apply`, order, audit, journal.

    python examples/own_loop.py [FOLDER]

It does what examples/fit.py does in one call, but for the checkpoints, and writes the same journal: the same
losses to the last bit. A test runs both and compares them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

import lehr
from fit import RECIPE, work
from lehr.events import (
    EpochEnded,
    FreezeAudited,
    Note,
    RunEnded,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
)
from lehr.journal import Journal
from lehr.run.audit import audit, frozen_digests
from lehr.run.sampler import cut, order


def main(folder: Path) -> nn.Module:
    """Train, write plan, journal and best weights into `folder`, and return the model."""
    model, train, valid = work()
    plan = lehr.plan(RECIPE, model, samples=len(train))  # everything is known from here on: print(plan)
    optimizer = lehr.optimizer(plan, model)  # the groups of all stages, built once
    torch.manual_seed(plan.seed)  # dropout, in a model that has some
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    best, best_epoch, began = {"valid_loss": float("inf")}, -1, time.monotonic()

    with Journal(folder / "journal.jsonl") as journal:
        journal(run_started(plan, train, valid))
        for note in plan.notes:
            journal(Note(note))
        for stage in plan.stages:
            journal(stage_started(plan, stage))
            frozen = frozen_digests(model, plan.trainable(stage))
            for epoch, start, stop in stage.epoch_ranges():
                clock = time.perf_counter()
                steps = plan.steps(start, stop, stage)
                batches = in_order(train, plan, stage.batch_size, epoch)
                with tqdm(total=stop - start, desc=f"epoch {epoch + 1}/{plan.total_epochs}") as bar:
                    losses, train_loss = train_epoch(model, optimizer, steps, batches, bar)
                    speed = len(train) / (time.perf_counter() - clock)
                    metrics = validate(model, loader(valid, batch_size=max(stage.batch_size, 32)))
                    bar.set_postfix({"loss": train_loss, **metrics})
                if is_best := metrics["valid_loss"] < best["valid_loss"]:
                    best, best_epoch = {"train_loss": train_loss, **metrics}, epoch
                    save_file(model.state_dict(), folder / "best.safetensors")
                rates, seconds = trained(plan[stop - 1].lr), time.perf_counter() - clock
                journal(StepsTaken(start, stop, tuple(losses)))  # 100 a line at most: an epoch here has fewer
                journal(
                    EpochEnded(epoch, stage.index, stop, train_loss, metrics, rates, seconds, speed, is_best)
                )
            proof = audit(
                model, optimizer, plan.trainable(stage), frozen
            )  # it raises where frozen was not frozen
            journal(freeze_audited(plan, stage, frozen, proof))
            journal(StageEnded(stage.index, stage.stop, reason="length", restored_epoch=None))
        seconds = time.monotonic() - began
        journal(RunEnded(plan.total_steps, "length", best_epoch, metrics=best, seconds=seconds))
    return model


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[lehr.Step],
    batches: Iterable[Any],
    bar: tqdm[None],
) -> tuple[list[float], float]:
    """Train for one epoch: the loss of every step, and their mean over the samples."""
    losses, total, samples = [], 0.0, 0
    model.train()  # what is frozen stays in eval mode all the same
    for step, (inputs, targets) in zip(steps, batches, strict=True):
        lehr.apply(step, model, optimizer)  # what trains and how fast: the one line that is lehr's
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = functional.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()

        losses.append(loss.item())
        total, samples = total + losses[-1] * len(targets), samples + len(targets)
        bar.update()
        bar.set_postfix({"loss": total / samples, **trained(step.lr)})
    return losses, total / samples


@torch.no_grad()
def validate(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Loss and accuracy over the whole set, weighted by samples."""
    model.eval()
    total, correct, samples = 0.0, torch.tensor(0), 0
    for inputs, targets in batches:
        outputs = model(inputs)
        total += functional.cross_entropy(outputs, targets).item() * len(targets)
        correct += (outputs.argmax(1) == targets).sum()
        samples += len(targets)
    return {"valid_loss": total / samples, "valid_accuracy": (correct / samples).item()}


def in_order(data: Any, plan: lehr.Plan, batch_size: int, epoch: int) -> DataLoader[Any]:
    """The batches of an epoch. Their order depends on (seed, epoch) alone.

    A sample is asked for as (index, view); its augmentation depends on (seed, view, index) alone.
    """
    batches = cut(order(len(data), plan.seed, epoch), batch_size)
    return loader(data, batch_sampler=[[(index, epoch) for index in batch.tolist()] for batch in batches])


def loader(data: Any, **how: Any) -> DataLoader[Any]:
    """A plain DataLoader that leaves torch's global generator, and so dropout, alone."""
    return DataLoader(data, generator=torch.Generator(), **how)


def trained(rates: Mapping[str, float]) -> dict[str, float]:
    """The rates of the groups that train; those of the others are 0."""
    return {group: rate for group, rate in rates.items() if rate}


def run_started(plan: lehr.Plan, train: Any, valid: Any) -> RunStarted:
    """The journal's first line."""
    return RunStarted(
        lehr=lehr.__version__, plan_hash=plan.hash, total_steps=plan.total_steps,
        total_epochs=plan.total_epochs, samples_train=len(train), samples_valid=len(valid), device="cpu",
        precision="fp32", stages=len(plan.stages),
    )  # fmt: skip


def stage_started(plan: lehr.Plan, stage: Any) -> StageStarted:
    """The first line of a stage."""
    return StageStarted(
        stage=stage.index, label=stage.label, start=stage.start, stop=stage.stop,
        first_epoch=stage.first_epoch, epochs=stage.epochs,
        trained_parameters=sum(plan.parameters[name] for name in plan.trainable(stage)),
        total_parameters=sum(plan.parameters.values()), peak_lr=trained(stage.peak_lr),
    )  # fmt: skip


def freeze_audited(plan: lehr.Plan, stage: Any, frozen: Mapping[str, str], proof: str) -> FreezeAudited:
    """How many parameters and buffers the stage kept frozen, and one digest of them all."""
    parameters = len(plan.parameters) - len(plan.trainable(stage))
    return FreezeAudited(stage.index, stage.stop, parameters, len(frozen) - parameters, proof)


if __name__ == "__main__":
    model = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop"))
