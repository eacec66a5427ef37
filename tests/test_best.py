"""The best weights: which they are, where they are kept, how they come back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lehr.errors import RunError
from lehr.run.best import Best, Weights
from lehr.run.ema import Ema


def numbered(value: float) -> nn.Module:
    """A model all of whose weights are `value`."""
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def offered(best: Best, values: list[float], *, first: int = 0, metric: str = "valid_loss") -> list[bool]:
    """Offers one epoch after another, whose weights are the number of the epoch."""
    rows = enumerate(values, first)
    return [best.offer(epoch, {"train_loss": 0.0, metric: value}, numbered(epoch)) for epoch, value in rows]


def restored(best: Best, *, of_run: bool, epoch: int = 99) -> tuple[int | None, float]:
    model = numbered(-1.0)
    return best.restore(model, None, epoch, of_run=of_run), model.weight[0, 0].item()


def test_the_lowest_loss_wins_and_a_tie_keeps_the_earlier() -> None:
    """Only an epoch that is strictly better than all before it is the best."""
    best = Best("valid_loss", None)
    best.begin_stage(0)
    assert offered(best, [3.0, 2.0, 2.0, 2.5, 1.0, 1.0]) == [True, True, False, False, True, False]
    assert restored(best, of_run=True) == (4, 4.0)


@pytest.mark.parametrize("metric", ["valid_accuracy", "valid_f1"])
def test_more_of_a_metric_is_better(metric: str) -> None:
    """What is no loss and no error is to be high."""
    best = Best(metric, None)
    best.begin_stage(0)
    assert offered(best, [0.5, 0.7, 0.6], metric=metric) == [True, True, False]


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_an_epoch_that_is_not_a_number_blocks_no_later_one(worst: float) -> None:
    """NaN is worse than anything, also where it came first."""
    best = Best("valid_loss", None)
    best.begin_stage(0)
    assert offered(best, [worst, 5.0, worst, 4.0])[1:] == [True, False, True]
    assert restored(best, of_run=True) == (3, 3.0)


def test_each_stage_has_a_best_of_its_own() -> None:
    """The best of a stage is the best since the stage began; that of the run is over all of them."""
    best = Best("valid_loss", None)
    best.begin_stage(0)
    offered(best, [3.0, 1.0, 2.0])
    assert restored(best, of_run=False) == (1, 1.0)
    best.begin_stage(3)
    assert offered(best, [6.0, 4.0, 5.0], first=3) == [False, False, False]
    assert restored(best, of_run=False) == (4, 4.0)
    assert restored(best, of_run=True) == (1, 1.0)


def test_nothing_is_restored_where_the_last_epoch_was_the_best() -> None:
    """The best weights that are those of the epoch just trained are no restoration to tell of."""
    best = Best("valid_loss", None)
    best.begin_stage(0)
    offered(best, [2.0, 1.0])
    assert restored(best, of_run=True, epoch=1) == (None, 1.0)


def test_patience_counts_epochs_of_the_stage_without_a_new_best() -> None:
    """`epochs_since` counts from the stage's beginning or from the run's last best, whichever is later."""
    best = Best("valid_loss", None)
    best.begin_stage(0)
    waits = []
    for epoch, value in enumerate([3.0, 2.0, 2.0, 2.0, 1.0]):
        best.offer(epoch, {"valid_loss": value}, numbered(epoch))
        waits.append(best.epochs_since(epoch))
    assert waits == [0, 0, 1, 2, 0]
    best.begin_stage(5)
    best.offer(5, {"valid_loss": 9.0}, numbered(5))
    assert best.epochs_since(5) == 1


def test_the_average_is_restored_with_the_model() -> None:
    """Weights that are put back go into the moving average, too, so that it goes on from them."""
    model = numbered(7.0)
    average = Ema(model, 0.9)
    best = Best("valid_loss", None)
    best.begin_stage(0)
    offered(best, [1.0, 2.0])
    best.restore(model, average, 1, of_run=False)
    assert model.weight[0, 0].item() == average.model.weight[0, 0].item() == 0.0


def test_what_is_kept_is_a_copy() -> None:
    """Training on does not change the best weights."""
    model = numbered(5.0)
    best = Best("valid_loss", None)
    best.begin_stage(0)
    best.offer(0, {"valid_loss": 1.0}, model)
    nn.init.zeros_(model.weight)
    best.restore(model, None, 9, of_run=True)
    assert model.weight[0, 0].item() == 5.0


class Kept:
    """What is handed over to be kept: (epoch, whether of the run, the first weight)."""

    def __init__(self, best: Best) -> None:
        self.told: list[tuple[int, bool, float]] = []
        best.keep = self

    def __call__(self, epoch: int, weights: Weights, of_run: bool) -> None:
        self.told.append((epoch, of_run, weights["weight"][0, 0].item()))


def test_what_is_kept_elsewhere_is_each_best() -> None:
    """Each new best of the run, and each of a stage, is handed over once with its weights, and nothing else."""
    best = Best("valid_loss", None)
    kept = Kept(best)
    best.begin_stage(0)
    offered(best, [3.0, 1.0, 2.0])
    best.begin_stage(3)
    offered(best, [4.0, 5.0], first=3)
    assert kept.told == [(0, True, 0.0), (1, True, 1.0), (3, False, 3.0)]
    assert best.epoch == 1
    assert torch.equal(best.weights(numbered(77.0))["weight"], torch.ones(1, 2))


def test_the_few_best_are_kept_elsewhere() -> None:
    """`most` epochs are ranked, a tie for the earlier; an epoch is handed over when it joins them."""
    best = Best("valid_loss", None, most=2)
    kept = Kept(best)
    best.begin_stage(0)
    offered(best, [3.0, 1.0, 2.0, 2.0, 9.0, 1.5])
    assert [epoch for epoch, _, _ in kept.told] == [0, 1, 2, 5]
    assert [k.epoch for k in best.so_far.ranked] == [1, 5]
    assert set(best.held) == {1}


def test_without_a_monitor_the_last_weights_are_the_runs() -> None:
    """Where nothing says which weights are best, the last ones are kept, and the last row is the best row."""
    best = Best("", None)
    kept = Kept(best)
    best.begin_stage(0)
    assert offered(best, [1.0, 2.0]) == [False, False]
    assert kept.told == []
    assert best.epoch is None
    assert best.epochs_since(1) == 0
    assert torch.equal(best.weights(numbered(4.0))["weight"], torch.full((1, 2), 4.0))
    assert best.row([{"epoch": 0}, {"epoch": 1}]) == {"epoch": 1}


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), min_size=2, max_size=9),
    st.integers(1, 3),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_what_is_best_can_be_taken_up_anywhere(values: list[float], most: int, data: st.DataObject) -> None:
    """After any epoch, what is known and the weights held are enough to go on as if nothing had happened."""
    at, second = (
        data.draw(st.integers(1, len(values))) for _ in range(2)
    )  # taken up here, the stage begins there
    runs: list[tuple[object, ...]] = []
    for taken_up in (False, True):
        best = Best("valid_loss", None, most=most)
        for epoch, value in enumerate(values):
            if taken_up and epoch == at:
                other = Best("valid_loss", None, most=most)
                other.resume(best.so_far, best.held)
                best = other
            if epoch in (0, second):
                best.begin_stage(epoch)
            best.offer(epoch, {"valid_loss": value}, numbered(epoch))
        restored_weights = [restored(best, of_run=of_run) for of_run in (True, False)]
        runs.append((best.so_far, sorted(best.held), restored_weights, best.epochs_since(len(values))))
    assert repr(runs[0]) == repr(runs[1])


def test_fewer_may_be_kept_by_the_run_that_goes_on() -> None:
    """A run that goes on with a smaller `most` ranks no more than that."""
    best = Best("valid_loss", None, most=3)
    best.begin_stage(0)
    offered(best, [3.0, 2.0, 1.0])
    other = Best("valid_loss", None, most=1)
    other.resume(best.so_far, best.held)
    assert [kept.epoch for kept in other.so_far.ranked] == [2]


def test_a_metric_that_is_not_measured_is_named() -> None:
    """A monitored name that the epoch does not have is an error that lists those it has."""
    best = Best("valid_acuracy", None)
    best.begin_stage(0)
    wanted = (
        r"called 'valid_acuracy'; did you mean \"valid_accuracy\"\? There are: train_loss, valid_accuracy"
    )
    with pytest.raises(RunError, match=wanted):
        offered(best, [0.5], metric="valid_accuracy")
