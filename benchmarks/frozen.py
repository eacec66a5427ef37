"""Training with a frozen backbone for 10 and 20 epochs: lehr beside a plain PyTorch loop and the field.

    python benchmarks/frozen.py [--only resnet18,head mobilenet_v3_large ...] [--contestants plain lehr ...]
    python benchmarks/frozen.py --again lehr          # lehr's runs anew, the others as they are
    python benchmarks/frozen.py --table               # the tables of what there is; runs nothing
    python benchmarks/frozen.py --contestants plain lightning fts fastai hf keras --pictures 64 --epochs 10 --out FIELD.json

Five networks, thawed at the head, the last block or the last stage: 224 px, random weights, batches of 8, tensors
in memory, AdamW, one thread. The time of 10 epochs is the clock after 10 of the 20. Each contestant is a fresh
process, saved when it is done; the same command goes on where it was stopped. Everything of a setting runs on one core.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from frozen_table import all_rows, lehr_rows, problems, versions
from machine import machine
from pictures_contestants import CONTESTANTS
from pictures_models import NETWORKS, THAWS
from pictures_runs import HERE, Job, Run, Setting, Store, cores, run_all, turned

FIELD = ("plain", "lehr", "lightning", "fts", "fastai", "hf", "keras")
BESIDE_THE_FIELD = ("resnet18", "mobilenet_v3_large")  # the others have the plain loop and lehr, unless asked
OUT = HERE / "results" / "frozen.json"


def main() -> int:
    asked = _arguments()
    settings = _settings(asked)
    store = Store(asked.out)
    if not asked.table:
        store.forget(asked.again, settings)
        run_all(_jobs(settings, asked), store, asked.cores)
    page = _page(store.runs, _of_store(store.runs, settings))
    print(page)
    asked.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 1 if problems(store.runs) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="NETWORK[,THAW]", help="settings; default all 15")
    add("--contestants", nargs="+", choices=CONTESTANTS, help=f"default {', '.join(FIELD)}; see the README")
    add("--again", nargs="+", default=[], choices=CONTESTANTS, help="run these again")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=8)
    add("--pictures", type=int, help="in the epoch; default by network")
    add("--cores", type=cores, default=cores("all"), help="0,1: two processes at a time, each on its core")
    add("--out", type=Path, default=OUT, help="where the runs are kept")
    add("--table", action="store_true", help="only the tables of what there is")
    return parser.parse_args()


def _settings(asked: argparse.Namespace) -> list[Setting]:
    """The asked settings; a network without a thaw is all three of its thaws."""
    named: list[tuple[str, str]] = []
    for text in asked.only or [name for name in NETWORKS if name != "tiny"]:
        name, _, thaw = text.partition(",")
        if name not in NETWORKS or (thaw and thaw not in NETWORKS[name].thaws):
            known = ", ".join(f"{n},{t}" for n, network in NETWORKS.items() for t in network.thaws)
            raise SystemExit(f"--only {text!r} is not known; there are {known}")
        named += [(name, thaw)] if thaw else [(name, each) for each in THAWS]
    return [
        Setting(name, thaw, asked.epochs, asked.batch, asked.pictures or NETWORKS[name].pictures)
        for name, thaw in dict.fromkeys(named)
    ]


def _jobs(settings: Sequence[Setting], asked: argparse.Namespace) -> list[Job]:
    """For each setting who trains it; each setting begins one place further on than the one before."""
    jobs: list[Job] = []
    for number, setting in enumerate(settings):
        default = FIELD if setting.network in BESIDE_THE_FIELD else ("plain", "lehr")
        jobs.append((setting, turned(asked.contestants or default, number), 0))
    return jobs


def _of_store(runs: Sequence[Run], settings: Sequence[Setting]) -> list[Setting]:
    """The asked settings and all that were ever run, in the order of the networks."""
    names, thaws = list(NETWORKS), list(NETWORKS["vit_small"].thaws)
    every = dict.fromkeys([*settings, *(run.setting for run in runs)])
    return sorted(every, key=lambda s: (names.index(s.network), thaws.index(s.thaw), s.epochs, s.pictures))


def _page(runs: Sequence[Run], settings: Sequence[Setting]) -> str:
    """The tables, and all that is needed to judge or repeat them."""
    remarks = [f"{NETWORKS[n].label}: {NETWORKS[n].remark}" for n in NETWORKS if NETWORKS[n].remark]
    labels = {
        who: CONTESTANTS[who].label for who in CONTESTANTS if who in {*FIELD, *(r.contestant for r in runs)}
    }
    ours = [s for s in settings if any(r.setting == s and r.contestant == "lehr" for r in runs)]
    beside = [s for s in settings if {r.contestant for r in runs if r.setting == s} - {"plain", "lehr"}]
    lengths = " or ".join(map(str, sorted({s.epochs for s in settings})))
    wrong, loads = problems(runs), [run.load for run in runs] or [0.0]
    lines = [
        "**A frozen backbone**: time over the plain PyTorch loop's; batches of 8, 224 px, tensors in memory, AdamW, "
        "one thread, no validation; n = 1 fresh process each.",
        *(["", *lehr_rows(runs, ours)] if ours else []),
        "",
        "Ratios of processor time (all threads of the process) and of wall time, from the call on: tracing, checking "
        f"and filling the cache count. *half* and *all*: of {lengths} epochs.",
        *(f"{remark}." for remark in remarks),
        "",
        "The field, processor time over the plain loop's after epoch 1 / half / all of them:",
        "",
        *all_rows(runs, beside, labels),
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions(runs).items())}; "
        f"lehr at {', '.join(sorted({r.commit for r in runs if r.contestant == 'lehr'})) or '-'}.",
        f"Machine: {machine()}; one process a core, each pinned to its core; load average {min(loads):.1f} to "
        f"{max(loads):.1f}; {min((r.when for r in runs), default='-')} to {max((r.when for r in runs), default='-')}.",
        f"Command: `{shlex.join(['python', 'benchmarks/frozen.py', *sys.argv[1:]])}`",
    ]
    return "\n".join([*lines, *(["", "**Not valid:**", *(f"- {each}" for each in wrong)] if wrong else [])])


if __name__ == "__main__":
    sys.exit(main())
