"""How long a checkpoint holds up training: lehr beside torch.save, safetensors and Lightning.

    python benchmarks/checkpoint.py [--rounds N] [--only NAME ...] [--save]

The task: resnet50 (25.6 M parameters) with Adam, about 307 MB a checkpoint, one every 10 steps, on the CPU. Every
contestant (checkpoint_contestants.py) runs in a fresh process. A round runs all of them in turn, and begins one
place further on than the round before; a ratio compares runs of one round. How the stall is measured, and what
is done about noise, is said in benchmarks/README.md.
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
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from checkpoint_contestants import CONTESTANTS
from checkpoint_table import Run, problems, rows
from machine import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETTINGS = ("every", "checkpoints", "batch", "size", "threads")


def main() -> int:
    asked = _arguments()
    runs: list[Run] = []
    for number in range(asked.rounds):
        for name in _turned(asked.only, number):
            run = _run(name, number, asked)
            runs.append(run)
            _say(run, asked.rounds)
    wrong = problems(runs)
    page = _page(runs, asked, wrong)
    print(page)
    if asked.save:
        out = HERE / "results" / "checkpoint.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(_record(runs, asked, wrong)) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        print(f"\nsaved: {out.relative_to(ROOT)} and {out.with_suffix('.md').name}")
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contestant (default 3)")
    names = list(CONTESTANTS)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--every", type=int, default=10, help="steps from checkpoint to checkpoint (default 10)"
    )
    parser.add_argument(
        "--checkpoints", type=int, default=6, help="measured in each run, the first apart (default 6)"
    )
    parser.add_argument("--batch", type=int, default=2, help="images in a step (default 2)")
    parser.add_argument("--size", type=int, default=64, help="side of an image (default 64)")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of every contestant (default 1)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where checkpoints are written, and removed (default: a temporary one)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/checkpoint.json and .md"
    )
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.every < 3 or asked.checkpoints < 2:
        parser.error("--rounds must be at least 1, --every at least 3, --checkpoints at least 2")
    return asked


def _turned(names: Sequence[str], number: int) -> list[str]:
    """The names, beginning `number` places further on: so that nobody is always first."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def _run(name: str, number: int, asked: argparse.Namespace) -> Run:
    """One contestant in a fresh process and an empty directory; what others wrote is on the disk by then."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
        result, work = Path(folder, "result.json"), Path(folder, "work")
        work.mkdir()
        given = [f"--{key}={getattr(asked, key)}" for key in SETTINGS]
        command = [sys.executable, str(HERE / "checkpoint_worker.py"), name, str(result), str(work), *given]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_environment(asked.threads),
            check=False,
        )
        if result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
        else:
            last = done.stderr[-400:].decode(errors="replace").strip()
            found = {"failed": f"exit code {done.returncode}: {last}"}
    return Run(name, number, asked.every, found)


def _environment(threads: int) -> dict[str, str]:
    """The caller's environment, with this checkout first and no other number of threads."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    kinds = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **kinds, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def _say(run: Run, rounds: int) -> None:
    what: object = dict(run.found)
    if run.ok:
        stalls = ", ".join(f"{1e3 * cycle.stall:.0f}" for cycle in run.cycles())
        what = f"stalls {stalls} ms; a step {1e3 * run.quiet_step:.0f} ms"
    print(f"round {run.round + 1}/{rounds}  {run.name:16s} {what}", file=sys.stderr, flush=True)


def _page(runs: Sequence[Run], asked: argparse.Namespace, wrong: Sequence[str]) -> str:
    """The table, and all that is needed to judge or repeat it."""
    labels = {name: (CONTESTANTS[name].label, CONTESTANTS[name].flushes) for name in asked.only}
    lines = [
        f"**Stall per checkpoint**: resnet50 with Adam, fp32, batch {asked.batch} at {asked.size} px, a checkpoint "
        f"every {asked.every} steps; n = {asked.rounds} fresh processes each, interleaved, with {asked.checkpoints} "
        f"checkpoints, of which the first is apart; torch threads: {asked.threads}.",
        "",
        *rows(runs, labels),
        "",
        *_own_words(runs),
        f"Versions: {', '.join(f'{k} {v}' for k, v in _versions(runs).items())}.",
        f"Machine: {machine()}; load average at the end {os.getloadavg()[0]:.2f}.",
        f"Command: `{_command()}`",
    ]
    lines += ["", "**Not valid:**", *(f"- {problem}" for problem in wrong)] if wrong else []
    return "\n".join(lines)


def _own_words(runs: Sequence[Run]) -> list[str]:
    """What lehr's journal says of the same checkpoints: those after the first, up to the last that steps follow."""
    said = [
        event
        for run in runs
        if run.ok
        for event in run.found["lehr"]
        if run.every < event["step"] < len(run.found["begun"])
    ]
    if not said:
        return []
    stall, seconds = (statistics.median(event[key] for event in said) for key in ("stall", "seconds"))
    return [
        f"lehr's own journal says: stall {1e3 * stall:.0f} ms, written in {seconds:.2f} s beside the training (medians)."
    ]


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }
    try:
        found["lehr"] = version("lehr")
    except PackageNotFoundError:
        found["lehr"] = "this checkout"
    for run in runs:
        found |= run.found.get("versions", {})
    return found


def _command() -> str:
    return shlex.join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]])


def _record(runs: Sequence[Run], asked: argparse.Namespace, wrong: Sequence[str]) -> dict[str, Any]:
    return {
        "what": "when each step began and ended, seconds",
        "command": _command(),
        "versions": _versions(runs),
        "machine": machine(),
        "settings": {key: getattr(asked, key) for key in ("rounds", *SETTINGS)},
        "load": os.getloadavg(),
        "problems": list(wrong),
        "runs": [_rounded(asdict(run)) for run in runs],
    }


def _rounded(value: Any) -> Any:
    """Numbers to the tenth of a millisecond: nothing here is measured more exactly."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
