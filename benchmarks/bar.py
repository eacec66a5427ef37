"""What a progress bar costs at every step, with two losses shown: lehr.bar beside tqdm.

    python benchmarks/bar.py [--rounds N] [--save]

The task: 100,000 samples in batches of 8, 12,500 steps; after each, d_loss and g_loss are given to the bar. A step is a
fixed piece of arithmetic of some ten microseconds, long enough for a bar to be drawn several times. Every contestant
runs once a round, its bar going to a file and to a pseudo-terminal that another process reads; a round begins one
place further on than the round before. What counts is the processor time (of all threads) above the loop without a bar in
the same round: other processes on the machine lengthen the wall time of whoever is running, not that.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

import lehr
from machine import machine

HERE = Path(__file__).resolve().parent
STEPS = 100_000 // 8
PROMISE = ("lehr", "tqdm-quiet")  # the first costs no more than the second
SINKS = ("file", "pty")
ROWS, COLUMNS = 24, 110  # of the pseudo-terminal

Losses = Sequence[Any]


def work() -> int:
    """A step."""
    return sum(range(1200))


def none(_: TextIO, d: Losses, g: Losses) -> None:
    for step in range(STEPS):
        work()
        d[step], g[step]


def tqdm_bare(stream: TextIO, d: Losses, g: Losses) -> None:
    for step in tqdm(range(STEPS), file=stream, desc="epoch 1", mininterval=0.1):
        work()
        d[step], g[step]


def tqdm_quiet(stream: TextIO, d: Losses, g: Losses) -> None:
    bar = tqdm(range(STEPS), file=stream, desc="epoch 1", mininterval=0.1)
    for step in bar:
        work()
        bar.set_postfix(d_loss=d[step], g_loss=g[step], refresh=False)


def tqdm_default(stream: TextIO, d: Losses, g: Losses) -> None:
    bar = tqdm(range(STEPS), file=stream, desc="epoch 1")
    for step in bar:
        work()
        bar.set_postfix(d_loss=d[step], g_loss=g[step])


def lehr_bar(stream: TextIO, d: Losses, g: Losses) -> None:
    bar = lehr.bar(range(STEPS), "epoch 1", stream=stream, mode="bar")
    for step in bar:
        work()
        bar.set_postfix(d_loss=d[step], g_loss=g[step])


def tqdm_items(stream: TextIO, d: Losses, g: Losses) -> None:
    bar = tqdm(range(STEPS), file=stream, desc="epoch 1", mininterval=0.1)
    for step in bar:
        work()
        bar.set_postfix(d_loss=d[step].item(), g_loss=g[step].item(), refresh=False)


CONTESTANTS: Mapping[str, tuple[str, Callable[[TextIO, Losses, Losses], None], bool]] = {
    "none": ("no bar", none, False),
    "tqdm-bare": ("tqdm, no losses", tqdm_bare, False),
    "tqdm-quiet": ("tqdm, `mininterval`, `set_postfix(..., refresh=False)`", tqdm_quiet, False),
    "tqdm": ("tqdm, `set_postfix(...)`", tqdm_default, False),
    "lehr": ("lehr.bar, `set_postfix(...)`", lehr_bar, False),
    "tqdm-items": ("tqdm, `mininterval`, `refresh=False`, losses are tensors: `.item()`", tqdm_items, True),
    "lehr-tensors": ("lehr.bar, losses are tensors", lehr_bar, True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="runs of every contestant (default 9)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bar.json and bar.md")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    runs, wrong = measured(asked.rounds)
    page = page_of(runs, asked.rounds)
    print(page)
    if asked.save:
        record = {
            "what": "processor and wall time per step, microseconds", "command": command(), "versions": versions(), "machine": machine(),
            "steps": STEPS, "rounds": asked.rounds, "load": os.getloadavg(), "problems": wrong, "runs": runs,
        }  # fmt: skip
        out = HERE / "results" / "bar.json"
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    for problem in wrong:
        print(f"not valid: {problem}", file=sys.stderr)
    kept = all(cost(runs, PROMISE[0], sink)[0] <= cost(runs, PROMISE[1], sink)[0] for sink in SINKS)
    print(f"\nlehr.bar costs no more than tqdm with `mininterval`: {'yes' if kept else 'NO'}")
    return 1 if wrong or not kept else 0


def measured(rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Microseconds a step of every run; and what was not drawn as it should."""
    generator = torch.Generator().manual_seed(0)
    tensors = [list(torch.rand(STEPS, generator=generator).unbind()) for _ in range(2)]
    numbers = [[tensor.item() for tensor in some] for some in tensors]
    last = [some[-1] for some in numbers]
    for _, run, _ in CONTESTANTS.values():  # so that nobody pays for the first time
        with tempfile.TemporaryFile("w", encoding="utf-8") as stream:
            run(stream, *(tensors if run is tqdm_items else numbers))
    runs: list[dict[str, Any]] = []
    wrong: list[str] = []
    names = list(CONTESTANTS)
    for number in range(rounds):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            _, run, wants_tensors = CONTESTANTS[name]
            for sink in SINKS:
                with opened(sink) as stream:
                    began, before = time.perf_counter(), time.process_time()
                    run(stream, *(tensors if wants_tensors else numbers))
                    cpu, wall = time.process_time() - before, time.perf_counter() - began
                    if sink == "file":
                        wrong += problems(name, stream, last)
                spent = {"cpu_us": 1e6 * cpu / STEPS, "wall_us": 1e6 * wall / STEPS}
                runs.append({"name": name, "sink": sink, "round": number, **spent})
        print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    return runs, list(dict.fromkeys(wrong))


