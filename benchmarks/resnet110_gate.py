"""What the warm-up of ResNet-110 is for: its first updates at a rate of 0.01 until less than 80 % of the training images are
classified wrongly, and then at 0.1 (`gate`); and at 0.1 from the start (`open`). He et al. 2015, section 4.2.

    python benchmarks/resnet110_gate.py [--depth 110] [--only gate open] [--updates 2000] [--runs FOLDER]
    python benchmarks/resnet110_gate.py --draw

The first line trains, or goes on with what is in FOLDER, until it is done or stopped (Ctrl-C, SIGTERM); either way the errors
so far are put into results/resnet110_gate.json. The second draws docs/figures/resnet110_gate.png from that file. The network,
the data in memory and the augmentation are those of examples/resnet110.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from machine import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "examples"))

import lehr  # noqa: E402
from lehr.events import Event, StepsTaken  # noqa: E402
from lehr.run.cifar_resnet import cifar_resnet  # noqa: E402
from resnet110 import classified, in_memory  # noqa: E402  (an example is no package)

SUBSET = ROOT.parent / "shared" / "data" / "cifar10_lossless_subset.npz"
RESULTS = HERE / "results" / "resnet110_gate.json"
FIGURE = ROOT / "docs" / "figures" / "resnet110_gate.png"
HOW = ("gate", "open")
BATCH, EVERY = 128, 50


def main() -> int:
    asked = _arguments()
    if asked.draw:
        _draw(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"])
        return 0
    torch.set_num_threads(asked.threads)
    for how in asked.only:
        folder = asked.runs / f"depth{asked.depth}-{how}-seed{asked.seed}"
        try:
            _train(how, asked, folder)
        finally:
            _keep(how, asked, folder)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=SUBSET, help="CIFAR-10's own folder, or a .npz of such images")
    add("--depth", type=int, default=110, help="6n + 2 (110)")
    add("--only", nargs="+", choices=HOW, default=list(HOW))
    add("--updates", type=int, default=2000, help="2000")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--runs", type=Path, default=Path("runs/resnet110_gate"), help="where the runs are kept")
    add("--draw", action="store_true", help="draw the figure from the stored results, and train nothing")
    asked = parser.parse_args()
    if not asked.draw and not asked.data.exists():
        parser.error(f"{asked.data} does not exist; name the images with --data")
    return asked


def _recipe(how: str, updates: int, seed: int) -> lehr.Recipe:
    """The paper's optimizer; the rate as `how` says, and constant after the gate."""
    if how == "open":
        stages = [lehr.Stage(f"{updates} steps", train="all", lr=0.1)]
    else:
        latest = updates * 3 // 4  # a gate that stays closed is open by then
        stages = [
            lehr.Stage(
                f"{latest} steps", train="all", lr=0.01, until="train_error < 0.80", every=f"{EVERY} steps"
            ),
            lehr.Stage(f"{updates} steps", train="all", lr=0.1, clock="run"),
        ]
    return lehr.Recipe(
        stages, optimizer={"name": "sgd", "momentum": 0.9}, schedule=lehr.constant(), batch_size=BATCH,
        weight_decay=1e-4, no_decay=[], monitor="train_loss", seed=seed,
    )  # fmt: skip


class Errors:
    """Counts the wrong answers of each update, and writes them with its loss when lehr tells of it.

    As a loss function it sees the batches, but not which update they are for; as an observer it learns which updates
    are done. Lines of updates that were lost and done again are replaced when the file is read.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._waiting = file, list[tuple[int, int]]()

    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
        """The example's loss; what it got wrong waits until its update is told of."""
        said = classified(model, batch)
        if model.training:
            wrong = said["outputs"].argmax(1) != said["targets"]
            self._waiting.append((int(wrong.sum()), len(wrong)))
        return said

    def __call__(self, event: Event) -> None:
        """Write the updates that are done."""
        if isinstance(event, StepsTaken):
            for step, loss in zip(range(event.start, event.stop), event.losses, strict=True):
                wrong, samples = self._waiting.pop(0)
                print(
                    json.dumps({"step": step, "loss": loss, "wrong": wrong, "samples": samples}),
                    file=self._file,
                )
            self._file.flush()


