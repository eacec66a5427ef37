"""What `lehr verify` does: a short version of a person's own run is trained once whole, then again and again with
a stop, and what each ends with is compared to the bit.

How a process is begun, killed and gone on with is in `trials.py`; how two runs differ, in `run/outcome.py`.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from lehr import job as jobs
from lehr.data.listing import shown
from lehr.errors import RequestError, nearest
from lehr.events import EpochEnded
from lehr.journal import read_journal
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.folder import RunFolder
from lehr.run.models import DIGITS_NET
from lehr.run.outcome import Outcome, audits, differences, outcome
from lehr.run.precision import Arithmetic, arithmetic
from lehr.run.reload import CARD, Card, read_card
from lehr.shortening import Short, shortened
from lehr.trials import LISTING, RECIPE, Stop, Trial, Trials

Tell = Callable[[str], None]
_WHOLE, _AGAIN = "whole", "whole-again"
_WORKERS = (0, 2)  # for files; arrays are in memory and need none


@dataclass(frozen=True)
class Verdict:
    """How many of the stopped runs ended with the same bits, and how many tensors and losses were compared.

    `difference` says in lines how the first one differs that does; `cause` what that usually comes from. Both are
    empty where there is none.

    Example:
        >>> print(Verdict(3, 3, 142, 36))
        3 of 3 stopped runs ended with the same bits (142 tensors, 36 losses)
    """

    stops: int
    same: int
    tensors: int
    losses: int
    difference: tuple[str, ...] = ()
    cause: str = ""

    def __str__(self) -> str:
        runs = "run" if self.stops == 1 else "runs"
        what = f"{self.tensors} tensors, {self.losses} losses"
        return f"{self.same} of {self.stops} stopped {runs} ended with the same bits ({what})"


def job_of(
    path: str, asked: Mapping[str, Any], *, progress: Callable[[int, int], None] | None = None
) -> jobs.Job:
    """The job of a run's directory, or of a recipe file; nothing is fetched.

    Args:
        path: the directory or the file.
        asked: what was said besides, by the names of `Request`; of a run only where its `data` are now.
        progress: called with (files done, files in all) while a folder of images is looked at.

    Raises:
        RequestError: (or one of its kinds) where it is neither, or says something that cannot be.
    """
    place = Path(path).expanduser()
    said = {key: value for key, value in asked.items() if value is not None}
    if not place.is_dir():
        if not place.is_file():
            raise RequestError(f"{path}: {_neither(place)}")
        request = jobs.Request(**{"data": "digits", **said}, recipe=str(place))
        return jobs.prepare(request, fetch=False, progress=progress)
    if beyond := [_flag(key) for key, value in said.items() if key != "data" and value is not True]:
        raise RequestError(
            f"{path}: a run says itself which model it has, and of which images; leave out {', '.join(beyond)}"
        )
    if read_card(place) is None and RunFolder(place).journal.is_file():
        raise RequestError(
            f"{path}: a run of your own model or data, which lehr cannot make again; docs/verify.md shows how to "
            "stop it and compare by hand"
        )
    return jobs.prepare_again(path, data=said.get("data"), progress=progress)


def place_of(path: str, device: str | None) -> Arithmetic:
    """Where to train: on `device`, or as the run in the directory `path` was, or as `lehr fit` would.

    Raises:
        RequestError: where there is no such device here.
    """
    if device is not None:
        return arithmetic(device, "auto")
    state = CheckpointFolder(RunFolder(Path(path).expanduser()).checkpoints).newest_state()
    return arithmetic(state.made.device, state.made.precision) if state else arithmetic("auto", "auto")


def verify(
    job: jobs.Job,
    on: Arithmetic,
    *,
    kills: int = 3,
    seed: int = 0,
    keep_files: str | None = None,
    tell: Tell = lambda _: None,
) -> Verdict:
    """Stop a short version of `job` `kills` times, go on each time, and compare what it ends with.

    Args:
        job: the run to be made short.
        on: where it trains.
        kills: how many runs to stop, 1 or more; every second one is stopped twice.
        seed: of the places at which they are stopped.
        keep_files: a new directory for what is written; None writes into a temporary one, which is removed.
        tell: called with a line now and then.

    Raises:
        RequestError: for a `keep_files` that holds something.
        RunError: where the short run cannot be trained.
    """
    short = shortened(job.recipe, job.plan, job.facts, job.data.listing)
    with _folder(keep_files) as folder, _terminated():
        for line in _introduction(job, short, on):
            tell(line)
        trials = _described(folder, job, short, on)
        whole = _not_stopped(trials, tell)
        pace, chance = _seconds_per_step(folder / _WHOLE), random.Random(seed)
        found: list[tuple[str, ...]] = []
        for number in range(kills):
            name = f"stopped-{number + 1}"
            place = (number + chance.random()) / kills * len(whole.losses)
            how = trials.stopped(name, Stop(place, pace, twice=number % 2 == 1), chance)
            found.append(differences(whole, outcome(folder / name)))
            tell(f"stop {number + 1} of {kills}: {how}: {'NOT ' if found[-1] else ''}the same bits")
            if keep_files is None:
                shutil.rmtree(folder / name)
        odd = next((lines for lines in found if lines), ())
        cause = _cause(trials, whole, tell) if odd else ""
    return Verdict(kills, found.count(()), len(whole.tensors), len(whole.losses), odd, cause)


def _not_stopped(trials: Trials, tell: Tell) -> Outcome:
    """Train once whole: what all others must end with."""
    trials.to_end(trials.first)
    run = trials.folder / trials.first.out
    whole = outcome(run)
    tell(f"not stopped: {len(whole.losses)} steps, {_seconds_per_step(run):.2g} s each")
    for stage, audit in enumerate(audits(run), 1):
        parameters, buffers = (
            f"{count} {what}{'' if count == 1 else 's'}"
            for count, what in ((audit.parameters, "parameter"), (audit.buffers, "buffer"))
        )
        kept = f"{parameters} and {buffers}, unchanged to the bit"
        tell(f"frozen in stage {stage} ({audit.label}): {kept if audit.parameters else 'nothing'}")
    return whole


def _cause(trials: Trials, whole: Outcome, tell: Tell) -> str:
    """What a difference usually comes from: it matters whether the run repeats itself without a stop."""
    tell("not stopped, once more: does it repeat itself?")
    trials.to_end(replace(trials.first, out=_AGAIN))
    if differences(whole, outcome(trials.folder / _AGAIN)):
        return (
            "The run does not repeat itself without a stop, either. Usually kernels of a GPU add in another order "
            "each time: torch.use_deterministic_algorithms(True), in a Python script of your own, forbids those; "
            "--device cpu shows whether it is the device"
        )
    return (
        "Without a stop the run repeats itself to the bit, so something was not put back. Usually a data set, a "
        "loss or a module keeps a state of its own beside its parameters and buffers; where all of them are lehr's, "
        "please report it, with what --keep-files DIR keeps"
    )


def _described(folder: Path, job: jobs.Job, short: Short, on: Arithmetic) -> Trials:
    """Write the short run down, so that new processes can train it."""
    there = RunFolder(folder)
    there.write_json(
        CARD, Card(job.model_name, job.data.classes, replace(job.transform, augment=())).to_json()
    )
    there.write_json(LISTING, short.listing.to_json())
    there.write_text(RECIPE, short.recipe.to_toml())
    weights = job.request.weights
    first = Trial(
        _WHOLE, str(on.device), on.precision,
        weights=None if weights is None else str(Path(weights).expanduser().absolute()),
        pretrained=_with_ours(job),
    )  # fmt: skip
    return Trials(folder, first, _WORKERS if job.data.listing.kind == "folder" else (0, 0))


def _with_ours(job: jobs.Job) -> bool:
    """Whether the run begins with weights that come with lehr, and so need not be fetched."""
    return job.model_name == DIGITS_NET and job.request.pretrained and job.request.weights is None


def _introduction(job: jobs.Job, short: Short, on: Arithmetic) -> Iterator[str]:
    """What is trained, and what is not as in the run itself."""
    now, was = short.listing, job.data.listing
    yield f"a short run of {job.model_name} on {shown(was.source)}: {short.plan.total_steps} steps"
    yield (
        f"  {len(now.train):,} of {len(was.train):,} samples to train on, {len(now.valid):,} of {len(was.valid):,} "
        "to validate"
    )
    for line in short.said:
        yield f"  {line}"
    file = job.request.weights
    begins = "its own weights" if _with_ours(job) else "random weights (the proof needs no others)"
    yield f"  begins with {begins if file is None else shown(Path(file).name)}; on {on.device}, {on.precision}"


def _seconds_per_step(run: Path) -> float:
    """What a step takes, with its share of validation: in an epoch of middling speed, for the first one loads
    what is needed.
    """
    ended = [r.event for r in read_journal(run / "journal.jsonl").records if isinstance(r.event, EpochEnded)]
    begun = [0, *(epoch.step for epoch in ended)]
    return median(epoch.seconds / (epoch.step - step) for epoch, step in zip(ended, begun, strict=False))


def _neither(place: Path) -> str:
    """Why a path is neither a run nor a recipe."""
    if place.exists():
        return "neither a file nor a directory; expected a recipe file or a run's directory"
    near = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
    return (
        f"no such file or directory{nearest(place.name, near)} Expected a recipe file (lehr init DATA writes one) "
        "or the directory of a run"
    )


def _flag(key: str) -> str:
    return "--no-pretrained" if key == "pretrained" else f"--{key}"


@contextmanager
def _folder(keep_files: str | None) -> Iterator[Path]:
    """A folder to train in: a temporary one, or the one to keep."""
    if keep_files is None:
        with tempfile.TemporaryDirectory(prefix="lehr-verify-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    kept = Path(keep_files).expanduser().absolute()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        used = any(kept.iterdir())
    except OSError as error:
        raise RequestError(
            f"{keep_files}: cannot be made: {error.strerror}; choose another directory"
        ) from None
    if used:
        raise RequestError(f"{keep_files}: holds something already; --keep-files takes a new directory")
    yield kept


@contextmanager
def _terminated() -> Iterator[None]:
    """Within this context SIGTERM ends the program as Ctrl-C does: what it has begun is put away."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
