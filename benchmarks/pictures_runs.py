"""Runs of `pictures_worker.py`, for `frozen.py` and `full.py`: started in fresh processes, saved after each, gone on with.

A lane is a core: its runs come one after another, each pinned to it. Two lanes run at the same time, and everything
that is compared with each other runs in one lane.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Setting:
    """What is trained: everything but who trains it."""

    network: str
    thaw: str
    epochs: int
    batch: int
    pictures: int

    def __str__(self) -> str:
        return f"{self.network} {self.thaw}"


@dataclass(frozen=True)
class Run:
    """One process: who, what, in which round; what it found, or why it did not; where and when."""

    setting: Setting
    contestant: str
    round: int
    found: Mapping[str, Any]
    core: int | None = None
    when: str = ""
    load: float = 0.0
    commit: str = ""

    @property
    def key(self) -> tuple[Setting, str, int]:
        """What makes it this run, and no other."""
        return self.setting, self.contestant, self.round

    @property
    def ok(self) -> bool:
        """Whether it trained to the end."""
        return "marks" in self.found


class Store:
    """The runs there are, in a file that is whole at any time; lanes may add at the same time."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        self.runs = [Run(**{**run, "setting": Setting(**run["setting"])}) for run in kept]

    def has(self, setting: Setting, contestant: str, number: int) -> bool:
        """Whether this run is there, and trained to the end."""
        return any(run.ok and run.key == (setting, contestant, number) for run in self.runs)

    def forget(self, contestants: Iterable[str], settings: Sequence[Setting]) -> None:
        """Leave these out, so that they are run again."""
        named = set(contestants)
        self.runs = [r for r in self.runs if r.contestant not in named or r.setting not in settings]

    def add(self, run: Run) -> None:
        """Keep a run, in the place of an earlier one of the same key, and write all down."""
        with self.lock:
            self.runs = [kept for kept in self.runs if kept.key != run.key] + [run]
            save([asdict(kept) for kept in self.runs], self.path)


def save(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write runs down, a line for each; the file is whole at any time."""
    lines = ",\n".join(map(json.dumps, runs))
    head = json.dumps({"machine": machine(), "python": platform.python_version()})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    draft.replace(path)


Job = tuple[Setting, Sequence[str], int]
"""A setting, who trains it in turn, and the number of the round."""


def run_all(jobs: Sequence[Job], store: Store, cores: Sequence[int | None]) -> None:
    """Every job that is not there yet; a lane for each core takes the next job when it is free."""
    left, lock = list(jobs), threading.Lock()

    def lane(core: int | None) -> None:
        while True:
            with lock:
                if not left:
                    return
                setting, contestants, number = left.pop(0)
            for contestant in contestants:
                if not store.has(setting, contestant, number):
                    run = run_one(setting, contestant, number, core)
                    store.add(run)
                    print(f"{run.when}  core {core}  {setting}, round {number + 1}: {_said(run)}", flush=True)

    lanes = [threading.Thread(target=lane, args=(core,), daemon=True) for core in cores]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()


def run_one(setting: Setting, contestant: str, number: int, core: int | None) -> Run:
    """One contestant in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "found.json")
        command = [
            sys.executable, str(HERE / "pictures_worker.py"), contestant, setting.network, setting.thaw,
            str(result), "--epochs", str(setting.epochs), "--batch", str(setting.batch),
            "--pictures", str(setting.pictures),
        ]  # fmt: skip
        command += [] if core is None else ["--core", str(core)]
        done = subprocess.run(command, env=_environment(), capture_output=True, check=False, cwd=folder)
        if result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
        else:
            found = {"failed": f"exit code {done.returncode}: {done.stderr[-400:].decode(errors='replace')}"}
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Run(setting, contestant, number, found, core, now, round(os.getloadavg()[0], 2), commit())


def cores(text: str) -> list[int | None]:
    """`"0,1"`, or all that this process may use; None is no core in particular."""
    if text != "all":
        return [int(part) for part in text.split(",")]
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]


def turned(names: Sequence[str], number: int) -> list[str]:
    """The names, beginning `number` places further on: so that nobody is always first."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def _said(run: Run) -> str:
    if not run.ok:
        return f"{run.contestant}: {dict(run.found)}"
    wall, cpu = run.found["total"]
    return f"{run.contestant:16s} {wall:7.1f} s, CPU {cpu:7.1f} s"


def _environment() -> dict[str, str]:
    """The caller's environment, with this checkout first and one thread everywhere."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def commit() -> str:
    """The checkout's commit, with a plus where its sources have changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
