"""One CUDA GPU: lehr beside a plain compiled loop and Lightning, frozen and thawed, and how far each is from a floor.

    python benchmarks/gpu.py [--networks resnet50 ...] [--stages head all] [--rounds N] [--minutes N] [--table]

224 px, random weights, batches of 128, fp32 pictures in memory, AdamW, bf16 autocast; torch's own settings of matmul
precision, cuDNN and so on are left as they come. All runs are in one process, saved one by one; a round runs everybody
once and begins one place further on than the round before; the same command goes on.

`plain` is channels-last, `torch.compile`d, with fused AdamW, frozen norms in eval mode and pinned batches of
`--workers` processes. `resident` is the same on one batch that lies on the device: the kernels without the data. `lehr`
is `lehr.fit` as a person calls it. Lightning is as its documents show it: neither compiled nor channels-last.

At the end of each epoch the device is waited for and the clock is read. A step is the median epoch from the third on,
over its steps, so what an epoch costs by itself is in it (a loader's first batch, lehr's events): the less, the more
`--steps`. What is compiled, traced and proved, and workers that start, are part of the first epoch, which is given by
round: inductor keeps code on disk, so later rounds have it cheaper, and `resident` has the code of `plain`.

The floor of a step is the larger of two times. Arithmetic: the forward pass's operations, times 1 (`head`, where the
head's own backward pass is nothing) or 3 (`all`), over the rate of a large bf16 product measured here. Bytes: what
convolutions and linear layers put out, in bf16, written once and read once, times the same 1 or 3, and the fp32
weights once, over the rate of a copy measured here; all between them can be done on the way. `layer by layer` counts
the output of every leaf module in that manner: no floor, but what one kernel for each layer moves. A stage that is cached
computes no forward pass, so it has no floor of this kind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import logging
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import lehr
from frozen_table import versions
from machine import machine
from pictures_contestants import TOLD
from pictures_models import NETWORKS, SIDE, network, pictures, trained_names
from pictures_runs import HERE, Run, Setting, Store, commit, turned
from pictures_task import DECAY, LR, Task
from pictures_worker import TINY_SIDE

OUT = HERE / "results" / "cuda.json"
EPOCHS = {"head": 6, "all": 4}
SETTLED = 2  # epochs that do not count
PACKAGES = ("torch", "torchvision", "timm", "lightning")


@dataclass(frozen=True)
class On:
    """Where to train, and how many processes load samples."""

    device: torch.device
    workers: int

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device to wait for; on a CPU this script can only be tried."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def main() -> int:
    asked = _arguments()
    store = Store(asked.out)
    if not asked.table:
        warnings.filterwarnings("ignore")  # of the libraries, about workers and the like: not measured here
        run_all(asked, store)
    page = _page(store.runs)
    print(page)
    asked.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
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


Train = Callable[[nn.Module, Task, On], None]


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
            marks.append(_since(began, on))

    handle = register_optimizer_step_post_hook(updated)
    try:
        began = _since(0.0, on)
        train(model, task, on)
        total = _since(began, on)
    finally:
        handle.remove()
    if len(marks) != setting.epochs:
        raise RuntimeError(f"it has made {len(marks)} epochs of updates, not {setting.epochs}")
    peak = torch.cuda.max_memory_allocated(on.device) if on.is_cuda else 0
    return {"marks": [round(mark, 6) for mark in marks], "total": total, "peak": peak, "told": task.told}


def _since(began: float, on: On) -> float:
    on.wait()
    return time.perf_counter() - began


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


# The contestants.


def compiled_step(model: nn.Module, task: Task, on: On) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of the plain loop, on a batch that lies on the device."""
    model.to(on.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(task.freeze(model), lr=LR, weight_decay=DECAY, fused=True)
    _still(model, task)
    compiled = torch.compile(model)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(on.device.type, torch.bfloat16):
            loss = functional.cross_entropy(compiled(inputs), targets)
        loss.backward()
        optimizer.step()

    return step


def _still(model: nn.Module, task: Task) -> None:
    for module in task.frozen_modules(model):
        if isinstance(module, _NormBase):
            module.eval()


def _loader(task: Task, on: On) -> DataLoader[Any]:
    return DataLoader(
        task.data, task.batch, shuffle=True, drop_last=True, num_workers=on.workers, pin_memory=on.is_cuda,
        persistent_workers=on.workers > 0,
    )  # fmt: skip


def plain(model: nn.Module, task: Task, on: On) -> None:
    """The compiled loop by hand."""
    step, loader = compiled_step(model, task, on), _loader(task, on)
    for _ in range(task.epochs):
        for inputs, targets in loader:
            here = inputs.to(on.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            step(here, targets.to(on.device, non_blocking=True))


def resident(model: nn.Module, task: Task, on: On) -> None:
    """The same steps, always on the first batch, which lies on the device."""
    step = compiled_step(model, task, on)
    inputs, targets = (tensor[: task.batch].to(on.device) for tensor in task.data.tensors)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    for _ in range(task.epochs * (len(task.data) // task.batch)):
        step(inputs, targets)


def lehr_fit(model: nn.Module, task: Task, on: On, *, compile: bool = False, **said: Any) -> None:
    """`lehr.fit` of one stage at a constant rate; `said` goes into the recipe."""
    train = ["all"] if task.everything else [f"{path}.*" for path in task.paths]
    recipe = lehr.Recipe(
        [lehr.Stage(f"{task.epochs} epochs", train=train, lr=LR)],
        optimizer="adamw", weight_decay=DECAY, batch_size=task.batch, schedule=lehr.constant(), **said,
    )  # fmt: skip

    def keep(event: Any) -> None:
        if type(event).__name__ in TOLD and is_dataclass(event) and not isinstance(event, type):
            task.told.append({"event": type(event).__name__, **asdict(event)})

    lehr.fit(
        model, task.data, recipe=recipe, device=on.device, precision="bf16", observers=[keep], compile=compile
    )


def lightning(model: nn.Module, task: Task, on: On) -> None:
    """Lightning's Trainer; it keeps the norms' modes as it finds them."""
    import lightning as pl

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trained = task.freeze(model)
    _still(model, task)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            inputs, targets = batch
            return functional.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)

    trainer = pl.Trainer(
        max_epochs=task.epochs, accelerator=on.device.type, devices=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), _loader(task, on))


@dataclass(frozen=True)
class Contestant:
    """One way to train: what the table calls it, the function, and the stages in which it has a part."""

    label: str
    train: Train
    stages: tuple[str, ...] = ("head", "all")


CONTESTANTS = {
    "plain": Contestant("plain loop, compiled", plain),
    "resident": Contestant("the same, one batch on the device", resident),
    "lehr": Contestant("lehr.fit", lehr_fit),
    "lehr-compiled": Contestant("lehr.fit, `compile=True`", partial(lehr_fit, compile=True), ("all",)),
    "lehr-uncached": Contestant(
        'lehr.fit, `compile=True`, `cache="off"`', partial(lehr_fit, compile=True, cache="off"), ("head",)
    ),
    "lightning": Contestant("Lightning", lightning),
}


# The floors.


def measured_rates(on: On) -> dict[str, float]:
    """Operations a second of a large bf16 product, and bytes a second, read and written, of a copy on the device."""
    side, size = (8192, 1 << 31) if on.is_cuda else (512, 1 << 24)
    a, b = (torch.randn(side, side, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=on.device).random_()
    target = torch.empty_like(source)
    return {
        "operations": 2 * side**3 / _seconds(lambda: a @ b, on),
        "bytes": 2 * size / _seconds(lambda: target.copy_(source), on),
    }


def _seconds(call: Callable[[], object], on: On) -> float:
    """The median of ten calls after three."""
    times = []
    for _ in range(13):
        began = _since(0.0, on)
        call()
        times.append(_since(began, on))
    return statistics.median(times[3:])


def counted(model: nn.Module, side: int) -> dict[str, float]:
    """Of a forward pass of one picture: its operations, the elements that products (convolutions and linear layers) and that
    all leaf modules put out; and the network's weights.
    """
    model, outputs = copy.deepcopy(model).eval(), {"products": 0, "leaves": 0}

    def add(module: nn.Module, _: Any, output: Any) -> None:
        size = output.numel() if isinstance(output, torch.Tensor) else 0
        outputs["leaves"] += size
        outputs["products"] += size if isinstance(module, (nn.Conv2d, nn.Linear)) else 0

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(add)
    # Attention as products: the counter does not know its kernel on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    weights = sum(p.numel() for p in model.parameters())
    return {"operations": counter.get_total_flops(), "weights": weights, **outputs}


def floors(counts: Mapping[str, float], rates: Mapping[str, float], setting: Setting) -> dict[str, float]:
    """Seconds that a step cannot do without, by arithmetic and by bytes; and those of the bytes of a kernel a layer."""
    passes = setting.batch * (1 if setting.thaw == "head" else 3)
    written_and_read, weights = 2 * 2 * passes, 4 * counts["weights"]
    return {
        "arithmetic": passes * counts["operations"] / rates["operations"],
        "bytes": (written_and_read * counts["products"] + weights) / rates["bytes"],
        "layer by layer": (written_and_read * counts["leaves"] + weights) / rates["bytes"],
    }


# The page.


def steps_of(runs: Sequence[Run]) -> list[float]:
    """Seconds of a step in each epoch that counts, of all these runs."""
    return [
        (later - sooner) * run.setting.batch / run.setting.pictures
        for run in runs
        for sooner, later in pairwise(run.found["marks"][SETTLED - 1 :])
    ]


def _page(runs: Sequence[Run]) -> str:
    """The table, and all that is needed to judge or repeat it."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    head = (
        "network", "stage", "who", "n", "ms a step: median (min - max)", "/ plain", "/ floor", "first epoch s, by round",
        "peak GiB", "total s",
    )  # fmt: skip
    lines = [
        "**One CUDA GPU**: 224 px, bf16 autocast, pictures in memory, AdamW, constant rate; interleaved in one process.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head))),
        *(f"| {' | '.join(cells)} |" for setting in settings for cells in rows(runs, setting)),
        "",
    ]
    for setting in settings:
        times = [f"{name} {1e3 * s:.3g} ms" for name, s in _floor(runs, setting).items()]
        lines.append(
            f"{setting}: {setting.epochs} epochs of {setting.pictures // setting.batch} steps of {setting.batch}; "
            f"{', '.join(times)}."
        )

    def several(what: Callable[[Run], str]) -> str:
        return "; ".join(dict.fromkeys(map(what, runs))) or "-"

    lines += [
        "",
        f"Device: {several(lambda r: r.found['device'])}; it was measured at {several(_rates)}.",
        f"Machine: {several(lambda r: r.found['machine'])}; "
        f"{min((r.when for r in runs), default='-')} to {max((r.when for r in runs), default='-')}.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions(runs).items())}; lehr at {several(lambda r: r.commit)}.",
        f"Command: `{several(lambda r: r.found['command'])}`",
    ]
    wrong = [
        f"{r.setting}, {r.contestant}, round {r.round + 1}: {r.found['failed']}" for r in runs if not r.ok
    ]
    return "\n".join([*lines, *(["", "**Failed:**", *(f"- {each}" for each in wrong)] if wrong else [])])


def rows(runs: Sequence[Run], setting: Setting) -> list[tuple[str, ...]]:
    """The cells of everybody who has trained in this setting."""
    lines: list[tuple[str, ...]] = []
    base = steps_of([r for r in runs if r.ok and (r.setting, r.contestant) == (setting, "plain")])
    floor = _floor(runs, setting)
    for who, contestant in CONTESTANTS.items():
        mine = [r for r in runs if r.ok and (r.setting, r.contestant) == (setting, who)]
        if not mine:
            continue
        mine.sort(key=lambda run: run.round)
        steps = steps_of(mine)
        step, shown = statistics.median(steps), [f"{1e3 * s:.3g}" for s in (min(steps), max(steps))]
        is_cached = any(event["event"] == "PrefixCached" for run in mine for event in run.found["told"])
        lines.append((
            setting.network, setting.thaw, contestant.label, str(len(mine)),
            f"{1e3 * step:.3g} ({' - '.join(shown)})",
            f"{step / statistics.median(base):.3f}" if base else "-",
            f"cached: {1e6 * step:.0f} µs a step" if is_cached
            else f"{step / max(floor['arithmetic'], floor['bytes']):.2f}",
            ", ".join(f"{run.found['marks'][0]:.1f}" for run in mine),
            f"{statistics.median(run.found['peak'] for run in mine) / (1 << 30):.2f}",
            f"{statistics.median(run.found['total'] for run in mine):.1f}",
        ))  # fmt: skip
    return lines


def _floor(runs: Sequence[Run], setting: Setting) -> Mapping[str, float]:
    return next(run.found["floor"] for run in reversed(runs) if run.setting == setting)


def _rates(run: Run) -> str:
    rates = run.found["rates"]
    return f"{rates['operations'] / 1e12:.4g} T operations/s in bf16 and {rates['bytes'] / 1e9:.4g} GB/s"


if __name__ == "__main__":
    sys.exit(main())
