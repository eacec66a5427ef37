"""The whole default recipe on real images: seconds to the accuracy that fastai's `fine_tune` reaches by its defaults.

    python benchmarks/recipe.py [--data DIR] [--weights FILE] [--only fastai lehr] [--seeds 0,1] [--again lehr] [--table]

Both get the same network, the same local weights and the same split at 128 px, and nothing else: lehr is its command
line, fastai `vision_learner` and `fine_tune(5)` (recipe_fastai.py). Each is a fresh process on one core, one thread,
no workers; time runs from the start of the process, imports included. Runs are saved one by one; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowers_split import hash_of, lay_out, split_of
from machine import machine
from pictures_runs import HERE, ROOT, commit, save

SHARED = ROOT.parent / "shared"
WHO = ("fastai", "lehr")
HALF = 0.5  # of fastai's time, at most
OUT = HERE / "results" / "recipe.json"

Found = Mapping[str, Any]


def main() -> int:
    asked = _arguments()
    runs = json.loads(asked.out.read_text(encoding="utf-8"))["runs"] if asked.out.exists() else []
    runs = [run for run in runs if run["who"] not in asked.again]
    if not asked.table:
        split = split_of(asked.data, asked.split, asked.split_seed)
        with tempfile.TemporaryDirectory() as folder:
            lay_out(split, asked.data, Path(folder, "data"))
            for seed in asked.seeds:
                for who in [who for who in asked.only if not _has(runs, who, seed, hash_of(split))]:
                    runs.append(_run(who, seed, asked, Path(folder), hash_of(split), runs))
                    save(runs, asked.out)
                    print(f"{who}, seed {seed}: {_said(runs[-1])}", file=sys.stderr, flush=True)
    page = _page(runs)
    print(page)
    asked.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
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
    add("--epochs", type=int, default=5, help="of fastai's fine_tune, after its one frozen epoch (default 5)")
    add("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1], help="default 0,1")
    add("--only", nargs="+", choices=WHO, default=list(WHO))
    add("--again", nargs="+", choices=WHO, default=[], help="run these again")
    add("--stop", action="store_true", help="stop lehr where it has reached fastai's accuracy")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="passed on to lehr")
    add("--core", type=int, help="run on this core alone")
    add("--out", type=Path, default=OUT, help="where the runs are kept")
    add("--table", action="store_true", help="only the table of what there is")
    asked = parser.parse_args()
    for path in () if asked.table else (asked.data, asked.weights):
        if not path.exists():
            parser.error(f"{path} does not exist; name the images with --data and the weights with --weights")
    return asked


def _has(runs: Sequence[Found], who: str, seed: int, split: str) -> bool:
    return any((r["who"], r["seed"], r["split"]) == (who, seed, split) and "epochs" in r for r in runs)


def _run(
    who: str, seed: int, asked: argparse.Namespace, folder: Path, split: str, runs: Sequence[Found]
) -> dict[str, Any]:
    """One of the two, in a fresh process, pinned; what it did by epoch, and what it was."""
    environment = _environment()
    if who == "fastai":
        found = _fastai(seed, asked, folder, environment)
    else:
        goal = target(runs, split) if asked.stop else None
        found = _lehr(seed, asked, folder, environment, goal)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "who": who, "seed": seed, "split": split, "when": now, "load": round(os.getloadavg()[0], 2),
        "commit": commit(), "settings": list(asked.settings), **found,
    }  # fmt: skip


def _fastai(
    seed: int, asked: argparse.Namespace, folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    result = folder / f"fastai-{seed}.json"
    command = [
        *_pinned(asked), sys.executable, str(HERE / "recipe_fastai.py"), str(folder / "data"), str(asked.weights),
        str(result), "--model", asked.model, "--epochs", str(asked.epochs), "--size", str(asked.size),
        "--seed", str(seed),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if not result.exists():
        return {"failed": f"exit code {done.returncode}: {done.stderr[-400:]}"}
    return json.loads(result.read_text(encoding="utf-8")) | {"versions": _versions("fastai")}


def _lehr(
    seed: int, asked: argparse.Namespace, folder: Path, environment: Mapping[str, str], goal: float | None
) -> dict[str, Any]:
    """`lehr fit` as a person types it; its journal is read as it grows, for the processor time at every epoch."""
    run = folder / f"lehr-{seed}"
    command = [
        *_pinned(asked), sys.executable, "-m", "lehr", "fit", str(folder / "data"), "--model", asked.model,
        "--weights", str(asked.weights), "--size", str(asked.size), "--workers", "0", "--device", "cpu",
        "--out", str(run), "--set", f"seed={seed}",
    ]  # fmt: skip
    for setting in asked.settings:
        command += ["--set", setting]
    epochs: list[dict[str, Any]] = []
    began = time.perf_counter()
    with (folder / "lehr.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            _read(run / "journal.jsonl", epochs, process.pid, time.perf_counter() - began)
            if goal is not None and any(epoch["accuracy"] >= goal for epoch in epochs):
                process.terminate()
                process.wait()
        _read(run / "journal.jsonl", epochs, None, time.perf_counter() - began)
        log.seek(0)
        said = log.read()[-400:]
    if not epochs:
        return {"failed": f"exit code {process.returncode}: {said}"}
    journal = (
        (run / "journal.jsonl").read_text(encoding="utf-8").replace(str(asked.weights), asked.weights.name)
    )
    events = [json.loads(line) for line in journal.splitlines()]
    told = [e for e in events if e.get("event") in ("note", "prefix_cached", "cache_closed", "stage_ended")]
    recipe = (run / "recipe.toml").read_text(encoding="utf-8")
    return {"epochs": epochs, "told": told, "recipe": recipe, "versions": _versions("lehr")}


def _read(journal: Path, epochs: list[dict[str, Any]], pid: int | None, wall: float) -> None:
    """Add the epochs that have been written down since, with the time it is."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    ended = [json.loads(line) for line in lines if '"epoch_ended"' in line and line.endswith("}")]
    for event in ended[len(epochs) :]:
        accuracy = event["metrics"]["valid_accuracy"]
        epochs.append({"accuracy": accuracy, "wall": wall, "cpu": _cpu(pid), "stage": event["stage"]})


