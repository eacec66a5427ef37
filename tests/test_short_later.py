"""What goes otherwise only after the first batches: the short way notices, and a run is what it is the long way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset, get_worker_info

import lehr
from lehr.events import EpochEnded, Event
from lehr.run import allocator
from lehr.run.cache import clock, shortcut
from lehr.run.cache.store import Store
from lehr.run.cache.ways import Way
from short_runs import Net, Own, close, images, loader, net, ran, recipe, same


@pytest.fixture(autouse=True)
def _every_job_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)


class Scaled(Net):
    """Takes a number besides the images."""

    def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
        return by * super().forward(x)


def later(first: Callable[[Any, Any], Any], then: Callable[[Any, Any], Any], after: int = 20) -> Any:
    """A loss function whose call of the model is another after so many training steps."""

    def loss(model: Any, batch: Any) -> torch.Tensor:
        call = then if model.fc.bias.step > after else first
        return functional.cross_entropy(call(model, batch[0]), batch[1])

    return loss


def counted(model: nn.Module) -> Callable[[Event], None]:
    """An observer by which the model's head knows how far the run is."""
    model.fc.bias.step = 0

    def count(event: Event) -> None:
        if isinstance(event, EpochEnded):
            model.fc.bias.step = event.step

    return count


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (lambda model, x: model(x, 5.0), "other arguments"),
        (lambda model, x: model(x) + 0.1 * model(x), "more than once"),
        (lambda model, x: model(x) + 0.1 * model(x.flip(3)), "reads the model's inputs"),
        (lambda model, x: model(x.flip(3)), "reads the model's inputs"),
        (lambda model, _: model(torch.zeros(8, 3, 6, 6)), "another argument 1"),
    ],
)
def test_a_model_that_is_called_otherwise_later(then: Any, why: str) -> None:
    """Where the loss function changes how it calls the model in the middle of a run, the run goes on the long way, with a
    line that says why.
    """
    runs = {}
    for cache in ("auto", "off"):
        model = net(Scaled)
        count = counted(model)
        seen: list[Event] = []
        result = lehr.fit(
            model, images(), recipe=recipe(length="6 epochs", cache=cache, optimizer="sgd"), device="cpu", precision="fp32",
            loss=later(lambda m, x: m(x), then, after=8), observers=[count, seen.append],
        )  # fmt: skip
        runs[cache] = result.model.state_dict(), "\n".join(getattr(e, "text", "") for e in seen)
    assert why in runs["auto"][1]
    for name, weight in runs["off"][0].items():
        assert torch.allclose(runs["auto"][0][name], weight, atol=1e-4)


def test_a_number_that_the_model_is_given_changes() -> None:
    """An argument that is no tensor, and the same at first, is not taken for constant."""
    test_a_model_that_is_called_otherwise_later(lambda m, x: m(x, by=2.0), "other arguments")


def loud(samples: int = 24) -> TensorDataset:
    """One image, which is not in the first batch, is so bright that fp16 does not hold its features."""
    data = images(samples)
    data.tensors[0][7] *= 1e6
    return data


class Quieted(Net):
    """Brings loud features down behind the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-10.0, 10.0)


def test_a_row_that_fp16_cannot_hold_beside_others_that_it_can() -> None:
    """A sample that overflows is computed each time and stays finite, also in a batch whose other rows are read; the others
    are stored, once.
    """
    model = net(Quieted)
    wide = ran(recipe(["head"], cache_exact=True), model=net(Quieted), train=loud(), valid=None)
    row = wide.cached["train"].bytes
    said = recipe(
        length="5 epochs", cache_dtype="fp16", cache_budget=f"{24 * row * 2 // 3} bytes", optimizer="sgd"
    )
    found = ran(said, model=model, train=loud(), valid=None)
    assert found.cached["train"].bytes < row
    assert "too large" in found.notes
    assert found.closed["train"].computed == 24 + 4
    assert close(
        found,
        ran(
            recipe(length="5 epochs", cache="off", optimizer="sgd"),
            model=net(Quieted),
            train=loud(),
            valid=None,
        ),
        within=5e-2,
    )


def drawing(image: torch.Tensor, index: int) -> torch.Tensor:
    """One image, which no probe looks at, is another each time."""
    return image + torch.randn(()) if index == 1 else image


@pytest.mark.parametrize("step", [4, 7, 10])
def test_a_resume_knows_what_was_noticed_before_it(tmp_path: Path, step: int) -> None:
    """Where a sample drew random numbers in an epoch before the stop, the run that goes on trains the long way as well."""
    said = recipe(length="5 epochs", cache="auto", cache_exact=True)
    whole = ran(said, train=Own(drawing), valid=None)
    assert whole.cached
    assert "draws random numbers" in whole.notes

    def stopping(event: Event) -> None:
        if type(event).__name__ == "CheckpointWritten" and event.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lehr.fit(
            net(), Own(drawing), recipe=said, out=tmp_path / "run", checkpoint="1 step", observers=[stopping],
            device="cpu", precision="fp32",
        )  # fmt: skip
    found = ran(said, train=Own(drawing), valid=None, out=tmp_path / "run", resume=True)
    assert all(torch.equal(found.weights[n], w) for n, w in whole.weights.items())


class Opened(Own):
    """Must be opened in each worker."""

    opened = False

    def __getitem__(self, index: int) -> Any:
        assert self.opened or get_worker_info() is None
        return super().__getitem__(index)


def opening(_: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.opened = True
    assert isinstance(info.dataset, Opened)


def test_a_worker_finds_the_data_set_that_it_knows() -> None:
    """A person's `worker_init_fn` may set up the data set of its worker."""
    data = {"num_workers": 1, "worker_init_fn": opening}
    found = ran(recipe(cache_exact=True), train=loader(Opened(), **data), valid=None)
    assert found.closed["train"].computed == 24
    assert same(found, ran(recipe(cache="off"), train=loader(Opened(), **data), valid=None))


