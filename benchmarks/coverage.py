"""Which models can be cut before what trains, and whether the halves are then the model.

    python benchmarks/coverage.py [--only NAME ...] [--again] [--jobs N] [--limit SECONDS]

95 models (coverage_models.py) with the head, the last block, and the last stage thawed, in training and in evaluation. What
is cut and passes lehr's own proof is compared with the whole model once more, by other code than the proof's: outputs,
gradients of all that trains, and buffers, under one seed, on another batch. A process for each model, one thread each;
results are kept model by model in benchmarks/results/coverage.json, and a model that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import coverage_worker
from coverage_models import names
from coverage_table import page
from machine import machine

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "coverage.json"


def main() -> int:
    asked = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for package in ("torchvision", "timm", "transformers", "torch.export"):
        import_module(package)  # once, for all processes
    wanted = [
        name for name in names() if not asked.only or name in asked.only or name.split("/")[1] in asked.only
    ]
    known = json.loads(asked.out.read_text())["models"] if asked.out.exists() else {}
    todo = [name for name in wanted if asked.again or name not in known]
    for name, record in _records(todo, asked.jobs, asked.limit):
        known[name] = record
        _save(known, asked.out)
        print(f"{name}: {_said(record)}", flush=True)
    text = page({name: known[name] for name in names() if name in known})
    asked.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models alone")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time (default 1)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a model (default 600)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the file of results")
    return parser.parse_args()


def _records(todo: list[str], jobs: int, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records, as they come. Each model has a process of its own, forked from this one, which has torch loaded."""
    waiting, running = list(todo), []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                out = Path(folder) / name.replace("/", "-")
                process = get_context("fork").Process(target=_run, args=(name, out))
                process.start()
                running.append((name, out, process, time.monotonic()))
            wait([process.sentinel for _, _, process, _ in running], timeout=1)
            for one in list(running):
                name, out, process, began = one
                seconds = round(time.monotonic() - began, 1)
                if process.is_alive() and seconds < limit:
                    continue
                process.kill()
                process.join()
                running.remove(one)
                yield name, _record(out) | {"seconds": seconds}


def _run(name: str, out: Path) -> None:
    """Write the record of one model; what is printed meanwhile goes to a file beside it."""
    noise = os.open(f"{out}.noise", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(noise, stream)
    try:
        record = coverage_worker.record(name)
    except BaseException as error:
        record = {"failed": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(record), encoding="utf-8")


def _record(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {"failed": "not done within the time limit, or killed"}
    noise = [line for line in Path(f"{out}.noise").read_text(errors="replace").splitlines() if line.strip()]
    record: dict[str, Any] = json.loads(out.read_text())
    return record | {"noise": noise[:3]}


def _said(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"FAILED {record['failed']}"
    words = []
    for way in record["ways"]:
        what = f"{way['share']:.2f} {way['route']}" if way["split"] else f"no ({way['why']})"
        wrong = "" if not way["split"] or way["equal"] else f" WRONG {way['off']}"
        words.append(f"{way['thawed']}/{way['mode']} {what}{wrong}")
    return "; ".join(words) + f" [{record['seconds']} s]"


def _save(models: dict[str, Any], out: Path) -> None:
    packages = ("torch", "torchvision", "timm", "transformers")
    record = {
        "machine": machine(), "python": platform.python_version(), "versions": {p: version(p) for p in packages},
        "threads": 1, "models": models,
    }  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