def problems(name: str, stream: TextIO, losses: Sequence[float]) -> list[str]:
    """What is wrong with what was drawn: it must end with all steps, and with the last losses where it shows any."""
    stream.flush()
    stream.seek(0)
    last = re.split(r"[\r\n]+", stream.read().strip())[-1]
    if name == "none":
        return [] if not last else ["the loop without a bar drew something"]
    found = []
    if f"{STEPS}/{STEPS}" not in last.replace(",", ""):
        found.append(f"{name}: the last line is {last!r}")
    values = [float(value) for value in re.findall(r"[dg]_loss=([0-9.e-]+)", last)]
    wanted = [] if name == "tqdm-bare" else losses
    if len(values) != len(wanted) or any(abs(a - b) > 0.01 * b for a, b in zip(values, wanted, strict=False)):
        found.append(f"{name}: the losses at the end are {values}, not {wanted}")
    return found


@contextmanager
def opened(sink: str) -> Iterator[TextIO]:
    """A file, or a pseudo-terminal that another process reads all the time."""
    if sink == "file":
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            yield file
        return
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    reader = subprocess.Popen(["cat"], stdin=near, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(near)
    with os.fdopen(far, "w", encoding="utf-8") as stream:
        yield stream
    reader.wait()


def cost(runs: Sequence[Mapping[str, Any]], name: str, sink: str) -> tuple[float, float, float]:
    """Microseconds a step above the loop without a bar, round by round: median, smallest, largest."""
    bare = {run["round"]: run["cpu_us"] for run in of(runs, "none", sink)}
    above = [run["cpu_us"] - bare[run["round"]] for run in of(runs, name, sink)]
    return statistics.median(above), min(above), max(above)


def of(runs: Sequence[Mapping[str, Any]], name: str, sink: str) -> list[Mapping[str, Any]]:
    return [run for run in runs if (run["name"], run["sink"]) == (name, sink)]


def page_of(runs: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """The table, and all that is needed to judge or repeat it."""
    lines = [
        f"**Cost of a bar**: {STEPS:,} steps, two losses set at each; n = {rounds} runs each in one process, interleaved.",
        "",
        "| bar | to | CPU us/step above no bar, median (min - max) | CPU us/step, median | wall us/step, median |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (label, _, _) in CONTESTANTS.items():
        for sink in SINKS:
            mine = of(runs, name, sink)
            middle, low, high = cost(runs, name, sink)
            above = "" if name == "none" else f"{middle:.2f} ({low:.2f} - {high:.2f})"
            whole = [statistics.median(run[key] for run in mine) for key in ("cpu_us", "wall_us")]
            lines.append(f"| {label} | {sink} | {above} | {whole[0]:.2f} | {whole[1]:.2f} |")
    said = ", ".join(f"{key} {value}" for key, value in versions().items())
    load = f"load average at the end {os.getloadavg()[0]:.2f}"
    return "\n".join(
        [*lines, "", f"Versions: {said}.", f"Machine: {machine()}; {load}.", f"Command: `{command()}`"]
    )


def versions() -> dict[str, str]:
    names = ("tqdm", "torch")
    return {
        "python": platform.python_version(),
        "lehr": "this checkout",
        **{name: version(name) for name in names},
    }


def command() -> str:
    return " ".join(["python", "benchmarks/bar.py", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
