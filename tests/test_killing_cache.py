"""A run whose frozen part is computed once a sample is stopped and resumed, and ends with the bits of the run that was not.

The features are not saved: what goes on computes them again, in the batches in which they were computed first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lehr
from killing import differences, warm_up
from nursery import Nursery, nursery
from variants import Case, Stop, never_stopped, stopped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are copied")
_ONCE = ("SIGINT",)
_SHORT = (
    lehr.Stage("3 epochs", train="head", lr=1e-2, cache="require"),
    lehr.Stage("5 epochs", train=["head", "1"], lr=1e-2, cache="require", views=2),
    lehr.Stage("1 epoch", train="all", lr=1e-2),
)
_PLACES = [
    Stop("PrefixCached"),
    *(Stop("training", n) for n in (5, 23, 46)),  # some of these calls are the self-check's
    Stop("training", 20, _ONCE),
    Stop("validation", 9, _ONCE),
    *(Stop("EpochEnded", n) for n in (0, 4, 5)),
    Stop("CacheClosed"),
    Stop("StageStarted", 1),
]


@pytest.fixture(scope="module")
def place() -> Nursery:
    return nursery(warm_up)


@pytest.fixture(scope="module")
def cached(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return never_stopped(place, tmp_path_factory.mktemp("cached"), Case(stages=_SHORT))


@pytest.mark.parametrize("often", ["1 step", "7 steps"])
@pytest.mark.parametrize("stop", _PLACES, ids=lambda stop: f"{stop.at}-{stop.nth}-{stop.how[0]}")
def test_death_in_a_cached_stage(
    place: Nursery, cached: dict[str, str], tmp_path: Path, stop: Stop, often: str
) -> None:
    """From whichever place and checkpoint a run goes on, it ends with the same bits, short last batches included."""
    case = Case(stages=_SHORT, more={"checkpoint": often})
    found = stopped(place, tmp_path / "stopped", case, stop)
    assert differences({**cached, "state": ""}, {**found, "state": ""}) == []


def test_twice_in_the_same_stage(place: Nursery, cached: dict[str, str], tmp_path: Path) -> None:
    """A second death in the stage in which a run had gone on changes nothing either."""
    stops = [Stop("training", 9), Stop("EpochEnded", 1), Stop("training", 21, _ONCE)]
    found = stopped(place, tmp_path / "stopped", Case(stages=_SHORT), *stops)
    assert differences(cached, found) == []
