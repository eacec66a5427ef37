"""The page that `gpu.py` prints: a pure rendering of what its runs measured, which runs, times and counts nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from frozen_table import versions
from pictures_runs import Run, Setting

SETTLED = 2  # epochs that do not count


def steps_of(runs: Sequence[Run]) -> list[float]:
    """Seconds of a step in each epoch that counts, of all these runs."""
    return [
        (later - sooner) * run.setting.batch / run.setting.pictures
        for run in runs
        for sooner, later in pairwise(run.found["marks"][SETTLED - 1 :])
    ]


def page(runs: Sequence[Run], labels: Mapping[str, str]) -> str:
    """The table, and all that is needed to judge or repeat it; `labels` name the contestants, in the order of the rows."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    head = (
        "network", "stage", "who", "n", "ms a step: median (min - max)", "/ plain", "/ floor", "first epoch s, by round",
        "peak GiB", "total s",
    )  # fmt: skip
    lines = [
        "**One CUDA GPU**: 224 px, bf16 autocast, pictures in memory, AdamW, constant rate; interleaved in one process.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head))),
        *(f"| {' | '.join(cells)} |" for setting in settings for cells in rows(runs, setting, labels)),
        "",
    ]
    for setting in settings:
        times = [f"{name} {1e3 * s:.3g} ms" for name, s in _floor(runs, setting).items()]
        lines.append(
            f"{setting}: {setting.epochs} epochs of {setting.pictures // setting.batch} steps of {setting.batch}; "
            f"{', '.join(times)}."
        )

    def several(what: Callable[[Run], str]) -> str:
        return "; ".join(dict.fromkeys(map(what, runs))) or "-"

    lines += [
        "",
        f"Device: {several(lambda r: r.found['device'])}; it was measured at {several(_rates)}.",
        f"Machine: {several(lambda r: r.found['machine'])}; "
        f"{min((r.when for r in runs), default='-')} to {max((r.when for r in runs), default='-')}.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions(runs).items())}; lehr at {several(lambda r: r.commit)}.",
        f"Command: `{several(lambda r: r.found['command'])}`",
    ]
    wrong = [
        f"{r.setting}, {r.contestant}, round {r.round + 1}: {r.found['failed']}" for r in runs if not r.ok
    ]
    return "\n".join([*lines, *(["", "**Failed:**", *(f"- {each}" for each in wrong)] if wrong else [])])


def rows(runs: Sequence[Run], setting: Setting, labels: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The cells of everybody who has trained in this setting."""
    lines: list[tuple[str, ...]] = []
    base = steps_of([r for r in runs if r.ok and (r.setting, r.contestant) == (setting, "plain")])
    floor = _floor(runs, setting)
    for who, label in labels.items():
        mine = [r for r in runs if r.ok and (r.setting, r.contestant) == (setting, who)]
        if not mine:
            continue
        mine.sort(key=lambda run: run.round)
        steps = steps_of(mine)
        step, shown = statistics.median(steps), [f"{1e3 * s:.3g}" for s in (min(steps), max(steps))]
        is_cached = any(event["event"] == "PrefixCached" for run in mine for event in run.found["told"])
        lines.append((
            setting.network, setting.thaw, label, str(len(mine)),
            f"{1e3 * step:.3g} ({' - '.join(shown)})",
            f"{step / statistics.median(base):.3f}" if base else "-",
            f"cached: {1e6 * step:.0f} µs a step" if is_cached
            else f"{step / max(floor['arithmetic'], floor['bytes']):.2f}",
            ", ".join(f"{run.found['marks'][0]:.1f}" for run in mine),
            f"{statistics.median(run.found['peak'] for run in mine) / (1 << 30):.2f}",
            f"{statistics.median(run.found['total'] for run in mine):.1f}",
        ))  # fmt: skip
    return lines


def _floor(runs: Sequence[Run], setting: Setting) -> Mapping[str, float]:
    return next(run.found["floor"] for run in reversed(runs) if run.setting == setting)


def _rates(run: Run) -> str:
    rates = run.found["rates"]
    return f"{rates['operations'] / 1e12:.4g} T operations/s in bf16 and {rates['bytes'] / 1e9:.4g} GB/s"
