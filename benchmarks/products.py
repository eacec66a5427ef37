"""A linear layer by oneDNN beside torch's own, by MKL, in fp32 on a CPU.

    python benchmarks/products.py [--threads 1] [--repeats 9]

What lehr does with the linear layers of a frozen part on AMD's processors (`run/prefix/linear.py`); the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from lehr.run.prefix.linear import product
from machine import machine

SHAPES = [  # rows of the input, inside, outside
    ((8, 197), 384, 1536),
    ((8, 197), 1536, 384),
    ((32, 197), 384, 1152),
    ((8, 197), 768, 3072),
    ((8, 49), 768, 3072),
    ((32, 128), 768, 768),
    ((8,), 2048, 1000),
    ((8, 3136), 96, 384),
    ((3,), 64, 64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=9, help="of each, in turns (default 9)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| rows | layer | weights | MKL, ms | oneDNN's share | apart by |")
    print("|---|---|---|---|---|---|")
    for rows, inside, outside in SHAPES:
        x, weight, bias = torch.randn(*rows, inside), torch.randn(outside, inside), torch.randn(outside)
        own = functional.linear(x, weight, bias)
        apart = float((product(x, weight, bias) - own).norm() / own.norm())
        usual, other = _timed(
            lambda x=x, w=weight, b=bias: functional.linear(x, w, b),
            lambda x=x, w=weight, b=bias: product(x, w, b),
            asked.repeats,
        )
        where = " x ".join(map(str, rows))
        print(
            f"| {where} | {inside}, {outside} | {weight.numel():,} | {1e3 * usual:.3f} | {other / usual:.2f} | {apart:.0e} |"
        )
    print(
        f"\nMedians of n = {asked.repeats}; {asked.threads} thread(s); torch {torch.__version__}; {machine()}"
    )


def _timed(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for run, times in zip((one, other), taken, strict=True):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    first, second = (statistics.median(times[1:]) for times in taken)
    return first, second


if __name__ == "__main__":
    main()
