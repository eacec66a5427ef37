"""Trained the short way, a run comes to what it comes to the long way; where it cannot, it says so and goes the long way."""

from __future__ import annotations

import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    DataLoader,
    Dataset,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import lehr
from lehr.errors import RecipeError
from lehr.events import PrefixCached
from lehr.run.cache import store as cache
from lehr.run.cache.calling import StandIn
from lehr.run.cache.shortcut import Drawn, Shortcut
from short_runs import Net, Own, close, images, loader, net, ran, recipe, same

EXACT = {"cache_exact": True}


@pytest.mark.parametrize("train", ["head", ["head", "blocks.1"], ["head", "blocks.1.1"]])
def test_the_same_bits_as_the_long_way(train: Any) -> None:
    """With the prefix in the model's own arithmetic and batches of its size, every loss, metric and weight is the same."""
    short, long = ran(recipe(train, **EXACT)), ran(recipe(train, cache="off"))
    assert same(short, long)
    assert short.weights["blocks.1.1.num_batches_tracked"] == long.weights["blocks.1.1.num_batches_tracked"]
    assert short.cached.keys() == {"train", "valid"}


def test_the_prefix_runs_once_a_sample() -> None:
    """Of four epochs the first computes the features and the others read them; so for the validation set."""
    found = ran(recipe(["head", "blocks.1"]))
    train, valid = found.closed["train"], found.closed["valid"]
    assert (train.computed, train.read) == (24, 72)
    assert (valid.computed, valid.read) == (9, 27)
    assert found.cached["train"].after.startswith("blocks.0")
    assert 0 < found.cached["train"].share < 1
    assert found.cached["train"].rows == 24


def test_no_sample_is_loaded_again() -> None:
    """In later epochs a person's data set is not asked for samples: there is nothing to decode."""
    data = Own()
    ran(recipe(), train=data, valid=None)
    first = data.drawn
    data.drawn = 0
    ran(recipe(length="40 epochs"), train=data, valid=None)
    assert data.drawn == first


def test_folded_and_partial_batches_come_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and with batches that do not divide the samples, the same within rounding."""
    monkeypatch.setattr("lehr.run.prefix.folding._LARGE", 0)
    data, said = images(22), {"train": ["head", "blocks.1"], "optimizer": "sgd"}
    short = ran(recipe(**said), train=data)
    assert short.cached["train"].folded
    assert close(short, ran(recipe(cache="off", **said), train=data))


@pytest.mark.parametrize("optimizer", ["adamw", {"name": "sgd", "momentum": 0.9}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_windows_and_averages_go_the_same_way(optimizer: Any, accumulate: int) -> None:
    """Accumulated batches, an average of the weights and clipping change nothing in that."""
    said = {"optimizer": optimizer, "accumulate": accumulate, "ema": 0.9, "clip_norm": 0.5, "batch_size": 4}
    assert same(ran(recipe(**EXACT, **said)), ran(recipe(cache="off", **said)))


def test_gradients_are_gone_before_a_batch_goes_through_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the update before are of no more use, and what they take is room for the pass; epochs that read keep them so long."""
    model, held = net(), []
    through = Shortcut._through

    def looked(self: Shortcut, drawn: Drawn) -> Any:
        held.append((bool(drawn.missing.any()), any(p.grad is not None for p in model.parameters())))
        return through(self, drawn)

    monkeypatch.setattr(Shortcut, "_through", looked)
    ran(recipe(), model=model, valid=None)
    assert (True, False) in held
    assert (True, True) not in held
    assert (False, True) in held


