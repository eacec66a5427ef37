"""When a run is saved, and what becomes of a checkpoint that cannot be written. The writing itself happens beside
the training: the loop stands still only while tensors are copied.

A run does not die of a disk that is full or gone: it warns, tries again, and says at its end what is missing.
This file must not know what a state consists of (`training.py`) or how its files look (`checkpoint.py`).
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lehr.cadence import Cadence, Moment
from lehr.errors import RunError
from lehr.events import CheckpointFailed, CheckpointWritten, Note
from lehr.run.best import Weights
from lehr.run.checkpoint import CheckpointFolder, Snapshot, kept_epochs
from lehr.run.files import ASIDE, flush, link, write_tensors
from lehr.run.folder import RunFolder
from lehr.run.state import State
from lehr.run.watch import Tell

RETRY = 60.0
"""Seconds after which a checkpoint that could not be written is tried again."""


_AT_ONCE = 5.0  # seconds
_under_way_anywhere: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """An interpreter that ends under a thread that writes aborts: who leaves at once waits for it a little."""
    for thread in tuple(_under_way_anywhere):
        if thread.is_alive():
            thread.join(_AT_ONCE)


@dataclass
class _Writing:
    """What a thread writes, and what came of it: weights of the best of the first `epochs`, and a snapshot, where
    there is one.
    """

    step: int
    stall: float
    snapshot: Snapshot | None
    epochs: int
    retry: float = RETRY
    bytes: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    thread: threading.Thread | None = None
    claim: threading.Lock = field(default_factory=threading.Lock)  # who has it writes

    @property
    def done(self) -> bool:
        """Whether its thread has ended."""
        return self.thread is not None and not self.thread.is_alive()


class Saver:
    """Saves a run into its directory: by time or by steps, at each stage's end, and when it is told to.

    Args:
        folder: the run's directory.
        cadence: how often, and how many checkpoints and best weights to keep.
        take: takes a snapshot, which is used before the next is taken.
        tell: is told of what was written, and of what could not be.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        folder: RunFolder,
        cadence: Cadence,
        take: Callable[[], Snapshot],
        tell: Tell,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._said, self._take, self._tell = folder.path, take, tell
        self._folder = RunFolder(folder.path.absolute())  # the program may change its working directory
        self._every, self._most = cadence.every, cadence.keep
        self._by_time = cadence.every.unit not in ("steps", "epochs")
        self._clock = clock
        self._files = CheckpointFolder(self._folder.checkpoints)
        self._best: dict[int, Weights] = {}  # not on the disk yet
        self._best_of_run: int | None = None
        self._last_was(Moment(0, 0, clock()))
        self._retry_at = math.inf
        self._taken: Snapshot | None = None
        self._writings: list[_Writing] = []  # under way, or not told of yet: one after the other
        self.problem = ""

    def begin(self, step: int = 0, epoch: int = 0) -> None:
        """Save the run as this process begins with it, before a step is taken.

        Raises:
            RunError: where it cannot be saved; nothing was trained yet, so nothing is lost.
        """
        self.save(step, epoch, wait=True)
        if self.problem:
            raise RunError(
                f"{self._said}: the run cannot be saved, so it was not begun: {self.problem}; "
                "free some space, or choose another directory"
            )

    def go_on(self, state: State) -> None:
        """Count from where another process has saved the run, and do not write again what that has written."""
        self._last_was(Moment(state.at.step, state.at.epoch, self._clock()))
        self._files.trust(state)

    def keep(self, epoch: int, weights: Weights, of_run: bool) -> None:
        """Write the weights of a best epoch, which do not change any more."""
        self._settle(_under_way)
        self._best[epoch] = weights
        if of_run:
            self._best_of_run = epoch
        self._start(_Writing(epoch, 0.0, None, epoch + 1))

    def offer(self, step: int, epoch: int, *, epoch_ended: bool = False) -> None:
        """Save the run after `step` updates, in `epoch`, if it is time; cheap enough for every step."""
        if self._writings:
            self._settle(_under_way)
        seconds = self._clock()
        reached = seconds if self._by_time else step if self._every.unit == "steps" else epoch
        if reached < self._next and seconds < self._retry_at and not epoch_ended:
            return  # at nearly every step
        due = seconds >= self._retry_at or self._every.due(
            last=self._last, now=Moment(step, epoch, seconds), epoch_ended=epoch_ended
        )
        if due and not (self._by_time and any(writing.snapshot for writing in self._writings)):
            self.save(step, epoch)

    def save(self, step: int, epoch: int, *, wait: bool = False) -> None:
        """Save the run now, unless it was saved right here; with `wait`, return when it is on the disk, or cannot
        be.
        """
        if wait:
            self.wait()
        here = (step, epoch) == (self._last.step, self._last.epochs)
        if here and self._taken and self._taken.state.instead_of is None and not self.problem:
            return
        began = self._clock()
        self._settle(
            lambda _: not any(writing.snapshot for writing in self._writings)
        )  # its memory is used again
        snapshot = self._taken = self._take()
        needed = kept_epochs(snapshot.state)  # on a disk that stays full, the others would pile up in memory
        for spare in self._best.keys() - needed:
            self._best.pop(spare, None)
        self._last_was(Moment(step, epoch, self._clock()))
        self._retry_at = math.inf
        stall, retry = self._last.seconds - began, 0.0 if wait else RETRY
        self._start(_Writing(step, stall, snapshot, epoch, retry=retry))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when what is being written is on the disk, or cannot be."""
        self._settle(lambda _: False)

    def finish(self, step: int, weights: Weights, epoch: int | None) -> None:
        """Leave the run's `weights` on the disk, those of `epoch` where they are its best, and its last state;
        what could not be left is in `problem`.
        """
        self.wait()
        if self.problem and self._taken:
            # Not a new one: the model has its best weights by now, and those of the last step are in this.
            self._start(_Writing(step, 0.0, self._taken, self._taken.state.at.epoch, retry=0.0))
            self.wait()
        try:
            if epoch is None:
                write_tensors(self._folder.weights, weights)
            else:
                link(self._files.keep(epoch, weights), self._folder.weights)
        except OSError as error:
            self.problem = self.problem or _words(error)

    def _last_was(self, moment: Moment) -> None:
        """Remember when the run was last saved, and what is to be reached before the next time."""
        self._last = moment
        if self._by_time:
            self._next = moment.seconds + float(self._every.seconds)
        else:
            done = moment.step if self._every.unit == "steps" else moment.epochs
            amount = int(self._every.amount)
            self._next = (done // amount + 1) * amount

    def _start(self, writing: _Writing) -> None:
        before = self._writings[-1].thread if self._writings else None
        # A daemon: who leaves at once does not wait for it, and half a file is no checkpoint.
        writing.thread = threading.Thread(target=self._write, args=(writing, before), daemon=True)
        self._writings.append(writing)
        _under_way_anywhere.add(writing.thread)
        writing.thread.start()

    def _write(self, writing: _Writing, before: threading.Thread | None) -> None:
        """The thread's work: first the weights that the checkpoint refers to."""
        if not writing.claim.acquire(blocking=False):
            return
        if before:
            with suppress(RuntimeError):  # it did not come to start
                before.join()
        began = self._clock()
        try:
            for epoch, weights in tuple(self._best.items()):
                if epoch >= writing.epochs:  # the checkpoint does not know it, and would have it removed
                    continue
                path = self._files.keep(epoch, weights)
                if epoch == self._best_of_run:
                    link(path, self._folder.weights)
                self._best.pop(epoch, None)
            if writing.snapshot and writing.snapshot.finite:
                with suppress(OSError):
                    flush(self._folder.journal)  # the state says how many lines it has
                writing.bytes = self._files.write(writing.snapshot)
                if writing.snapshot.state.instead_of is None:  # else the last one of the old plan is needed
                    self._files.prune(self._most)
        except Exception as error:
            writing.error = error
        writing.seconds = self._clock() - began

    def _settle(self, enough: Callable[[_Writing], bool]) -> None:
        """See what became of the writings, in order, and tell of each, until it is `enough` of them."""
        while self._writings and not enough(self._writings[0]):
            writing = self._writings[0]
            assert writing.thread is not None
            try:
                writing.thread.join()
            except RuntimeError:  # torch had told of a dead worker in the middle of its start
                self._write(writing, None)
                with suppress(RuntimeError):
                    writing.thread.join()
            del self._writings[0]
            self._tell_of(writing)

    def _tell_of(self, writing: _Writing) -> None:
        if writing.error is None:
            if writing.bytes:
                self.problem, self._retry_at = "", math.inf
                self._tell(CheckpointWritten(writing.step, writing.bytes, writing.stall, writing.seconds))
            return
        if not isinstance(writing.error, OSError):
            raise writing.error
        self.problem = _words(writing.error)
        self._retry_at = self._clock() + RETRY
        if writing.snapshot:
            self._tell(CheckpointFailed(writing.step, self.problem, writing.retry))
        else:
            self._tell(
                Note(
                    f"the best weights could not be written: {self.problem}; "
                    "they are kept in memory, and tried again"
                )
            )


def _under_way(writing: _Writing) -> bool:
    return not writing.done


def _words(error: OSError) -> str:
    """What the system says, and of which file."""
    where = (
        f": {Path(str(error.filename)).name.removeprefix('.').removesuffix(ASIDE)}" if error.filename else ""
    )
    return f"{error.strerror or error}{where}"
