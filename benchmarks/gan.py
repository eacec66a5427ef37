"""Do the two objectives of examples/gan.py learn to draw digits? Judged against a bar, seed by seed.

    python benchmarks/gan.py [--seeds 0,1,2] [--epochs 120] [--threads 1] [--save]

The judge and the bar are in examples/digit_judge.py: nothing but the real digits is needed. Beside the seeds stand
the real digits that nobody was trained on, and pictures that must not pass. The exit code is 1 where a seed
misses the bar, where the held-out digits do, or where a cheat passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from machine import machine

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))  # before this folder, which has a gan.py as well: this file

from digit_judge import BAR, Judge, Verdict, cheats, digits  # noqa: E402
from gan import EPOCHS, PICTURES, draw, rows, train  # noqa: E402

FIGURES = ("recognised", "confidence", "classes", "entropy", "variety", "distance", "copies")


def main() -> int:
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    data = digits()
    judge = Judge(data)
    real = {"held-out real digits": judge(data.held_out)}
    bad = {name: judge(pictures) for name, pictures in cheats(data).items()}
    seeds: dict[str, dict[str, Any]] = {}
    drawn: dict[str, Verdict] = {}
    for seed in asked.seeds:
        drawn[f"seed {seed}"], clocks = _one(judge, seed, asked.epochs)
        seeds[f"seed {seed}"] = {**asdict(drawn[f"seed {seed}"]), **clocks}
        print(f"seed {seed}: {drawn[f'seed {seed}']}; {clocks}", file=sys.stderr, flush=True)
    wrong = [
        *(f"{name}: {miss}" for name, one in {**real, **drawn}.items() for miss in one.misses(BAR)),
        *(f"{name} passes" for name, one in bad.items() if not one.misses(BAR)),
    ]
    page = _page(judge, {**real, **drawn, **bad}, seeds, wrong, asked)
    print(page)
    if asked.save:
        record = {
            "command": _command(), "versions": _versions(), "machine": machine(), "bar": asdict(BAR),
            "accuracy": judge.accuracy, "seeds": seeds, "wrong": wrong,
            "others": {name: asdict(one) for name, one in {**real, **bad}.items()},
        }  # fmt: skip
        out = HERE / "results" / "gan.json"
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 1 if wrong else 0


def _one(judge: Judge, seed: int, epochs: int) -> tuple[Verdict, dict[str, float]]:
    """Train with one seed, as the example does, and judge what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        result = train({"seed": seed, "epochs": epochs}, Path(folder))
        clocks = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        clocks |= {name: result.history[-1][f"train_{name}"] for name in ("d_loss", "g_loss")}
        return judge(rows(draw(result.model, PICTURES))), clocks


def _page(
    judge: Judge,
    found: Mapping[str, Verdict],
    seeds: Mapping[str, Mapping[str, float]],
    wrong: Sequence[str],
    asked: argparse.Namespace,
) -> str:
    """The table, and all that is needed to judge or repeat it."""
    machine_says, trees_say = judge.accuracy
    bar = {
        "recognised": f"≥ {BAR.recognised}", "confidence": "", "classes": f"≥ {BAR.classes}",
        "entropy": f"≥ {BAR.entropy}", "variety": f"≥ {BAR.variety}",
        "distance": f"{BAR.nearest} to {BAR.farthest}", "copies": f"≤ {BAR.copies}",
    }  # fmt: skip
    lines = [
        f"**Two objectives draw digits**: {asked.epochs} epochs, {PICTURES:,} pictures a seed. The judge names "
        f"{machine_says:.3f} (machine) and {trees_say:.3f} (trees) of the held-out real digits rightly.",
        "",
        f"| pictures | {' | '.join(FIGURES)} | s | CPU s |",
        "|---" * (len(FIGURES) + 3) + "|",
        f"| the bar | {' | '.join(bar[name] for name in FIGURES)} | | |",
    ]
    for name, verdict in found.items():
        plain = asdict(verdict)
        clocks = [
            f"{seeds[name][clock]:.0f}" if name in seeds else "" for clock in ("seconds", "cpu_seconds")
        ]
        cells = [str(plain[figure]) if figure == "classes" else f"{plain[figure]:.3f}" for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join([*cells, *clocks])} |")
    lines += [
        "",
        f"{'; '.join(wrong)}." if wrong else "Every seed reaches the bar; no cheat does.",
        f"Machine: {machine()}; torch threads: {asked.threads}.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in _versions().items())}.",
        f"Command: `{_command()}`",
    ]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    named = ("torch", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in named}}


def _command() -> str:
    return shlex.join(["python", "benchmarks/gan.py", *sys.argv[1:]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=_whole_numbers, default=(0, 1, 2), help="default 0,1,2")
    add("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}")
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    add("--save", action="store_true", help="write benchmarks/results/gan.json and .md")
    return parser.parse_args()


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
