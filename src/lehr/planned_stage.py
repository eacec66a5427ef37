"""A stage of a plan in numbers: its steps, whose turn each of them is, and the factors of its schedules. Pure.

An epoch of a stage is cut into rounds: a round is one window of batches, and each objective that has its turn on it
makes its updates. An ordinary stage has one objective, without a name, and one update a round. This file must not
know groups of parameters (`planning.py`), nor what a recipe is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from lehr import shapes
from lehr.conditions import Condition
from lehr.curves import Curve, Schedule
from lehr.shapes import Array


@dataclass(frozen=True)
class Turn:
    """What an objective does in a stage: on the rounds 0, every, 2 * every, ... of each epoch it makes `repeat` updates,
    along its schedule, which counts them alone.
    """

    objective: str
    every: int
    repeat: int
    schedule: Schedule

    def updates(self, rounds: int) -> int:
        """The updates that it makes in an epoch of so many rounds."""
        return -(-rounds // self.every) * self.repeat


@dataclass(frozen=True)
class Decision:
    """What was decided on evidence: after `step` updates of the run, stage `stage` ends, or cools; `value` was measured."""

    stage: int
    step: int
    kind: Literal["end", "reduce"]
    value: float


class _Pattern(NamedTuple):
    """An epoch, step by step: whose turn it is (an index into the turns), in which round, the how many-th of its own."""

    turn: np.ndarray
    round: np.ndarray
    own: np.ndarray


@dataclass(frozen=True)
class PlannedStage:
    """A stage in numbers: the half-open steps [start, stop), its batches, its turns, and what trains at which peak.

    `span` is how many steps its schedules are laid over: counted from its start, where it may end sooner by `until`;
    from the run's first step where `clock` is "run". `until` is "" where nothing but the length ends it; `every` is
    0 where it is checked at the end of each epoch. `reduce` is 1.0 where a plateau ends the stage; else it cools at
    most `reductions` times, and did so at the steps `cooled`. Each sample has so many fixed `views`, or a fresh one in
    each epoch. `cache` says how what it computes is kept, and changes nothing else.
    """

    index: int
    label: str
    start: int
    stop: int
    first_epoch: int
    steps_per_epoch: int
    rounds_per_epoch: int
    batch_size: int
    accumulate: int
    turns: tuple[Turn, ...]
    peak_lr: Mapping[str, float]
    weight_decay: Mapping[str, float]
    restore_best: bool
    span: int
    clock: Literal["stage", "run"] = "stage"
    until: str = ""
    every: int = 0
    reduce: float = 1.0
    reductions: int = 0
    cooled: tuple[int, ...] = ()
    views: int | Literal["fresh"] = "fresh"
    cache: Literal["auto", "off", "require"] = "auto"

    def __hash__(self) -> int:
        return hash((self.index, self.label, self.start, self.stop, self.turns))

    @property
    def steps(self) -> int:
        """The number of updates, of all objectives together."""
        return self.stop - self.start

    @property
    def epochs(self) -> int:
        """The number of passes over the data that it begins; the last may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    @cached_property
    def condition(self) -> Condition | None:
        """What ends it, or cools it, before its length."""
        return Condition.parse(self.until) if self.until else None

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The schedule of each turn, over the updates that it has at the most."""
        return tuple(
            turn.schedule.over(
                steps=self.own_updates(index, self.span), steps_per_epoch=turn.updates(self.rounds_per_epoch)
            )
            for index, turn in enumerate(self.turns)
        )

    @property
    def is_plain(self) -> bool:
        """Whether each step is a round of its own, with one update."""
        return len(self.turns) == 1 and self.turns[0].every == self.turns[0].repeat == 1

    @property
    def may_end_sooner(self) -> bool:
        """Whether evidence can end it before its length; a stage whose plateaus cool it without end goes on."""
        return bool(self.until) and self.reductions < self.stop

    def epoch_ranges(self) -> Iterator[tuple[int, int, int]]:
        """Each epoch with its half-open range of steps: (epoch, start, stop)."""
        for k in range(self.epochs):
            start = self.start + k * self.steps_per_epoch
            yield self.first_epoch + k, start, min(start + self.steps_per_epoch, self.stop)

    def turn_at(self, step: int) -> int:
        """Whose turn update `step` of the run is: an index into `turns`."""
        return 0 if self.is_plain else int(self._pattern.turn[(step - self.start) % self.steps_per_epoch])

    def turns_of(self, start: int, stop: int) -> list[int]:
        """Whose turn each update of the half-open range is."""
        if self.is_plain:
            return [0] * (stop - start)
        turns: list[int] = self._pattern.turn[
            (np.arange(start, stop) - self.start) % self.steps_per_epoch
        ].tolist()
        return turns

    def round_of(self, step: int) -> int:
        """The round of its epoch that update `step` of the run belongs to; each epoch begins with round 0."""
        position = (step - self.start) % self.steps_per_epoch
        return position if self.is_plain else int(self._pattern.round[position])

    def first_of_round(self, number: int) -> int:
        """The first step of a round of an epoch, counted from the epoch's first."""
        return number if self.is_plain else int(np.searchsorted(self._pattern.round, number))

    def ends_round(self, step: int) -> bool:
        """Whether a new round, epoch or stage begins after update `step`."""
        if self.is_plain:
            return True
        following = step + 1
        begins = (following - self.start) % self.steps_per_epoch == 0
        return following >= self.stop or begins or self.round_of(following) != self.round_of(step)

    def own_updates(self, turn: int, steps: int) -> int:
        """How many of the first `steps` updates of the stage are of this turn."""
        if self.is_plain:
            return steps
        epochs, rest = divmod(steps, self.steps_per_epoch)
        in_rest = int(np.count_nonzero(self._pattern.turn[:rest] == turn))
        return epochs * self.turns[turn].updates(self.rounds_per_epoch) + in_rest

    def own_index(self, step: int) -> int:
        """The how many-th update of its own turn, counted from 0 within the stage, update `step` of the run is."""
        epochs, position = divmod(step - self.start, self.steps_per_epoch)
        if self.is_plain:
            return step - self.start
        turn = self.turns[self.turn_at(step)]
        return epochs * turn.updates(self.rounds_per_epoch) + int(self._pattern.own[position])

    def is_warm(self, step: int) -> bool:
        """Whether, after `step` updates of the run, the warm-up of every schedule is over."""
        done = step - (self.start if self.clock == "stage" else 0)
        return all(self.own_updates(index, done) >= _warmup(curve) for index, curve in enumerate(self.curves))

    def factors(self, turn: int) -> tuple[np.ndarray, Array]:
        """The stage's steps that are of this turn, counted from its start, and the factor at each of them."""
        steps = np.arange(self.steps)
        if self.is_plain:
            own = steps
        else:
            position = steps % self.steps_per_epoch
            steps = steps[self._pattern.turn[position] == turn]
            position = steps % self.steps_per_epoch
            before = steps // self.steps_per_epoch * self.turns[turn].updates(self.rounds_per_epoch)
            own = before + self._pattern.own[position]
        factors = self.curves[turn](own + (self.start if self.clock == "run" else 0))
        if self.cooled:
            factors = factors * self.reduce ** np.searchsorted(self.cooled, steps + self.start, side="right")
        return steps, factors

    @cached_property
    def _pattern(self) -> _Pattern:
        """The turns of one epoch. On each round the objectives follow each other in the order in which they stand."""
        at = [np.repeat(np.arange(0, self.rounds_per_epoch, t.every), t.repeat) for t in self.turns]
        turns = np.repeat(np.arange(len(self.turns)), [len(own) for own in at])
        together = np.concatenate(at)
        order = np.argsort(together, kind="stable")  # within a round, the turn that stands first
        own = np.concatenate([np.arange(len(own)) for own in at])
        return _Pattern(turns[order], together[order], own[order])


def steps_in_epoch(turns: Sequence[Turn], rounds: int) -> int:
    """The updates of all objectives in an epoch of so many rounds."""
    return sum(turn.updates(rounds) for turn in turns)


def _warmup(curve: Curve) -> int:
    """The updates of a curve's leading warm-up."""
    end = 0
    for segment in curve.segments:
        if not isinstance(segment.part.shape, shapes.Warmup):
            break
        end = segment.stop
    return end
