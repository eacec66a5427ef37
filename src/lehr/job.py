"""What the commands share: a request for a folder of images becomes data, model, recipe and plan. It prints nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lehr.data import Data, Transform, open_data
from lehr.defaults import default_recipe
from lehr.errors import RequestError
from lehr.planning import Plan, resolve
from lehr.recipe import Recipe, Stage, load_recipe, overridden, recipe_from
from lehr.run.facts import inspect
from lehr.run.models import DIGITS_NET, Made, make_model
from lehr.run.reload import CARD, Card
from lehr.selection import ModelFacts

DEFAULT_MODEL = "mobilenetv3_large_100"


@dataclass(frozen=True)
class Request:
    """What a person asked for on the command line."""

    data: str
    model: str | None = None
    weights: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    size: int | None = None
    pretrained: bool = True
    skip_bad: bool = False


@dataclass(frozen=True)
class Job:
    """All that is known before the first batch."""

    request: Request
    model_name: str
    data: Data
    made: Made
    facts: ModelFacts
    recipe: Recipe
    transform: Transform
    plan: Plan

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of data and weights."""
        found = tuple(f"data: {f.path + ': ' if f.path else ''}{f.what}" for f in self.data.listing.findings)
        return (f"data: {self.data.listing.split}", *found, *self.made.notes)


def prepare(request: Request, *, progress: Callable[[int, int], None] | None = None) -> Job:
    """Check the data, make the model, read or choose the recipe, resolve the plan.

    Raises:
        RequestError: (or one of its kinds) for the first thing that is wrong; nothing was written.
    """
    said = None if request.recipe is None else load_recipe(request.recipe, settings=request.settings)
    seed = said.seed if said else _seed_said(request.settings)
    data = open_data(request.data, seed=seed, skip_bad=request.skip_bad, progress=progress)
    name = request.model or (DIGITS_NET if request.data == "digits" else DEFAULT_MODEL)
    channels = 1 if name == DIGITS_NET else 3
    torch.manual_seed(seed)  # the new head
    made = make_model(
        name,
        len(data.classes),
        weights=request.weights,
        pretrained=request.pretrained,
        channels=channels,
        size=request.size,
    )
    facts = replace(inspect(made.module), name=name)
    samples = len(data.listing.train)
    if said is None:
        pretrained = request.pretrained or request.weights is not None
        chosen = default_recipe(
            facts, samples=samples, image_side=min(made.transform.size), pretrained=pretrained, seed=seed
        )
        said = (
            recipe_from(overridden(chosen.to_dict(), request.settings), where="--set")
            if request.settings
            else chosen
        )
    transform = (
        replace(made.transform, augment=tuple(said.augment)) if said.augment is not None else made.transform
    )
    return Job(request, name, data, made, facts, said, transform, resolve(said, facts, samples=samples))


def from_scratch(job: Job) -> tuple[Made, Recipe]:
    """The same network with nothing learnt, and a recipe with the same number of updates: everything trains from the first one."""
    torch.manual_seed(job.recipe.seed)
    fresh = make_model(
        job.model_name,
        len(job.data.classes),
        pretrained=False,
        channels=job.transform.channels,
        size=job.request.size,
    )
    peak = max(rate for stage in job.plan.stages for rate in stage.peak_lr.values())
    stage = Stage(
        f"{job.plan.total_steps} steps", train="all", lr=peak, batch_size=job.plan.stages[-1].batch_size
    )
    return fresh, replace(job.recipe, stages=[stage])


def write_card(job: Job, folder: Path) -> None:
    """Keep in the run what is needed to use it again: the model's name, classes and transform; and which image was in which half."""
    folder.mkdir(parents=True, exist_ok=True)
    card = Card(job.model_name, job.data.classes, replace(job.transform, augment=()))
    for name, plain in ((CARD, card.to_json()), ("data.json", job.data.listing.to_json())):
        (folder / name).write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def new_folder(job: Job, out: str | None) -> Path:
    """The directory that was asked for, or the next free one: runs/DATA-MODEL-1, -2, ...

    Raises:
        RequestError: where the one asked for holds a run.
    """
    if out is not None:
        if (Path(out) / "journal.jsonl").exists():
            raise RequestError(
                f"--out {out}: holds a run already, and nothing is overwritten; choose another directory, or remove it"
            )
        return Path(out)
    name = f"{_plain(Path(job.request.data).stem or 'data')}-{_plain(job.model_name)}"
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "run"


def _seed_said(settings: Sequence[str]) -> int:
    """The seed of `--set seed=N`: the split and the new head need it before the recipe is chosen."""
    seed = overridden({}, [s for s in settings if s.partition("=")[0].strip() == "seed"]).get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RequestError(f"--set seed={seed}: expected a whole number from 0 on")
    return seed
