"""All that changes while a run goes on, in one place: what a checkpoint holds, and a resume puts back.

It must not know when a checkpoint is taken, or where it is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lehr._version import __version__
from lehr.cadence import Cadence
from lehr.data.fingerprint import Fingerprint, fingerprint
from lehr.errors import CheckpointError
from lehr.journal import Journal
from lehr.planning import Plan, PlannedStage
from lehr.run.audit import Digests, audit, frozen_digests
from lehr.run.best import Best
from lehr.run.checkpoint import Snapshot
from lehr.run.ema import Ema
from lehr.run.facts import unwrap
from lehr.run.precision import Arithmetic
from lehr.run.randomness import Randomness, RandomState
from lehr.run.sampler import Feed, Window
from lehr.run.snapshot import Copies, fill_slots, put_back, slots_of, tensors_of
from lehr.run.state import Made, Position, Settings, SoFar, State
from lehr.run.update import Update
from lehr.run.watch import EpochWatch
from lehr.run.weights import listed

_NOW, _EPOCH = "random/now/", "random/epoch/"


@dataclass(frozen=True)
class Terms:
    """What a run was begun with, that its checkpoints repeat: data and settings."""

    train: Fingerprint
    valid: Fingerprint | None
    settings: Settings

    @classmethod
    def of(cls, train: Feed, valid: Feed | None, cadence: Cadence) -> Terms:
        """What can be known of the data, and how often the run is saved."""
        return cls(
            fingerprint(train.dataset, seed=train.seed),
            fingerprint(valid.dataset, seed=valid.seed) if valid else None,
            Settings(str(cadence.every), cadence.keep, cadence.keep_best),
        )


@dataclass
class Training:
    """A run under way. `stage`, `epoch` and `step` say where it is, as in `Position`; `instead_of` is the hash of
    the plan that its own replaces, until that is written down.
    """

    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Update
    average: Ema | None
    best: Best
    loss: Any
    feed: Feed
    on: Arithmetic
    terms: Terms | None = None
    stage: int = 0
    epoch: int = 0
    step: int = 0
    history: list[Mapping[str, float]] = field(default_factory=list)
    so_far: SoFar = field(default_factory=SoFar)
    watch: EpochWatch | None = None
    frozen: Digests | None = None
    epoch_random: RandomState | None = None
    before: float = 0.0
    began: float = field(default_factory=time.monotonic)
    instead_of: str | None = None
    _copies: Copies = field(default_factory=Copies)

    @property
    def seconds(self) -> float:
        """How long the run has trained, in this process and those before it."""
        return self.before + time.monotonic() - self.began

    def enter(self, stage: PlannedStage) -> None:
        """Be in `stage`: at its start, unless the run was resumed within it."""
        if self.frozen is None or self.stage != stage.index:
            self.stage, self.epoch, self.step = stage.index, stage.first_epoch, stage.start
            self.best.begin_stage(stage.first_epoch)
            self.frozen = frozen_digests(self.model, self.plan.trainable(stage))

    def audited(self, stage: PlannedStage) -> tuple[int, int, str]:
        """What the stage has kept frozen, now that it ends: parameters, buffers, and one digest of them all.

        Raises:
            RunError: where some of it has changed.
        """
        assert self.frozen is not None
        digest = audit(self.model, self.optimizer, self.plan.trainable(stage), self.frozen)
        parameters = len(self.plan.parameters) - len(self.plan.trainable(stage))
        return parameters, len(self.frozen) - parameters, digest

    def begin_epoch(self, watch: EpochWatch) -> None:
        """Be in the epoch that is watched; the random states of its beginning are kept where the person's own
        loader draws from them.
        """
        if self.feed.loader is not None and (watch.epoch != self.epoch or self.epoch_random is None):
            self.epoch_random = self._randomness.take()
        self.epoch, self.watch = watch.epoch, watch

    def windows(self, stage: PlannedStage, start: int) -> Iterator[Window]:
        """The windows of batches of the epoch that began at step `start`, from here on."""
        if self.epoch_random is not None and self.step == start:  # saved when its first window had failed
            self._randomness.put(self.epoch_random)
        rewound = self._randomness.rewound(self.epoch_random)
        return self.feed.windows(stage, self.epoch, self.step - start, rewound)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Be between epochs."""
        self.history.append(row)
        self.epoch, self.watch, self.so_far, self.epoch_random = self.epoch + 1, None, SoFar(), None

    def take(self, journal: Journal) -> Snapshot:
        """All of it at this moment, with the number of lines that the journal has by now.

        The tensors are used before the next snapshot is taken.
        """
        assert self.terms is not None
        so_far = self.watch.so_far() if self.watch else self.so_far  # None before the loop has come to it
        slots, tensors = slots_of(self.optimizer)
        for part, module in self._parts.items():
            tensors |= tensors_of(part, module)
        random = self._randomness.take().named(_NOW)
        plain, states = dict(random.plain), dict(random.tensors)
        if self.epoch_random:
            begun = self.epoch_random.named(_EPOCH)
            plain, states = plain | begun.plain, states | dict(begun.tensors)
        state = State(
            at=Position(self.stage, self.epoch, self.step), plan_hash=self.plan.hash,
            instead_of=self.instead_of, records=journal.records, seconds=self.seconds, so_far=so_far,
            history=tuple(dict(row) for row in self.history), best=self.best.so_far, frozen=dict(self.frozen or {}),
            optimizer=slots, scaler=self.update.scaling, random=plain, train=self.terms.train, valid=self.terms.valid,
            settings=self.terms.settings, made=made_by(self.on), files={},
        )  # fmt: skip
        trained = tuple(f"model/{name}" for name in self.plan.trainable(self.plan.stages[self.stage]))
        return Snapshot(state, self._copies.of(tensors | states), self.best.held, trained)

    def put(self, snapshot: Snapshot) -> None:
        """Be where `snapshot` was taken; its plan may be another, as long as the place means the same.

        Raises:
            CheckpointError: where it does not fit, by name.
        """
        state = snapshot.state
        if not _is_place(state.at, self.plan):
            raise CheckpointError(f"{state.at} is no place of the plan")
        try:
            for part, module in reversed(self._parts.items()):
                put_back(part, module, snapshot.tensors)
            fill_slots(self.optimizer, state.optimizer, snapshot.tensors)
            self.update.resume(state.scaler)
            _check_best(snapshot.best, self._parts["model"])
            self.best.resume(state.best, snapshot.best)
            random = RandomState(snapshot.tensors, state.random)
            self._randomness.put(random.within(_NOW))
        except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"it was not written by lehr, or for another run ({error})") from error
        begun = random.within(_EPOCH)
        self.epoch_random = begun if begun.tensors else None
        self.stage, self.epoch, self.step = state.at.stage, state.at.epoch, state.at.step
        self.history, self.so_far, self.before = list(state.history), state.so_far, state.seconds
        stage = self.plan.stages[self.stage]
        same = state.plan_hash == self.plan.hash or self.step > stage.start
        self.frozen = dict(state.frozen) if same else None

    @cached_property
    def _randomness(self) -> Randomness:
        return Randomness(self.on.device, self.feed.generators)

    @property
    def _parts(self) -> dict[str, nn.Module]:
        parts = {"model": unwrap(self.model)}
        if self.average:
            parts["ema"] = self.average.model
        if isinstance(self.loss, nn.Module):
            parts["loss"] = self.loss
        return parts


def made_by(on: Arithmetic) -> Made:
    """By what a state is made here."""
    return Made(__version__, torch.__version__, on.device.type, on.precision, torch.get_num_threads())


def _check_best(best: Mapping[int, Mapping[str, torch.Tensor]], model: nn.Module) -> None:
    """Refuse best weights that could not be loaded when their stage ends."""
    own = model.state_dict()
    for epoch, weights in best.items():
        wrong = [n for n in own if n not in weights] + [n for n in weights if n not in own]
        wrong += [n for n in own if n in weights and own[n].shape != weights[n].shape]
        if wrong:
            raise CheckpointError(
                f"the best weights, of epoch {epoch}, do not fit the model: {listed(wrong)}"
            )


def _is_place(at: Position, plan: Plan) -> bool:
    """Whether a run of `plan` comes by `at`."""
    if at.stage >= len(plan.stages):
        return False
    stage = plan.stages[at.stage]
    ends = [(epoch, start, stop) for epoch, start, stop in stage.epoch_ranges() if epoch == at.epoch]
    if not ends:
        return at.epoch == stage.first_epoch + stage.epochs and at.step == stage.stop
    return ends[0][1] <= at.step <= ends[0][2]
