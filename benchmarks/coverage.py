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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coverage_models import names
from coverage_table import page
from machine import machine

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "coverage.json"


def main() -> int:
    asked = _arguments()
    wanted = [
        name for name in names() if not asked.only or name in asked.only or name.split("/")[1] in asked.only
    ]
    known = json.loads(asked.out.read_text())["models"] if asked.out.exists() else {}
    todo = [name for name in wanted if asked.again or name not in known]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for name, record in zip(todo, pool.map(lambda n: _run(n, asked.limit), todo), strict=True):
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


def _run(name: str, limit: float) -> dict[str, Any]:
    """The record of one model, made in a process of its own; how it failed, where it did."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "coverage_worker.py"), name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s", "seconds": limit}
    if done.returncode:
        return {
            "failed": (done.stderr.strip().splitlines() or ["no word"])[-1],
            "seconds": time.monotonic() - began,
        }
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    noise = [line for line in done.stderr.splitlines() if line.strip()]
    return record | {"seconds": round(time.monotonic() - began, 1), "noise": noise[:3]}


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