def _train(how: str, asked: argparse.Namespace, folder: Path) -> None:
    train, _ = in_memory(str(asked.data), torch.device("cpu"))
    torch.manual_seed(asked.seed)
    net = cifar_resnet(asked.depth).to(memory_format=torch.channels_last)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lines(folder).open("a", encoding="utf-8") as file:
        errors = Errors(file)
        lehr.fit(
            net, train, recipe=_recipe(how, asked.updates, asked.seed), loss=errors.loss, out=folder, device="cpu",
            observers=[errors], resume="auto", checkpoint="1 minute",
        )  # fmt: skip


def _lines(folder: Path) -> Path:
    return folder.with_name(folder.name + ".errors.jsonl")


def _keep(how: str, asked: argparse.Namespace, folder: Path) -> None:
    """Put what a run has measured so far into the file of results, in place of what was there of it."""
    by_step = {}
    for line in _lines(folder).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_step[row["step"]] = row
    rows = [by_step[step] for step in range(len(by_step))]
    parts = [rows[first : first + EVERY] for first in range(0, len(rows) - EVERY + 1, EVERY)]
    events = [
        json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ended = [e["step"] for e in events if e["event"] == "stage_ended" and e["stage"] == 0]
    run = {
        "depth": asked.depth, "how": how, "seed": asked.seed, "updates": len(rows), "of": asked.updates, "every": EVERY,
        "gate_opened_after": ended[-1] if ended and how == "gate" else None,
        "error": [round(sum(r["wrong"] for r in part) / sum(r["samples"] for r in part), 5) for part in parts],
        "loss": [round(sum(r["loss"] * r["samples"] for r in part) / sum(r["samples"] for r in part), 5) for part in parts],
        "command": _command(how, asked), "machine": machine(), "threads": asked.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lehr": version("lehr")},
    }  # fmt: skip
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
    others = [r for r in kept if any(r[key] != run[key] for key in ("depth", "how", "seed"))]
    RESULTS.parent.mkdir(exist_ok=True)
    runs = sorted([*others, run], key=lambda r: (-r["depth"], r["how"], r["seed"]))
    RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def _command(how: str, asked: argparse.Namespace) -> str:
    """The command that makes this run, without where things lie on this machine."""
    return (
        f"python benchmarks/resnet110_gate.py --depth {asked.depth} --only {how} --updates {asked.updates} "
        f"--seed {asked.seed} --threads {asked.threads}"
    )


def _draw(runs: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each depth: the training error of each 50 updates, with the gate and without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    depths = sorted({run["depth"] for run in runs}, reverse=True)
    figure, panels = plt.subplots(
        1, len(depths), figsize=(4.6 * len(depths), 3.4), sharey=True, squeeze=False
    )
    for depth, panel in zip(depths, panels[0], strict=True):
        for run in runs:
            if run["depth"] == depth:
                _line(panel, run)
        panel.axhline(80, color="0.6", linewidth=0.8, linestyle="--")
        panel.set(title=f"{depth} layers", xlabel="updates", xlim=(0, None), ylim=(0, 100))
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("training error, %")
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def _line(panel: Any, run: Mapping[str, Any]) -> None:
    ends = [run["every"] * (k + 1) for k in range(len(run["error"]))]
    gate = run["how"] == "gate"
    label = "0.01 until < 80 %, then 0.1" if gate else "0.1 from the start"
    color = "tab:blue" if gate else "tab:red"
    panel.plot(ends, [100 * error for error in run["error"]], color=color, label=label, linewidth=1.3)
    if run["gate_opened_after"] is not None:
        panel.axvline(run["gate_opened_after"], color=color, linewidth=0.8, linestyle=":")


if __name__ == "__main__":
    sys.exit(main())
