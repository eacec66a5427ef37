"""Models and losses that do something besides what a cut model would do: each is trained as it is the long way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lehr
from lehr.run.batches import leaves
from lehr.run.cache.calling import calling
from short_runs import Net, close, images, net, ran, recipe, same


class LargeBatches(Net):
    """Does otherwise with more samples than a self-check looks at closely."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out * 2 if x.shape[0] > 6 else out


class ManySamples(Net):
    """Computes with the batch's size what a few samples do not show; torch.fx can follow it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + x.shape[0] // 6)


class Counted(Net):
    """Counts its samples by a tensor of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + (torch.ones_like(x[:, 0, 0, 0]).sum() > 6).float())


class Strided(Net):
    """Takes a size of every fourth sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x[::4].shape[0]


class MaxNorm(Net):
    """Keeps its head's weights small, as a part of its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fc.weight.data = torch.renorm(self.fc.weight.data, 2, 0, 0.1)
        return super().forward(x)


class Annealed(Net):
    """Its temperature falls with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.temperature *= 0.9
        return super().forward(x) / self.temperature


class Centred(Net):
    """Puts another buffer in the place of its own in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x) - self.centre
        self.centre = 0.9 * self.centre + 0.1 * out.detach().mean(0)
        return out


@pytest.mark.parametrize("make", [LargeBatches, ManySamples, Counted, Strided, MaxNorm, Annealed, Centred])
def test_what_only_the_whole_model_does(make: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that its batch's size or its own forward pass changes is trained as without a cache, to the bit, and a line
    says why.
    """
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    found = ran(recipe(cache="auto"), model=net(make), valid=None)
    assert same(found, ran(recipe(cache="off"), model=net(make), valid=None))
    assert "trained without a cache" in found.notes


class Sparse(Net):
    """Mixes its channels by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixed", torch.eye(3).to_sparse(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.mixed, super().forward(x).t()).t()


def test_sparse_buffers_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a sparse buffer is trained as without a cache, and a line says why."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    found = ran(recipe(cache="auto"), model=net(Sparse), valid=None)
    assert same(found, ran(recipe(cache="off"), model=net(Sparse), valid=None))
    assert "a sparse tensor of shape (3, 3)" in found.notes


class Twice(Net):
    """The same dropout between frozen layers and before the head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.blocks[0](x))
        return self.fc(self.drop(self.blocks[1](hidden).mean((2, 3))))


def test_a_dropout_that_is_used_twice_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout before the head is not switched off because it stands between frozen layers, too."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    said = {"cache_exact": True}
    found = ran(recipe(cache="auto", **said), model=net(Twice), valid=None)
    assert same(found, ran(recipe(cache="off"), model=net(Twice), valid=None))


def test_a_hook_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a part that is made of parts is called as often as without a cache."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    calls: dict[str, int] = {}
    for cache in ("auto", "off"):
        model = net()
        model.register_forward_hook(lambda *_, cache=cache: calls.update({cache: calls.get(cache, 0) + 1}))
        ran(recipe(cache=cache), model=model, valid=None)
    assert calls["auto"] >= calls["off"] > 0


def setting(model: Any, batch: Any) -> torch.Tensor:
    """Tells the model something before it calls it."""
    model.scale = 2.0
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_a_compiled_loss_is_compiled() -> None:
    """Nothing that looks at the model keeps the person's loss function from being compiled, which one may insist on."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs, targets)

    found = ran(recipe(), valid=None, loss=lambda model, batch: criterion(model(batch[0]), batch[1]))
    assert graphs
    assert found.cached["train"].rows == 24


def test_a_loss_that_changes_the_weights_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did when it was looked at is undone, and the stage goes on without a cache."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)

    def shrinking(model: Any, batch: Any) -> torch.Tensor:
        model.blocks[0][0].weight.data.mul_(0.9)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def last(kind: str) -> Any:
        model = net()
        with pytest.raises(lehr.RunError, match="changed"):  # frozen means unchanged
            ran(recipe(cache=kind, length="1 epoch"), valid=None, loss=shrinking, model=model)
        return model.blocks[0][0].weight

    assert torch.equal(last("auto"), last("off"))


def test_a_loss_that_sets_something_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss function sets of its model reaches the model."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    found = ran(recipe(cache="auto"), valid=None, loss=setting)
    assert same(found, ran(recipe(cache="off"), valid=None, loss=setting))
    assert "sets 'scale'" in found.notes


class Sizes(Dataset[Any]):
    """Images of another size in each batch of eight."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        side = 6 + index // 8
        return images().tensors[0][index].repeat(1, 2, 2)[:, :side, :side], images().tensors[1][index]


def test_batches_of_other_shapes() -> None:
    """Where samples of another shape come, the run goes on the long way and does not end."""
    data = DataLoader(Sizes(), batch_size=8)
    said = {"optimizer": "sgd"}
    found = ran(recipe(cache="auto", **said), train=data, valid=None)
    assert close(found, ran(recipe(cache="off", **said), train=DataLoader(Sizes(), batch_size=8), valid=None))


def test_batches_of_other_shapes_after_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where a prefix was found with the first batch."""
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    said = {"optimizer": "sgd", "cache_exact": True}
    found = ran(recipe(cache="auto", **said), train=DataLoader(Sizes(), batch_size=8), valid=None)
    assert found.cached
    assert "another shape" in found.notes
    assert close(found, ran(recipe(cache="off", **said), train=DataLoader(Sizes(), batch_size=8), valid=None))


def test_another_activation_finds_no_old_features(tmp_path: Path) -> None:
    """Features in cache_dir are those of a network with the same operations, not only the same weights."""
    for activation in (nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.5)):
        model = net()
        model.blocks[0][2] = activation
        found = ran(recipe(cache_exact=True), model=model, valid=None, cache_dir=tmp_path)
        assert found.closed["train"].computed == 24


