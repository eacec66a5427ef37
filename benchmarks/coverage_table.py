"""The results of benchmarks/coverage.py as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WAYS = [(thawed, mode) for thawed in ("head", "block", "stage") for mode in ("train", "eval")]


def page(models: Mapping[str, Any]) -> str:
    """A summary, and a row for each model."""
    split = [name for name, record in models.items() if _all(record, "split")]
    equal = [name for name in split if _all(models[name], "equal") and _all(models[name], "kept")]
    wrong = [
        name for name, r in models.items() if any(w["split"] and not w["equal"] for w in r.get("ways", ()))
    ]
    changed = [name for name, r in models.items() if not all(w["kept"] for w in r.get("ways", ()))]
    lines = [
        f"{len(split)} of {len(models)} models are split in all six ways; {len(equal)} of these equal the whole model in "
        f"outputs, gradients and buffers. Wrong results that passed the proof: {len(wrong)}"
        + (f" ({', '.join(wrong)})" if wrong else "")
        + f". Models that were changed by the look at them: {len(changed)}.",
        "",
        "| model | cut behind (head / block / stage thawed) | share of arithmetic | KiB a sample (tensors) | route | off | seconds |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, record) for name, record in models.items()),
        "",
        f"A sample's features alone beside those in a batch, the largest difference relative to the norm: {_worst(models):.1e}.",
        "",
        "`off`: the largest difference between the halves and the whole model over all six ways, relative to the norm, in "
        "outputs, gradients and buffers; then that between the features of the faster prefix (batch-norm folded, channels "
        "last), where that passed the proof, and the exact ones. `seconds`: of one way, looking, cutting and proving, the "
        "median, processor time. Networks that take pictures of any size were compared on 128 px; the KiB are those of "
        "their usual size (224 px, or what the name says).",
    ]
    return "\n".join(lines)


def _worst(models: Mapping[str, Any]) -> float:
    return max((w["alone"] for r in models.values() for w in r.get("ways", ()) if w["split"]), default=0.0)


def _all(record: Mapping[str, Any], key: str) -> bool:
    return bool(record.get("ways")) and all(way.get(key) for way in record["ways"])


def _row(name: str, record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return f"| {name} | failed: {record['failed']} | | | | | |"
    ways = {(way["thawed"], way["mode"]): way for way in record["ways"]}
    trained = [ways[thawed, "train"] for thawed in ("head", "block", "stage")]
    done = [way for way in record["ways"] if way["split"]]
    if not done:
        return f"| {name} | none: {record['ways'][0]['why']} | | | | | |"

    def each(show: Any) -> str:
        return " / ".join(show(way) if way["split"] else "-" for way in trained)

    notes = [f"{w['thawed']}, {w['mode']}: {w['why']}" for w in record["ways"] if not w["split"]]
    seconds = sorted(way["seconds"] for way in record["ways"])[len(ways) // 2]
    return (
        f"| {name} | {each(lambda w: w['after'])}{'; not ' + '; '.join(notes) if notes else ''} "
        f"| {each(lambda w: format(w['share'], '.3f'))} "
        f"| {each(_size)} "
        f"| {', '.join(dict.fromkeys(w['route'] for w in done))} "
        f"| {max(w['off'] for w in done):.0e}, {max(w['off_fast'] for w in done):.0e} | {seconds} |"
    )


def _size(way: Mapping[str, Any]) -> str:
    return f"{way['bytes'] / 1024:.3g} ({way['tensors']})"
