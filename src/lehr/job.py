"""What the commands share: a request becomes data, model, recipe and plan, and then a run's directory.

It prints nothing, and must not know how a command was written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lehr.costs import StageCost
from lehr.data import Data, Listing, Transform, open_data, reopened
from lehr.defaults import default_augment, default_recipe
from lehr.errors import CheckpointError, RecipeError, RequestError, RunError, nearest
from lehr.plan_changes import plan_differences, rates_compared
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import load_recipe, overridden, recipe_from
from lehr.replanning import check_continuation, extended
from lehr.report.picture import draw_plan
from lehr.resolving import resolve
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.facts import inspect
from lehr.run.folder import RunFolder
from lehr.run.forecast import forecast
from lehr.run.lock import is_held
from lehr.run.models import DIGITS_NET, Made, check_fit, check_name, has_weights, make_model
from lehr.run.optimizer import optimizer
from lehr.run.precision import arithmetic
from lehr.run.reload import CARD, Card, read_card
from lehr.run.resuming import has_begun, nothing_good
from lehr.run.sampler import feed
from lehr.run.state import DamageError
from lehr.run.training import followed
from lehr.run.update import cross_entropy
from lehr.selection import ModelFacts
from lehr.untrusted import read_bytes

DEFAULT_MODEL = "mobilenetv3_large_100"
_MEASURED = ("train_loss", "valid_accuracy", "valid_loss")
_WAITED_FOR = (
    "train_loss", "train_error", "train_accuracy", "valid_loss", "valid_error", "valid_accuracy",
)  # fmt: skip
_LISTING, PICTURE = "data.json", "plan.png"
_LARGEST_LISTING = 2**30
_BACK = "put it back from a copy, or begin a new run"
_UNFETCHED = "weights: published, fetched by lehr fit"
_OURS = (
    CARD, _LISTING, PICTURE, "journal.jsonl", "recipe.toml", "plan.json", "environment.json", "checkpoints", ".lock", "tensorboard",
)  # fmt: skip


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
        """What a person should know of data, images and weights."""
        listing, (height, width) = self.data.listing, self.transform.size
        halves = f"{len(listing.train):,} to train on, {len(listing.valid):,} to validate"
        changed = ", ".join(self.transform.augment)
        return (
            f"data: {halves} ({listing.split})",
            *(f"data: {note}" for note in listing.notes()),
            f"images: {height} x {width} pixels"
            + (f"; changed at random while training: {changed}" if changed else ""),
            *self.made.notes,
        )


def prepare(
    request: Request,
    *,
    fetch: bool,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Job:
    """Check the data, make the model, read or choose the recipe, resolve the plan.

    Args:
        request: what was asked for.
        fetch: whether published weights are wanted; without them the plan is the same, for it depends on names
            and shapes alone.
        progress: called with (files done, files in all) while a folder is checked.
        tell: called with a line before what may take long: published weights may have to be fetched.

    Raises:
        RequestError: (or one of its kinds) for the first thing that is wrong; nothing was written.
    """
    if request.weights is not None and not request.pretrained:
        raise RequestError("--weights and --no-pretrained exclude each other; leave one of them out")
    said = None if request.recipe is None else load_recipe(request.recipe, settings=request.settings)
    seed = said.seed if said else _seed_said(request.settings)
    name = request.model or (DIGITS_NET if request.data == "digits" else DEFAULT_MODEL)
    check_name(name)
    if request.weights is None and not has_weights(name):
        request = replace(request, pretrained=False)
    data = open_data(request.data, seed=seed, skip_bad=request.skip_bad, progress=progress)
    remote = name != DIGITS_NET and request.pretrained and request.weights is None
    if tell and remote and fetch:
        tell(f"{name}: fetching its published weights, unless they are on this machine already")
    torch.manual_seed(seed)  # the new head
    made = make_model(
        name,
        len(data.classes),
        weights=request.weights,
        pretrained=request.pretrained and (fetch or not remote),
        channels=1 if name == DIGITS_NET else 3,
        size=request.size,
    )
    if remote and not fetch:
        made = replace(made, notes=(_UNFETCHED,))
    facts = replace(inspect(made.module), name=name)
    recipe = said or _chosen(request, facts, data, made.transform, seed)
    if recipe.augment is None:
        recipe = replace(recipe, augment=default_augment(min(made.transform.size)))
    _check_monitor(recipe, data)
    _check_until(recipe, data)
    transform = replace(made.transform, augment=tuple(recipe.augment or ()))
    plan = resolve(recipe, facts, samples=len(data.listing.train))
    check_fit(made, len(data.classes), name)
    for objective in plan.objectives:
        optimizer(plan, made.module, objective)  # a plan that could not be followed is refused as well
    return Job(request, name, data, made, facts, recipe, transform, plan)


@dataclass(frozen=True)
class Change:
    """A plan that replaces another after `step` updates of a run."""

    was: Plan
    now: Plan
    step: int
    picture: Path

    def __str__(self) -> str:
        lines = [f"changed: {line}" for line in plan_differences(self.was, self.now)]
        return "\n".join([*lines, rates_compared(self.was, self.now, step=self.step)])

    def draw(self) -> None:
        """Draw the run's picture anew, with the old curve behind the new one."""
        draw_plan(self.now, self.picture, before=self.was, at=self.step)


