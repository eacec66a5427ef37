"""Are the accuracies of runs that keep what is frozen others than those of runs that compute it each time?

    python benchmarks/accuracies.py [--data DIR] [--weights FILE] [--cifar FILE] [--cifar-weights FILE] [--seeds 0,1,...]
    python benchmarks/accuracies.py --table

Pairs of runs that differ in `cache` alone: "auto", with all its defaults, and "off". A seed draws the images, the new
head and their order, for both. The head trains on a frozen backbone, then the last block with it, so that the model is
cut in two places; a run in which lehr did not read from its cache in both ends the benchmark. Runs are saved one by
one; the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader

import lehr
from lehr.data import open_data
from lehr.data.datasets import ImageSamples
from lehr.events import CacheClosed, Event, Note, PrefixCached
from lehr.run.facts import inspect
from lehr.run.models import make_model
from machine import machine
from pictures_runs import HERE, ROOT, commit, save

SHARED = ROOT.parent / "shared"
OUT = HERE / "results" / "accuracies.json"
Cache = Literal["auto", "off"]
CACHES: tuple[Cache, ...] = get_args(Cache)
BATCH = 16
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
"""Student's t for 95 %, two-sided, with 1 to 19 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
section 1.3.6.7.2.
"""

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A network, what of it trains in the second stage, on how many images, and the epochs of both stages."""

    name: str
    model: str
    size: int
    block: tuple[str, ...]
    train: int
    held_out: int
    epochs: tuple[int, int]


TASKS = (
    # As in lehr's default recipe the norms stay as they were.
    Task("flowers", "mobilenetv2_100", 96, ("head", "blocks.6", "conv_head", "!norm"), 300, 400, (3, 3)),
    # Here the block's norms train as well, on the statistics of each batch.
    Task("CIFAR-10", "cifar_resnet20", 32, ("head", "layer3.2"), 500, 1000, (4, 4)),
)


def main() -> int:
    asked = _arguments()
    torch.set_num_threads(1)
    runs = json.loads(asked.out.read_text(encoding="utf-8"))["runs"] if asked.out.exists() else []
    if not asked.table:
        for task in TASKS:
            todo = [(s, c) for s in asked.seeds for c in CACHES if _pick(runs, task, s, c) is None]
            for run in _runs(task, todo, *asked.where[task.name]):
                runs.append(run)
                save(runs, asked.out)
                print(_said(run), file=sys.stderr, flush=True)
    page = _page(runs)
    print(page)
    asked.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    weights = SHARED / "weights"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--data", type=Path, default=SHARED / "data" / "flowers5", help="folder of class folders")
    add(
        "--weights",
        type=Path,
        default=weights / "timm_mobilenetv2_100_onnxzoo_features.pth",
        help="of mobilenetv2_100",
    )
    add(
        "--cifar",
        type=Path,
        default=SHARED / "data" / "cifar10_lossless_subset.npz",
        help="CIFAR-10, or a part",
    )
    add("--cifar-weights", type=Path, default=weights / "resnet20-12fca82f.th", help="of cifar_resnet20")
    add(
        "--seeds",
        type=lambda text: [int(s) for s in text.split(",")],
        default=list(range(10)),
        help="default 0 to 9",
    )
    add("--out", type=Path, default=OUT, help="where the runs are kept")
    add("--table", action="store_true", help="only the table of what there is")
    asked = parser.parse_args()
    pairs = (asked.data, asked.weights), (asked.cifar, asked.cifar_weights)
    for path in () if asked.table else (path for pair in pairs for path in pair):
        if not path.exists():
            parser.error(f"{path} does not exist; name images and weights, see --help")
    if len(asked.seeds) > len(T) + 1:
        parser.error(
            f"--seeds: {len(asked.seeds)}, expected at most {len(T) + 1}, for which there is a t-interval"
        )
    asked.where = {task.name: pair for task, pair in zip(TASKS, pairs, strict=True)}
    return asked


def _runs(
    task: Task, todo: Sequence[tuple[int, Cache]], where: Path, weights: Path
) -> Iterator[dict[str, Any]]:
    """A run for each seed and cache; the images are looked at once."""
    if not todo:
        return
    data = open_data(where)
    for seed, cache in todo:
        torch.manual_seed(seed)
        made = make_model(task.model, len(data.classes), weights=weights, size=task.size)
        for path in inspect(made.module).head:  # also where the file has one
            for layer in made.module.get_submodule(path).modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        train = _drawn(data.train(made.transform), task.train, seed)
        held_out = _drawn(data.valid(made.transform), task.held_out, seed)
        yield _run(task, seed, cache, made.module, train, held_out)


