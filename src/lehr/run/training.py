"""All that changes while a run goes on, in one place: what a checkpoint holds, and a resume puts back.

It must not know when a checkpoint is taken, or where it is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from lehr._version import __version__
from lehr.cadence import Cadence
from lehr.data.fingerprint import Fingerprint, fingerprint
from lehr.errors import CheckpointError, RecipeError
from lehr.events import Note
from lehr.journal import Journal
from lehr.planned_stage import Decision, PlannedStage
from lehr.planning import Plan, Step
from lehr.run.allocator import give_back
from lehr.run.audit import Digests, audit, frozen_digests
from lehr.run.best import Best
from lehr.run.cache.stage_cache import Caching, StageCache
from lehr.run.checkpoint import Snapshot
from lehr.run.ema import Ema
from lehr.run.facts import unwrap
from lehr.run.freezing import set_trainable
from lehr.run.gate import Gate
from lehr.run.layout import Layout, Name, Trial, apply_layout, may_be_tried, named_layout
from lehr.run.losses import Losses, modules_of
from lehr.run.precision import Arithmetic
from lehr.run.randomness import Randomness, RandomState
from lehr.run.sampler import Feed, Window
from lehr.run.snapshot import Copies, fill_slots, put_back, slots_of, tensors_of
from lehr.run.state import Decided, Gauge, Made, Position, Settings, Slots, SoFar, State
from lehr.run.update import Update
from lehr.run.watch import EpochWatch, Tell
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
    """A run under way. `made` is its plan as it was made, `plan` the one that follows with what was decided since.
    `stage`, `epoch` and `step` say where it is, as in `Position`; `instead_of` is the hash of the plan that its own
    replaces, until that is written down. Optimizers and updates are by objective, losses by stage and objective.
    `compiled_by` is the backend that compiles the model, in a word.
    """

    made: Plan
    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]
    updates: Mapping[str, Update]
    average: Ema | None
    best: Best
    losses: tuple[Losses, ...]
    feed: Feed
    on: Arithmetic
    rule: Layout
    sign: Callable[[str], float]
    caching: Caching
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
    gauge: Gauge = field(default_factory=Gauge)
    gate: Gate | None = None
    cache: StageCache | None = None
    layout: Name = "contiguous"
    trial: Trial | None = None
    compiled_by: str = ""
    plan: Plan = field(init=False)
    _copies: Copies = field(default_factory=Copies)

    @property
    def seconds(self) -> float:
        """How long the run has trained, in this process and those before it."""
        return self.before + time.monotonic() - self.began

    @property
    def models(self) -> list[nn.Module]:
        """What is called: the model, and the average of its weights where there is one."""
        return [self.model, *([self.average.model] if self.average else [])]

    def __post_init__(self) -> None:
        self.plan = self.made

    def lay_out(self, layout: Layout, trained: frozenset[str] | None = None) -> None:
        """Have convolution weights laid out so from here on: all, or those of these names. What is frozen stays as the rule
        has it, so that a resume computes its features to the same bits.
        """
        if trained is not None and layout.name == self.layout:
            return
        self.layout = layout.name
        for model in self.models:
            apply_layout(model, layout, trained)
        give_back()

    def enter(self, index: int) -> PlannedStage:
        """Be in the stage: at its start, unless the run was resumed within it."""
        stage = self.plan.stages[index]
        if self.frozen is None or self.stage != index:
            self.stage, self.epoch, self.step = index, stage.first_epoch, stage.start
            self.best.begin_stage(stage.first_epoch)
            self.frozen = frozen_digests(self.model, self.plan.trainable(stage))
            self.gauge = Gauge()
            self.lay_out(self.rule)
        self.gate = Gate(stage, self.sign(stage.condition.metric) if stage.condition else 1.0, self.gauge)
        for turn in stage.turns:
            update = self.updates[turn.objective]
            update.loss = self.losses[index][turn.objective]
            update.measure = self.gate.measure(turn.objective)
        return stage

    def hasten(self, tell: Tell) -> StageCache:
        """Let the stage go the short way, where there is one: what does not train is computed once a sample. Layouts are tried
        where another may be faster; not in a compiled run, for each is another graph.
        """
        stage = self.plan.stages[self.stage]
        trained = self.plan.trainable(stage)
        may_try = (
            stage.is_plain
            and not self.compiled_by
            and may_be_tried(self.rule, self.model, self.on, trained, stage.steps)
        )
        self.trial = Trial(self.rule, self.on.device) if may_try else None
        loss = self.losses[stage.index].get("")
        set_trainable(self.model, trained)  # the way is found before the stage's first step
        self.cache = StageCache(
            self.caching, self.plan, stage, self.feed, loss, tell=tell, at=lambda: self.step,
            layout=lambda: self.layout if self.trial else None,
        )  # fmt: skip
        if self.cache.train:
            self.updates[""].loss = self.cache.train.loss
        return self.cache

    def decide(self, decision: Decision) -> PlannedStage:
        """Follow the plan with one more decision from here on; the stage as it is now."""
        self._follow(self.plan.decided(decision))
        return self.plan.stages[self.stage]

    def _follow(self, plan: Plan) -> None:
        self.plan = plan
        for update in self.updates.values():
            update.plan = plan

    def audited(self, stage: PlannedStage) -> tuple[int, int, str]:
        """What the stage has kept frozen, now that it ends: parameters, buffers, and one digest of them all.

        Raises:
            RunError: where some of it has changed.
        """
        assert self.frozen is not None
        optimizers = [self.optimizers[turn.objective] for turn in stage.turns]
        digest = audit(self.model, optimizers, self.plan.trainable(stage), self.frozen)
        parameters = len(self.plan.parameters) - len(self.plan.trainable(stage))
        return parameters, len(self.frozen) - parameters, digest

    def begin_epoch(self, watch: EpochWatch) -> None:
        """Be in the epoch that is watched; the random states of its beginning are kept where the person's own
        loader draws from them.
        """
        if self.feed.loader is not None and (watch.epoch != self.epoch or self.epoch_random is None):
            self.epoch_random = self._randomness.take()
        self.epoch, self.watch = watch.epoch, watch

    def steps(self, start: int, stop: int) -> Iterator[tuple[Step, Window]]:
        """What is left of the epoch of the steps [start, stop), each step with its window of batches. A decision that is
        taken between two of them holds for the next.
        """
        windows = self._windows(self.plan.stages[self.stage], start)
        while self.step < (end := min(stop, self.plan.stages[self.stage].stop)):
            plan, before = self.plan, self.step
            for step in plan.steps(self.step, end, plan.stages[self.stage]):
                # Not by zip, which holds on to every other pair for a step more.
                window = next(windows, None)
                if window is None:
                    return
                yield step, window
                if self.plan is not plan:
                    break
            if self.step == before or self.plan is plan:
                return

    def update(self, step: Step, window: Window, tell: Tell) -> torch.Tensor:
        """Make the step; in a layout that is tried, where one is."""
        update, trial = self.updates[step.objective], self.trial
        number = step.index - self.plan.stages[self.stage].start
        if trial is None or number >= trial.steps:
            return update(window, step.index)
        trained = self.plan.trainable(self.plan.stages[self.stage])
        self.lay_out(named_layout(trial.at(number)), trained)
        with trial.timed():
            loss = update(window, step.index)
        if number == trial.steps - 1:
            found = trial.decided()
            self.lay_out(found, trained)
            tell(Note(found.said))
        return loss

    def done(self, step: Step, samples: int) -> Decision | None:
        """The step is done: what its stage's `until` decides on it."""
        assert self.gate is not None
        stage, update = self.plan.stages[self.stage], self.updates[step.objective]
        if self.average and step.objective:
            own = self._own_before(step.objective) + stage.own_index(step.index)
            self.average.update(own, step.trainable)
        elif self.average:
            self.average.update(step.index)
        self.step = step.index + 1
        self.gate.add(update.measured, samples)
        return self.gate.after_step(stage, self.step)

    def measured(self) -> dict[str, float]:
        """What the stage's `until` waits for, over the epoch that has ended."""
        assert self.gate is not None
        return self.gate.over_epoch()

    def epoch_done(self, row: Mapping[str, float]) -> Decision | None:
        """The epoch is done, with this row: what its stage's `until` decides on it."""
        assert self.gate is not None
        return self.gate.after_epoch(self.plan.stages[self.stage], self.step, row, self.epoch)

    def has_decided(self, kind: str) -> bool:
        """Whether the stage has ended, or cooled, on evidence."""
        return any(d.stage == self.stage and d.kind == kind for d in self.plan.decisions)

    def _own_before(self, objective: str) -> int:
        """The updates in the stages before this one that an objective has made, or an ordinary stage for all."""
        return sum(
            stage.own_updates(index, stage.steps)
            for stage in self.plan.stages[: self.stage]
            for index, turn in enumerate(stage.turns)
            if turn.objective in (objective, "")
        )

    def _windows(self, stage: PlannedStage, start: int) -> Iterator[Window]:
        """The window of batches of each step of the epoch that began at step `start`, from here on. Objectives that
        take turns share that of their round, and a run is saved only between rounds.
        """
        if self.epoch_random is not None and self.step == start:  # saved when its first window had failed
            self._randomness.put(self.epoch_random)
        rewound = self._randomness.rewound(self.epoch_random)
        # After the last round that was drawn: one that is nobody's is drawn when its time comes.
        first = stage.round_of(self.step - 1) + 1 if self.step > start else 0
        source = (self.cache and self.cache.train) or self.feed
        windows = source.windows(stage, self.epoch, first, rewound)
        return windows if stage.is_plain else _by_turns(stage, self.step, enumerate(windows, start=first))

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
        slots: dict[str, dict[str, Slots]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, optimizer in self.optimizers.items():
            slots[name], kept = slots_of(optimizer, _part(name))
            tensors |= kept
        for part, module in self._parts.items():
            tensors |= tensors_of(part, module)
        random = self._randomness.take().named(_NOW)
        plain, states = dict(random.plain), dict(random.tensors)
        if self.epoch_random:
            begun = self.epoch_random.named(_EPOCH)
            plain, states = plain | begun.plain, states | dict(begun.tensors)
        scalers = {
            name: update.scaling for name, update in self.updates.items() if update.scaling is not None
        }
        state = State(
            at=Position(self.stage, self.epoch, self.step), plan_hash=self.made.hash,
            instead_of=self.instead_of, records=journal.records, seconds=self.seconds, so_far=so_far,
            decisions=tuple(Decided(d.stage, d.step, d.kind, d.value) for d in self.plan.decisions),
            gauge=self.gate.gauge if self.gate else self.gauge,
            history=tuple(dict(row) for row in self.history), best=self.best.so_far, frozen=dict(self.frozen or {}),
            optimizer=slots, scalers=scalers, random=plain, train=self.terms.train, valid=self.terms.valid,
            settings=self.terms.settings, rule=self.rule.name, layout=self.layout,
            made=made_by(self.on, self.compiled_by), files={},
        )  # fmt: skip
        trained = tuple(f"model/{name}" for name in self.plan.trainable(self.plan.stages[self.stage]))
        return Snapshot(state, self._copies.of(tensors | states), self.best.held, trained)

    def put(self, snapshot: Snapshot) -> None:
        """Be where `snapshot` was taken; its plan may be another, as long as the place means the same.

        Raises:
            CheckpointError: where it does not fit, by name.
        """
        state = snapshot.state
        try:
            self._follow(followed(self.made, state))
        except RecipeError as error:
            raise CheckpointError(str(error)) from None
        if not _is_place(state.at, self.plan):
            raise CheckpointError(f"{state.at} is no place of the plan")
        self.rule = replace(self.rule, name=state.rule)
        self.lay_out(self.rule)
        self.lay_out(named_layout(state.layout), self.plan.trainable(self.plan.stages[state.at.stage]))
        try:
            for part, module in reversed(self._parts.items()):
                put_back(part, module, snapshot.tensors)
            _check_objectives(state, self.optimizers)
            for name, optimizer in self.optimizers.items():
                fill_slots(optimizer, state.optimizer[name], snapshot.tensors, _part(name))
                self.updates[name].resume(state.scalers.get(name))
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
        self.gauge = state.gauge
        stage = self.plan.stages[self.stage]
        same = state.plan_hash == self.made.hash or self.step > stage.start
        self.frozen = dict(state.frozen) if same else None

    @cached_property
    def _randomness(self) -> Randomness:
        return Randomness(self.on.device, self.feed.generators)

    @property
    def _parts(self) -> dict[str, nn.Module]:
        parts = {"model": unwrap(self.model)}
        if self.average:
            parts["ema"] = self.average.model
        return parts | modules_of(self.losses)


def followed(plan: Plan, state: State) -> Plan:
    """The plan with what had been decided when the state was taken.

    Raises:
        RecipeError: where the plan has no such place.
    """
    for decided in state.decisions:
        plan = plan.decided(Decision(decided.stage, decided.step, decided.kind, decided.value))
    return plan


def _part(objective: str) -> str:
    """Under what the tensors of an objective's optimizer are kept."""
    return f"optimizer.{objective}" if objective else "optimizer"


def _check_objectives(state: State, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    if state.optimizer.keys() != optimizers.keys():
        raise CheckpointError(
            f"it has the state of the objectives {listed(list(map(repr, state.optimizer)))}, the plan has "
            f"{listed(list(map(repr, optimizers)))}"
        )


def _by_turns(stage: PlannedStage, step: int, windows: Iterator[tuple[int, Window]]) -> Iterator[Window]:
    """The window of each step from `step` on: that of its round. A round that is nobody's is passed over."""
    for number, window in windows:
        if stage.round_of(step) != number:
            continue
        while True:
            yield window
            step += 1
            if stage.ends_round(step - 1):
                break


def made_by(on: Arithmetic, compiled_by: str) -> Made:
    """By what a state is made here."""
    return Made(
        __version__, torch.__version__, on.device.type, on.precision, torch.get_num_threads(), compiled_by
    )


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