RARE = 7  # the class of one sample, which counts as 1


def _marked() -> TensorDataset:
    inputs, targets = images().tensors
    targets[17] = RARE
    return TensorDataset(inputs, targets)


def _weighed(model: nn.Module, batch: Any) -> torch.Tensor:
    """Samples of strong contrast count more; NaN would compare as false, and nothing be noticed."""
    each = functional.cross_entropy(model(batch[0]), batch[1] % 3, reduction="none")
    return (each * (1 + 5 * (batch[0].std((1, 2, 3)) > 1.05))).mean()


def _of_one(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of one sample reads its input."""
    out = model(batch[0])
    loss = functional.cross_entropy(out, batch[1] % 3)
    rare = batch[1] == RARE
    return loss + (out[rare].sum() - batch[0][rare].sum()).square() / 100 if rare.any() else loss


def _wider(model: nn.Module, batch: Any) -> torch.Tensor:
    """The inputs are of another type in one batch."""
    inputs = batch[0].to(torch.float64 if (batch[1] == RARE).any() else torch.float32)
    return functional.cross_entropy(
        model(inputs.float() if inputs.dtype is torch.float64 else inputs), batch[1] % 3
    )


def _twice(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model is called once more for one of the samples."""
    loss = functional.cross_entropy(model(batch[0]), batch[1] % 3)
    return loss + model(batch[0]).square().mean() if (batch[1] == RARE).any() else loss


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (_weighed, "reads the model's inputs itself"),
        (_of_one, "reads the model's inputs itself"),
        (_wider, "inputs"),  # it reads them, or changes them where the first batch shows it
        (_twice, "calls the model more than once"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_does_otherwise_for_some_samples(
    loss: Any, says: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed in the batch in which it does, which is made anew, with the same dropout and with statistics that have moved
    once; the run comes to what it comes to without a cache.
    """
    monkeypatch.setattr("lehr.run.cache.ways.LEAST_WORK", 0.0)
    said = {"seed": seed, "cache_exact": True}
    given = {"train": _marked(), "valid": None, "loss": loss}
    found = ran(recipe(["head", "blocks.1"], cache="auto", **said), **given)
    assert same(found, ran(recipe(["head", "blocks.1"], cache="off", **said), **given))
    assert says in found.notes


def test_nothing_of_the_first_batch_is_held() -> None:
    """What is known of a call are the arguments that no batch gives: the samples looked at first are not in memory for the stage."""
    batch = (torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.long))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0], None, more={"scale": 2.0}), batch[1])

    found = calling(net(), loss, batch)
    assert found.own == [None, 2.0]
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves((found.form, found.arguments)))
    call = found.call(batch)
    assert call.args[0] is batch[0]
    assert (call.args[1:], call.kwargs) == ((None,), {"more": {"scale": 2.0}})


def test_what_needs_no_values_of_the_inputs_may_be_asked() -> None:
    """Shape, type and device of the inputs, and their way to where they are already."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x = batch[0].to("cpu")
        assert x.ndim == 4
        scale = torch.ones(len(x), dtype=x.dtype, device=x.device).mean() * x.shape[0] / x.size(0)
        return scale * functional.cross_entropy(model(x), batch[1])

    assert same(*(ran(recipe(cache=c, cache_exact=True), valid=None, loss=loss) for c in ("require", "off")))
