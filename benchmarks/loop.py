"""What a step costs above the bare loop: lehr beside tqdm, Lightning, Ignite, Accelerate and fastai.

    python benchmarks/loop.py [--rounds N] [--optimizer sgd|adamw] [--only NAME ...] [--save]

The task: a 16->32->10 perceptron, batches of 8, 12,500 updates (100,000 samples once, shuffled), a cosine
with warm-up set at every step, a bar drawn. Every contestant (contestants.py) runs in a fresh process, once
with its bar going to a file and once to a pseudo-terminal that is read all the time. A round runs all of them
in turn, and begins one place further on than the round before; a ratio compares runs of one round. How noise
is handled is said in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pty
import shlex
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from fcntl import ioctl
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

from contestants import CONTESTANTS
from loop_table import Run, problems, rows
from machine import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SINKS = ("file", "pty")
ROWS, COLUMNS = 24, 100  # of the pseudo-terminal


def main() -> int:
    asked = _arguments()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            for name in _turned(asked.only, number):
                for sink in asked.sinks:
                    run = _run(name, sink, number, asked, Path(folder))
                    runs.append(run)
                    _say(run, asked.rounds)
    wrong = problems(runs)
    page = _page(runs, asked, wrong)
    print(page)
    if asked.save:
        out = HERE / "results" / "loop.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(_record(runs, asked, wrong), indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        print(f"\nsaved: {out.relative_to(ROOT)} and {out.with_suffix('.md').name}")
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="runs of every contestant (default 5)")
    parser.add_argument(
        "--samples", type=int, default=100_000, help="in the epoch (default 100000: 12,500 steps)"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    names = list(CONTESTANTS)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--sinks", nargs="+", choices=SINKS, default=list(SINKS), help="where the bar goes")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of every contestant (default 1)"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/loop.json and loop.md")
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.samples < 8:
        parser.error("--rounds must be at least 1 and --samples at least 8")
    return asked


def _turned(names: Sequence[str], number: int) -> list[str]:
    """The names, beginning `number` places further on: so that nobody is always first."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def _run(name: str, sink: str, number: int, asked: argparse.Namespace, folder: Path) -> Run:
    """One contestant in a fresh process."""
    result = folder / f"{name}-{sink}-{number}.json"
    command = [
        sys.executable, str(HERE / "loop_worker.py"), name, str(result),
        "--samples", str(asked.samples), "--optimizer", asked.optimizer, "--threads", str(asked.threads),
    ]  # fmt: skip
    code, drawn = _to_file(command, folder) if sink == "file" else _to_pty(command)
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
    else:
        found = {"failed": f"exit code {code}: {drawn[-400:].decode(errors='replace').strip()}"}
    return Run(name, sink, number, found, len(drawn))


def _environment() -> dict[str, str]:
    """The caller's environment, with this checkout first and nothing that changes threads or bars."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**kept, **single, "TERM": "xterm-256color", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def _to_file(command: Sequence[str], folder: Path) -> tuple[int, bytes]:
    """Run with standard output and error in one file."""
    sink = folder / "bar.txt"
    with sink.open("wb") as stream:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=_environment(), check=False
        )
    return done.returncode, sink.read_bytes()


def _to_pty(command: Sequence[str]) -> tuple[int, bytes]:
    """Run on a pseudo-terminal of 24 x 100, which a thread of this process drains as fast as it fills."""
    near, far = pty.openpty()
    ioctl(far, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    drawn = bytearray()

    def drain() -> None:
        while True:
            try:
                piece = os.read(near, 65536)
            except OSError:  # Linux says so when the last writer has gone
                return
            if not piece:
                return
            drawn.extend(piece)

    process = subprocess.Popen(
        command, stdin=far, stdout=far, stderr=far, env=_environment(), start_new_session=True
    )
    os.close(far)
    reader = threading.Thread(target=drain)
    reader.start()
    code = process.wait()
    reader.join()
    os.close(near)
    return code, bytes(drawn)


def _say(run: Run, rounds: int) -> None:
    what = f"{run.found['wall_us']:8.1f} us/step" if run.ok else str(dict(run.found))
    print(f"round {run.round + 1}/{rounds}  {run.name:12s} {run.sink:4s} {what}", file=sys.stderr, flush=True)


def _page(runs: Sequence[Run], asked: argparse.Namespace, wrong: Sequence[str]) -> str:
    """The table, and all that is needed to judge or repeat it."""
    lines = [
        f"**Cost per step**: perceptron 16->32->10, batch 8, {asked.samples // 8:,} updates, "
        f"{asked.optimizer}, warm-up and cosine at every step; n = {asked.rounds} fresh processes each, "
        f"interleaved; torch threads: {asked.threads}.",
        "",
        *rows(runs, {name: CONTESTANTS[name].label for name in asked.only}, asked.sinks),
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in _versions(runs).items())}.",
        f"Machine: {machine()}; load average at the end {os.getloadavg()[0]:.2f}.",
        f"Command: `{_command()}`",
    ]
    lines += ["", "**Not valid:**", *(f"- {problem}" for problem in wrong)] if wrong else []
    return "\n".join(lines)


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": version("torch")}
    try:
        found["lehr"] = version("lehr")
    except PackageNotFoundError:
        found["lehr"] = "this checkout"
    for run in runs:
        found |= run.found.get("versions", {})
    return found


def _command() -> str:
    return shlex.join(["python", "benchmarks/loop.py", *sys.argv[1:]])


def _record(runs: Sequence[Run], asked: argparse.Namespace, wrong: Sequence[str]) -> dict[str, Any]:
    return {
        "what": "cost per step, microseconds",
        "command": _command(),
        "versions": _versions(runs),
        "machine": machine(),
        "settings": {
            key: getattr(asked, key) for key in ("rounds", "samples", "optimizer", "threads", "sinks")
        },
        "load": os.getloadavg(),
        "problems": list(wrong),
        "runs": [asdict(run) for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