def test_a_cache_that_does_not_pay_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading a sample takes longer than computing it, a line says so and the next epochs do without; not where a
    cache is required.
    """
    now = [0.0]
    kept, get = Way.kept, Store.get

    def computing(self: Way, batch: Any) -> Any:
        now[0] += 1.0
        return kept(self, batch)

    def reading(self: Store, slots: torch.Tensor) -> Any:
        now[0] += 9.0
        return get(self, slots)

    monkeypatch.setattr(Way, "kept", computing)
    monkeypatch.setattr(Store, "get", reading)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = ran(recipe(length="6 epochs", cache="auto"), valid=None)
    assert "does not pay" in found.notes
    assert found.closed["train"].read == 24
    assert ran(recipe(length="6 epochs"), valid=None).closed["train"].read == 5 * 24


def test_both_halves_have_features_of_their_own(tmp_path: Path) -> None:
    """Training and validation on as many samples do not get in each other's way in cache_dir."""
    found = ran(recipe(), valid=images(24, seed=5), cache_dir=tmp_path)
    assert "for this run alone" not in found.notes
    again = ran(recipe(), valid=images(24, seed=5), cache_dir=tmp_path)
    assert [again.closed[half].computed for half in ("train", "valid")] == [0, 0]
    assert again.losses == found.losses


def test_after_an_error_cache_dir_is_free(tmp_path: Path) -> None:
    """A run that has failed lets go of its features, though its error is still held."""

    calls = iter(range(100))

    def failing(model: Any, batch: Any) -> torch.Tensor:
        if not isinstance(model, nn.Module) and next(calls) > 6:
            raise ArithmeticError("in a later step")
        return functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ArithmeticError) as error:
        ran(recipe(), valid=None, cache_dir=tmp_path, loss=failing)
    assert "for this run alone" not in ran(recipe(), valid=None, cache_dir=tmp_path).notes
    assert error.value


def test_a_layout_that_came_is_kept() -> None:
    """Weights that a person has laid out channels-last stay so."""
    model = net().to(memory_format=torch.channels_last)
    ran(recipe(cache="off"), model=model, valid=None)
    assert model.blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.blocks[0][0].weight.is_contiguous()


def test_memory_is_given_back_while_a_cache_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each pass that fills it; a batch that is read only holds memory where it was. Nothing is kept while the
    model is looked at.
    """
    told: list[str] = []

    class Ceiling:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def allow(self) -> None:
            told.append("allowed")

        def hold(self) -> None:
            told.append("held")

    monkeypatch.setattr(shortcut, "Ceiling", Ceiling)
    monkeypatch.setattr(allocator, "_TUNED", ["as if"])  # also where there is no such allocator
    library = SimpleNamespace(malloc_trim=lambda _: None, mallopt=lambda *_: 1)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(
        allocator, "_set", lambda said: told.append("spared" if said is allocator._SPARING else "keeping")
    )
    ran(recipe(length="3 epochs"), valid=None)
    looking = told.index("spared")
    assert told[looking : looking + 2] == ["spared", "keeping"]
    assert told[looking + 2 :] == ["allowed"] * 2 * 3 + ["held"] * 2 * 3
