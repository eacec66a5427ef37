"""A small run in which any one operation on its files can be made to go wrong: the process dies there, or the
system refuses. The operations of the files it reads, and of other directories, go on as ever.
"""

from __future__ import annotations

import errno
import io
import os
import random
import re
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import TensorDataset

import lehr
import lehr.line_file
import lehr.run.files
from killing import differences, leave, outcome
from lehr.events import CheckpointFailed, Event, Note
from lehr.journal import read_journal
from nursery import Nursery

DEAD = 9
ELSEWHERE = ".elsewhere"
_RECIPE = lehr.Recipe(
    [
        lehr.Stage("1 epoch", train="head", lr=1e-2),
        lehr.Stage("1 epoch", train=["head", "1"], lr=1e-2, restore_best=True),
        lehr.Stage("1 epoch", train="all", lr=1e-2),
    ],
    batch_size=4,
    ema=0.9,
)
HALVES = frozenset({"save_file", "write"})
"""The operations that can be half done."""
_QUIET = re.compile(r"unlink |hardlink_to |\w+ journal|open .*\d\.json$")
"""Those that a run can do without: old files stay, a name becomes a copy, lines of the journal wait."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong when the `operation`, "NAME FILE", is done for the `nth` time (from 0): the process dies, or the
    system says `error`, then or from then on (`lasting`); before the operation, or when it is `half` done.
    """

    operation: str
    nth: int = 0
    error: str = ""
    half: bool = False
    lasting: bool = False

    def __str__(self) -> str:
        what = f"{self.error or 'death'}{' from' if self.lasting else ''}{' half-way' if self.half else ''}"
        return f"{what} at {self.operation} ({self.nth})"


def run(out: Path, fault: Fault | None = None, log: Path | None = None) -> None:
    """Begin the run in `out`, or go on with it; write into `log` what it did with its files, a line each.

    What it cannot write there it puts into the directory ELSEWHERE beside it.
    """
    torch.manual_seed(7)
    elsewhere = out.with_suffix(ELSEWHERE)
    elsewhere.mkdir(exist_ok=True)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
    inputs = torch.linspace(-1, 1, 48).sin().reshape(16, 3)
    train, valid = (TensorDataset(part, (part.sum(1) > 0).long()) for part in (inputs[:8], inputs[8:]))
    with mock.patch.object(tempfile, "tempdir", str(elsewhere)), _operations(out, fault, log):
        result = lehr.fit(
            net, train, valid, recipe=_RECIPE, out=out, device="cpu", head="3",
            checkpoint={"every": "1 step", "keep": 2}, resume="auto",
        )  # fmt: skip
    leave(result, out)


class _Operations:
    """Counts what is done under `root`, and lets one of it go wrong."""

    def __init__(self, root: Path, fault: Fault | None, log: Path | None) -> None:
        self._root, self._fault = os.path.realpath(root), fault
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self._ours: dict[int, str] = {}
        self._counts, self._lock = Counter[str](), threading.Lock()
        self._refusing = False
        self._write = os.write

    def is_ours(self, path: object) -> bool:
        """Whether a path is in the run's directory."""
        if not isinstance(path, (str, os.PathLike)):
            return False
        return f"{os.path.realpath(path)}{os.sep}".startswith(f"{self._root}{os.sep}")

    def opened(self, descriptor: int, path: object) -> int:
        """Remember what a number stands for."""
        self._ours[descriptor] = str(path)
        return descriptor

    def path(self, descriptor: int) -> str:
        """What a number stands for; "" where it is not of the run."""
        return self._ours.get(descriptor, "")

    def closed(self, descriptor: int) -> None:
        """Forget it."""
        self._ours.pop(descriptor, None)

    def done(self, name: str, path: object, half: Callable[[], object]) -> None:
        """An operation is about to be done; `half` does half of it."""
        operation = f"{name} {os.path.relpath(str(path), self._root)}"
        with self._lock:
            nth = self._counts[operation]
            self._counts[operation] += 1
        if self._log is not None:
            self._write(self._log, f"{operation}\n".encode())
        fault = self._fault
        if fault is None or ((operation, nth) != (fault.operation, fault.nth) and not self._refusing):
            return
        self._refusing = fault.lasting
        if fault.half:
            half()
        if not fault.error:
            os._exit(DEAD)
        code = getattr(errno, fault.error)
        if name == "save_file":  # as the library says it
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
            )
        raise OSError(code, os.strerror(code), str(path))


