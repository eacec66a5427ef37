"""Tries every reader with many damaged and lying files: never a traceback, never a hang, never memory without bound.

    python scripts/fuzz.py --examples 20000 [--only NAME]

A line for each reader: how many different inputs were tried, how many were accepted and refused, how long the
slowest took, and by how much memory grew. The inputs are those of tests/fuzz.py. Each reader runs in a process
of its own with a limit on its memory. Ends with 1 where a reader did anything else than give a value or an error in
words, and prints the input.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from hypothesis import HealthCheck, Phase, given, settings

from fuzz import attempt, readers

_LIMIT = 12 << 30  # bytes of address space, of which torch takes some at once
_SLOW = 20.0  # seconds; more is a hang


def main() -> int:
    """Run what the command line asks for; 0 where every reader kept its promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="inputs for each reader")
    parser.add_argument("--only", metavar="NAME", help=f"one of: {', '.join(readers())}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        return _one(asked.only, asked.examples)
    names = [asked.only] if asked.only else list(readers())
    print(
        f"{'reader':14} {'inputs':>8} {'accepted':>8} {'refused':>8} {'slowest':>9} {'memory':>8} {'time':>7}"
    )
    failed = 0
    for name in names:
        began = time.perf_counter()
        command = [sys.executable, __file__, "--here", "--only", name, "--examples", str(asked.examples)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{name:14} FAILED ({done.returncode})\n{done.stderr[-3000:]}")
            continue
        said = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:14} {said['inputs']:8,} {said['accepted']:8,} {said['inputs'] - said['accepted']:8,} "
            f"{1000 * said['slowest']:6.0f} ms {said['memory']:5.0f} MB {time.perf_counter() - began:5.0f} s",
            flush=True,
        )
    return 1 if failed else 0


def _one(name: str, examples: int) -> int:
    """Try one reader here, and print what came of it as JSON."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))
    reader = readers()[name]
    counted = {"inputs": 0, "accepted": 0, "slowest": 0.0, "memory": 0.0}
    seen: set[int] = set()
    before, last = 0, b""
    folder = Path(tempfile.mkdtemp())

    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(reader.inputs)
    def tried(content: bytes) -> None:
        nonlocal before, last
        last = content
        began = time.perf_counter()
        accepted = attempt(reader, content, folder)
        took = time.perf_counter() - began
        assert took < _SLOW, f"{name}: took {took:.0f} s"
        if hash(content) not in seen:
            seen.add(hash(content))
            counted["inputs"] += 1
            counted["accepted"] += accepted
        counted["slowest"] = max(counted["slowest"], took)
        before = before or _peak()  # after the first, by which all is loaded

    try:
        tried()
    except Exception as error:  # whatever a reader should not have raised
        kept = folder / "failed"
        kept.write_bytes(last)
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"{type(error).__name__}: {str(error)[:500]}\n  at {where.filename}:{where.lineno}\n"
            f"  the input, of {len(last):,} bytes, is in {kept}: {last[:300]!r}",
            file=sys.stderr,
        )
        return 1
    counted["memory"] = (_peak() - before) / 1024
    print(json.dumps(counted))
    return 0


def _peak() -> int:
    """The most memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