def _drawn(samples: ImageSamples, count: int, seed: int) -> ImageSamples:
    """So many of the samples, with the classes' shares as they are."""
    numbers, _ = train_test_split(
        range(len(samples)), train_size=count, stratify=samples.targets, random_state=seed
    )
    return samples.part(numbers)


def _run(
    task: Task, seed: int, cache: Cache, model: nn.Module, train: ImageSamples, held_out: ImageSamples
) -> dict[str, Any]:
    told: list[Event] = []
    began = time.process_time()
    result = lehr.fit(
        model, train, held_out, recipe=_recipe(task, seed, cache), device="cpu", observers=[told.append]
    )
    seconds = time.process_time() - began
    _check(task, cache, told)
    last = result.history[-1]
    answers = _answers(result.model, held_out)
    return {
        "setting": _about(task), "seed": seed, "cache": cache, "of": len(held_out),
        "right": _whole(last["valid_accuracy"] * len(held_out)),
        "right_outside": sum(a == b for a, b in zip(answers, held_out.targets, strict=True)),
        "loss": last["valid_loss"], "accuracies": [round(row["valid_accuracy"], 6) for row in result.history],
        "answers": "".join(map(str, answers)), "weights": _digest(result.model),
        "cached": [{"event": type(e).__name__, **asdict(e)} for e in told if isinstance(e, PrefixCached | CacheClosed)],
        "cpu_seconds": round(seconds, 2), "when": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(),
        "versions": _versions(),
    }  # fmt: skip


def _recipe(task: Task, seed: int, cache: Cache) -> lehr.Recipe:
    """The settings of lehr's default recipe, for stages that are short; the last weights count, not the best."""
    head, block = task.epochs
    return lehr.Recipe(
        [
            lehr.Stage(f"{head} epochs", train="head", lr=3e-3),
            lehr.Stage(f"{block} epochs", train=task.block, lr={"head": 1e-3, "backbone": 3e-4}),
        ],
        optimizer="adamw", schedule=lehr.warmup("5%") >> lehr.cosine(floor=0.01), batch_size=BATCH,
        weight_decay=0.05, label_smoothing=0.1, clip_norm=1.0, seed=seed, cache=cache,
    )  # fmt: skip


def _check(task: Task, cache: Cache, told: Sequence[Event]) -> None:
    """End where the cache was not what the run's name says: read in both stages, for training and validation; or absent."""
    read = {(e.stage, e.data) for e in told if isinstance(e, CacheClosed) and e.read}
    wanted = {(stage, data) for stage in (0, 1) for data in ("train", "valid")} if cache == "auto" else set()
    if read != wanted:
        names = [f"stage {stage + 1}'s {data} half" for stage, data in sorted(wanted - read or read - wanted)]
        what = "was not read from" if wanted - read else "was there, although it was off,"
        notes = "; ".join(e.text for e in told if isinstance(e, Note))
        raise SystemExit(
            f"{task.name}: the cache {what} in {', '.join(names)}. lehr said: {notes or 'nothing'}"
        )


@torch.no_grad()
def _answers(model: nn.Module, samples: ImageSamples) -> list[int]:
    """What the whole model says, without anything of lehr between."""
    model.eval()
    return [a for images, _ in DataLoader(samples, batch_size=32) for a in model(images).argmax(1).tolist()]


def _whole(right: float) -> int:
    """The number of images that a share stands for; it was divided, so it may be off by rounding alone."""
    if abs(right - round(right)) > 0.01:
        raise SystemExit(f"an accuracy stands for {right} images, expected a whole number")
    return round(right)


def _digest(model: nn.Module) -> str:
    """A short name for the weights and buffers, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _pick(runs: Sequence[Found], task: Task, seed: int, cache: Cache) -> Found | None:
    wanted = _about(task), seed, cache
    return next((run for run in runs if (run["setting"], run["seed"], run["cache"]) == wanted), None)


def _pairs(runs: Sequence[Found], task: Task) -> list[tuple[Found, Found]]:
    """(with the cache, without), by seed."""
    seeds = sorted({run["seed"] for run in runs})
    both = [(_pick(runs, task, seed, "auto"), _pick(runs, task, seed, "off")) for seed in seeds]
    return [(one, other) for one, other in both if one and other]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % t-interval; 2 to 20 differences."""
    half = T[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), half


