"""The table that `loop.py` prints: a pure rendering of what its runs measured. It runs and times nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One process: who, where the bar went, in which round, and what it measured (or why it did not)."""

    name: str
    sink: str
    round: int
    found: Mapping[str, Any]
    drawn_bytes: int

    @property
    def ok(self) -> bool:
        """Whether it trained to the end."""
        return "wall_us" in self.found


def problems(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison worthless: updates that did not happen, other initial weights, no learning."""
    found = [f"{r.name} ({r.sink}): {r.found['failed']}" for r in runs if "failed" in r.found]
    done = [r for r in runs if r.ok]
    weights = {r.found["initial_weights"] for r in done}
    if len(weights) > 1:
        found.append(f"the contestants began with different weights: {sorted(weights)}")
    for r in done:
        before, after = r.found["loss_before"], r.found["loss_after"]
        if r.found["updates"] != r.found["steps"]:
            found.append(f"{r.name} ({r.sink}): {r.found['updates']} updates, expected {r.found['steps']}")
        if not after < 0.8 * before:
            found.append(f"{r.name} ({r.sink}): the loss went from {before:.3f} to {after:.3f}")
    return list(dict.fromkeys(found))


def rows(runs: Sequence[Run], labels: Mapping[str, str], sinks: Sequence[str]) -> list[str]:
    """A markdown table with a line for each contestant and sink."""
    head = (
        "contestant", "bar to", "us/step, median", "min - max", "/ bare (min - max)",
        "/ bare-fast (min - max)", "CPU us/step, median", "CPU / bare", "updates", "loss at the end",
    )  # fmt: skip
    lines = [_row(runs, name, label, sink) for name, label in labels.items() for sink in sinks]
    return [_line(head), _line(["---"] * len(head)), *map(_line, lines)]


def _row(runs: Sequence[Run], name: str, label: str, sink: str) -> list[str]:
    mine = [r for r in runs if (r.name, r.sink) == (name, sink)]
    done = [r.found for r in mine if r.ok]
    if not done:
        reason = next(
            (str(r.found["missing"]) + " is not installed" for r in mine if "missing" in r.found), "failed"
        )
        return [label, sink, f"not run: {reason}", *[""] * 7]
    wall = [found["wall_us"] for found in done]
    return [
        label,
        sink,
        f"{statistics.median(wall):.1f}",
        f"{min(wall):.1f} - {max(wall):.1f}",
        _spread(_ratios(runs, name, sink, "bare", "wall_us")),
        _spread(_ratios(runs, name, sink, "bare-fast", "wall_us")),
        f"{statistics.median(found['cpu_us'] for found in done):.1f}",
        _spread(_ratios(runs, name, sink, "bare", "cpu_us"), ends=False),
        f"{done[-1]['updates']:,}",
        f"{statistics.median(found['loss_after'] for found in done):.4f}",
    ]


def _ratios(runs: Sequence[Run], name: str, sink: str, base: str, key: str) -> list[float]:
    """`name` over `base`, round by round; the base draws nothing, so its runs of one round are averaged."""
    ratios = []
    for run in runs:
        beside = [b.found[key] for b in runs if b.ok and (b.name, b.round) == (base, run.round)]
        if run.ok and (run.name, run.sink) == (name, sink) and beside:
            ratios.append(run.found[key] / statistics.fmean(beside))
    return ratios


def _spread(ratios: Sequence[float], *, ends: bool = True) -> str:
    if not ratios:
        return "-"
    middle = f"{statistics.median(ratios):.2f}"
    return f"{middle} ({min(ratios):.2f} - {max(ratios):.2f})" if ends else middle


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