def _cpu(pid: int | None) -> float | None:
    """Processor seconds of a process so far: fields 14 and 15 of its stat, in ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def target(runs: Sequence[Found], split: str | None = None) -> float:
    """The accuracy that counts: the best that fastai ended with, of all its seeds."""
    ends = [r["epochs"][-1]["accuracy"] for r in _done(runs, "fastai") if split in (None, r["split"])]
    if not ends:
        raise SystemExit("fastai was not run on this split yet; run it first: --only fastai")
    return max(ends)


def reached(run: Found, goal: float) -> Mapping[str, Any] | None:
    """The first epoch at the goal or above."""
    return next((epoch for epoch in run["epochs"] if epoch["accuracy"] >= goal), None)


def _done(runs: Sequence[Found], who: str) -> list[Found]:
    return [run for run in runs if run["who"] == who and "epochs" in run]


def _page(runs: Sequence[Found]) -> str:
    """The table, and all that is needed to judge or repeat it."""
    rivals, mine = _done(runs, "fastai"), _done(runs, "lehr")
    if not rivals:
        return "\n".join(["fastai was not run yet.", *(_said(run) for run in runs)])
    goal = target(runs)
    lines = [
        f"**The default recipe**: seconds until {goal:.4f} of the validation images are named rightly, "
        "the best that fastai's `fine_tune` ended with.",
        "",
        "| who | seed | epochs | best | last | CPU s to its end | CPU s to the goal | wall s to its end | "
        "wall s to the goal |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(run, goal) for run in (*rivals, *mine)),
        "",
        _verdict(rivals, mine, goal),
        "",
        f"Splits: {', '.join(sorted({r['split'] for r in (*rivals, *mine)}))}; versions: "
        + ", ".join(f"{k} {v}" for r in (rivals[-1:] + mine[-1:]) for k, v in r["versions"].items())
        + f"; lehr at {', '.join(sorted({r['commit'] for r in mine})) or '-'}.",
        f"Machine: {machine()}; one thread, no workers; load average "
        f"{min(r['load'] for r in (*rivals, *mine)):.1f} to {max(r['load'] for r in (*rivals, *mine)):.1f}.",
        f"Command: `{shlex.join(['python', 'benchmarks/recipe.py', *sys.argv[1:]])}`",
    ]
    return "\n".join(lines)


def _row(run: Found, goal: float) -> str:
    accuracies, end, there = [e["accuracy"] for e in run["epochs"]], run["epochs"][-1], reached(run, goal)
    seconds = [
        f"{at[clock]:.0f}" if at and at[clock] is not None else "not reached"
        for clock in ("cpu", "wall")
        for at in (end, there)
    ]
    cells = (
        run["who"],
        str(run["seed"]),
        str(len(accuracies)),
        f"{max(accuracies):.4f}",
        f"{accuracies[-1]:.4f}",
    )
    return f"| {' | '.join((*cells, *seconds))} |"


def _verdict(rivals: Sequence[Found], mine: Sequence[Found], goal: float) -> str:
    """lehr's time to the goal over fastai's time to its own last accuracy: the kindest to fastai."""
    theirs = [reached(run, run["epochs"][-1]["accuracy"]) for run in rivals]
    ours = [reached(run, goal) for run in mine]
    if not ours or not all(ours):
        return f"lehr reached the goal in {sum(map(bool, ours))} of {len(ours)} runs."
    said = []
    for clock, name in (("cpu", "processor"), ("wall", "wall")):
        pair = [statistics.fmean(at[clock] for at in runs if at and at[clock]) for runs in (ours, theirs)]
        ratio = pair[0] / pair[1]
        said.append(f"{name} time {pair[0]:.0f} s over {pair[1]:.0f} s: {ratio:.2f}")
    met = "at most" if float(said[0].rsplit(" ", 1)[1]) <= HALF else "NOT at most"
    return f"lehr to the goal over fastai to what it ended with: {'; '.join(said)}; {met} half."


def _pinned(asked: argparse.Namespace) -> list[str]:
    return [] if asked.core is None else ["taskset", "-c", str(asked.core)]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONPATH": path}


def _versions(who: str) -> dict[str, str]:
    found = {}
    for name in ("torch", "timm", who):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "this checkout"
    return found


def _said(run: Found) -> str:
    if "epochs" not in run:
        return str(run.get("failed") or f"{run.get('missing')} is not installed")
    each = ", ".join(f"{epoch['accuracy']:.4f}" for epoch in run["epochs"])
    return f"{each}; {run['epochs'][-1]['wall']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