def prepare_again(
    run: str,
    *,
    data: str | None = None,
    settings: Sequence[str] = (),
    extend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Job:
    """The job of a run that is there, from what it left: the same data and model, its recipe.

    The model has no weights yet: those are in the run's checkpoint.

    Args:
        run: the run's directory.
        data: where the data are now, if they have moved.
        settings: as of `--set`, laid over the run's recipe.
        extend: by how much the last stage is to be longer.
        progress: called with (files done, files in all) while a folder is looked at.

    Raises:
        RequestError: (or one of its kinds) where it is no run of the command line, or something is not as it
            was.
    """
    folder = Path(run).expanduser()
    card, listing = read_card(folder), folder / _LISTING
    if card is None or not listing.is_file():
        raise CheckpointError(f"{run}: {_no_run(folder)}")
    was = _read_listing(listing)
    if not (folder / "recipe.toml").exists():
        raise CheckpointError(f"{run}: recipe.toml is missing; {_BACK}")
    recipe = load_recipe(folder / "recipe.toml", settings=settings)
    recipe = recipe if extend is None else extended(recipe, extend)
    again = reopened(was, data, progress=progress)
    torch.manual_seed(recipe.seed)
    made = make_model(card.model, len(card.classes), pretrained=False, channels=card.transform.channels)
    transform = replace(card.transform, augment=tuple(recipe.augment or ()))
    made = replace(made, transform=transform, notes=())
    facts = replace(inspect(made.module), name=card.model)
    _check_monitor(recipe, again)
    _check_until(recipe, again)
    plan = resolve(recipe, facts, samples=len(was.train))
    request = Request(was.source if data is None else data, model=card.model, settings=tuple(settings))
    return Job(request, card.model, again, made, facts, recipe, transform, plan)


def begun_run(run: str) -> tuple[RunFolder, dict[str, Any]]:
    """The directory of a run, and how it was trained: device, precision, whether compiled, and how often it was saved.

    Raises:
        CheckpointError: where it has no checkpoint.
    """
    folder = RunFolder(Path(run).expanduser())
    try:
        state = CheckpointFolder(folder.checkpoints).newest_state()
    except DamageError as why:
        raise CheckpointError(f"{run}: {nothing_good(why)}") from None
    if state is None:
        raise CheckpointError(
            f"{run}: holds no checkpoint to go on from: the run was stopped before its first step, or its "
            "checkpoints were removed; begin a new run in another directory"
        )
    made = state.made
    return folder, {
        "device": made.device,
        "precision": made.precision,
        "compile": made.compile or False,
        "checkpoint": asdict(state.settings),
    }


def change(job: Job, folder: RunFolder) -> Change | None:
    """What the changed plan of a run does to its rates, from where the run is; None where the plan is the same.

    Raises:
        RecipeError: where the run cannot go on with the plan, or its own cannot be read.
    """
    state = CheckpointFolder(folder.checkpoints).newest_state()
    was = Plan.load(folder.path / "plan.json")
    if state is None or was.hash == job.plan.hash:
        return None
    if was.augment != job.plan.augment:  # else it would be said of the data, which a person has not touched
        raise RecipeError(
            f"{folder.path}: augment: {', '.join(job.plan.augment) or 'none'}, was "
            f"{', '.join(was.augment) or 'none'}; a run keeps its samples and how they are changed, so leave it "
            "as it was, or begin a new run"
        )
    at = state.at
    was, now = followed(was, state), followed(job.plan, state)  # what evidence has decided holds for both
    check_continuation(was, now, stage=at.stage, epoch=at.epoch, step=at.step)
    return Change(was, now, at.step, folder.path / PICTURE)


def costs(job: Job, device: str = "auto") -> Iterator[StageCost]:
    """What each stage would cost on this machine, from a few timed steps; the job's model is of no further use.

    Raises:
        RequestError: for a device that is not there.
    """
    train = feed(job.data.train(job.transform, seed=job.recipe.seed), seed=job.recipe.seed)
    loss = cross_entropy(job.recipe.label_smoothing)
    valid = len(job.data.listing.valid)
    return forecast(job.plan, job.made.module, train, loss, arithmetic(device), samples_valid=valid)


def _no_run(folder: Path) -> str:
    """Why there is nothing that the command line can go on with."""
    there = [name for name in (CARD, _LISTING) if (folder / name).is_file()]
    if there:
        return f"{_LISTING if there == [CARD] else CARD} is missing; {_BACK}"
    if RunFolder(folder).journal.is_file():
        return (
            "a run of your own model or data, which lehr cannot make; call lehr.fit again as you did, with "
            'resume="auto"'
        )
    if folder.is_dir():
        return "not a run directory; expected one that lehr fit made"
    if folder.is_file():
        return "a file; expected the directory of a run that lehr fit made"
    runs = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = nearest(folder.name, runs)
    return f"no such directory{near if near != '.' else '; expected one that lehr fit made'}"


def _read_listing(path: Path) -> Listing:
    try:
        return Listing.from_json(json.loads(read_bytes(path, most=_LARGEST_LISTING)))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; {_BACK}") from None


def _chosen(request: Request, facts: ModelFacts, data: Data, transform: Transform, seed: int) -> Recipe:
    """The default recipe, with the request's settings laid over it."""
    chosen = default_recipe(
        facts,
        samples=len(data.listing.train),
        image_side=min(transform.size),
        pretrained=request.pretrained,
        validated=bool(data.listing.valid),
        seed=seed,
    )
    if not request.settings:
        return chosen
    return recipe_from(overridden(chosen.to_dict(), request.settings), where="--set")


def _check_monitor(recipe: Recipe, data: Data) -> None:
    """Refuse a `monitor` that is never measured, where something depends on it."""
    if recipe.monitor not in _MEASURED:
        near = nearest(recipe.monitor, _MEASURED)
        raise RecipeError(f"monitor: {recipe.monitor!r} is not measured{near} Known: {', '.join(_MEASURED)}")
    restores = any(recipe.restore_best if s.restore_best is None else s.restore_best for s in recipe.stages)
    if (restores or recipe.patience) and not data.listing.valid and recipe.monitor != "train_loss":
        raise RecipeError(
            f"monitor: {recipe.monitor!r} is never measured, for no class has an image to spare to validate; "
            'say monitor = "train_loss", or leave out restore_best and patience'
        )


def _check_until(recipe: Recipe, data: Data) -> None:
    """Refuse a condition on what is never measured on the command line, where the loss is lehr's own."""
    for index, stage in enumerate(recipe.stages):
        if stage.until is None or stage.objectives:
            continue
        said, valid = stage.until.metric, data.listing.valid
        known = [name for name in _WAITED_FOR if valid or not name.startswith("valid_")]
        if said not in known:
            raise RecipeError(
                f"stages.{index}.until: {said!r} is not measured{nearest(said, known)} Known: {', '.join(known)}"
            )


def from_scratch(job: Job, steps: int) -> tuple[Made, Recipe]:
    """The same network with nothing learnt, and a recipe of so many updates that trains all of it."""
    torch.manual_seed(job.recipe.seed)
    fresh = make_model(
        job.model_name,
        len(job.data.classes),
        pretrained=False,
        channels=job.transform.channels,
        size=job.request.size,
    )
    last = job.plan.stages[-1]
    stage = Stage(
        f"{steps} steps",
        train="all",
        lr=max(last.peak_lr.values()),
        batch_size=last.batch_size,
        accumulate=last.accumulate,
    )
    # The plan's peaks have the linear rule in them already.
    return fresh, replace(job.recipe, stages=[stage], lr_rule="fixed")


@contextmanager
def new_run(job: Job, out: str | None) -> Iterator[RunFolder]:
    """The directory that was asked for, or the next free one: runs/DATA-MODEL-1, -2, ...

    It holds what is needed to use the run again (the model's name, classes and transform), which weights it
    began with, which image was in which half, and the picture of the plan. Where something stops it before the
    run has begun, all of that is taken away again.

    Raises:
        RequestError: where the directory holds a run or cannot be made.
        RunError: for data or settings that turned out wrong after the run had begun.
    """
    folder = RunFolder.create(_free_name(job) if out is None else Path(out).expanduser())
    ours = [folder.path / name for name in _OURS if not (folder.path / name).exists()]
    card = Card(job.model_name, job.data.classes, replace(job.transform, augment=()), _origin(job.request))
    try:
        folder.write_json(CARD, card.to_json())
        folder.write_json(_LISTING, job.data.listing.to_json())
        draw_plan(job.plan, folder.path / PICTURE)
        yield folder
    except BaseException as error:
        if is_held(folder.lock):  # by another process, which was faster: all that is there is its own
            raise
        begun = has_begun(folder)
        if not begun:
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
                error.filename = str(folder.path)
            with suppress(OSError):  # what cannot be removed stays; why it ended is what matters
                _discard(folder.path, ours)
        elif isinstance(error, RequestError):
            raise RunError(str(error)) from error
        raise


def _origin(request: Request) -> dict[str, str]:
    """Where a run's weights came from; of a file its name without its folders, and what was in it."""
    if request.weights is None:
        return {"source": "published" if request.pretrained else "none"}
    digest = hashlib.sha256()
    with Path(request.weights).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"source": Path(request.weights).name, "sha256": digest.hexdigest()}


def _discard(folder: Path, ours: Sequence[Path]) -> None:
    """Remove what was written, and the directory if nothing else is in it."""
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _free_name(job: Job) -> Path:
    source = Path(job.request.data).expanduser().absolute()
    name = f"{_plain(source.stem if source.suffix == '.npz' else source.name)}-{_plain(job.model_name)}"
    for number in count(1):
        path = Path("runs") / f"{name}-{number}"
        try:
            path.mkdir(parents=True)  # made at once: two that begin at the same time take two names
        except FileExistsError:
            continue
        except OSError:  # said where it is made
            break
        break
    return path


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "data"


def _seed_said(settings: Sequence[str]) -> int:
    """The seed of `--set seed=N`: the split and the new head need it before the recipe is chosen."""
    seed = overridden({}, [s for s in settings if s.partition("=")[0].strip() == "seed"]).get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise RequestError(f"--set seed={seed}: expected a whole number from 0 to 2**63 - 1")
    return seed