class Weighed(Dataset[Any]):
    """Samples that are made when they are asked for."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[index] for tensor in images().tensors)


@pytest.mark.parametrize("made", ["tensors", "samples", "loader"])
def test_samples_are_gone_while_the_suffix_trains(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway through the model a batch's samples are of no more use, and often larger than what they have become."""
    monkeypatch.setattr("lehr.run.sampler._CHUNK", 1)  # a batch of tensors at a time, as of large ones
    drawn: list[weakref.ref[torch.Tensor]] = []
    held, through = list[int](), Shortcut._through

    def looked(self: Shortcut, given: Drawn) -> Any:
        if given.missing.any():
            drawn.append(weakref.ref(given.batch[0]))
        found = through(self, given)
        if len(drawn) == 1:
            held.clear()  # the look's own calls
        return found

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if isinstance(model, StandIn):
            held.append(sum(reference() is not None for reference in drawn))
        return functional.cross_entropy(model(batch[0]), batch[1])

    monkeypatch.setattr(Shortcut, "_through", looked)
    own = {"tensors": images(), "samples": Weighed(), "loader": DataLoader(images(), batch_size=8)}
    assert ran(recipe(), train=own[made], valid=None, loss=loss).cached
    assert len(drawn) == 3
    assert held == [0] * 12  # three steps that compute, and nine that read


class Zeroing(Net):
    """A model with a `zero_grad` of its own, which takes no arguments."""

    def zero_grad(self) -> None:
        """Do as the other does."""
        super().zero_grad()


def test_a_method_of_the_model_s_own_is_left_alone() -> None:
    """Gradients go without it."""
    assert ran(recipe(), model=net(Zeroing), valid=None).cached


def test_a_stage_that_follows_thaws_as_ever() -> None:
    """After the cached stage the whole model trains, with no trace of the cut left on it."""
    stages = [lehr.Stage("3 epochs", train="head", lr=0.02), lehr.Stage("2 epochs", train="all", lr=0.01)]
    said = {"batch_size": 8, "ema": 0.9, "restore_best": True}
    short = ran(lehr.Recipe(stages, cache_exact=True, **said))  # auto: too little work, so nothing is cached
    assert not short.cached
    first = [lehr.Stage("3 epochs", train="head", lr=0.02, cache="require"), stages[1]]
    assert same(ran(lehr.Recipe(first, cache_exact=True, **said)), short)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_fixed_views_are_cached(views: int) -> None:
    """Each view of a sample is computed once, in the epoch whose turn it is first."""
    data = Own(lambda image, _: image + 0.1 * torch.randn(()))
    found = ran(recipe(length="7 epochs", views=views, **EXACT), train=data)
    assert found.closed["train"].computed == 24 * views
    assert same(found, ran(recipe(length="7 epochs", views=views, cache="off"), train=data))


@pytest.mark.parametrize(
    "how", ["shuffle", "no generator", "workers", "weighted", "part", "in order", "drop last"]
)
def test_a_loader_s_own_order(how: str) -> None:
    """A person's loader is followed batch for batch, whatever draws its order."""

    def made() -> Any:
        torch.manual_seed(5)
        weights = torch.arange(1.0, 25.0)
        said: dict[str, Any] = {
            "shuffle": {},
            "no generator": {"generator": None},
            "workers": {"num_workers": 2},
            "weighted": {"shuffle": False, "sampler": WeightedRandomSampler(weights.tolist(), 24)},
            "part": {"shuffle": False, "sampler": SubsetRandomSampler(range(4, 20))},
            "in order": {"shuffle": False, "sampler": SequentialSampler(images())},
            "drop last": {"drop_last": True, "batch_size": 7},
        }[how]
        return loader(**said)

    size = 7 if how == "drop last" else 8
    short = ran(
        recipe(length="5 epochs", batch_size=size, **EXACT),
        train=made(),
        valid=loader(images(9), shuffle=False),
    )
    long = ran(
        recipe(length="5 epochs", batch_size=size, cache="off"),
        train=made(),
        valid=loader(images(9), shuffle=False),
    )
    assert close(short, long) if how in ("weighted", "drop last") else same(short, long)
    assert short.closed["train"].read > 0


