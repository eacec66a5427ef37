"""What a cache has done: counted once, by this program's clock or a GPU's; and what came of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lehr.run.cache import clock
from lehr.run.cache.clock import Clock, Tally


def test_a_gpus_own_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By events, which are let go where an epoch begins."""
    waited: list[Any] = []

    class Event:
        def __init__(self, **_: bool) -> None: ...

        def record(self, _: object) -> None: ...

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, _: object) -> float:
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    here = Clock(torch.device("cuda"))
    for _ in range(3):
        here.computed(4, since=here.now(on_device=True))
    assert here.tally == Tally(computed=12, computing=0.75)
    here.computed(4, since=here.now(on_device=True))
    here.begin_epoch()
    assert len(waited) == 4
    assert here.tally == Tally(computed=16, computing=1.0)
    assert len(waited) == 4


@pytest.mark.parametrize(
    ("reading", "computing", "pays"), [(9.0, 1.0, False), (9.0, 10.0, True), (0.1, 0.05, True)]
)
def test_what_pays(reading: float, computing: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading that takes longer than computing does not, where it takes seconds."""
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    here = Clock(torch.device("cpu"))
    began = here.now()
    now[0] += computing
    here.computed(1, since=began)
    assert here.why_not_worth_it() == ""
    here.begin_epoch()
    began = here.now()
    now[0] += reading
    here.read(1, since=began)
    assert (here.why_not_worth_it() == "") == pays
    assert here.tally.saved == pytest.approx(max(0.0, computing - reading))
