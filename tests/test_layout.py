"""Layouts: tried in steps like any other, the faster one kept, and training is the same but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.errors import RequestError
from lehr.events import CheckpointWritten, Event, Note
from lehr.run import layout as layouts
from lehr.run.layout import Trial, apply_layout, by_rule, laid_out, may_be_tried, named_layout
from lehr.run.precision import arithmetic

ON = arithmetic("cpu")


class Net(nn.Module):
    """Enough convolutions, statistics, dropout, a frozen part, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 3)
        self.norm = nn.BatchNorm2d(128)
        self.body = nn.Conv2d(128, 128, 3)
        self.again = nn.Conv2d(128, 128, 3)
        self.again.weight = self.body.weight
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(128, 4)
        self.stem.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.body(self.norm(self.stem(x)).relu()).relu())
        return self.head(self.drop(x.mean((2, 3))))


def batch() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 10, 10), torch.arange(4)]


@pytest.fixture(autouse=True)
def _nobody_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(layouts.TURNED_OFF_BY, raising=False)


def decided(rule: str, contiguous: float, last: float, seen: int = 6) -> str:
    """The layout after so many steps that take as long as that, and much longer where they are the first of their layout."""
    trial = Trial(named_layout(rule), ON.device)
    for number in range(6 - seen, 6):
        seconds = {"contiguous": contiguous, "channels_last": last}[trial.at(number)]
        trial.took(seconds + (100.0 if number % 3 == 0 else 0.0))
    return trial.decided().name


@pytest.mark.parametrize("rule", ["contiguous", "channels_last"])
def test_the_faster_one_is_kept(rule: str) -> None:
    """Whichever is faster is kept, whatever the rule; what is not clear, too short to be timed, or not wholly seen is the
    rule's to say.
    """
    assert decided(rule, 1.0, 0.9) == "channels_last"
    assert decided(rule, 0.9, 1.0) == "contiguous"
    assert decided(rule, 1.0, 0.97) == decided(rule, 0.97, 1.0) == rule
    assert decided(rule, 0.001, 0.004) == decided(rule, 0.004, 0.001) == rule
    assert decided(rule, 0.1, 0.9, seen=4) == decided(rule, 0.9, 0.1, seen=4) == rule


def test_each_is_tried_for_three_steps() -> None:
    """First as the rule has it, then the other."""
    trial = Trial(named_layout("channels_last"), ON.device)
    assert [trial.at(number) for number in range(trial.steps)] == ["channels_last"] * 3 + ["contiguous"] * 3


def test_little_is_not_tried() -> None:
    """Few steps, few convolutions, or convolutions that do not train: the rule decides."""
    rule, all_of_it = named_layout("contiguous"), frozenset(n for n, _ in Net().named_parameters())
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 4))
    assert may_be_tried(rule, Net(), ON, all_of_it, 100)
    assert not may_be_tried(rule, Net(), ON, all_of_it, 99)
    assert not may_be_tried(rule, Net(), ON, frozenset({"head.weight"}), 100)
    assert not may_be_tried(rule, small, ON, frozenset({"0.weight"}), 100)


