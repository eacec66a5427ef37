"""Trainings of one described run, in processes that are killed and gone on with.

Each training is a new process of the interpreter, as a person's would be; `python -m lehr.trials` is that
process. What it trains is described in files like those of a run. This file must not know why, how a run is
saved, or how it is gone on with: it only kills, and sees which checkpoints there are.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lehr.data import Data, Listing, open_data
from lehr.data.gathering import FolderReader
from lehr.errors import LehrError, RunError

RECIPE, LISTING = "recipe.toml", "data.json"
_CHECKPOINT = re.compile(r"\d+-step-(\d+)\.json", re.ASCII)
_LOOK = 0.002  # seconds between two looks at what a process has written
_EVERY = (
    1,
    2,
    3,
)  # steps from one checkpoint to the next: what came after the last one is lost, and done again
_TRIES = 5  # to kill a run before it ends


@dataclass(frozen=True)
class Trial:
    """How one process trains: in the folder `out`, saved as often as `checkpoint` says.

    `head` is added to the seed of the first weights: where a run is gone on with, it begins with others, so that
    a tensor that is not put back shows. `weights` is the path of a file, or None; `pretrained` takes the weights
    that come with lehr.
    """

    out: str
    device: str
    precision: str
    weights: str | None = None
    pretrained: bool = False
    workers: int = 0
    checkpoint: str = "10 minutes"
    head: int = 0


@dataclass(frozen=True)
class Stop:
    """Where to kill a run: about `place` steps after its start, of `pace` seconds each; and `twice` or once."""

    place: float
    pace: float
    twice: bool


@dataclass(frozen=True)
class Trials:
    """Trainings of the run that `folder` describes (model.json, data.json, recipe.toml), beside each other in it.

    `first` is the trial that is varied; `workers` has two numbers of processes that load samples, of which a
    stopped run has one before its first stop and the other after it.
    """

    folder: Path
    first: Trial
    workers: Sequence[int]

    def to_end(self, trial: Trial) -> None:
        """Train until it has ended, from the start or from where it was stopped.

        Raises:
            RunError: where it fails, with what it said.
        """
        with self._process(trial) as child:
            self._check(child.wait(), trial)

    def stopped(self, name: str, stop: Stop, chance: random.Random) -> str:
        """Train in the folder `name`, be killed, and go on to the end; how that went, in words.

        Raises:
            RunError: where it fails, or ends again and again before it can be killed.
        """
        first, then = chance.sample(list(self.workers), 2)
        out, stops = self.folder / name, [stop]
        for _ in range(_TRIES):
            every = chance.choice(_EVERY)
            trial = replace(self.first, out=name, workers=first, checkpoint=f"{every} steps")
            if self._killed(trial, stops[0], every):
                break
            shutil.rmtree(out)  # it was faster than that
            stops = [replace(stop, place=max(0.0, stops[0].place - every - 1))]
        else:
            raise RunError(
                f"the short run ended {_TRIES} times before it could be killed; try another --seed"
            )
        trial = replace(trial, workers=then, head=1)
        if stop.twice:
            least = newest_step(out) + every
            last = max(float(least), newest_step(self.folder / self.first.out))
            second = replace(stop, place=chance.uniform(least, last))
            stops += [second] if self._killed(trial, second, every) else []
        self.to_end(replace(trial, head=2))
        said = "; ".join(f"killed, gone on from step {step}" for step in _resumed(out))
        return said if first == then else f"{said} ({first} workers, then {then})"

    def _killed(self, trial: Trial, stop: Stop, every: int) -> bool:
        """Train, and be killed when the last checkpoint before the place is there, and the time of the steps from
        it has passed; False where it has ended before.
        """
        at = int(stop.place // every * every)
        with self._process(trial) as child:
            while newest_step(self.folder / trial.out) < at and child.poll() is None:
                time.sleep(_LOOK)
            with suppress(subprocess.TimeoutExpired):
                child.wait((stop.place - at) * stop.pace)
            if child.poll() is None:
                child.kill()
                return child.wait() != 0
            self._check(child.returncode, trial)
            return False

    @contextmanager
    def _process(self, trial: Trial) -> Iterator[subprocess.Popen[bytes]]:
        """A new process that trains; at the end of the context it has ended, however."""
        root = Path(__file__).parents[1]
        known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        paths = os.pathsep.join(str(Path(part).absolute()) for part in (str(root), *known))
        with self._log(trial).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "lehr.trials", json.dumps(asdict(trial))],
                cwd=self.folder, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield child
        finally:
            child.kill()
            child.wait()
            if child.stdin:
                child.stdin.close()
            if os.name == "posix":
                with suppress(OSError):  # the processes that loaded samples for it
                    os.killpg(child.pid, signal.SIGKILL)

    def _log(self, trial: Trial) -> Path:
        return self.folder / f"{trial.out}.log"

    def _check(self, code: int, trial: Trial) -> None:
        """Say why a process failed, where it did."""
        if code == 0:
            return
        text = self._log(trial).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        starts = [place for place, line in enumerate(lines) if line.startswith("lehr: ")]
        said = "\n".join(lines[starts[-1] :] if starts else lines[-1:]).removeprefix("lehr: ")
        raise RunError(f"the short run failed (exit code {code}): {said or 'it said nothing'}")


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint; -1 where there is none."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))), default=-1)


def _resumed(run: Path) -> list[int]:
    """The steps from which a run was gone on with."""
    from lehr.events import Resumed
    from lehr.journal import read_journal

    return [r.event.step for r in read_journal(run / "journal.jsonl").records if isinstance(r.event, Resumed)]


def _train(trial: Trial) -> None:
    """What a process does: train the run that is described here, from the start or from where it was stopped."""
    import torch

    from lehr.recipe_file import load_recipe
    from lehr.run.loop import fit
    from lehr.run.models import make_model
    from lehr.run.reload import read_card

    here = Path()
    card, recipe = read_card(here), load_recipe(here / RECIPE)
    assert card is not None
    data = _data(Listing.from_json(json.loads((here / LISTING).read_text(encoding="utf-8"))))
    transform = replace(card.transform, augment=tuple(recipe.augment or ()))
    torch.manual_seed(recipe.seed + trial.head)
    made = make_model(
        card.model, len(card.classes), weights=trial.weights, pretrained=trial.pretrained,
        channels=transform.channels,
    )  # fmt: skip
    valid = data.valid(transform)
    fit(
        made.module, data.train(transform, seed=recipe.seed), valid if len(valid) else None, recipe=recipe,
        out=trial.out, device=trial.device, precision=trial.precision, workers=trial.workers, resume="auto",
        checkpoint=trial.checkpoint,
    )  # fmt: skip


def _data(listing: Listing) -> Data:
    """The samples of a listing that was made from data which were looked at just before."""
    if listing.kind == "folder":
        return Data(listing, FolderReader(listing.root))
    return Data(listing, open_data(listing.root or listing.source).read)


def _leave_with_parent() -> None:
    """End when the process that began this one has ended: the pipe between them is closed then."""
    os.read(0, 1)  # not sys.stdin, whose lock would be held where a worker is forked
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        _train(Trial(**json.loads(sys.argv[1])))
    except LehrError as error:
        sys.exit(f"lehr: {error}")


if __name__ == "__main__":
    _main()
