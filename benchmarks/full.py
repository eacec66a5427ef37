"""Fully thawed training: lehr beside a plain PyTorch loop, the best that is tuned by hand, Lightning and fastai.

    python benchmarks/full.py [--rounds N] [--only resnet18 ...] [--contestants plain hand lehr ...] [--table]

224 px, random weights, batches of 16, tensors in memory, AdamW, one thread. What counts is the median time of a step
after the first `--warm-up` of them. A round runs everybody once, each in a fresh process, and begins one place further on
than the round before; ratios are taken within a round. Runs are saved one by one; the same command goes on.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from frozen_table import CPU, WALL, growth, problems, versions
from machine import machine
from pictures_contestants import CONTESTANTS
from pictures_models import NETWORKS
from pictures_runs import HERE, Run, Setting, Store, cores, run_all, turned

WHO = ("plain", "hand", "hand-contiguous", "lehr", "lightning", "fastai")
BY_HAND = ("hand", "hand-contiguous")
WITHIN = 1.03  # of the better of the two by hand
LABELS = {"lightning": "Lightning", "fastai": "fastai"}  # with nothing frozen
OUT = HERE / "results" / "full.json"


def main() -> int:
    asked = _arguments()
    pictures = asked.batch * (asked.warm_up + asked.steps)
    settings = [Setting(name, "all", 1, asked.batch, pictures) for name in asked.only]
    store = Store(asked.out)
    if not asked.table:
        store.forget(asked.again, settings)
        rounds = range(asked.rounds)
        run_all([(s, turned(asked.contestants, n), n) for n in rounds for s in settings], store, asked.cores)
    page = _page(store.runs, list(dict.fromkeys([r.setting for r in store.runs])), asked)
    print(page)
    asked.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 1 if problems(store.runs) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    names = [name for name in NETWORKS if name != "tiny"]
    add("--only", nargs="+", choices=names, default=["resnet18", "mobilenet_v3_large"], metavar="NETWORK")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(WHO), help=f"default {', '.join(WHO)}")
    add("--again", nargs="+", default=[], choices=CONTESTANTS, help="run these again")
    add("--rounds", type=int, default=5)
    add("--warm-up", type=int, default=6, help="steps that do not count (default 6)")
    add("--steps", type=int, default=14, help="steps that do (default 14)")
    add("--batch", type=int, default=16)
    add("--cores", type=cores, default=cores("all"), help="0,1: two processes at a time, each on its core")
    add("--out", type=Path, default=OUT, help="where the runs are kept")
    add("--table", action="store_true", help="only the table of what there is")
    return parser.parse_args()


def step(run: Run, clock: int, warm_up: int) -> float:
    """The median seconds of a step after the warm-up."""
    times = [mark[clock] for mark in run.found["marks"]]
    gaps = [later - sooner for sooner, later in pairwise(times)]
    return statistics.median(gaps[warm_up - 1 :])  # the first gap ends with the second step


def ratios(runs: Sequence[Run], who: str, base: Sequence[str], clock: int, warm_up: int) -> list[float]:
    """`who` over the best of `base`, round by round; rounds that lack one of them are left out.

    The best is one of them for all rounds, by its median: the smallest of several noisy numbers would flatter it.
    """
    by_round = {(r.contestant, r.round): step(r, clock, warm_up) for r in runs if r.ok}
    medians = {b: [t for (name, _), t in by_round.items() if name == b] for b in base}
    there = {b: statistics.median(times) for b, times in medians.items() if times}
    if not there:
        return []
    best = min(there, key=lambda name: there[name])
    rounds = sorted({n for name, n in by_round if name == who and (best, n) in by_round})
    return [by_round[who, n] / by_round[best, n] for n in rounds]


def rows(runs: Sequence[Run], setting: Setting, warm_up: int) -> list[str]:
    """A line for everybody who trained in this setting."""
    head = (
        "network", "who", "n", "CPU ms a step: median (min - max)", "/ plain (min - max)",
        "/ best by hand (min - max)", "wall ms", "wall / best by hand", "peak MiB above start",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for who, contestant in CONTESTANTS.items():
        label = LABELS.get(who, contestant.label)
        mine = [r for r in runs if r.setting == setting and r.contestant == who]
        done = [r for r in mine if r.ok]
        if not done:
            reasons = [r.found.get("missing", "failed") for r in mine]
            lines += [(setting.network, label, f"not run: {r}", *[""] * 6) for r in reasons[:1]]
            continue
        cpu = [1e3 * step(r, CPU, warm_up) for r in done]
        here = [r for r in runs if r.setting == setting]
        lines.append((
            setting.network, label, str(len(done)),
            f"{statistics.median(cpu):.0f} ({min(cpu):.0f} - {max(cpu):.0f})",
            _spread(ratios(here, who, ("plain",), CPU, warm_up)),
            _spread(ratios(here, who, BY_HAND, CPU, warm_up)),
            f"{statistics.median(1e3 * step(r, WALL, warm_up) for r in done):.0f}",
            _spread(ratios(here, who, BY_HAND, WALL, warm_up)),
            f"{statistics.median(growth(r) for r in done) / (1 << 20):.0f}",
        ))  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _spread(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.3f} ({min(found):.3f} - {max(found):.3f})" if found else "-"


def _verdict(runs: Sequence[Run], setting: Setting, warm_up: int) -> str:
    here = [r for r in runs if r.setting == setting]
    found = ratios(here, "lehr", BY_HAND, CPU, warm_up)
    if not found:
        return f"{setting.network}: lehr beside the best by hand was not run."
    median = statistics.median(found)
    said = "within" if median <= WITHIN else "NOT within"
    return f"{setting.network}: lehr is at {median:.3f} of the best by hand, {said} {WITHIN:.2f} (n = {len(found)})."


def _page(runs: Sequence[Run], settings: Sequence[Setting], asked: argparse.Namespace) -> str:
    """The table, and all that is needed to judge or repeat it."""
    wrong, loads = problems(runs), [run.load for run in runs] or [0.0]
    lines = [
        f"**Everything thawed**: the median step after {asked.warm_up} steps of warm-up; batches of "
        f"{asked.batch}, 224 px, tensors in memory, AdamW, one thread; fresh processes, interleaved.",
        "",
    ]
    for setting in settings:
        lines += [*rows(runs, setting, asked.warm_up), "", _verdict(runs, setting, asked.warm_up), ""]
    lines += [
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions(runs).items())}; "
        f"lehr at {', '.join(sorted({r.commit for r in runs if r.contestant == 'lehr'})) or '-'}.",
        f"Machine: {machine()}; one process a core, each pinned to its core; load average {min(loads):.1f} to "
        f"{max(loads):.1f}; {min((r.when for r in runs), default='-')} to {max((r.when for r in runs), default='-')}.",
        f"Command: `{shlex.join(['python', 'benchmarks/full.py', *sys.argv[1:]])}`",
    ]
    return "\n".join([*lines, *(["", "**Not valid:**", *(f"- {each}" for each in wrong)] if wrong else [])])


if __name__ == "__main__":
    sys.exit(main())
