"""How long a million steps of a schedule take, evaluated as one array.

    python benchmarks/schedules.py [--repeats N]

The schedule has three parts, `warmup("5%") >> hold("20%") >> cosine(0.01)`; the steps are a NumPy array that
exists before the clock starts. Making the curve is timed apart.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time

import numpy as np

import lehr

STEPS = 1_000_000
LIMIT = 0.1  # seconds; what the project promises


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=21, help="evaluations (default 21)")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        parser.error("--repeats must be at least 1")
    steps = np.arange(STEPS)
    making, evaluating = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        curve = (lehr.warmup("5%") >> lehr.hold("20%") >> lehr.cosine(0.01)).over(steps=STEPS)
        made = time.perf_counter()
        values = curve(steps)
        making.append(made - began)
        evaluating.append(time.perf_counter() - made)
    _check(values)
    median = statistics.median(evaluating)
    print(f"schedule: {curve}")
    low, high = 1e3 * min(evaluating), 1e3 * max(evaluating)
    print(f"{STEPS:,} steps: median {1e3 * median:.1f} ms, min {low:.1f}, max {high:.1f}, n = {repeats}")
    print(f"the promise is below {1e3 * LIMIT:.0f} ms")
    print(f"making the curve: median {1e6 * statistics.median(making):.0f} us")
    print(f"python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} CPUs")
    return 0 if median < LIMIT else 1


def _check(values: np.ndarray) -> None:
    """The array is the curve: its peak, its plateau, its half-way point and its last step, by hand."""
    rise, held = STEPS // 20, STEPS // 20 + STEPS // 5
    fall = STEPS - held
    expected = {
        0: 1 / (rise + 1),
        rise: 1.0,
        held - 1: 1.0,
        held + fall // 2: 0.505,
        STEPS - 1: 0.01 + 0.99 * (1 + np.cos(np.pi * (fall - 1) / fall)) / 2,
    }
    for step, value in expected.items():
        if abs(values[step] - value) > 1e-12:
            sys.exit(f"step {step}: the curve is {values[step]!r}, by hand it is {value!r}")


if __name__ == "__main__":
    sys.exit(main())