@pytest.mark.parametrize("asked", ["contiguous", "channels_last", "rule"])
def test_a_person_may_decide(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """LEHR_LAYOUT decides without a trial; a word that is none is refused with those that are."""
    monkeypatch.setenv(layouts.TURNED_OFF_BY, asked)
    rule = by_rule(Net(), ON)
    assert rule.is_given
    assert asked in (rule.name, "rule")
    assert not may_be_tried(rule, Net(), ON, frozenset({"body.weight"}), 1000)
    monkeypatch.setenv(layouts.TURNED_OFF_BY, "nhwc")
    with pytest.raises(RequestError, match="'nhwc'; expected 'contiguous' or 'channels_last'"):
        by_rule(Net(), ON)


def test_a_layout_that_came_is_a_person_s() -> None:
    """A model that is laid out channels-last stays so."""
    rule = by_rule(Net().to(memory_format=torch.channels_last), ON)
    assert (rule.name, rule.is_given) == ("channels_last", True)


def test_feature_maps_are_laid_out() -> None:
    """What has rows, columns and channels; nothing else is touched."""
    maps, rows = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    turned, same = laid_out((maps, rows), "channels_last")
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(turned, maps)
    assert same is rows
    assert laid_out((turned,), "contiguous")[0].is_contiguous()


Seen = Callable[[Event], None]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small runs try layouts, on a clock by which channels-last is faster; the layouts of the steps that were timed."""
    monkeypatch.setattr(layouts, "_FEWEST_STEPS", 10)
    laid: list[str] = []

    @contextmanager
    def timed(self: Trial) -> Iterator[None]:
        yield
        self.took(1.0 if laid[-1] == "contiguous" else 0.5)

    monkeypatch.setattr(Trial, "timed", timed)
    at = Trial.at
    monkeypatch.setattr(Trial, "at", lambda self, number: (laid.append(at(self, number)), laid[-1])[1])
    return laid


def ran(cache: str, **said: Any) -> tuple[Net, list[Event]]:
    """A run of two stages with enough steps; the stem stays frozen."""
    torch.manual_seed(0)
    model, seen = Net(), list[Event]()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 3, 10, 10, generator=generator), torch.arange(24) % 4)
    stages = [
        lehr.Stage("5 epochs", train=["body", "head"], lr=1e-2, cache=cache),
        lehr.Stage("2 epochs", train="head", lr=1e-3),
    ]
    recipe = lehr.Recipe(stages, optimizer={"name": "sgd", "momentum": 0.9}, batch_size=8)
    watching = said.pop("observers", ())
    lehr.fit(
        model, data, recipe=recipe, device="cpu", precision="fp32", observers=[seen.append, *watching], **said
    )
    return model, seen


@pytest.mark.parametrize("cache", ["require", "off"])
def test_a_stage_tries_both_and_keeps_the_faster(
    tried: list[str], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Three steps in each, with the short way and without; a line says what was kept; weights are those of a run that tried
    nothing, but for rounding; the next stage begins as the rule has it.
    """
    found, seen = ran(cache)
    assert tried == ["contiguous"] * 3 + ["channels_last"] * 3
    lines = [event.text for event in seen if isinstance(event, Note)]
    assert sum("laid out channels-last in this stage" in line for line in lines) == 1
    assert found.body.weight.is_contiguous()
    monkeypatch.setenv(layouts.TURNED_OFF_BY, "contiguous")
    plain, _ = ran(cache)
    assert len(tried) == 6
    for one, other in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_is_frozen_stays_as_the_rule_has_it(tried: list[str]) -> None:
    """A trial lays out what trains alone: frozen weights decide features, which a resume computes once more."""
    laid: list[tuple[bool, bool]] = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        form = {"memory_format": torch.channels_last}
        laid.append((model.stem.weight.is_contiguous(**form), model.body.weight.is_contiguous(**form)))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    ran("off", loss=loss)
    assert tried
    assert not any(stem for stem, _ in laid)
    assert [body for _, body in laid] == [False] * 3 + [True] * 12 + [False] * 6


@pytest.mark.parametrize("step", [2, 4, 6, 9])
@pytest.mark.parametrize("cache", ["require", "off"])
def test_a_resume_goes_on_in_the_layout_that_was_kept(
    tried: list[str], tmp_path: Path, step: int, cache: str
) -> None:
    """A run that is stopped after it has tried goes on to the same bits, and tries nothing again; one that is stopped before
    goes on with the trial.
    """
    whole, _ = ran(cache)
    tried.clear()

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointWritten) and event.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(cache, out=tmp_path / "run", checkpoint="1 step", observers=[stop])
    before = len(tried)
    found, _ = ran(cache, out=tmp_path / "run", resume=True)
    assert tried[before:] == (["contiguous"] * 3 + ["channels_last"] * 3)[step:]
    if step >= 6:
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.parameters(), strict=True))


def test_a_layout_is_applied_and_taken_back() -> None:
    """Each parameter stays the same object with the same values; the outputs are the same but for rounding."""
    model, (x, _) = Net().eval(), batch()
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    expected = model(x)
    for name, form in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        apply_layout(model, named_layout(name))
        assert model.body.weight.is_contiguous(memory_format=form)
        assert model.again.weight is model.body.weight
        torch.testing.assert_close(model(x), expected)
        for key, parameter in model.named_parameters():
            was, value = weights[key]
            assert parameter is was
            assert torch.equal(parameter, value)
