"""Kills real runs at random moments, resumes them, and compares every bit with a run that was never stopped.

    python scripts/kill.py --kills 100 --seed 0 [--save FILE]
    python scripts/kill.py --injection

The first kills each run one to three times (SIGKILL, after a random time), with another number of worker processes
after each, and prints a line for each run and where it was killed. The second makes a run die at every single
operation on its files. Both are those of the tests, in larger numbers. Ends with 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

import injecting
import lehr
from killing import trial, warm_up, whole
from nursery import nursery

_ERRORS = ("ENOSPC", "EIO", "EACCES")


def main() -> int:
    """Do what the command line asks for; 0 where all is equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="runs to kill (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random moments (0)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    parser.add_argument("--injection", action="store_true", help="die at every operation on files instead")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = _injection(Path(folder)) if asked.injection else _kills(asked.kills, asked.seed, Path(folder))
    found |= {"seconds": round(time.monotonic() - began, 1), "torch": torch.__version__}
    found |= {"lehr": lehr.__version__, "python": platform.python_version(), "system": platform.platform()}
    print(f"{found['equal']} of {found['runs']} as promised, in {found['seconds']:.0f} s")
    if asked.save:
        asked.save.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["equal"] == found["runs"] else 1


def _kills(runs: int, seed: int, folder: Path) -> dict[str, object]:
    """Kill so many runs; what came of it."""
    place = nursery(warm_up)
    reference = whole(place, folder)
    equal, places, lines = 0, Counter[str](), []
    for number in range(runs):
        done = trial(place, folder, seed * 1_000_003 + number, reference)
        good = not done.different and not done.problem
        equal += good
        places.update(done.places)
        words = "equal" if good else done.problem or f"NOT EQUAL: {', '.join(done.different)}"
        workers = ", ".join(map(str, done.workers))
        lines.append(f"{number:4}  {words:6} workers {workers:10}  killed: {'; '.join(done.places)}")
        print(lines[-1], flush=True)
    print(f"{sum(places.values())} kills:")
    for where, count in sorted(places.items()):
        print(f"{count:6}  {where}")
    left = place.left(wait=30.0)
    print(f"{left} processes left behind")
    return {
        "runs": runs,
        "equal": equal if not left else 0,
        "seed": seed,
        "places": dict(sorted(places.items())),
    }


def _injection(folder: Path) -> dict[str, object]:
    """Let every operation go wrong in every way; what came of it."""
    place = nursery(warm_up)
    reference = injecting.whole(place, folder)
    kinds = Counter(name.split()[0] for name in reference.operations)
    print(f"{len(reference.operations)} operations: {', '.join(f'{n} {k}' for k, n in kinds.most_common())}")
    ways = {
        "death": (injecting.died, reference.faults()),
        "an error": (injecting.refused, reference.faults(*_ERRORS)),
        "errors from there on": (injecting.refused, reference.faults(*_ERRORS, lasting=True)),
    }
    runs = equal = 0
    for way, (tried, faults) in ways.items():
        good = 0
        for fault in faults:
            wrong = tried(place, folder, fault, reference)
            good += not wrong
            if wrong:
                print(f"{fault}: {wrong}", flush=True)
        print(f"{way}: {good} of {len(faults)} as promised", flush=True)
        runs, equal = runs + len(faults), equal + good
    return {"runs": runs, "equal": equal, "operations": dict(kinds)}


if __name__ == "__main__":
    sys.exit(main())