def keyed(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """A loss of a person's own, on dicts, with a penalty on the weights."""
    outputs = model(x=batch["image"])
    loss = functional.cross_entropy(outputs, batch["of"]["class"]) + 0.01 * model.fc.weight.square().sum()
    return {"loss": loss, "outputs": outputs, "targets": batch["of"]["class"]}


class Keyed(Own):
    """Samples as dicts in dicts."""

    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        return {"image": image, "of": {"class": target}}


def test_a_loss_of_one_s_own() -> None:
    """A loss function may take a batch of any form, call the model by keyword, and look at its weights."""
    more = {"train": Keyed(), "valid": Keyed(data=images(9)), "loss": keyed}
    assert same(ran(recipe(**EXACT), **more), ran(recipe(cache="off"), **more))


def mixed(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mixes samples before the model sees them."""
    inputs, targets = batch
    return functional.cross_entropy(model(0.7 * inputs + 0.3 * inputs.flip(0)), targets)


def reading(model: nn.Module, batch: Any) -> torch.Tensor:
    """Looks at the inputs besides."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs), targets) + 0.1 * inputs.square().mean()


def twice(model: nn.Module, batch: Any) -> torch.Tensor:
    """Calls the model twice."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs) + model(inputs.flip(3)), targets)


def parts(model: nn.Module, batch: Any) -> torch.Tensor:
    """Calls parts of the model, not the model."""
    return functional.cross_entropy(model.fc(model.blocks(batch[0]).mean((2, 3))), batch[1])


class Centred(Net):
    """Its frozen part takes the mean of the batch away: a sample depends on the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x - x.mean(0)).mean((2, 3)))


class Branching(Net):
    """Goes another way for bright images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2 if x.mean() > 0 else x)


AMISS = [
    ({"loss": mixed}, "changes the inputs"),
    ({"loss": reading}, "loss"),
    ({"loss": twice}, "calls the model|changes the inputs|reads the model's inputs"),
    ({"loss": parts}, "never calls the model|does more"),
    ({"model": Centred}, "sample"),
    ({"model": Branching}, "branch"),
    ({"train": Own(lambda image, _: image + torch.randn(()))}, "random"),
]


@pytest.mark.parametrize(("what", "why"), AMISS)
def test_what_cannot_be_cached_is_trained_the_long_way(
    what: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the short way would be wrong, the run is the long way's to the bit and a line says why; `require` raises it."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    said = dict(what)
    make = said.pop("model", Net)
    plain = ran(recipe(cache="off"), model=net(make), **said)
    found = ran(recipe(cache="auto"), model=net(make), **said)
    assert same(found, plain)
    assert "train" not in found.cached
    (line,) = [
        line for line in found.notes.splitlines() if line.startswith("stage 1 is trained without a cache")
    ]
    with pytest.raises(RecipeError, match=why) as raised:
        ran(recipe(), model=net(make), **said)
    assert str(raised.value).removeprefix("stages.0.cache: ") in line


def test_over_the_budget_a_part_is_cached() -> None:
    """Where not all fits, the first samples are kept and the others computed each time, with the same result."""
    row = ran(recipe()).cached["train"].bytes
    found = ran(recipe(cache_budget=f"{10 * row} bytes", length="5 epochs", **EXACT), valid=None)
    assert found.cached["train"].rows == 10
    assert found.closed["train"].read > 0
    assert close(found, ran(recipe(cache="off", length="5 epochs"), valid=None))


def test_a_narrow_type_is_taken_when_the_budget_asks_for_it() -> None:
    """fp16 is stored only where fp32 does not fit, and where it is allowed; the result is near."""
    row = ran(recipe()).cached["train"].bytes
    tight = f"{24 * row * 2 // 3} bytes"
    assert ran(recipe(cache_dtype="fp16"), valid=None).cached["train"].bytes == row
    narrow = ran(recipe(cache_dtype="fp16", cache_budget=tight), valid=None)
    assert narrow.cached["train"].bytes < row
    assert narrow.cached["train"].rows == 24
    assert close(narrow, ran(recipe(cache="off"), valid=None), within=5e-3)


class Loud(Net):
    """Its features are too large for fp16 in some samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(
            self.blocks(x * torch.where(x.mean((1, 2, 3), keepdim=True) > 0.25, 1e6, 1.0)).mean((2, 3)) * 1e-6
        )


def test_what_a_narrow_type_cannot_hold_is_not_stored_in_it() -> None:
    """Samples whose features overflow are computed each time, and a line says so; the run is near the long way's."""
    found = ran(recipe(cache_dtype="fp16", cache_budget="600 bytes"), model=net(Loud), valid=None)
    assert close(found, ran(recipe(cache="off"), model=net(Loud), valid=None), within=5e-3)


