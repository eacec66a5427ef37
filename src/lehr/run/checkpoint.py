"""Checkpoints as files: written so that a kill at any byte leaves the last good one, read so that a damaged one
is noticed.

checkpoints/0017-step-1200.safetensors   tensors by name: model/..., ema/..., optimizer/PARAMETER/..., random/...
checkpoints/0017-step-1200.json          the state (`state.py`) and the sums of the files; written last
checkpoints/best-7.safetensors           the weights of epoch 7, one of the best; checkpoints refer to it

The JSON is what makes a checkpoint: without it there is none. Numbers only grow and no file is ever written
over. Names are made from numbers; none is taken from a file. This file must not know models or optimizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lehr.run.files import ASIDE, sha256_of, write_tensors, write_text
from lehr.run.state import DamageError, FileSum, State, dumps, loads
from lehr.untrusted import read_bytes

Tensors = Mapping[str, torch.Tensor]
_NAME = re.compile(r"(\d{4,18})-step-(\d{1,18})\.(json|safetensors)", re.ASCII)
_BEST = re.compile(r"best-(\d{1,18})\.safetensors", re.ASCII)
_MOST = 10**18 - 1  # the largest number that `_NAME` reads
_LARGEST = 256 * 2**20
_TENSORS = "tensors"
_OF_RUN = "best.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """All that changes while a run goes on, at one moment between two updates: the state, its tensors, and the
    weights of the best epochs that a resume needs. `trained` are the names of what has just been trained.
    """

    state: State
    tensors: Tensors
    best: Mapping[int, Tensors]
    trained: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the trained weights are finite; from others there is nothing to go on with."""
        return all(bool(self.tensors[name].isfinite().all()) for name in self.trained)


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint: its name, what it holds; and in words what newer ones were passed over."""

    name: str
    snapshot: Snapshot
    passed_over: tuple[str, ...]


@dataclass
class CheckpointFolder:
    """The folder `checkpoints/` of a run. Reading changes nothing in it."""

    path: Path
    _sums: dict[int, FileSum] = field(default_factory=dict)
    _spoiled: set[int] = field(default_factory=set)

    def write(self, snapshot: Snapshot) -> int:
        """Write a checkpoint, and the weights of best epochs that are not kept yet.

        Returns:
            The bytes that were written.

        Raises:
            OSError: where it cannot be written; the last one is unharmed.
        """
        for epoch, weights in snapshot.best.items():
            self.keep(epoch, weights)
        self._make()
        number, last = max(self._named(), default=(0, ""))
        if number + 1 > _MOST:
            raise OSError(None, f"no checkpoint can come after {last}; remove it, for lehr did not write it")
        number += 1
        stem = f"{number:04d}-step-{snapshot.state.at.step}"
        tensors, state = self.path / f"{stem}.safetensors", self.path / f"{stem}.json"
        best = {f"best-{e}": self._sums[e] for e in sorted(kept_epochs(snapshot.state)) if e in self._sums}
        try:
            write_tensors(tensors, snapshot.tensors)
            sums = {_TENSORS: _sum(tensors), **best}
            write_text(state, dumps(replace(snapshot.state, files=sums)))
        except OSError:  # what is in place by now is no checkpoint, and would fill the disk at every try
            with suppress(OSError):
                state.unlink(missing_ok=True)  # first, for it must not stay without its tensors
                tensors.unlink(missing_ok=True)
            raise
        return sums[_TENSORS].bytes

    def keep(self, epoch: int, tensors: Tensors) -> Path:
        """Write the weights of a best epoch; nothing is done where this process has written or read them.

        Raises:
            OSError: where they cannot be written.
        """
        path = self._best(epoch)
        if epoch not in self._sums or not path.exists():
            self._make()
            write_tensors(path, tensors)
            self._sums[epoch] = _sum(path)
        return path

    def newest(self, fits: Callable[[State], str] = lambda _: "") -> Found | None:
        """The newest checkpoint that is good; damaged ones, and those that `fits` objects to, are passed over.

        Raises:
            DamageError: where there are checkpoints and none is good; it says what is wrong with each.
        """
        passed_over: list[str] = []
        for stem in self._stems():
            try:
                state = loads(_text(self.path / f"{stem}.json"))
                if objection := fits(state):
                    raise DamageError(objection)
                tensors = self._good(f"{stem}.safetensors", state.files.get(_TENSORS))
                epochs = {kept.epoch for kept in (state.best.run, state.best.stage) if kept}
                best = {
                    epoch: _in_memory(self._good_best(epoch, state.files.get(f"best-{epoch}")))
                    for epoch in epochs
                }
            except DamageError as why:
                passed_over.append(f"{self.path.name}/{stem}: {why}")
                continue
            self.trust(state)
            return Found(f"{self.path.name}/{stem}", Snapshot(state, tensors, best), tuple(passed_over))
        if passed_over:
            raise DamageError("; ".join(passed_over))
        return None

    def trust(self, state: State) -> None:
        """Know of the best weights what a checkpoint that was found good says of them."""
        self._sums = {e: s for e in kept_epochs(state) if (s := state.files.get(f"best-{e}"))}
        self._spoiled.clear()
        for number, stem in sorted(self._named("json"), reverse=True):
            with suppress(DamageError):
                if loads(_text(self.path / f"{stem}.json")).files == state.files:
                    break
            self._spoiled.add(number)  # newer, and was passed over

    def newest_state(self) -> State | None:
        """The state of the newest checkpoint whose JSON is good, whatever its tensors are; None without one.

        Raises:
            DamageError: where there are checkpoints and no JSON is good; it says what is wrong with each.
        """
        passed_over: list[str] = []
        for stem in self._stems():
            try:
                return loads(_text(self.path / f"{stem}.json"))
            except DamageError as why:
                passed_over.append(f"{self.path.name}/{stem}: {why}")
        if passed_over:
            raise DamageError("; ".join(passed_over))
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints and the best epochs that they refer to.

        What cannot be removed stays.
        """
        oldest, needed = -1, set[int]()
        for number, stem in sorted(self._named("json"), reverse=True):
            if number in self._spoiled:
                continue
            with suppress(DamageError):  # what cannot be read does not count as one of those to keep
                needed |= kept_epochs(loads(_text(self.path / f"{stem}.json")))
                oldest, keep = number, keep - 1
            if not keep:
                break
        if oldest < 0:
            return
        names = [p.name for p in self._entries()]
        gone = [n for n in names if (found := _NAME.fullmatch(n)) and int(found[1]) < oldest]
        gone += [n for n in names if (found := _BEST.fullmatch(n)) and int(found[1]) not in needed]
        gone += [n for n in names if n.startswith(".") and n.endswith(ASIDE) and _is_ours(n[1 : -len(ASIDE)])]
        for name in sorted(gone, key=lambda n: not n.endswith(".json")):  # a checkpoint ends with its JSON
            with suppress(OSError):
                (self.path / name).unlink()

    def _good(self, name: str, said: FileSum | None) -> Tensors:
        """The tensors of a file that is what the JSON says."""
        path = self.path / name
        if said is None:
            raise DamageError(f"does not say what {name} is")
        try:
            if not path.is_file():
                raise DamageError(f"{name} is missing")
            if path.stat().st_size != said.bytes:
                raise DamageError(f"{name} has {path.stat().st_size:,} bytes, not {said.bytes:,}")
            if sha256_of(path) != said.sha256:
                raise DamageError(f"{name} was changed, or its disk is damaged: its SHA-256 is another")
            return load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise DamageError(f"{name} cannot be read ({error})") from None

    def _good_best(self, epoch: int, said: FileSum | None) -> Tensors:
        """The weights of a best epoch; where they are gone, the run's own best weights may be the same file."""
        try:
            return self._good(self._best(epoch).name, said)
        except DamageError:
            with suppress(DamageError):
                return self._good(f"../{_OF_RUN}", said)
            raise

    def _make(self) -> None:
        """Make the folder, but not the run's directory: where that has gone, a disk may have gone."""
        if not self.path.is_dir():
            self.path.mkdir()

    def _best(self, epoch: int) -> Path:
        return self.path / f"best-{epoch}.safetensors"

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _stems(self) -> list[str]:
        """The names of all checkpoints, the newest first."""
        try:
            return [stem for _, stem in sorted(self._named("json"), reverse=True)]
        except OSError as error:
            raise DamageError(f"{self.path.name} cannot be read ({error.strerror})") from None

    def _named(self, kind: str = "") -> list[tuple[int, str]]:
        """The checkpoints that there are files of: number and name."""
        found = (_NAME.fullmatch(path.name) for path in self._entries())
        return [(int(f[1]), f"{f[1]}-step-{f[2]}") for f in found if f and kind in ("", f[3])]


def kept_epochs(state: State) -> set[int]:
    """The best epochs that a state knows of: those whose weights are kept."""
    best = state.best
    return {kept.epoch for kept in (best.run, best.stage, *best.ranked) if kept}


def _in_memory(tensors: Tensors) -> Tensors:
    """Copies: what was read is still the file, which may change or go away while the weights are held."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _is_ours(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or _BEST.fullmatch(name))


def _sum(path: Path) -> FileSum:
    return FileSum(path.stat().st_size, sha256_of(path))


def _text(path: Path) -> bytes:
    try:
        return read_bytes(path, most=_LARGEST)
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})") from None
