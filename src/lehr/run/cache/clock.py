"""What a cache has done and how long it took, and whether it pays. It must not know rows, models or batches.

On a GPU, which works beside this program, computing is timed by the device's own clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

_LONG = 5.0
"""Seconds of reading in an epoch from which on a cache is judged by the clock; below, it does not matter."""


@dataclass
class Tally:
    """What a cache has done: samples computed and samples read, and the seconds that each took."""

    computed: int = 0
    read: int = 0
    computing: float = 0.0
    reading: float = 0.0

    @property
    def saved(self) -> float:
        """Seconds that were not spent, as far as it can be told."""
        if not self.computed or not self.read:
            return 0.0
        return max(0.0, self.read * self.computing / self.computed - self.reading)


class Moment(NamedTuple):
    """A time of this program, and the place in the work of a GPU, if there is one, at which it was taken."""

    seconds: float
    event: torch.cuda.Event | None = None


class Clock:
    """Counts samples and seconds, for work on `device`.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.read(4, since=clock.now())
        >>> clock.tally.read
        4
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tally = Tally()
        self._laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of computing, on a GPU
        self._at_start: Tally | None = None  # of the epoch that was last

    @property
    def tally(self) -> Tally:
        """What has been done; a GPU is waited for."""
        for began, ended in self._laps:
            ended.synchronize()
            self._tally.computing += began.elapsed_time(ended) / 1e3
        self._laps.clear()
        return self._tally

    def now(self, *, on_device: bool = False) -> Moment:
        """This moment; `on_device` where a GPU is about to be given work that counts."""
        if not on_device or self._device.type != "cuda":
            return Moment(time.monotonic())
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return Moment(time.monotonic(), event)

    def loaded(self, *, since: Moment) -> None:
        """Samples were loaded, which is a part of computing them."""
        self._tally.computing += time.monotonic() - since.seconds

    def read(self, samples: int, *, since: Moment | None = None) -> None:
        """So many samples were read; without a time where most of the batch was computed."""
        self._tally.read += samples
        if since is not None:
            self._tally.reading += time.monotonic() - since.seconds

    def computed(self, samples: int, *, since: Moment) -> None:
        """So many samples were computed."""
        self._tally.computed += samples
        if since.event is not None and (ended := self.now(on_device=True).event):
            self._laps.append((since.event, ended))
        else:
            self._tally.computing += time.monotonic() - since.seconds

    def begin_epoch(self) -> None:
        """Judge from here on."""
        self._at_start = replace(self.tally)

    def why_not_worth_it(self) -> str:
        """After a whole epoch that was read: why the cache does not pay; "" where it does, or where nothing can be said."""
        was, tally = self._at_start, self.tally
        if was is None or not was.computed or tally.computed > was.computed:
            return ""
        seconds, read = tally.reading - was.reading, tally.read - was.read
        if seconds <= _LONG or seconds / read <= was.computing / was.computed:
            return ""
        return (
            f"reading a sample takes {1e3 * seconds / read:.3g} ms and computing it "
            f"{1e3 * was.computing / was.computed:.3g} ms, so the cache does not pay and is off from here on"
        )
