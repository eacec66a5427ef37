"""The process that `loop.py` starts: it times one contestant and says whether it really trained.

    python benchmarks/loop_worker.py NAME RESULT.json [--samples N] [--optimizer sgd|adamw] [--threads N]

The contestant is called twice: on a few samples to warm up, and on all of them to be timed; so imports and
what is built at the first call do not count. What it draws goes to this process's standard output and error.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from contestants import BATCH, CONTESTANTS, PEAK, Contestant, Task

WARM_UP_BATCHES = 200  # of the untimed call


def make_task(samples: int, optimizer: str) -> Task:
    """Points of 16 numbers, their classes given by a linear map: learnable, so that the loss shows it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 16, generator=generator)
    targets = (inputs @ torch.randn(16, 10, generator=torch.Generator().manual_seed(1))).argmax(1)
    return Task(TensorDataset(inputs, targets), optimizer)


def make_model() -> nn.Module:
    """The perceptron, with the same initial weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts every `torch.optim` step that really happens, whoever makes it; the same small cost for all."""
    count = [0]

    def count_one(*_: Any) -> None:
        count[0] += 1

    handle = register_optimizer_step_post_hook(count_one)
    try:
        yield count
    finally:
        handle.remove()


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]


def mean_loss(model: nn.Module, task: Task) -> float:
    """The mean cross-entropy over all data, in eval mode."""
    inputs, targets = task.data.tensors
    model.eval()
    with torch.no_grad():
        return float(functional.cross_entropy(model(inputs), targets))


def measure(contestant: Contestant, samples: int, optimizer: str) -> dict[str, Any]:
    """Train twice, time the second; everything that says whether it really trained."""
    contestant.train(make_model(), make_task(WARM_UP_BATCHES * BATCH, optimizer))
    task, model = make_task(samples, optimizer), make_model()
    before, weights = mean_loss(model, task), fingerprint(model)
    torch.manual_seed(0)
    gc.collect()
    with counted() as updates:
        wall, cpu = time.perf_counter(), time.process_time()
        contestant.train(model, task)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall_us": 1e6 * wall / task.steps,
        "cpu_us": 1e6 * cpu / task.steps,
        "updates": updates[0],
        "steps": task.steps,
        "initial_weights": weights,
        "loss_before": before,
        "loss_after": mean_loss(model, task),
        "versions": {name: version(name) for name in contestant.packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--optimizer", choices=PEAK, default="sgd")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the libraries, about workers and the like: not measured here
    torch.set_num_threads(asked.threads)
    try:
        found = measure(CONTESTANTS[asked.name], asked.samples, asked.optimizer)
    except ImportError as error:
        found = {"missing": f"{error.name or error}"}
    asked.result.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
