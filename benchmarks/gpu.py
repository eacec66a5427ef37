"""One CUDA GPU: lehr beside a plain compiled loop and Lightning, frozen and thawed, and how far each is from a floor.

    python benchmarks/gpu.py [--networks resnet50 ...] [--stages head all] [--rounds N] [--minutes N] [--table]

224 px, random weights, batches of 128, fp32 pictures in memory, AdamW, bf16 autocast; torch's own settings of matmul
precision, cuDNN and so on are left as they come. All runs are in one process, saved one by one; a round runs everybody
once and begins one place further on than the round before; the same command goes on.

Of the contestants (`gpu_contestants.py`), `plain` is channels-last, `torch.compile`d, with fused AdamW, frozen norms in
eval mode and pinned batches of `--workers` processes. `resident` is the same on one batch that lies on the device: the
kernels without the data. `lehr` is `lehr.fit` as a person calls it. Lightning is as its documents show it: neither
compiled nor channels-last.

At the end of each epoch the device is waited for and the clock is read. A step is the median epoch from the third on,
over its steps, so what an epoch costs by itself is in it (a loader's first batch, lehr's events): the less, the more
`--steps`. What is compiled, traced and proved, and workers that start, are part of the first epoch, which is given by
round: inductor keeps code on disk, so later rounds have it cheaper, and `resident` has the code of `plain`.

The floor of a step (`gpu_floors.py`) is the larger of two times. Arithmetic: the forward pass's operations, times 1
(`head`, where the head's own backward pass is nothing) or 3 (`all`), over the rate of a large bf16 product measured
here. Bytes: what convolutions and linear layers put out, in bf16, written once and read once, times the same 1 or 3,
and the fp32 weights once, over the rate of a copy measured here; all between them can be done on the way.
`layer by layer` counts the output of every leaf module in that manner: no floor, but what one kernel for each layer
moves. A stage that is cached computes no forward pass, so it has no floor of this kind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import platform
import shlex
import sys
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from gpu_contestants import CONTESTANTS, Train
from gpu_device import On
from gpu_floors import counted, floors, measured_rates
from gpu_table import SETTLED, page
from machine import machine
from pictures_models import NETWORKS, SIDE, network, pictures, trained_names
from pictures_runs import HERE, Run, Setting, Store, commit, turned
from pictures_task import Task
from pictures_worker import TINY_SIDE

OUT = HERE / "results" / "cuda.json"
EPOCHS = {"head": 6, "all": 4}
PACKAGES = ("torch", "torchvision", "timm", "lightning")


def main() -> int:
    asked = _arguments()
    store = Store(asked.out)
    if not asked.table:
        warnings.filterwarnings("ignore")  # of the libraries, about workers and the like: not measured here
        run_all(asked, store)
    text = page(store.runs, {who: contestant.label for who, contestant in CONTESTANTS.items()})
    print(text)
    asked.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0 if all(run.ok for run in store.runs) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["resnet50", "vit_small"], metavar="NETWORK")
    add("--stages", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default all")
    add("--batch", type=int, default=128)
    add("--steps", type=int, default=10, help="steps an epoch (default 10)")
    add("--epochs", type=int, help="3 or more (default 6 for head, 4 for all)")
    add("--rounds", type=int, default=2)
    add("--workers", type=int, default=8, help="processes of the loader of plain and Lightning (default 8)")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many (default no limit)")
    add("--device", default="cuda", help="cpu only tries the script")
    add("--commit", default=commit(), help="lehr's commit, where git cannot be asked")
    add("--out", type=Path, default=OUT, help="where the runs are kept")
    add("--table", action="store_true", help="only the table of what there is")
    asked = parser.parse_args()
    if asked.epochs is not None and asked.epochs <= SETTLED:
        parser.error(f"--epochs {asked.epochs}: the first {SETTLED} do not count; at least {SETTLED + 1}")
    return asked


def run_all(asked: argparse.Namespace, store: Store) -> None:
    """Every run that is not there yet, until the time is up."""
    ends = time.monotonic() + 60 * asked.minutes
    on = On(torch.device(asked.device), asked.workers)
    with suppress(ImportError):  # what is missing says so in its run; importing is no part of a first epoch
        importlib.import_module("lightning")
    rates = measured_rates(on)  # the first use of the device, too
    sides = {name: TINY_SIDE if name == "tiny" else SIDE for name in asked.networks}
    data = {side: pictures(asked.batch * asked.steps, side) for side in set(sides.values())}
    models = {name: network(name, data[side]) for name, side in sides.items()}
    counts = {name: counted(models[name], side) for name, side in sides.items()}
    about = {
        "device": torch.cuda.get_device_name(on.device) if on.is_cuda else "cpu",
        "machine": machine(), "rates": rates, "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }  # fmt: skip
    for number in range(asked.rounds):
        for name, stage in ((name, stage) for name in asked.networks for stage in asked.stages):
            epochs = asked.epochs or EPOCHS[stage]
            setting = Setting(name, stage, epochs, asked.batch, asked.batch * asked.steps)
            floor = floors(counts[name], rates, setting)
            here = [who for who in asked.contestants if stage in CONTESTANTS[who].stages]
            for who in turned(here, number) if here else ():
                if store.has(setting, who, number):
                    continue
                if time.monotonic() > ends:
                    print(f"{asked.minutes:g} minutes are over: no further runs", flush=True)
                    return
                found = tried(CONTESTANTS[who].train, models[name], data[sides[name]], setting, on)
                when = time.strftime("%Y-%m-%d %H:%M:%S")
                all_found = {**found, "floor": floor, **about}
                store.add(Run(setting, who, number, all_found, when=when, commit=asked.commit))
                said = found.get("failed") or f"{found['total']:.1f} s"
                print(f"{when}  {setting}, round {number + 1}: {who}: {said}", flush=True)


def tried(train: Train, built: nn.Module, data: TensorDataset, setting: Setting, on: On) -> dict[str, Any]:
    """What a contestant comes to on a copy of the network, or why it failed; nothing of it is left afterwards."""
    try:
        return timed(train, copy.deepcopy(built), data, setting, on)
    except Exception as error:  # one that fails must not stop the others
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    finally:
        torch._dynamo.reset()
        _clear(on)


def timed(train: Train, model: nn.Module, data: TensorDataset, setting: Setting, on: On) -> dict[str, Any]:
    """Seconds from the call to the end of each epoch, and to the end of the call; the peak of the device's memory."""
    paths = NETWORKS[setting.network].thaws[setting.thaw]
    task = Task(data, setting.batch, setting.epochs, paths, trained_names(model, paths), lambda: None)
    marks: list[float] = []
    _clear(on)
    torch.manual_seed(0)
    done = count(1)

    def updated(*_: Any) -> None:
        if next(done) % (setting.pictures // setting.batch) == 0:
            marks.append(on.since(began))

    handle = register_optimizer_step_post_hook(updated)
    try:
        began = on.since(0.0)
        train(model, task, on)
        total = on.since(began)
    finally:
        handle.remove()
    if len(marks) != setting.epochs:
        raise RuntimeError(f"it has made {len(marks)} epochs of updates, not {setting.epochs}")
    peak = torch.cuda.max_memory_allocated(on.device) if on.is_cuda else 0
    return {"marks": [round(mark, 6) for mark in marks], "total": total, "peak": peak, "told": task.told}


def _clear(on: On) -> None:
    gc.collect()
    if on.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on.device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
