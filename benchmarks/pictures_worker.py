"""The process that `frozen.py` and `full.py` start: it times one contestant, and says what it really trained.

    python benchmarks/pictures_worker.py CONTESTANT NETWORK THAW RESULT.json --epochs N [--batch N] [--pictures N]

The contestant first trains a tiny network, so that imports and what is built at the first call do not count. Then
the clock runs from the call on: what a library sets up, traces and checks is part of its first epoch. Every update
is noted with the wall time and the processor time of the process, all threads together.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from pictures_contestants import CONTESTANTS, Contestant, give_back
from pictures_models import NETWORKS, network, pictures, trained_names
from pictures_task import Task

TINY_SIDE = 32

Hashes = Mapping[str, str]


class Clock:
    """Wall and processor seconds since `start`, at every update: counted by a hook of torch.optim, or by hand."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.start()

    def start(self) -> None:
        """Forget what was, and begin."""
        self.marks.clear()
        self.began = time.perf_counter(), time.process_time()

    def mark(self, *_: Any) -> None:
        """An update is done."""
        self.marks.append(self.now())

    def now(self) -> tuple[float, float]:
        """Wall and processor seconds."""
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def hashes(model: nn.Module) -> Hashes:
    """A hash of every parameter and buffer by name."""
    return {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:12]
        for name, value in model.state_dict().items()
    }


def loss(model: nn.Module, data: TensorDataset) -> float:
    """The mean loss of the first 8 pictures in eval mode; the model is left in training mode."""
    inputs, targets = (tensor[:8] for tensor in data.tensors)
    model.eval()
    with torch.no_grad():
        found = float(functional.cross_entropy(model(inputs), targets))
    model.train()
    return found


def forget_peak() -> None:
    """Begin anew with the peak of resident memory, where Linux can."""
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")


def memory() -> dict[str, int]:
    """Resident memory now and at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kib = {name: int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM") if name in fields}
    peak = kib.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"now": 1024 * kib.get("VmRSS", peak), "peak": 1024 * peak}


def task_of(asked: argparse.Namespace, clock: Clock, *, tiny: bool) -> tuple[nn.Module, Task]:
    """Model and task: the asked ones, or the warm-up."""
    name = "tiny" if tiny else asked.network
    thaw = asked.thaw if asked.thaw in NETWORKS[name].thaws else "head"
    count = 2 * asked.batch if tiny else asked.pictures
    data = pictures(count, TINY_SIDE) if tiny else pictures(count)
    model, paths = network(name, data), NETWORKS[name].thaws[thaw]
    epochs = 3 if tiny else asked.epochs
    return model, Task(data, asked.batch, epochs, paths, trained_names(model, paths), clock.mark)


def measure(contestant: Contestant, asked: argparse.Namespace) -> dict[str, Any]:
    """Train the tiny network, then the asked one; times, memory, and what changed."""
    clock = Clock()
    register_optimizer_step_post_hook(clock.mark)  # Keras has optimizers of its own, and says it by hand
    contestant.train(*task_of(asked, clock, tiny=True))
    model, task = task_of(asked, clock, tiny=False)
    before, loss_before = hashes(model), loss(model, task.data)
    gc.collect()
    give_back()
    try:
        forget_peak()
        forgotten = True
    except OSError:
        forgotten = False
    memory_before = memory()
    torch.manual_seed(0)
    clock.start()
    contestant.train(model, task)
    total, memory_after = clock.now(), memory()
    after = hashes(model)
    frozen = [name for name in before if name in dict(model.named_parameters()) and name not in task.trained]
    return {
        "marks": [[round(wall, 5), round(cpu, 5)] for wall, cpu in clock.marks],
        "total": total,
        "steps_per_epoch": len(task.data) // task.batch,
        "epochs": task.epochs,
        "trained_parameters": sum(p.numel() for n, p in model.named_parameters() if n in task.trained),
        "initial": hashlib.sha256(json.dumps(before).encode()).hexdigest()[:12],
        "trained_changed": sum(before[name] != after[name] for name in task.trained),
        "trained": len(task.trained),
        "frozen_changed": sum(before[name] != after[name] for name in frozen),
        "buffers_changed": sum(before[n] != after[n] for n in before if n not in {*frozen, *task.trained}),
        "loss": [loss_before, loss(model, task.data)],
        "memory": {"before": memory_before, "after": memory_after, "peak_began_anew": forgotten},
        "told": task.told,
        "versions": {name: _version(name) for name in ("torch", "lehr", *contestant.packages)},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "this checkout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("thaw")
    parser.add_argument("result", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", type=int, help="run on this core alone")
    asked = parser.parse_args()
    if asked.core is not None:
        os.sched_setaffinity(0, {asked.core})
    warnings.filterwarnings("ignore")  # of the libraries, about workers and the like: not measured here
    torch.set_num_threads(asked.threads)
    try:
        found = measure(CONTESTANTS[asked.contestant], asked)
    except ImportError as error:
        if not CONTESTANTS[asked.contestant].packages:
            raise
        found = {"missing": f"{error.name or error}"}
    asked.result.write_text(json.dumps(found, default=str), encoding="utf-8")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
