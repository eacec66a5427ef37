"""The short way on a GPU: features on the device or pinned beside it, in bf16, compiled; and no step that waits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.events import CacheClosed, EpochEnded, Event, PrefixCached
from lehr.run.cache import shortcut
from lehr.run.cache.store import Column, Place, Store
from lehr.run.sampler import feed
from short_runs import images, net
from waiting import no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _ran(cache: str, *, precision: str = "fp32", **said: Any) -> tuple[dict[str, torch.Tensor], list[Event]]:
    """Weights and events of a run of a head and then of all, in batches that divide the samples."""
    events: list[Event] = []
    stages = [
        lehr.Stage("4 epochs", train="head", lr=0.02, cache=cache),
        lehr.Stage("1 epoch", train="all", lr=0.002, cache="off"),
    ]
    recipe = lehr.Recipe(stages, batch_size=8, seed=3, optimizer="sgd", cache_exact=True)
    result = lehr.fit(
        net(), images(), images(9, seed=5), recipe=recipe, device="cuda", precision=precision,
        observers=[events.append], **said,
    )  # fmt: skip
    return {n: t.cpu() for n, t in result.model.state_dict().items()}, events


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("place", ["device", "pinned memory", "file"])
def test_the_short_way_on_cuda(
    place: Place, precision: str, within: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever its features lie, a run comes to what it comes to the long way; each sample is computed once."""
    monkeypatch.setattr(shortcut, "place_for", lambda *_: place)
    long, _ = _ran("off", precision=precision)
    short, events = _ran("require", precision=precision, out=tmp_path / "run")
    cached = {e.data: e for e in events if isinstance(e, PrefixCached)}
    closed = {e.data: e for e in events if isinstance(e, CacheClosed)}
    assert {e.place for e in cached.values()} == {place}
    assert (closed["train"].computed, closed["train"].read) == (24, 72)
    for name, tensor in long.items():
        torch.testing.assert_close(short[name], tensor, rtol=within, atol=within, msg=name)


@pytest.mark.parametrize("place", ["device", "pinned memory", "file"])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_reading_does_not_wait(place: Place, narrow: torch.dtype | None, tmp_path: Path) -> None:
    """Rows come back as they were put, in their layout, and nobody waits for the device."""
    features = torch.randn(12, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    targets = torch.arange(12, device="cuda")
    columns = [Column.like(features, narrow), Column.like(targets)]
    store = Store(columns, 12, place=place, device="cuda", folder=tmp_path)
    slots = torch.randperm(12)
    store.put(slots, [features, targets])
    wanted = slots[[3, 1, 7]]
    with no_waiting():
        read = store.get(wanted)
    expected = features[[3, 1, 7]]
    assert torch.equal(read[0], expected.to(narrow).float() if narrow else expected)
    assert read[0].is_contiguous(memory_format=torch.channels_last)
    assert read[1].tolist() == [3, 1, 7]


def test_a_step_of_a_cached_epoch_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second epoch on neither reading features nor the part that trains waits for the device."""
    epochs = 0
    guarded: list[str] = []
    get = Store.get

    def reading(store: Store, slots: torch.Tensor) -> list[torch.Tensor]:
        guarded.append("reading")
        with no_waiting():
            return get(store, slots)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with no_waiting() if epochs and model.training else nullcontext():
            guarded.append("training" if epochs else "first epoch")
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def look(event: Event) -> None:
        nonlocal epochs
        epochs += isinstance(event, EpochEnded)

    monkeypatch.setattr(Store, "get", reading)
    stage = lehr.Stage("3 epochs", train="head", lr=0.02, cache="require")
    recipe = lehr.Recipe([stage], batch_size=8, seed=3)
    lehr.fit(net(), images(), recipe=recipe, device="cuda", loss=loss, observers=[look])
    assert guarded.count("reading") == guarded.count("training") == 6


@pytest.mark.filterwarnings(
    "ignore:TensorFloat32", "ignore:`torch.jit"
)  # inductor advises it, and uses what is deprecated
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_on_cuda(precision: str) -> None:
    """A head from a cache and then all, compiled, comes close to the same run as it is written."""
    eager, _ = _ran("require", precision=precision)
    compiled, _ = _ran("require", precision=precision, compile=True)
    within = 1e-3 if precision == "fp32" else 3e-2
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=within, atol=within, msg=name)


def test_batches_of_tensors_are_gathered_where_a_gpu_fetches_them() -> None:
    """Without a copy between: what is gathered is pinned, and the same rows."""
    data = TensorDataset(torch.randn(44, 3, 8, 8), torch.arange(44))
    (batch,) = feed(data, seed=0, pin=True).batches_of([torch.tensor([5, 2, 43])], 0)
    assert all(tensor.is_pinned() for tensor in batch)
    assert torch.equal(batch[0], data.tensors[0][[5, 2, 43]])
    assert batch[1].tolist() == [5, 2, 43]