def test_in_a_file_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short the rows lie in the run's directory, and nothing of them is left there."""
    monkeypatch.setattr(cache, "free_memory", lambda: 100)
    found = ran(recipe(**EXACT), out=tmp_path / "run")
    assert found.cached["train"].place == "file"
    assert same(found, ran(recipe(cache="off")))
    assert not [path for path in (tmp_path / "run").iterdir() if "cache" in path.name]


def test_frozen_weights_that_change_are_noticed() -> None:
    """Where somebody writes to frozen weights, features computed before are not used any more."""
    model, events = net(), []

    def meddling(event: Any) -> None:
        events.append(event)
        if type(event).__name__ == "EpochEnded" and event.epoch == 1:
            with torch.no_grad():
                model.blocks[0][0].weight.mul_(1.5)

    with pytest.raises(lehr.LehrError, match=r"frozen|blocks"):
        lehr.fit(
            model, images(), recipe=recipe(cache="auto"), observers=[meddling], device="cpu", precision="fp32"
        )


def test_the_random_states_are_the_long_way_s() -> None:
    """A run leaves the global random states as it leaves them the long way, however the prefix was found."""
    ran(recipe(**EXACT))
    short = torch.get_rng_state()
    ran(recipe(cache="off"))
    assert torch.equal(short, torch.get_rng_state())


def test_a_small_job_is_left_alone() -> None:
    """Where there is little to save, `auto` looks for no prefix, and does not speak of it."""
    found = ran(recipe(cache="auto"))
    assert not [event for event in found.events if isinstance(event, PrefixCached)]
    assert "cache" not in found.notes


class Fussy(Net):
    """Its frozen part is computed otherwise for batches of fewer than four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(_fussy(self.blocks(x)).mean((2, 3)))


def _fussy(x: torch.Tensor) -> torch.Tensor:
    return x if len(x) >= 4 else x.flatten(0, 1)[:, None].expand(-1, 8, -1, -1)[: len(x)]


torch.fx.wrap("_fussy")


def test_a_batch_that_does_not_fit_is_trained_the_long_way() -> None:
    """Where a batch turns out to need another way through the model, the run goes on the long way and says so."""
    data = images(18)
    found = ran(recipe(cache="auto", optimizer="sgd"), model=net(Fussy), train=data, valid=None)
    assert close(found, ran(recipe(cache="off", optimizer="sgd"), model=net(Fussy), train=data, valid=None))


def test_features_are_computed_in_the_batches_of_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on after a stop computes each sample's features beside the same samples as the run that was not stopped,
    since on some machines what lies beside it decides its last bit.
    """
    beside: dict[bytes, set[tuple[bytes, ...]]] = {}
    computed = Shortcut._computed

    def recorded(self: Shortcut, drawn: Drawn, *rest: Any) -> Any:
        together = tuple(image.numpy().tobytes() for image in drawn.batch[0])
        for image in together:
            beside.setdefault(image, set()).add(together)
        return computed(self, drawn, *rest)

    monkeypatch.setattr(Shortcut, "_computed", recorded)
    said = recipe(length="7 epochs", views=2)
    data = {"train": Own(lambda image, _: image + torch.randn(())), "valid": None}
    ran(said, out=tmp_path / "whole", **data)
    expected = dict(beside)
    for step in (1, 4, 11, 16):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            ran(said, out=out, checkpoint="1 step", loss=_interrupted_in(step), **data)
        beside.clear()
        ran(said, out=out, resume=True, loss=_interrupted_in(None), **data)
        assert beside
        assert all(beside[image] == expected[image] for image in beside)


def _interrupted_in(step: int | None) -> Any:
    """Cross-entropy, and Ctrl-C in the step (counted by the optimizer's updates that have been done)."""
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = model(batch[0])
        if not isinstance(model, nn.Module) and torch.is_grad_enabled() and next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return functional.cross_entropy(outputs, batch[1])

    return loss
