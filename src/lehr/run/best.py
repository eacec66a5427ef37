"""The best weights so far: what "best" means, where they are kept, and how they come back.

It must not know how they were trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lehr.errors import RunError, nearest
from lehr.run.ema import Ema
from lehr.run.facts import unwrap
from lehr.run.state import BestSoFar, Kept
from lehr.run.validation import Metrics, higher_is_better

Weights = Mapping[str, torch.Tensor]
Keep = Callable[[int, Weights, bool], None]
"""Told of weights to keep: the epoch, the weights (which do not change any more), whether they are the run's best."""


@dataclass(frozen=True)
class _Held:
    kept: Kept
    weights: Weights


class Best:
    """Keeps the best weights of the stage and of the run by `monitor` in memory, and has the `most` best of the
    run kept elsewhere, too.

    An empty `monitor` keeps none: the last weights are the run's. A tie keeps the earlier epoch.
    """

    def __init__(self, monitor: str, metrics: Metrics | None, *, most: int = 1) -> None:
        self._monitor, self._most = monitor, most
        self.keep: Keep | None = None
        self._sign = 1.0 if monitor and higher_is_better(monitor, metrics) else -1.0
        self._run: _Held | None = None
        self._stage: _Held | None = None
        self._ranked: tuple[Kept, ...] = ()
        self._waiting_since = -1

    @property
    def so_far(self) -> BestSoFar:
        """What is known of the best epochs, without their weights."""
        run, stage = (held.kept if held else None for held in (self._run, self._stage))
        return BestSoFar(run, stage, self._ranked, self._waiting_since)

    @property
    def held(self) -> dict[int, Weights]:
        """The weights of the best epoch of the run and of the stage, by epoch; they do not change any more."""
        return {held.kept.epoch: held.weights for held in (self._run, self._stage) if held}

    @property
    def epoch(self) -> int | None:
        """The best epoch of the run."""
        return self._run.kept.epoch if self._run else None

    def resume(self, so_far: BestSoFar, weights: Mapping[int, Weights]) -> None:
        """Go on from what was known; `weights` has those of the run's and the stage's best epoch."""
        self._run, self._stage = (
            _Held(kept, weights[kept.epoch]) if kept else None for kept in (so_far.run, so_far.stage)
        )
        self._ranked, self._waiting_since = so_far.ranked[: self._most], so_far.waiting_since

    def begin_stage(self, first_epoch: int) -> None:
        """Forget the last stage's best; patience counts anew."""
        self._stage = None
        self._waiting_since = first_epoch - 1

    def offer(self, epoch: int, row: Mapping[str, float], model: nn.Module) -> bool:
        """Keep `model`'s weights if they are the best of the stage or run; say whether of the run.

        Raises:
            RunError: where the epoch has no metric of the monitored name.
        """
        if not self._monitor:
            return False
        if self._monitor not in row and self._monitor.startswith("train_"):
            return False  # an objective that had no turn, in an epoch that was cut
        if self._monitor not in row:
            raise RunError(
                f"monitor: no metric is called {self._monitor!r}{nearest(self._monitor, row)} "
                f"There are: {', '.join(row)}"
            )
        measured = row[self._monitor]
        value = -math.inf if math.isnan(measured) else self._sign * measured  # nothing compares with NaN
        of_stage = self._stage is None or value > self._stage.kept.value
        of_run = self._run is None or value > self._run.kept.value
        ranked = sorted((*self._ranked, Kept(epoch, value)), key=lambda k: (-k.value, k.epoch))[: self._most]
        few = ranked != list(self._ranked)
        if of_stage or of_run or few:
            held = _Held(Kept(epoch, value), _copied(unwrap(model)))
            self._stage = held if of_stage else self._stage
            self._run = held if of_run else self._run
            self._waiting_since = epoch if of_run else self._waiting_since
            self._ranked = tuple(ranked)
            if self.keep:
                self.keep(epoch, held.weights, of_run)
        return of_run

    def epochs_since(self, epoch: int) -> int:
        """Epochs of this stage, up to and with `epoch`, that brought no new best of the run."""
        return epoch - self._waiting_since if self._monitor else 0

    def restore(self, model: nn.Module, average: Ema | None, epoch: int, *, of_run: bool) -> int | None:
        """Put the best weights of the run, or of the stage, into the model and its average.

        Returns:
            The epoch that they come from; None where that is `epoch`, the one that was just trained, or
            nothing was kept.
        """
        held = self._run if of_run else self._stage
        if held is None:
            return None
        unwrap(model).load_state_dict(held.weights)
        if average:
            average.model.load_state_dict(held.weights)
        return held.kept.epoch if held.kept.epoch != epoch else None

    def weights(self, model: nn.Module) -> Weights:
        """The weights that the run leaves: its best, or the last ones where no best was kept."""
        return _copied(unwrap(model)) if self._run is None else self._run.weights

    def row(self, history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """The best epoch's row of `history`, or the last one."""
        return next(
            (row for row in history if self._run and row["epoch"] == self._run.kept.epoch), history[-1]
        )


def _copied(model: nn.Module) -> Weights:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
