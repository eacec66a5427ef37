"""The best weights so far: what "best" means, where they are kept, and how they come back.

It must not know how they were trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lehr.errors import RunError, nearest
from lehr.run.ema import Ema
from lehr.run.facts import unwrap
from lehr.run.folder import RunFolder
from lehr.run.validation import Metrics, higher_is_better

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Kept:
    epoch: int
    value: float
    state: State


class Best:
    """Keeps the best weights of the stage and of the run by `monitor`, in memory and in the run's directory.

    An empty `monitor` keeps none: the last weights are the run's. A tie keeps the earlier epoch.
    """

    def __init__(self, monitor: str, metrics: Metrics | None, folder: RunFolder | None) -> None:
        self._monitor, self._folder = monitor, folder
        self._sign = 1.0 if monitor and higher_is_better(monitor, metrics) else -1.0
        self._run: _Kept | None = None
        self._stage: _Kept | None = None
        self._waiting_since = -1

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
        if self._monitor not in row:
            raise RunError(
                f"monitor: no metric is called {self._monitor!r}{nearest(self._monitor, row)} "
                f"There are: {', '.join(row)}"
            )
        measured = row[self._monitor]
        value = -math.inf if math.isnan(measured) else self._sign * measured  # nothing compares with NaN
        of_stage = self._stage is None or value > self._stage.value
        of_run = self._run is None or value > self._run.value
        if of_stage or of_run:
            kept = _Kept(epoch, value, _copied(unwrap(model)))
            self._stage = kept if of_stage else self._stage
            if of_run:
                self._run = kept
                self._waiting_since = epoch
                if self._folder:
                    self._folder.save_weights(kept.state)
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
        kept = self._run if of_run else self._stage
        if kept is None:
            return None
        unwrap(model).load_state_dict(kept.state)
        if average:
            average.model.load_state_dict(kept.state)
        return kept.epoch if kept.epoch != epoch else None

    def finish(self, model: nn.Module) -> None:
        """Where no best was kept, the last weights are the run's."""
        if self._run is None and self._folder:
            self._folder.save_weights(_copied(unwrap(model)))

    def row(self, history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """The best epoch's row of `history`, or the last one."""
        return next((row for row in history if self._run and row["epoch"] == self._run.epoch), history[-1])


def _copied(model: nn.Module) -> State:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