@contextmanager
def _operations(root: Path, fault: Fault | None, log: Path | None) -> Iterator[None]:
    """Within this context what is done under `root` is counted, and one of it may go wrong."""
    ours = _Operations(root, fault, log)
    os_open, os_close, os_write, os_fsync, replace = os.open, os.close, os.write, os.fsync, os.replace
    save_file = lehr.run.files.save_file

    def opening(path: Any, *said: Any, **more: Any) -> int:
        if not ours.is_ours(path):
            return os_open(path, *said, **more)
        ours.done("open", path, _nothing)
        return ours.opened(os_open(path, *said, **more), path)

    def closing(descriptor: int) -> None:
        ours.closed(descriptor)
        os_close(descriptor)

    def writing(descriptor: int, data: Any) -> int:
        if path := ours.path(descriptor):
            ours.done("write", path, lambda: os_write(descriptor, data[: len(data) // 2]))
        return os_write(descriptor, data)

    def syncing(descriptor: int) -> None:
        if path := ours.path(descriptor):
            ours.done("fsync", path, _nothing)
        os_fsync(descriptor)

    def replacing(old: Any, new: Any) -> None:
        if ours.is_ours(new):
            ours.done("replace", new, _nothing)
        replace(old, new)

    def saving(tensors: Any, path: Any, metadata: Any) -> None:
        def half() -> None:
            save_file(tensors, path, metadata=metadata)
            os.truncate(path, path.stat().st_size // 2)

        if ours.is_ours(path):
            ours.done("save_file", path, half)
        save_file(tensors, path, metadata=metadata)

    class Lines(io.FileIO):
        """The journal's file."""

        def write(self, data: Any) -> int:
            if path := ours.path(self.fileno()):
                ours.done("write", path, lambda: super(Lines, self).write(data[: len(data) // 2]))
            return super().write(data)

    with (
        mock.patch.multiple(os, open=opening, close=closing, write=writing, fsync=syncing, replace=replacing),
        mock.patch.multiple(
            Path, **{n: _method(ours, n) for n in ("hardlink_to", "unlink", "mkdir", "chmod")}
        ),
        mock.patch.object(lehr.run.files, "save_file", saving),
        mock.patch.object(lehr.line_file, "FileIO", Lines),
    ):
        yield


def _method(ours: _Operations, name: str) -> Callable[..., Any]:
    """A method of `Path` that is counted."""
    method = getattr(Path, name)

    def counted(path: Path, *said: Any, **more: Any) -> Any:
        if ours.is_ours(path):
            ours.done(name, path, _nothing)
        return method(path, *said, **more)

    return counted


def _nothing() -> None:
    """Half of what is done at once."""


@dataclass(frozen=True)
class Whole:
    """A run in which nothing went wrong: what it ends with, and its operations, "NAME FILE" each."""

    outcome: dict[str, str]
    operations: tuple[str, ...]

    def faults(self, *errors: str, lasting: bool = False) -> list[Fault]:
        """Death before and in the middle of each operation; or instead the `errors` in turn.

        After an operation is before the next one.
        """
        kinds = cycle(errors or ("",))
        times = Counter[str]()
        found = []
        for operation in self.operations:
            for half in (False, True) if operation.split()[0] in HALVES else (False,):
                found.append(Fault(operation, times[operation], next(kinds), half, lasting))
            times[operation] += 1
        return found

    def before_the_first_step(self, fault: Fault) -> bool:
        """Whether it strikes before the first checkpoint is there: then a run may be refused."""
        at = [n for n, operation in enumerate(self.operations) if operation == fault.operation][fault.nth]
        return "write journal.jsonl" not in self.operations[_first(self.operations) : at]


def kinds(faults: Sequence[Fault], draw: random.Random) -> list[Fault]:
    """Of the faults, one of each kind: the operation, the sort of file, and whether it is half done."""
    found = defaultdict(list)
    for fault in faults:
        found[re.sub(r"\d+", "", fault.operation), fault.half].append(fault)
    return [draw.choice(same) for same in found.values()]


def _first(operations: Sequence[str]) -> int:
    """Where the first checkpoint gets its name; the next line of the journal says that it is there."""
    return next(n for n, name in enumerate(operations) if re.fullmatch(r"replace .*step-0\.json", name))


def whole(place: Nursery, folder: Path) -> Whole:
    """Run it without a fault."""
    out, log = folder / "whole", folder / "operations"
    ended = place.run(partial(run, out, None, log))
    assert ended.code == 0, ended.said
    return Whole(outcome(out), tuple(log.read_text().splitlines()))


def died(place: Nursery, folder: Path, fault: Fault, reference: Whole) -> str:
    """Let a run die, and go on with it; what is wrong then, or ""."""
    out = _cleared(folder / "died")
    ended = place.run(partial(run, out, fault))
    if ended.code != DEAD:
        return f"did not die, but ended with {ended.code}: {ended.said[-1000:]}"
    return _gone_on(place, out, reference)


def refused(place: Nursery, folder: Path, fault: Fault, reference: Whole) -> str:
    """Let the system refuse one operation, or all from one on; what is wrong then, or "".

    A run that was not begun is begun again. One that was must be done and have the same bits, or say that it is not
    whole, and have its weights elsewhere; then it is gone on with.
    """
    out = _cleared(folder / "refused")
    ended = place.run(partial(run, out, fault))
    lines = [line for line in ended.said.splitlines() if line]
    if ended.code == 0:
        told = [record.event for record in read_journal(out / "journal.jsonl")]
        if not any(map(_is_warning, told)) and not _QUIET.match(fault.operation):
            return "nobody was warned"
        return _compared(out, reference)
    if ended.code != 1 or not re.match(r"lehr\.errors\.\w+: ", lines[-1]):
        return f"ended with {ended.code}: {ended.said[-1000:]}"
    if not reference.before_the_first_step(fault):
        left = list(out.with_suffix(ELSEWHERE).glob("*/best.safetensors"))
        if "the run is done, but this directory is not whole" not in lines[-1] or len(left) != 1:
            return f"left {len(left)} weights elsewhere, and said {lines[-1]}"
        if sha256(left[0].read_bytes()).hexdigest() != reference.outcome["best.safetensors"]:
            return "the weights that it left elsewhere are others"
        left[0].unlink()
    return _gone_on(place, out, reference)


def _gone_on(place: Nursery, out: Path, reference: Whole) -> str:
    ended = place.run(partial(run, out))
    return f"could not be gone on with: {ended.said[-1000:]}" if ended.code else _compared(out, reference)


def _is_warning(event: Event) -> bool:
    """Whether it tells that something could not be written."""
    return isinstance(event, CheckpointFailed) or (isinstance(event, Note) and "could not be" in event.text)


def _cleared(out: Path) -> Path:
    """The place of a new run, where one that went wrong may have been left."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_suffix(ELSEWHERE), ignore_errors=True)
    return out


def _compared(out: Path, reference: Whole) -> str:
    """What is wrong with a run that has ended; it is cleared away."""
    different = differences(reference.outcome, outcome(out))
    shutil.rmtree(out)
    return f"not equal: {', '.join(different)}" if different else ""
