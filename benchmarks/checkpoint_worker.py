"""The process that `checkpoint.py` starts: it trains with one contestant and says when each step was begun and
ended, and whether what lies on the disk is what was trained.

    python benchmarks/checkpoint_worker.py NAME RESULT.json FOLDER [--every N] [--checkpoints N] [--threads N]

The clock is read in two places that every contestant passes: where the network's forward pass begins, and
where torch's optimizer step has ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset
from torchvision.models import resnet50

from checkpoint_contestants import CONTESTANTS, Contestant, Task


@contextmanager
def clocked(model: nn.Module) -> Iterator[tuple[list[float], list[float]]]:
    """The times at which steps begin (forward) and end (the optimizer is done), in seconds."""
    begun: list[float] = []
    ended: list[float] = []
    handles = (
        model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        register_optimizer_step_post_hook(lambda *_: ended.append(time.perf_counter())),
    )
    try:
        yield begun, ended
    finally:
        for handle in handles:
            handle.remove()


def measure(contestant: Contestant, task: Task) -> dict[str, Any]:
    """Train, and look at what it left; the last checkpoint is of the last step, so it has the final weights.

    A tiny network is trained before: so imports, and what a first call sets up, count neither as time nor as
    memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        few = TensorDataset(*(tensor[: 2 * task.batch] for tensor in task.data.tensors))
        tiny = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
        contestant.train(tiny, Task(few, task.batch, 1, Path(folder)))
    gc.collect()
    torch.manual_seed(0)
    model = resnet50(weights=None)
    before = _resident_mb()
    with clocked(model) as (begun, ended):
        contestant.train(model, task)
    peak = _peak_mb()
    return {
        "begun": [at - begun[0] for at in begun],
        "ended": [at - begun[0] for at in ended],
        "grown_mb": peak - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_bytes": _largest(task.folder),
        "same_weights": _same(contestant.read(task.folder), model) if contestant.read else None,
        "versions": {name: version(name) for name in contestant.packages},
        "lehr": _said_by_lehr(task.folder),
    }


def _peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 976.5625
    )


def _resident_mb() -> float:
    """The memory that this process has; the most it has had, where the system does not say."""
    said = Path("/proc/self/statm")
    return int(said.read_text().split()[1]) * resource.getpagesize() / 1e6 if said.exists() else _peak_mb()


def _largest(folder: Path) -> int:
    """The bytes of the largest checkpoint: a file, or a folder of files named as a step."""
    kept = [path for path in folder.rglob("*") if path.is_file()]
    sizes: dict[Path, int] = {}
    for path in kept:
        whole = path.parent if path.parent.name.startswith("step-") else path
        sizes[whole] = sizes.get(whole, 0) + path.stat().st_size
    return max(sizes.values(), default=0)


def _same(read: dict[str, torch.Tensor], model: nn.Module) -> bool:
    """Whether the weights that were read are those of the model, to the bit."""
    mine = model.state_dict()
    return read.keys() == mine.keys() and all(torch.equal(read[name], mine[name]) for name in mine)


def _said_by_lehr(folder: Path) -> list[dict[str, Any]]:
    """What lehr's own journal says of its checkpoints."""
    journal = folder / "run" / "journal.jsonl"
    if not journal.exists():
        return []
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record.get("event") == "checkpoint_written"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the libraries, about workers and the like: not measured here
    torch.set_num_threads(asked.threads)
    samples = asked.batch * asked.every * (asked.checkpoints + 1)  # the last checkpoint has no step after it
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, asked.size, asked.size, generator=generator)
    classes = torch.randint(1000, (samples,), generator=generator)
    task = Task(TensorDataset(images, classes), asked.batch, asked.every, asked.folder)
    try:
        found = measure(CONTESTANTS[asked.name], task)
    except ImportError as error:
        found = {"missing": f"{error.name or error}"}
    asked.result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
