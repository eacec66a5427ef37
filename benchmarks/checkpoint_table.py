"""The table that `checkpoint.py` prints: a pure rendering of what its runs measured. It runs and times nothing.

A cycle is what follows a checkpoint until the next: the gap in which the loop stands still, and the steps
beside which something may still be written. What a quiet step and a quiet gap take is the median over the last
steps of all cycles of the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE = "torch"
LEAST_BYTES = 12  # a parameter and Adam's two moments, in fp32


@dataclass(frozen=True)
class Cycle:
    """One checkpoint: how long the loop stood still for it, and how much longer the steps took that followed, in
    seconds.
    """

    stall: float
    slower: float

    @property
    def total(self) -> float:
        """What the checkpoint cost the run."""
        return self.stall + self.slower


@dataclass(frozen=True)
class Run:
    """One process: who, in which round, and what it measured (or why it did not)."""

    name: str
    round: int
    every: int
    found: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it trained to the end."""
        return "begun" in self.found

    @property
    def steps(self) -> list[float]:
        """From the beginning of each forward pass to the end of the optimizer's step, seconds."""
        return [end - begin for begin, end in zip(self.found["begun"], self.found["ended"], strict=True)]

    @property
    def gaps(self) -> list[float]:
        """From the end of each step to the beginning of the next, seconds."""
        return [b - e for b, e in zip(self.found["begun"][1:], self.found["ended"][:-1], strict=True)]

    @property
    def quiet_step(self) -> float:
        """The median step in the last third of all cycles."""
        return statistics.median(t for i, t in enumerate(self.steps) if i % self.every >= self._late)

    @property
    def quiet_gap(self) -> float:
        """The median gap without a checkpoint."""
        return statistics.median(t for i, t in enumerate(self.gaps) if (i + 1) % self.every)

    def cycles(self) -> Iterator[Cycle]:
        """Each checkpoint that training went on after."""
        steps, gaps = self.steps, self.gaps
        for at in range(self.every, len(steps), self.every):
            beside = steps[at : at + self._late]
            yield Cycle(gaps[at - 1] - self.quiet_gap, sum(beside) - len(beside) * self.quiet_step)

    @property
    def _late(self) -> int:
        return self.every - self.every // 3


def problems(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison worthless: a checkpoint that lacks something or has other weights."""
    found = [f"{r.name}: {r.found['failed']}" for r in runs if "failed" in r.found]
    for r in runs:
        if not r.ok or r.found["same_weights"] is None:
            continue
        if not r.found["same_weights"]:
            found.append(f"{r.name}: its last checkpoint has other weights than the model")
        if r.found["largest_bytes"] < LEAST_BYTES * r.found["parameters"]:
            found.append(f"{r.name}: {r.found['largest_bytes']:,} bytes are not model and optimizer")
    return list(dict.fromkeys(found))


def rows(runs: Sequence[Run], labels: Mapping[str, tuple[str, str]]) -> list[str]:
    """A markdown table with a line for each contestant; `labels` says what it is called and what it flushes."""
    head = (
        "contestant", "flushed", "first stall, ms", "stall, ms, median", "min - max", "/ torch.save (min - max)",
        "slower steps, s", "stall + slower steps, s", "memory, MB", "checkpoint, MB", "quiet step, ms",
    )  # fmt: skip
    lines = [_row(runs, name, *label) for name, label in labels.items()]
    return [_line(head), _line(["---"] * len(head)), *map(_line, lines)]


def _row(runs: Sequence[Run], name: str, label: str, flushes: str) -> list[str]:
    mine = [r for r in runs if r.name == name]
    done = [r for r in mine if r.ok]
    if not done:
        missing = [f"{r.found['missing']} is not installed" for r in mine if "missing" in r.found]
        return [label, flushes, f"not run: {missing[0] if missing else 'failed'}", *[""] * 8]
    first = [next(r.cycles()).stall for r in done]
    later = [cycle for r in done for cycle in list(r.cycles())[1:]]
    stalls = [cycle.stall for cycle in later]
    above = _beside(runs, name, "none", lambda r: r.found["grown_mb"], lambda mine, none: mine - none)
    return [
        label,
        flushes,
        f"{1e3 * statistics.median(first):.0f}",
        f"{1e3 * statistics.median(stalls):.0f}",
        f"{1e3 * min(stalls):.0f} - {1e3 * max(stalls):.0f}",
        _spread(_beside(runs, name, BASE, _stall, lambda mine, base: mine / base)),
        f"{statistics.median(cycle.slower for cycle in later):.2f}",
        f"{statistics.median(cycle.total for cycle in later):.2f}",
        f"{statistics.median(above):+.0f}" if above else "-",
        f"{done[-1].found['largest_bytes'] / 1e6:.0f}",
        f"{1e3 * statistics.median(r.quiet_step for r in done):.0f}",
    ]


def _stall(run: Run) -> float:
    return statistics.median(cycle.stall for cycle in list(run.cycles())[1:])


def _beside(
    runs: Sequence[Run],
    name: str,
    base: str,
    value: Callable[[Run], float],
    compare: Callable[[float, float], float],
) -> list[float]:
    """`name` against `base`, round by round."""
    bases = {r.round: value(r) for r in runs if r.ok and r.name == base}
    return [compare(value(r), bases[r.round]) for r in runs if r.ok and r.name == name and r.round in bases]


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
