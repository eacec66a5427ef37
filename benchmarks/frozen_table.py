"""The tables that `frozen.py` prints: a pure rendering of what its runs measured. It runs and times nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pictures_runs import Run, Setting

TARGETS = {"head": (0.13, 0.08), "block": (0.35, 0.30), "stage": (0.50, 0.45)}
"""At most so much of the plain loop's time, after 10 and after 20 epochs."""
FIRST = 1.10
WALL, CPU = 0, 1
MIB = 1 << 20


def after(run: Run, epochs: int, clock: int) -> float:
    """Seconds from the call to the last update of that epoch; to the end of the call after the last epoch."""
    if epochs == run.setting.epochs:
        return run.found["total"][clock]
    return run.found["marks"][epochs * run.found["steps_per_epoch"] - 1][clock]


def points(setting: Setting) -> tuple[int, ...]:
    """The epochs after which times are compared: 1, half, and all."""
    return tuple(dict.fromkeys((1, max(1, setting.epochs // 2), setting.epochs)))


def growth(run: Run) -> int:
    """Bytes of resident memory at the peak of the training call, above what there was before it."""
    memory = run.found["memory"]
    return memory["after"]["peak"] - memory["before"]["now"]


def cached(run: Run) -> int:
    """Bytes that lehr's caches held."""
    return sum(
        event["bytes"] * event["rows"] for event in run.found["told"] if event["event"] == "PrefixCached"
    )


def problems(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison worthless."""
    found = [f"{r.setting}, {r.contestant}: {r.found['failed']}" for r in runs if "failed" in r.found]
    initial: dict[str, set[str]] = {}
    for run in (r for r in runs if r.ok):
        initial.setdefault(run.setting.network, set()).add(run.found["initial"])
        who = f"{run.setting}, {run.contestant}"
        steps = run.setting.epochs * run.found["steps_per_epoch"]
        if len(run.found["marks"]) != steps:
            found.append(f"{who}: {len(run.found['marks'])} updates, expected {steps}")
        if run.found["trained_changed"] != run.found["trained"]:
            found.append(f"{who}: {run.found['trained_changed']} of {run.found['trained']} tensors trained")
        if run.found["frozen_changed"] and not run.contestant.endswith("as-is"):
            found.append(f"{who}: {run.found['frozen_changed']} frozen tensors changed")
    found += [f"{name}: different initial weights" for name, hashes in initial.items() if len(hashes) > 1]
    return found


def lehr_rows(runs: Sequence[Run], settings: Sequence[Setting]) -> list[str]:
    """lehr beside the plain loop, a line for each setting: ratios of time, and memory."""
    head = (
        "network", "thawed", "pictures", "plain, CPU s", "epoch 1", "half", "all", "wall: epoch 1", "half", "all",
        "at most", "met", "cut after", "cache MiB", "peak MiB above start: plain", "lehr", "met",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for setting in settings:
        pair = [_find(runs, setting, who) for who in ("plain", "lehr")]
        if pair[0] and pair[1]:
            lines.append(_lehr_row(*pair))
        else:
            lacking = [who for who, run in zip(("plain", "lehr"), pair, strict=True) if not run]
            lines.append((setting.network, setting.thaw, f"missing: {', '.join(lacking)}", *[""] * 14))
    return [_line(cells) for cells in lines]


def _lehr_row(plain: Run, lehr: Run) -> tuple[str, ...]:
    setting = plain.setting
    ratios = {
        clock: {n: after(lehr, n, clock) / after(plain, n, clock) for n in points(setting)}
        for clock in (CPU, WALL)
    }
    half = setting.epochs // 2 if setting.epochs > 3 else 0
    cells = [f"{ratios[c][n]:.3f}" if n else "-" for c in (CPU, WALL) for n in (1, half, setting.epochs)]
    limits = (FIRST, *TARGETS.get(setting.thaw, ())) if setting.epochs == 20 else (FIRST,)
    met = all(r <= limit for r, limit in zip(ratios[CPU].values(), limits, strict=False))
    fits = growth(lehr) <= growth(plain) + cached(lehr)
    cut = next((e["after"] for e in lehr.found["told"] if e["event"] == "PrefixCached"), "-")
    return (
        setting.network, setting.thaw, str(setting.pictures), f"{after(plain, setting.epochs, CPU):.1f}", *cells,
        " / ".join(f"{limit:.2f}" for limit in limits), _yes(met), cut, f"{cached(lehr) / MIB:.1f}",
        f"{growth(plain) / MIB:.0f}", f"{growth(lehr) / MIB:.0f}", _yes(fits),
    )  # fmt: skip


def all_rows(runs: Sequence[Run], settings: Sequence[Setting], labels: Mapping[str, str]) -> list[str]:
    """Everybody over the plain loop of the same setting: processor time after one epoch, half and all."""
    head = ("who", *(f"{s.network} {s.thaw}" for s in settings), "frozen statistics kept")
    lines = [_line(head), _line(["---"] * len(head))]
    for who, label in labels.items():
        mine = [_find(runs, setting, who) for setting in settings]
        if any(mine):
            cells = [_cell(run, _find(runs, s, "plain")) for run, s in zip(mine, settings, strict=True)]
            lines.append(_line([label, *cells, _kept([run for run in mine if run])]))
        else:
            lines.append(_line([label, *[_reason(runs, who)] * len(settings), ""]))
    return lines


def _cell(run: Run | None, plain: Run | None) -> str:
    if run is None or plain is None:
        return "not run"
    return " / ".join(f"{after(run, n, CPU) / after(plain, n, CPU):.2f}" for n in points(run.setting))


def _reason(runs: Sequence[Run], who: str) -> str:
    missing = [r.found["missing"] for r in runs if r.contestant == who and "missing" in r.found]
    return f"{missing[0]} is not installed" if missing else "not run"


def _kept(runs: Sequence[Run]) -> str:
    """Whether no more buffers changed than where the plain loop's thawed norms count."""
    if any(run.found["frozen_changed"] for run in runs):
        return "no, and their weights were trained"
    return "no" if any(_drifted(run) for run in runs) else "yes"


def _drifted(run: Run) -> bool:
    """Buffers of frozen norms changed: with a thawed head alone no buffer should."""
    return run.setting.thaw == "head" and run.found["buffers_changed"] > 0


def _find(runs: Sequence[Run], setting: Setting, who: str) -> Run | None:
    return next((r for r in runs if r.ok and r.setting == setting and r.contestant == who), None)


def versions(runs: Sequence[Run]) -> dict[str, Any]:
    """Versions of all that took part."""
    found: dict[str, Any] = {}
    for run in runs:
        found |= run.found.get("versions", {})
    return found


def _yes(said: bool) -> str:
    return "yes" if said else "NO"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