def _page(runs: Sequence[Found]) -> str:
    """The tables, and all that is needed to judge or repeat them."""
    pairs = {task: _pairs(runs, task) for task in TASKS}
    known = {task: found for task, found in pairs.items() if 2 <= len(found) <= len(T) + 1}
    if not known:
        return f"Fewer than two pairs, or more than {len(T) + 1}; no table."
    used = [run for found in known.values() for pair in found for run in pair]
    same = sum(run["right"] == run["right_outside"] for run in used)
    off = max(abs(run["right"] - run["right_outside"]) for run in used)
    lines = [
        "**Accuracies with the cache and without**: held-out images named rightly after the last epoch, in percent; "
        "differences, with less without, in points, paired by seed.",
        "",
        "| data | pairs | with | without | mean difference, 95 % t-interval | smallest | largest | equal | answers that differ "
        "| same weights to the bit |",
        "|---" * 10 + "|",
        *(_row(task, found) for task, found in known.items()),
        "",
        "With and without: the mean over seeds ± the standard deviation. Equal: pairs with the same number of images right. Answers that "
        "differ: of a pair, the share of held-out images that the two name differently, mean (largest).",
        f"The whole model, run outside lehr, has as many right as lehr said in {same} of {len(used)} runs"
        + ("." if same == len(used) else f"; elsewhere {off} image(s) more or fewer at the most."),
        "",
        "| data | stage | half | cut after | share of the arithmetic before it | folded | samples computed | samples read |",
        "|---" * 8 + "|",
        *(line for task, found in known.items() for line in _cache_rows(task, [one for one, _ in found])),
        "",
        *(_about(task) for task in known),
        f"Versions: {_each(used, 'versions')}; lehr at {', '.join(sorted({r['commit'] for r in used}))}. One torch thread.",
        f"Machine: {machine()}; a run takes {_span(used)} s of processor time.",
        "Command: `python benchmarks/accuracies.py`",
    ]
    return "\n".join(lines)


def _row(task: Task, pairs: Sequence[tuple[Found, Found]]) -> str:
    points = [100 * (one["right"] - other["right"]) / one["of"] for one, other in pairs]
    arms = [[100 * run["right"] / run["of"] for run in arm] for arm in zip(*pairs, strict=True)]
    mean, half = interval(points)
    changed = [
        100 * statistics.fmean(a != b for a, b in zip(one["answers"], other["answers"], strict=True))
        for one, other in pairs
    ]
    cells = (
        task.name, str(len(pairs)), *(f"{statistics.fmean(arm):.2f} ± {statistics.stdev(arm):.2f}" for arm in arms),
        f"{mean:+.3f} ± {half:.3f}", f"{min(points):+.2f}", f"{max(points):+.2f}",
        f"{sum(one['right'] == other['right'] for one, other in pairs)} of {len(pairs)}",
        f"{statistics.fmean(changed):.2f} % ({max(changed):.2f} %)",
        f"{sum(one['weights'] == other['weights'] for one, other in pairs)} of {len(pairs)}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cache_rows(task: Task, runs: Sequence[Found]) -> Iterator[str]:
    """What was kept where, the same in all runs; where it is not, all that there was."""
    for stage in range(2):
        for data in ("train", "valid"):
            told = [
                e for run in runs for e in run["cached"] if (e.get("stage"), e.get("data")) == (stage, data)
            ]
            cells = [
                ", ".join(dict.fromkeys(str(e[key]) for e in told if key in e))
                for key in ("after", "share", "folded", "computed", "read")
            ]
            yield f"| {task.name} | {stage + 1} | {data} | {' | '.join(cells)} |"


def _about(task: Task) -> str:
    head, block = task.epochs
    return (
        f"{task.name}: {task.model} at {task.size} px, {task.train} training and {task.held_out} held-out images, batches of {BATCH}; "
        f"{head} epochs of the head, then {block} of {', '.join(f'`{pattern}`' for pattern in task.block)}. One image is "
        f"{100 / task.held_out:.2f} points."
    )


def _span(runs: Sequence[Found]) -> str:
    seconds = {cache: [r["cpu_seconds"] for r in runs if r["cache"] == cache] for cache in CACHES}
    return " and ".join(
        f"{min(s):.0f} to {max(s):.0f} ({'with' if c == 'auto' else 'without'})" for c, s in seconds.items()
    )


def _versions() -> dict[str, str]:
    named = ("torch", "torchvision", "timm", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in named}}


def _each(runs: Sequence[Found], key: str) -> str:
    return " / ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in run[key].items()) for run in runs))


def _said(run: Found) -> str:
    share = 100 * run["right"] / run["of"]
    return f"{run['setting'].split(':')[0]}, seed {run['seed']}, cache {run['cache']}: {share:.2f} %; CPU {run['cpu_seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
