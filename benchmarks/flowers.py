"""Real images: `lehr fit` as it comes, beside a careful hand-written loop and a converged linear probe.

    python benchmarks/flowers.py [--size 128] [--epochs 5,8] [--seeds 0,1,2] [--only probe hand lehr] [--save]

All three get the same split, laid out as a folder with train/ and val/; the loop and lehr get the same epochs
and seeds. lehr is run as a person runs it, by its command line. The best epoch counts for both, and the last
one is shown beside it. The rivals are in flowers_rivals.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flowers_rivals import Item, Outcome, Settings, hand_loop, linear_probe
from flowers_split import Split, hash_of, lay_out, split_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
WHO = ("probe", "hand", "lehr")


def main() -> int:
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    split = split_of(asked.data, asked.split, asked.split_seed)
    classes = sorted({Path(path).parts[0] for path in split["train"]})
    halves = [[(asked.data / p, classes.index(Path(p).parts[0])) for p in split[h]] for h in ("train", "val")]
    settings = Settings(
        asked.model, asked.weights, len(classes), asked.size, asked.epochs,
        head_lr=asked.head_lr, thaw_head_lr=asked.thaw_lr[0], thaw_backbone_lr=asked.thaw_lr[1],
    )  # fmt: skip
    found: dict[str, Any] = {}
    if "probe" in asked.only:
        found["probe"] = linear_probe(*halves, settings)
        _say(f"probe: {found['probe']}")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(split, asked.data, Path(folder, "data"))
        for seed in asked.seeds:
            for who in ("hand", "lehr"):
                if who in asked.only:
                    outcome = _one(who, asked, halves, settings, seed=seed, folder=Path(folder))
                    found.setdefault(who, []).append({"seed": seed, "best": outcome.best, **asdict(outcome)})
                    _say(f"{who}, seed {seed}: {outcome}")
    page = _page(found, asked, split)
    print(page)
    if asked.save:
        part = "" if set(asked.only) == set(WHO) else "-" + "-".join(asked.only)
        out = HERE / "results" / f"flowers{part}.json"
        out.parent.mkdir(exist_ok=True)
        record = {"command": _command(), "versions": _versions(), "split": hash_of(split), "found": found}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    weights = SHARED / "weights" / "timm_mobilenetv2_100_onnxzoo_features.pth"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--data", type=Path, default=SHARED / "data" / "flowers5", help="folder of class folders")
    add("--model", default="mobilenetv2_100", help="timm model")
    add("--weights", type=Path, default=weights, help="its backbone's weights")
    add(
        "--split",
        type=Path,
        help='JSON: {"train": [CLASS/FILE, ...], "val": [...]}; default 80/20 stratified',
    )
    add("--split-seed", type=int, default=0, help="of the default split")
    add("--size", type=int, default=128, help="pixels the model sees (default 128)")
    add("--epochs", type=_whole_numbers, default=(5, 8), help="HEAD,ALL (default 5,8)")
    add("--seeds", type=_whole_numbers, default=(0, 1, 2), help="default 0,1,2")
    add("--only", nargs="+", choices=WHO, default=list(WHO))
    add("--head-lr", type=float, default=3e-3, help="the hand-written loop's, first stage")
    add("--thaw-lr", type=_rates, default=(1e-3, 3e-4), help="its HEAD,BACKBONE in the second stage")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="passed on to lehr")
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    add("--save", action="store_true", help="write benchmarks/results/flowers[-WHO].json and .md")
    asked = parser.parse_args()
    if len(asked.epochs) != 2 or len(asked.thaw_lr) != 2:
        parser.error("--epochs and --thaw-lr take two numbers with a comma, for example --epochs 5,8")
    for path in (asked.data, asked.weights):
        if not path.exists():
            parser.error(f"{path} does not exist; name the images with --data and the weights with --weights")
    return asked


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _one(
    who: str,
    asked: argparse.Namespace,
    halves: Sequence[Sequence[Item]],
    settings: Settings,
    *,
    seed: int,
    folder: Path,
) -> Outcome:
    """One of the two that train, with one seed."""
    if who == "hand":
        return hand_loop(halves[0], halves[1], settings, seed=seed)
    return _lehr(asked, seed=seed, data=folder / "data", run=folder / f"run-{seed}")


def _lehr(asked: argparse.Namespace, *, seed: int, data: Path, run: Path) -> Outcome:
    """`lehr fit` in a process of its own; what it reached is read from its journal."""
    lengths = [f"stages.{stage}.length={json.dumps(f'{n} epochs')}" for stage, n in enumerate(asked.epochs)]
    command = [
        sys.executable, "-m", "lehr", "fit", str(data),
        "--model", asked.model, "--weights", str(asked.weights), "--size", str(asked.size),
        "--workers", "0", "--device", "cpu", "--out", str(run),
    ]  # fmt: skip
    for setting in (*lengths, f"seed={seed}", *asked.settings):
        command += ["--set", setting]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(asked.threads)}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True)
    seconds = time.perf_counter() - began
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [event for event in events if event.get("event") == "epoch_ended"]
    stages = [tuple(e["metrics"]["valid_accuracy"] for e in epochs if e["stage"] == n) for n in (0, 1)]
    return Outcome(stages[0], stages[1], seconds)


def _page(found: Mapping[str, Any], asked: argparse.Namespace, split: Split) -> str:
    """The table, and all that is needed to judge or repeat it."""
    train, val = len(split["train"]), len(split["val"])
    head, everything = asked.epochs
    lines = [
        f"**Real images**: {asked.model} at {asked.size} px, {train} training and {val} validation images "
        f"(split {hash_of(split)}), {head} epochs of the head and {everything} of everything.",
        "",
        "| who | seeds | best epoch's valid accuracy: mean (each) | last epoch's | head stage's best | s |",
        "|---|---|---|---|---|---|",
    ]
    if "probe" in found:
        probe = found["probe"]
        reached, seconds = f"{probe['accuracy']:.4f}", f"{probe['seconds']:.0f}"
        how = f"C = {probe['C']}, {'scaled, ' if probe['scaled'] else ''}{probe['iterations']} iterations"
        how += "" if probe["converged"] else ", NOT CONVERGED"
        lines.append(f"| linear probe ({how}) | - | {reached} | - | - | {seconds} |")
    for who, label in (("hand", "hand-written loop"), ("lehr", "lehr fit, default recipe")):
        if who in found:
            lines.append(_row(label, found[who]))
    lines += [
        "",
        f"One validation image is {1 / val:.4f}; the standard error of an accuracy of 0.8 is "
        f"{(0.8 * 0.2 / val) ** 0.5:.4f}.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in _versions().items())}; torch threads: {asked.threads}.",
        f"Command: `{_command()}`",
    ]
    return "\n".join(lines)


def _row(label: str, runs: Sequence[Mapping[str, Any]]) -> str:
    each = ", ".join(f"{run['best']:.4f}" for run in runs)
    best = statistics.fmean(run["best"] for run in runs)
    last = statistics.fmean(run["thawed"][-1] for run in runs)
    head = statistics.fmean(max(run["head"]) for run in runs)
    seconds = statistics.fmean(run["seconds"] for run in runs)
    return f"| {label} | {len(runs)} | {best:.4f} ({each}) | {last:.4f} | {head:.4f} | {seconds:.0f} |"


def _versions() -> dict[str, str]:
    named = ("torch", "torchvision", "timm", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in named}}


def _command() -> str:
    return shlex.join(["python", "benchmarks/flowers.py", *sys.argv[1:]])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
